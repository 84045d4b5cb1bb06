"""The CustomResourceDefinitions that a cluster of tests has: `python -m tools.crds` fetches them.

They lie as files in the projects' Go modules, which are downloaded and not built. A folder in LATENTAC_CRDS comes on
top of them: for other versions, and for Kubeflow Pipelines, whose module is not fetched here.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.golang import Unavailable, cached, module_files

NAMED = "LATENTAC_CRDS"
"""Environment variable: a folder with further CRDs, in subfolders if one likes."""
VOLCANO = "v1.14.1"
KSERVE = "v0.17.0"
ARGO = "v3.7.0"
GATEWAY_API = "v1.4.1"


@dataclass(frozen=True)
class Source:
    """A Go module with CRDs. files: patterns of their paths inside it."""

    module: str
    version: str
    files: tuple[str, ...]


# Argo's minimal form is the one that its own manifests install: the full schemas are too large for plain `apply`.
_SOURCES = {
    "volcano-crds": Source(
        "volcano.sh/volcano", VOLCANO, ("config/crd/volcano/bases/*.yaml", "config/crd/jobflow/bases/*.yaml")
    ),
    "kserve-crds": Source(
        "github.com/kserve/kserve",
        KSERVE,
        ("config/crd/full/*_*.yaml", "config/crd/full/clusterstoragecontainer/*_*.yaml"),
    ),
    "argo-crds": Source(
        "github.com/argoproj/argo-workflows/v3", ARGO, ("manifests/base/crds/minimal/argoproj.io_*.yaml",)
    ),
    "gateway-api": Source(
        "sigs.k8s.io/gateway-api",
        GATEWAY_API,
        tuple(
            f"config/crd/standard/gateway.networking.k8s.io_{kind}.yaml"
            for kind in ("gatewayclasses", "gateways", "httproutes", "referencegrants")
        ),
    ),
}


def folders() -> list[Path]:
    """Where the CRDs lie: those of the cache, then that of LATENTAC_CRDS. Raises Unavailable if it is no folder."""
    found = [path for name, source in _SOURCES.items() if (path := cached(name, source.version)).exists()]
    named = os.environ.get(NAMED)
    if named and not Path(named).is_dir():
        raise Unavailable(f"{NAMED} = {named!r} is not a folder. Correct or unset it.")
    return [*found, *([Path(named).absolute()] if named else [])]


def missing() -> list[str]:
    """Names of what `fetch` has not put into the cache yet."""
    return [name for name, source in _SOURCES.items() if not cached(name, source.version).exists()]


def fetch() -> None:
    """Put what is missing into the cache. Raises Unavailable."""
    for name in missing():
        source = _SOURCES[name]
        origin, folder = module_files(source.module, source.version), cached(name, source.version)
        files = [path for pattern in source.files for path in sorted(origin.glob(pattern))]
        if not files:
            raise Unavailable(
                f"{source.module}@{source.version} has no {' or '.join(source.files)}: correct tools/crds.py"
            )
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, partial / path.name)  # without its mode: files of a module are read-only
        partial.rename(folder)


def main() -> None:
    try:
        fetch()
        for folder in folders():
            print(f"{folder}: {len(list(folder.rglob('*.yaml')))} files")
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
