"""The node's containerd, and how images get into it without a registry.

Its root stays in the cache, so what was imported once is there when the next node comes up. Of an image of the docker
daemon only the layers travel that containerd lacks: after a change of code that is the small one on top.
"""

import fcntl
import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.layers import Layers
from tests.cluster.processes import Program
from tests.cluster.sandbox import Sandbox
from tools.binaries import PAUSE, program
from tools.docker import Docker
from tools.golang import Unavailable

SOCKET = "/run/containerd/containerd.sock"
PAUSE_IMAGE = f"docker.io/latentac/pause:{PAUSE}"
_CHUNK = 2**20
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}

_SETTINGS = """\
version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing"]

[grpc]
address = "{socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{network}"
"""


class Containerd:
    """In `sandbox`, with its content below `root`; network: the folder of CNI's configuration, plugins: of CNI's."""

    def __init__(self, sandbox: Sandbox, root: Path, network: Path, plugins: Path) -> None:
        self.sandbox, self.root, self.network, self.plugins = sandbox, root, network, plugins
        self.program: Program

    def start(self) -> None:
        """Returns when pods can be started. Raises Unavailable."""
        settings = self.sandbox.folder / "containerd.toml"
        layered = subprocess.run(["stat", "-f", "-c", "%T", self.root], capture_output=True, text=True).stdout
        values = {
            "root": self.root,
            "socket": SOCKET,
            "pause": PAUSE_IMAGE,
            "snapshotter": "native" if "overlay" in layered else "overlayfs",  # overlay on overlay is refused
            "plugins": self.plugins,
            "network": self.network,
        }
        settings.write_text(_SETTINGS.format(**values))
        self.program = self._launch(settings)
        left = self.ctr("containers", "list", "--quiet").split()
        if left:  # of a node before: its processes are gone, the kubelet would puzzle over the rest
            self.ctr("containers", "delete", *left)
            self.sandbox.kill(self.program)
            self.program = self._launch(settings)
        held = self.ctr("leases", "list", "--quiet").split()
        if held:  # of imports that were killed: for a day they keep from being cleared what nobody names
            self.ctr("leases", "delete", *held)
        self.add(PAUSE_IMAGE, program("pause"))

    def ctr(self, *arguments: str) -> str:
        """stdout of containerd's own client. Raises Unavailable."""
        return self.sandbox.run("ctr", "--address", SOCKET, "--namespace", "k8s.io", *arguments)

    def images(self) -> dict[str, set[str]]:
        """Full name -> digests that say which image it is: of its manifest and of its configuration."""
        found = {}
        for line in self.ctr("images", "list").splitlines()[1:]:
            name, _, digest = line.split()[:3]
            manifest = json.loads(self.ctr("content", "get", digest))
            found[name] = {digest, manifest.get("config", {}).get("digest", digest)}
        return found

    def load(self, names: Iterable[str], docker: Docker) -> list[str]:
        """Images of the docker daemon into containerd. Returns the names that moved; the others were there already.

        Raises Unavailable.
        """
        with (self.root.parent / "load.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            have = self.images()
            wanted = {name: docker.image(name) for name in names}
            lacking = {name: image for name, image in wanted.items() if image not in have.get(full_name(name), ())}
            layers = Layers.of(docker) if lacking else None
            if layers:
                self._copy(layers, lacking)
            elif lacking:
                self._transfer(docker, lacking)
            if lacking:
                self._forget_replaced()
        return list(lacking)

    def _copy(self, source: Layers, images: Mapping[str, str]) -> None:
        """Only the layers that are not here, straight from the daemon's folder; images: id by name."""
        sizes: dict[str, int] = {}
        with self._import() as archive:
            for name, image in images.items():
                config = source.config(image)
                stack = json.loads(config)["rootfs"]["diff_ids"]
                for above, digest in enumerate(stack, 1):
                    if digest in sizes:
                        continue
                    blob = self._blobs / digest.removeprefix("sha256:")
                    sizes[digest] = blob.stat().st_size if blob.exists() else source.size(stack[:above])
                    if not blob.exists():
                        found = archive.add(digest, sizes[digest], source.read(stack[:above]))
                        if found != digest:
                            raise Unavailable(f"{name}: layer {digest} reads as {found} below {source.root}")
                archive.describe([name], config, sizes)
            archive.add_index()

    def _transfer(self, docker: Docker, names: Iterable[str]) -> None:
        """All layers, as the daemon sends them."""
        with tempfile.TemporaryFile() as errors:
            command = ["docker", "--host", docker.host, "save", *names]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as save:
                done = subprocess.run(self._importer, stdin=save.stdout, stdout=subprocess.DEVNULL, stderr=errors)
            errors.seek(0)
            if save.returncode or done.returncode:
                raise Unavailable(f"{' '.join(command)} | ctr images import:\n{errors.read().decode(errors='replace')}")

    def _forget_replaced(self) -> None:
        """The kubelet's interface keeps each image by its digest as well, also when its name has moved on."""
        have = self.images()
        named = {digest for name, digests in have.items() if "/" in name for digest in digests}
        replaced = [name for name in have if name.startswith("sha256:") and name not in named]
        if replaced:
            self.ctr("images", "delete", *replaced)

    def _launch(self, settings: Path) -> Program:
        log = self.sandbox.folder / "containerd.log"
        began = log.stat().st_size if log.exists() else 0
        started = Program("containerd", self.sandbox.inside("containerd", "--config", settings), log.parent)
        started.wait(lambda: b"Start streaming server" in log.read_bytes()[began:])  # a kubelet before that exits
        return started

    @property
    def _blobs(self) -> Path:
        return self.root / "io.containerd.content.v1.content" / "blobs" / "sha256"

    def add(self, name: str, binary: Path, user: int = 65532) -> None:
        """An image `name` that is one static program and nothing else; nothing if there is one of that name."""
        if full_name(name) in self.images():
            return
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as files:
            content = binary.read_bytes()
            entry = tarfile.TarInfo("program")
            entry.size, entry.mode = len(content), 0o755
            files.addfile(entry, io.BytesIO(content))
        digest = f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"
        config = {
            "architecture": _MACHINES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": ["/program"], "User": f"{user}:{user}"},
            "rootfs": {"type": "layers", "diff_ids": [digest]},
        }
        with self._import() as archive:
            archive.add_bytes("layer", layer.getvalue())
            archive.describe([name], json.dumps(config).encode(), {digest: len(layer.getvalue())})
            archive.add_index()

    @property
    def _importer(self) -> list[str]:
        client = ["ctr", "--address", SOCKET, "--namespace", "k8s.io"]
        return self.sandbox.inside(*client, "images", "import", "-", processes=False)

    def _import(self) -> "Archive":
        return Archive(self._importer)


class Archive:
    """An OCI image archive that is written straight into the program that reads it. A context manager."""

    def __init__(self, reader: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as the tar below: see __exit__
        self._reader = subprocess.Popen(reader, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors)
        assert self._reader.stdin is not None
        self._tar = tarfile.open(fileobj=self._reader.stdin, mode="w|", bufsize=_CHUNK)  # noqa: SIM115
        self._tar.copybufsize = _CHUNK  # type: ignore[attr-defined]
        self._manifests: list[dict[str, Any]] = []

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        assert self._reader.stdin is not None
        if kind:
            self._reader.kill()
        else:
            try:
                self._tar.close()
                self._reader.stdin.close()
            except BrokenPipeError:
                pass  # it says why
        code = self._reader.wait()
        with self._errors:
            self._errors.seek(0)
            if code and not kind:
                raise Unavailable(f"ctr images import ended with {code}: {self._errors.read().decode()}")

    def add(self, name: str, size: int, content: Iterable[bytes]) -> str:
        """One blob, by whatever name. Returns its digest, by which containerd keeps it."""
        entry = tarfile.TarInfo(name)
        entry.size = size
        stream = _Hashing(content)
        self._tar.addfile(entry, stream)  # type: ignore[arg-type]  # it only reads
        return f"sha256:{stream.hash.hexdigest()}"

    def add_bytes(self, name: str, content: bytes) -> str:
        return self.add(name, len(content), [content])

    def describe(self, names: Iterable[str], config: bytes, layers: Mapping[str, int]) -> None:
        """An image's configuration and manifest; layers: size of each layer by its digest, in the archive or not."""
        digest = self.add_bytes(f"config-{len(self._manifests)}", config)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": _CONFIG, "digest": digest, "size": len(config)},
            "layers": [
                {"mediaType": _LAYER, "digest": layer, "size": layers[layer]}
                for layer in json.loads(config)["rootfs"]["diff_ids"]
            ],
        }
        text = json.dumps(manifest).encode()
        described = {"mediaType": _MANIFEST, "digest": self.add_bytes(f"manifest-{digest}", text), "size": len(text)}
        for name in names:
            self._manifests.append({**described, "annotations": {"io.containerd.image.name": full_name(name)}})

    def add_index(self) -> None:
        index = {"schemaVersion": 2, "manifests": self._manifests}
        self.add_bytes("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        self.add_bytes("index.json", json.dumps(index).encode())


class _Hashing:
    """A file to read from that hashes what passes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._rest = iter(chunks), b""
        self.hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self.hash.update(chunk)
            self._rest += chunk
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def full_name(name: str) -> str:
    """As containerd and the kubelet call an image: with its registry and tag."""
    registry, slash, rest = name.partition("/")
    if not slash:
        name = f"docker.io/library/{name}"
    elif not ("." in registry or ":" in registry or registry == "localhost"):
        name = f"docker.io/{registry}/{rest}"
    return name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"
