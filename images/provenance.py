"""Where an image comes from, as SLSA's provenance of version 1 (https://slsa.dev/provenance/v1).

It says nothing that the image's own labels and the commit's files do not say: commit, base, locks. The tree is the
commit's, and the image is of that commit; images/publish.py makes sure of both.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any

from images.build import BACKEND, OCI, ON_TORCH, ROOT, revision
from tools import minio

# One job of a CI, by the variables that the common ones set.
JOB = ("CI_JOB_URL", "BUILD_URL", "BUILDKITE_BUILD_URL")


def provenance(name: str, labels: Mapping[str, str], builder: str = "") -> dict[str, Any]:
    """The predicate of the image `name` with those labels. builder: the address that names the platform it was built
    on; without one, a machine of somebody who ran `make`."""
    source = f"git+{_source()}"
    commit = {"uri": source, "digest": {"gitCommit": revision()}}
    dockerfile = f"images/{name}.Dockerfile"
    parameters = {"source": commit, "dockerfile": dockerfile, "target": f"make images IMAGES={name}"}
    if BACKEND in labels:
        parameters["torchBackend"] = labels[BACKEND]
    return {
        "buildDefinition": {
            "buildType": f"{_source()}/tree/main/images#images",
            "externalParameters": parameters,
            "internalParameters": {},
            "resolvedDependencies": [commit, *_base(labels), *_locks(name), *_modules(name)],
        },
        "runDetails": {
            "builder": {"id": builder or f"{_source()}/tree/main/images#a-machine-of-somebody"},
            "metadata": {"invocationId": invocation()},
        },
    }


def invocation() -> str:
    """The address of the CI's job, or a name of this run alone."""
    hub = [os.environ.get(f"GITHUB_{part}", "") for part in ("SERVER_URL", "REPOSITORY", "RUN_ID")]
    if all(hub):
        return f"{hub[0]}/{hub[1]}/actions/runs/{hub[2]}"
    return next((os.environ[each] for each in JOB if os.environ.get(each)), uuid.uuid4().urn)


def _source() -> str:
    """The address of the source, as the Dockerfiles have it; a remote of git may hold a password."""
    given = os.environ.get("SOURCE")
    (written,) = re.findall(r"^ARG SOURCE=(\S+)$", (ROOT / "images/pipeline.Dockerfile").read_text(), re.MULTILINE)
    return str(given or written)


def _base(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the image stands on; without a digest where no registry knows it."""
    name, digest = (labels.get(f"{OCI}base.{key}", "") for key in ("name", "digest"))
    algorithm, _, value = digest.partition(":")
    return [{"uri": f"oci://{name}", **({"digest": {algorithm: value}} if value else {})}] if name else []


def _locks(name: str) -> list[dict[str, Any]]:
    """The locks that the Dockerfiles of the image and of the layer below it copy."""
    files = [ROOT / f"images/{each}.Dockerfile" for each in (name, *(["torch"] if name in ON_TORCH else []))]
    found = {lock for file in files for lock in re.findall(r"requirements/images/[\w-]+\.lock", file.read_text())}
    return [
        {"name": lock, "digest": {"sha256": hashlib.sha256((ROOT / lock).read_bytes()).hexdigest()}}
        for lock in sorted(found)
    ]


def _modules(name: str) -> list[dict[str, Any]]:
    """MinIO is a published Go module, built by tools/minio.py."""
    return [{"uri": f"pkg:golang/github.com/minio/minio@{minio.RELEASE}"}] if name == "minio" else []
