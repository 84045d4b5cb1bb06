"""Build the images with docker: `make images`, which says what can be set.

The daemon is that of tests/docker.py. The base is `BASE`; without it the Dockerfiles' own default where a registry can
be reached or has been, else a Debian made here by debootstrap. Names, ids and sizes go to build/images/images.json.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.errors import ImageNotFound

from latentac import __version__
from tests import minio
from tests.docker import Docker, daemon
from tests.golang import Unavailable, cache_folder, run

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "images"
NAMES = ("torch", "train", "serve", "pipeline", "minio")
ON_TORCH = {"train", "serve"}
PULL_SECONDS = 60
INPUTS = "latentac.inputs"
# Passed on by name, so that a mirror's password is in no command line.
SETTINGS = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "TORCH_BACKEND", "TORCH_SHA256", "SOURCE")


def default_base() -> str:
    """What the Dockerfiles say; all say the same."""
    first, *_ = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "images/torch.Dockerfile").read_text(), re.MULTILINE)
    return str(first)


def find_base(docker: Docker, client: DockerClient, prefix: str) -> str:
    """The Python base: the public one if it is here or can be pulled, else one made by base.sh. Raises Unavailable."""
    public = default_base()
    authorities = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    recipe = (ROOT / "images/base.sh").read_bytes() + (authorities.read_bytes() if authorities.exists() else b"")
    key = hashlib.sha256(recipe).hexdigest()[:12]
    made = f"{prefix}/base:{key}"
    for name in (public, made):
        with contextlib.suppress(ImageNotFound):
            client.images.get(name)
            return name
    if _pulled(docker, public):
        return public
    archive = cache_folder().parent / f"base-{key}.tar"
    if not archive.exists():
        print(f"no image registry answers: making {made} with debootstrap (minutes, once)", flush=True)
        run(["bash", "images/base.sh", str(archive)], ROOT)
    run(["docker", "import", str(archive), made], ROOT, **docker.environment)
    return made


def _pulled(docker: Docker, name: str) -> bool:
    command = ["docker", "pull", "--quiet", name]
    environment = {**os.environ, **docker.environment}
    try:
        return not subprocess.run(command, env=environment, capture_output=True, timeout=PULL_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return False


def build(
    docker: Docker, client: DockerClient, name: str, arguments: dict[str, str], reference: str, *options: str
) -> None:
    """Build one image. Raises Unavailable if that fails; what docker said has been printed."""
    command = ["docker", "build", "--file", f"images/{name}.Dockerfile", "--tag", reference, *network(client), *options]
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
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
    """The git commit; a tree with changes is told by `-dirty`."""
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
        "revision": (image.attrs["Config"].get("Labels") or {}).get("org.opencontainers.image.revision", ""),
        "layers": image.attrs["RootFS"]["Layers"],
    }


def make_torch(docker: Docker, client: DockerClient, base: str, reference: str) -> None:
    """Build the torch layer unless it is there for the same lock, base and backend: docker alone would need a minute
    to see that. Raises Unavailable."""
    hashed = hashlib.sha256(str(client.images.get(base).id).encode())
    for name in ("images/torch.Dockerfile", "images/install-torch.sh", "requirements/images/torch.lock"):
        hashed.update((ROOT / name).read_bytes())
    for key in ("TORCH_BACKEND", "TORCH_SHA256"):
        hashed.update(f"{key}={os.environ.get(key, '')};".encode())
    inputs = hashed.hexdigest()
    with contextlib.suppress(ImageNotFound):
        if client.images.get(reference).labels.get(INPUTS) == inputs:
            print(f"{reference} is there for this lock and base", flush=True)
            return
    build(docker, client, "torch", {"BASE": base}, reference, "--label", f"{INPUTS}={inputs}")
    client.images.prune(filters={"dangling": True, "label": "latentac.stage=torch"})


def tidy(client: DockerClient, torch: str) -> None:
    """Remove untagged images on an older torch layer, 5 GB each. Those of the layer at hand are docker's cache."""
    with contextlib.suppress(ImageNotFound):
        inputs = client.images.get(torch).labels.get(INPUTS)
        client.images.prune(filters={"dangling": True, "label": INPUTS, "label!": f"{INPUTS}={inputs}"})


def wanted(names: Sequence[str]) -> list[str]:
    """In building order; the torch layer is among them if one stands on it, unless TORCH_IMAGE names another.

    Raises Unavailable.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise Unavailable(f"IMAGES names {', '.join(unknown)}; there are {', '.join(NAMES)}")
    chosen = set(names)
    if ON_TORCH & chosen and not os.environ.get("TORCH_IMAGE"):
        chosen.add("torch")
    return [name for name in NAMES if name in chosen]


def make(docker: Docker, client: DockerClient, names: Sequence[str], prefix: str, tag: str, base: str) -> None:
    """Build the images and write the list of them."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    base = base or find_base(docker, client, prefix)
    print(f"base: {base}", flush=True)
    run(["docker", "tag", base, f"{prefix}/base:{tag}"], ROOT, **docker.environment)
    commit = revision()
    torch = os.environ.get("TORCH_IMAGE") or f"{prefix}/torch:{tag}"
    for name in names:
        arguments = {"BASE": base}
        if name == "torch":
            make_torch(docker, client, base, torch)
            continue
        if name in ON_TORCH:
            arguments["TORCH_IMAGE"] = torch
        if name == "minio":
            (OUTPUT / "minio").mkdir(exist_ok=True)
            shutil.copy2(minio.binary(), OUTPUT / "minio" / "minio")
            arguments |= {"VERSION": minio.RELEASE, "REVISION": minio.RELEASE.rpartition("-")[2]}
        else:
            arguments |= {"VERSION": __version__, "REVISION": commit}
        build(docker, client, name, arguments, f"{prefix}/{name}:{tag}")
    tidy(client, torch)
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
