"""Build the images with docker: `make images`, which says what can be set.

The daemon is that of tools/docker.py. The base is `BASE`; without it the Dockerfiles' own default where a registry can
be reached or has been, else a Debian made here by debootstrap. What comes from a registry is used by its digest. Names,
ids, bases and sizes go to build/images/images.json.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.errors import ImageNotFound

from latentac import __version__
from tools import minio
from tools.docker import Docker, daemon
from tools.golang import Unavailable, cache_folder, run

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "images"
NAMES = ("torch", "train", "serve", "pipeline", "minio")
ON_TORCH = {"train", "serve"}
PULL_SECONDS = 60
INPUTS = "latentac.inputs"
BACKEND = "latentac.torch-backend"
OCI = "org.opencontainers.image."
# Passed on by name, so that a mirror's password is in no command line.
SETTINGS = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "TORCH_BACKEND", "TORCH_SHA256", "SOURCE")


@dataclass(frozen=True)
class Base:
    """An image that others stand on. name: as it was asked for; digest: sha256:..., "" where no registry knows it."""

    name: str
    digest: str

    @property
    def reference(self) -> str:
        """What a Dockerfile builds on: what was asked for, of exactly that content."""
        return f"{repository(self.name)}@{self.digest}" if self.digest else self.name

    @property
    def labels(self) -> dict[str, str]:
        """The OCI's labels of an image that stands on it. Without a digest it is empty, not left out: the base may have
        a label of its own, which would be inherited."""
        return {f"{OCI}base.name": self.name, f"{OCI}base.digest": self.digest}

    def __str__(self) -> str:
        return self.reference if self.digest else f"{self.name}, without a digest: it comes from no registry"


def repository(name: str) -> str:
    """An image's name without tag and digest; a colon before the last slash is that of a registry's port."""
    head, slash, last = name.partition("@")[0].rpartition("/")
    return head + slash + last.partition(":")[0]


def pinned(docker: Docker, client: DockerClient, name: str) -> Base:
    """The base of that name, pulled unless it is here, by the digest that its registry gave it. Raises Unavailable."""
    try:
        image = client.images.get(name)
    except ImageNotFound:
        if subprocess.run(["docker", "pull", name], env={**os.environ, **docker.environment}).returncode:
            raise Unavailable(
                f"there is no image {name} here, and no registry gave it: see above. Correct its name (BASE, "
                "TORCH_IMAGE), or `docker login` where the registry wants to know who asks."
            ) from None
        image = client.images.get(name)
    plain, _, named = name.partition("@")
    if named:
        return Base(plain, named)
    # The daemon shortens the names of Docker's own registry, and other registries may have had the same image.
    short = repository(name).removeprefix("docker.io/").removeprefix("library/")
    known = dict(each.split("@") for each in image.attrs.get("RepoDigests") or [])
    return Base(name, known.get(short, ""))


def default_base() -> str:
    """What the Dockerfiles say; all say the same."""
    first, *_ = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "images/torch.Dockerfile").read_text(), re.MULTILINE)
    return str(first)


def find_base(docker: Docker, client: DockerClient, prefix: str) -> Base:
    """The Python base: the public one if it is here or can be pulled, else one made by base.sh. Raises Unavailable."""
    public = default_base()
    authorities = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    recipe = (ROOT / "images/base.sh").read_bytes() + (authorities.read_bytes() if authorities.exists() else b"")
    key = hashlib.sha256(recipe).hexdigest()[:12]
    made = f"{prefix}/base:{key}"
    for name in (public, made):
        with contextlib.suppress(ImageNotFound):
            client.images.get(name)
            return pinned(docker, client, name)
    if _pulled(docker, public):
        return pinned(docker, client, public)
    archive = cache_folder().parent / f"base-{key}.tar"
    if not archive.exists():
        print(f"no image registry answers: making {made} with debootstrap (minutes, once)", flush=True)
        run(["bash", "images/base.sh", str(archive)], ROOT)
    run(["docker", "import", str(archive), made], ROOT, **docker.environment)
    return pinned(docker, client, made)


def _pulled(docker: Docker, name: str) -> bool:
    command = ["docker", "pull", "--quiet", name]
    environment = {**os.environ, **docker.environment}
    try:
        return not subprocess.run(command, env=environment, capture_output=True, timeout=PULL_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return False


def build(
    docker: Docker,
    client: DockerClient,
    name: str,
    arguments: Mapping[str, str],
    reference: str,
    labels: Mapping[str, str],
) -> None:
    """Build one image. Raises Unavailable if that fails; what docker said has been printed."""
    command = ["docker", "build", "--file", f"images/{name}.Dockerfile", "--tag", reference, *network(client)]
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    for key, value in labels.items():
        command += ["--label", f"{key}={value}"]
    text = (ROOT / f"images/{name}.Dockerfile").read_text()
    for key in SETTINGS:
        if os.environ.get(key) and f"ARG {key}" in text:
            command += ["--build-arg", key]
    started = time.monotonic()
    print(f"building {reference}", flush=True)
    context = OUTPUT / "minio" if name == "minio" else ROOT
    done = subprocess.run([*command, str(context)], cwd=ROOT, env={**os.environ, **docker.environment})
    if done.returncode:
        raise Unavailable(f"docker build of {reference} ended with {done.returncode}: see above")
    print(f"built {reference} in {time.monotonic() - started:.0f} s", flush=True)


def network(client: DockerClient) -> list[str]:
    """Options of `docker build` where the daemon has no bridge, as ours: the build reaches the network as the host."""
    return [] if client.networks.list(names=["bridge"]) else ["--network", "host"]


def revision() -> str:
    """The git commit; a tree with changes has `-dirty` at its end."""
    try:
        return run(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], ROOT).strip()
    except (Unavailable, OSError):
        return "unknown"


def describe(client: DockerClient, reference: str) -> dict[str, Any]:
    """What a chart or a person needs to pin the image. digests: only of what was pulled or pushed."""
    image = client.images.get(reference)
    return {
        "reference": reference,
        "id": image.id,
        "bytes": image.attrs["Size"],
        "digests": image.attrs.get("RepoDigests") or [],
        "revision": image.labels.get(f"{OCI}revision", ""),
        "base": {key: image.labels.get(f"{OCI}base.{key}", "") for key in ("name", "digest")},
        "layers": image.attrs["RootFS"]["Layers"],
    }


def make_torch(docker: Docker, client: DockerClient, base: Base, reference: str) -> None:
    """Build the torch layer unless it is there for the same lock, base and backend: docker alone would need a minute
    to see that. Raises Unavailable."""
    hashed = hashlib.sha256(f"{client.images.get(base.reference).id}{base}".encode())
    for name in ("images/torch.Dockerfile", "images/install-torch.sh", "requirements/images/torch.lock"):
        hashed.update((ROOT / name).read_bytes())
    for key in ("TORCH_BACKEND", "TORCH_SHA256"):
        hashed.update(f"{key}={os.environ.get(key, '')};".encode())
    inputs = hashed.hexdigest()
    with contextlib.suppress(ImageNotFound):
        if client.images.get(reference).labels.get(INPUTS) == inputs:
            print(f"{reference} is there for this lock and base", flush=True)
            return
    labels = {**base.labels, INPUTS: inputs, BACKEND: os.environ.get("TORCH_BACKEND") or "cuda"}
    build(docker, client, "torch", {"BASE": base.reference}, reference, labels)
    client.images.prune(filters={"dangling": True, "label": "latentac.stage=torch"})


def tidy(client: DockerClient, torch: str) -> None:
    """Remove untagged images on an older torch layer, 5 GB each. Those of the layer at hand are docker's cache."""
    with contextlib.suppress(ImageNotFound):
        inputs = client.images.get(torch).labels.get(INPUTS)
        client.images.prune(filters={"dangling": True, "label": INPUTS, "label!": f"{INPUTS}={inputs}"})


def wanted(names: Sequence[str]) -> list[str]:
    """In building order; the torch layer is among them if one stands on it, unless TORCH_IMAGE names one that was built
    before. Raises Unavailable."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise Unavailable(f"IMAGES names {', '.join(unknown)}; there are {', '.join(NAMES)}")
    chosen = set(names)
    if os.environ.get("TORCH_IMAGE"):
        chosen.discard("torch")
    elif ON_TORCH & chosen:
        chosen.add("torch")
    return [name for name in NAMES if name in chosen]


def make(docker: Docker, client: DockerClient, names: Sequence[str], prefix: str, tag: str, named: str) -> None:
    """Build the images on the base that is named, or else found, and write the list of them."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    base = pinned(docker, client, named) if named else find_base(docker, client, prefix)
    print(f"base: {base}", flush=True)
    run(["docker", "tag", base.reference, f"{prefix}/base:{tag}"], ROOT, **docker.environment)
    commit = revision()
    given = os.environ.get("TORCH_IMAGE")
    torch = pinned(docker, client, given) if given else Base(f"{prefix}/torch:{tag}", "")
    if given:
        print(f"torch layer: {torch}", flush=True)
    for name in names:
        arguments, labels = {"BASE": base.reference}, base.labels
        if name == "torch":
            make_torch(docker, client, base, torch.name)
            continue
        if name in ON_TORCH:
            arguments["TORCH_IMAGE"] = torch.reference
            labels = torch.labels if given else {}  # a layer made here hands its own base down
        if name == "minio":
            (OUTPUT / "minio").mkdir(exist_ok=True)
            shutil.copy2(minio.binary(), OUTPUT / "minio" / "minio")
            arguments |= {"VERSION": minio.RELEASE, "REVISION": minio.RELEASE.rpartition("-")[2]}
        else:
            arguments |= {"VERSION": __version__, "REVISION": commit}
        build(docker, client, name, arguments, f"{prefix}/{name}:{tag}", labels)
    tidy(client, torch.reference)
    listing = OUTPUT / "images.json"
    content = json.loads(listing.read_text()) if listing.exists() else {}
    content |= {name: describe(client, f"{prefix}/{name}:{tag}") for name in names}
    listing.write_text(json.dumps(content, indent=2) + "\n")
    for name in names:
        print(f"{content[name]['reference']:<32} {content[name]['id']} {content[name]['bytes'] / 1e6:8.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m images.build", description="build the images with docker")
    parser.add_argument("names", nargs="*", metavar="image", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--base", default="", help="image with Python 3.11 to 3.13 that all stand on")
    parser.add_argument("--prefix", default="latentac", help="before each name (default: %(default)s)")
    parser.add_argument("--tag", default="dev", help="of each image (default: %(default)s)")
    options = parser.parse_args()
    try:
        with daemon() as docker, contextlib.closing(docker.client()) as client:
            make(docker, client, wanted(options.names or NAMES), options.prefix, options.tag, options.base)
    except Unavailable as error:
        sys.exit(f"make images: {error}")


if __name__ == "__main__":
    main()
