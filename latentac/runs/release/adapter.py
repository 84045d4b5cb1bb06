"""A published adapter and its base: the reference in latentac.json, and the folder in which both are served.

The base is the copy that `prepare` has published, which training loaded. The model's manifest names it as a parent, so
it is kept as long as the model. Whoever fetches the model gets the base from the same store, into the folder's `base/`.
"""

import json
from pathlib import Path

from pydantic import ValidationError

from latentac.runs.reporting.card import base_model
from latentac.runs.workspace import Workspace
from latentac.serving.exported import BASE, FILE, Base, Exported, read
from latentac.store import Manifest, Store
from latentac.store.published import problem_of
from latentac.store.published import read as read_published
from latentac.system.errors import ArtifactNotFound, IntegrityError
from latentac.system.modelfiles import MOST_BYTES, Damaged, parse_json

_BACKBONE = "backbone"
"""Folder of the base in the artifact of `prepare`."""


def reference(space: Workspace) -> Base:
    """The base of this run's adapter."""
    described = read_published(space.artifact("prepare") / "backbone.json")
    return Base(
        name=base_model(space.config.model_dump()),
        commit=described.get("commit") or "",
        artifact=space.prepared.key,
        files=_files(space.prepared),
    )


def fetch_model(store: Store, version: str, folder: Path, cache: Path | None = None) -> Manifest:
    """Fill `folder` with the verified files of models/<version>, and with its base if it is an adapter. A folder that
    holds both already is left as it is; one that holds anything else is a ResourceError. cache: see `Store.fetch`."""
    manifest = store.fetch(f"models/{version}", folder, cache=cache, beside=BASE)
    place_base(store, folder, cache)
    return manifest


def place_base(store: Store, folder: Path, cache: Path | None = None) -> None:
    """Put the base of the adapter in `folder` into its `base/`; nothing for a whole pipeline. Raises IntegrityError
    where the store has another base than the adapter names, ServingError where `folder` is no exported model."""
    base = read(folder).base
    if base is not None:
        check_base(store, base)
        store.fetch(base.artifact, folder / BASE, cache=cache, below=_BACKBONE)


def check_base(store: Store, base: Base) -> Manifest:
    """The manifest of the artifact with the base. Raises IntegrityError, with the first file that is missing or not the
    one that the adapter was trained on."""
    remedy = "Fetch the model from a store that has its base, or train and deploy the run again"
    try:
        manifest = store.manifest(base.artifact)
    except ArtifactNotFound:
        problem = f"is not in the store, and the adapter needs it: it has the base {base.name}"
        raise IntegrityError(f"{store.url}/{base.artifact}", problem, remedy) from None
    found = _files(manifest)
    for name in sorted(found.keys() | base.files.keys()):
        if found.get(name) != base.files.get(name):
            problem = f"{_BACKBONE}/{name}: expected {_told(base.files.get(name))}, found {_told(found.get(name))}"
            raise IntegrityError(f"{store.url}/{base.artifact}", f"is not the base of the adapter: {problem}", remedy)
    return manifest


def check_published(store: Store, manifest: Manifest) -> None:
    """Verify the files of the base in the store, where the published model `manifest` is an adapter: then it was made
    from a run's `prepare`, too. Raises IntegrityError."""
    if not any(parent.key.endswith("/prepare") for parent in manifest.parents):
        return
    where, raw = f"{store.url}/{manifest.key}/{FILE}", store.read(manifest.key, FILE)
    try:
        if len(raw) > MOST_BYTES:
            raise Damaged(f"it has {len(raw):,} bytes, and at most {MOST_BYTES:,} are read")
        described = Exported.model_validate_json(json.dumps(parse_json(raw, FILE)))
    except ValidationError as error:
        raise IntegrityError(where, problem_of(error), "Deploy the run again") from None
    except Damaged as error:
        raise IntegrityError(where, str(error), "Deploy the run again") from None
    if described.base is not None:
        store.verify(check_base(store, described.base), parents=False)


def _files(manifest: Manifest) -> dict[str, str]:
    start = f"{_BACKBONE}/"
    return {f.path.removeprefix(start): f.sha256 for f in manifest.files if f.path.startswith(start)}


def _told(digest: str | None) -> str:
    return f"sha256 {digest}" if digest else "no such file"
