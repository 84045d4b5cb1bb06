"""Write a CycloneDX bill of materials of each image: `make sbom`.

Python packages with licences by cyclonedx-py, run on the environment inside the image; Debian packages from dpkg; the
Go modules of MinIO from the program itself. Image id and revision are in the metadata.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.errors import ImageNotFound, NotFound

from images.build import NAMES, ROOT, SETTINGS, network
from tools import minio
from tools.docker import Docker, daemon
from tools.golang import Unavailable, go, run

OUTPUT = ROOT / "build" / "sbom"
REVISION = "org.opencontainers.image.revision"


def write(docker: Docker, client: DockerClient, name: str, prefix: str, tag: str) -> Path:
    """The bill of one image, in OUTPUT. Raises Unavailable."""
    reference, scan = f"{prefix}/{name}:{tag}", f"{prefix}/sbom-{name}:{tag}"
    try:
        image = client.images.get(reference)
    except ImageNotFound:
        raise Unavailable(f"there is no image {reference}: `make images IMAGES={name}` builds it") from None
    command = ["docker", "build", "-q", "-f", "images/sbom.Dockerfile", "-t", scan, *network(client)]
    command += ["--build-arg", f"BASE={prefix}/base:{tag}", "--build-arg", f"IMAGE={reference}"]
    command += [part for key in SETTINGS[:1] if os.environ.get(key) for part in ("--build-arg", key)]
    run([*command, "."], ROOT, **docker.environment)
    found = _read(client, scan, "python.json", "debian.tsv")
    client.images.remove(scan)
    bill = json.loads(found.get("python.json") or '{"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}')
    components = bill.setdefault("components", [])
    components += _debian(found["debian.tsv"])
    if name == "minio":
        components += _modules(run([go(), "version", "-m", str(minio.binary())], ROOT))
    labels = image.attrs["Config"].get("Labels") or {}
    bill.setdefault("metadata", {})["component"] = {
        "type": "container",
        "bom-ref": "image",
        "name": reference.rpartition(":")[0],
        "version": labels.get("org.opencontainers.image.version", tag),
        "properties": [
            {"name": "latentac:image-id", "value": image.id},
            {"name": "latentac:revision", "value": labels.get(REVISION, "")},
        ],
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.cdx.json"
    path.write_text(json.dumps(bill, indent=2) + "\n")
    return path


def _read(client: DockerClient, image: str, *names: str) -> dict[str, str]:
    """The text of those files of the image's root that are there."""
    container = client.containers.create(image)
    found = {}
    try:
        for name in names:
            with contextlib.suppress(NotFound):
                stream = io.BytesIO(b"".join(container.get_archive(f"/{name}")[0]))
                with tarfile.open(fileobj=stream) as archive:
                    member = archive.extractfile(name)
                    found[name] = member.read().decode() if member else ""
    finally:
        container.remove()
    return found


def _debian(listing: str) -> Iterable[dict[str, Any]]:
    for line in listing.splitlines():
        name, version, architecture = line.split("\t")
        quoted = version.replace("+", "%2B").replace(":", "%3A").replace("~", "~")
        address = f"pkg:deb/debian/{name}@{quoted}?arch={architecture}"
        yield {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}


def _modules(output: str) -> Iterable[dict[str, Any]]:
    for line in output.splitlines():
        fields = line.split()
        if fields[:1] in (["mod"], ["dep"]):
            address = f"pkg:golang/{fields[1]}@{fields[2]}"
            yield {"type": "library", "bom-ref": address, "name": fields[1], "version": fields[2], "purl": address}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m images.sbom", description="bills of materials of the images")
    parser.add_argument("names", nargs="*", metavar="image", help=f"of {', '.join(NAMES)} (default: all but torch)")
    parser.add_argument("--prefix", default="latentac", help="before each name (default: %(default)s)")
    parser.add_argument("--tag", default="dev", help="of each image (default: %(default)s)")
    options = parser.parse_args()
    try:
        with daemon() as docker, contextlib.closing(docker.client()) as client:
            for name in options.names or [name for name in NAMES if name != "torch"]:
                path = write(docker, client, name, options.prefix, options.tag)
                print(f"{path.relative_to(ROOT)}: {len(json.loads(path.read_text())['components'])} components")
    except (Unavailable, subprocess.SubprocessError) as error:
        sys.exit(f"make sbom: {error}")


if __name__ == "__main__":
    main()
