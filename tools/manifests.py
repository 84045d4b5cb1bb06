"""Manifests of the projects that a cluster of tests has: `python -m tools.manifests` fetches them.

They are CustomResourceDefinitions, and what installs the controllers of Volcano and KServe. They lie as files in the
projects' Go modules, which are downloaded and not built. CRDs in the folder of LATENTAC_CRDS come on top of them: for
other versions, and for Kubeflow Pipelines, whose module is not fetched here.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.golang import Unavailable, cached, module_files

NAMED = "LATENTAC_CRDS"
"""Environment variable: a folder with further CRDs, in subfolders if one likes."""
# Not 1.15: it needs volcano.sh/apis of that version, which the module proxy refused. 1.14 goes with apis 1.14.0.
VOLCANO = "v1.14.1"
VOLCANO_APIS = "v1.14.0"
KSERVE = "v0.17.0"
ARGO = "v3.7.0"
GATEWAY_API = "v1.4.1"


@dataclass(frozen=True)
class Source:
    """Files of a Go module. patterns: of their paths below `folder` in the module, which are kept."""

    module: str
    version: str
    folder: str
    patterns: tuple[str, ...]


# Argo's minimal form is the one that its own manifests install: the full schemas are too large for plain `apply`.
_CRDS = {
    "volcano-crds": Source("volcano.sh/volcano", VOLCANO, "config/crd", ("*/bases/*.yaml",)),
    "kserve-crds": Source(
        "github.com/kserve/kserve", KSERVE, "config/crd/full", ("*_*.yaml", "clusterstoragecontainer/*_*.yaml")
    ),
    "argo-crds": Source("github.com/argoproj/argo-workflows/v3", ARGO, "manifests/base/crds/minimal", ("*_*.yaml",)),
    "gateway-api-crds": Source(
        "sigs.k8s.io/gateway-api",
        GATEWAY_API,
        "config/crd/standard",
        tuple(f"*_{kind}.yaml" for kind in ("gatewayclasses", "gateways", "httproutes", "referencegrants")),
    ),
}
_INSTALL = {
    "volcano-chart": Source("volcano.sh/volcano", VOLCANO, "installer/helm/chart/volcano", ("**/*",)),
    "kserve-config": Source("github.com/kserve/kserve", KSERVE, "config", ("webhook/*.yaml", "configmap/*.yaml")),
}
_SOURCES = {**_CRDS, **_INSTALL}


def crds() -> list[Path]:
    """Folders with CRDs: those of the cache, then that of LATENTAC_CRDS. Raises Unavailable if it is no folder."""
    found = [path for name in _CRDS if (path := _place(name)).exists()]
    named = os.environ.get(NAMED)
    if named and not Path(named).is_dir():
        raise Unavailable(f"{NAMED} = {named!r} is not a folder. Correct or unset it.")
    return [*found, *([Path(named).absolute()] if named else [])]


def install(name: str) -> Path:
    """Folder with what installs a controller: `volcano-chart` or `kserve-config`. Raises Unavailable."""
    if not _place(name).exists():
        raise Unavailable(f"{_place(name)} is not there: `make crds` fetches it")
    return _place(name)


def missing() -> list[str]:
    """Names of what `fetch` has not put into the cache yet."""
    return [name for name in _SOURCES if not _place(name).exists()]


def fetch() -> None:
    """Put what is missing into the cache. Raises Unavailable."""
    for name in missing():
        source = _SOURCES[name]
        origin = module_files(source.module, source.version) / source.folder
        files = [path for pattern in source.patterns for path in sorted(origin.glob(pattern)) if path.is_file()]
        if not files:
            wanted = f"{source.folder}/{{{','.join(source.patterns)}}}"
            raise Unavailable(f"{source.module}@{source.version} has no {wanted}: correct tools/manifests.py")
        partial = _place(name).with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for path in files:
            target = partial / path.relative_to(origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # without its mode: files of a module are read-only
        partial.rename(_place(name))


def _place(name: str) -> Path:
    return cached(name, _SOURCES[name].version)


def main() -> None:
    try:
        fetch()
    except Unavailable as error:
        sys.exit(str(error))
    for name in _SOURCES:
        print(f"{_place(name)}: {sum(path.is_file() for path in _place(name).rglob('*'))} files")


if __name__ == "__main__":
    main()
