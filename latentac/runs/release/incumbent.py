"""The model in production, which a new one is held against: which it is, whether it fits, whether it is whole.

Production belongs to a project: a model is judged by, and takes the place of, the one of its own project and no other.
torch is imported only to load it: the gate asks about it without.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from latentac.config.extensions import operator_allows
from latentac.runs.release.adapter import check_published, fetch_model
from latentac.runs.workspace import Workspace, cache_beside
from latentac.store import Store
from latentac.system.errors import ArtifactNotFound, ConfigError, IntegrityError, Problem, ServingError
from latentac.system.names import is_name

if TYPE_CHECKING:
    import torch

    from latentac.backbones import Denoiser
    from latentac.sampling.policy import Policy

BEFORE_PROJECTS = "registry/production.json"
"""What versions of latentac without projects wrote: it names a model and not whose it is, so it judges nobody."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Production:
    """What a project's pointer says. previous: the version before it; deployed: when, UTC in ISO 8601; forced: the
    gate's reasons against it where a person put it there all the same, else none."""

    project: str
    version: str
    run: str
    previous: str | None
    deployed: str
    forced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Incumbent:
    """version: in production, None where nothing is; sha256: of its manifest.json, None if that cannot be read;
    problem: why its images cannot be compared, or ""; policy: None without version or with a problem."""

    version: str | None
    sha256: str | None
    problem: str
    policy: "Policy | None"

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json says of it."""
        return {"version": self.version, "sha256": self.sha256, "problem": self.problem}


def pointer(project: str) -> str:
    """Key of what names the project's model in production."""
    return f"registry/{project}/production.json"


def production(store: Store, project: str) -> Production | None:
    """What is in production in `project`, None for nothing. Raises IntegrityError where the pointer says it wrongly."""
    key = pointer(project)
    try:
        found = store.read_json(key)
    except ArtifactNotFound:
        return None
    fields = found if isinstance(found, dict) else {}
    version, run, previous, deployed = (fields.get(name) for name in ("version", "run", "previous", "deployed"))
    if not (isinstance(version, str) and isinstance(run, str) and (previous is None or isinstance(previous, str))):
        remedy = "Write it again with `latentac deploy --force` of a run, or remove it if nothing is in production"
        raise IntegrityError(f"{store.url}/{key}", "it names no version and run", remedy)
    forced = fields.get("forced")
    forced = tuple(map(str, forced)) if isinstance(forced, list) else ()
    return Production(project, version, run, previous, str(deployed or ""), forced)


def productions(store: Store) -> list[Production]:
    """Of every project, the one that was deployed last first; a pointer that is damaged concerns its project alone."""
    found = []
    for key in store.pointers("registry"):
        project = key.removeprefix("registry/").removesuffix("/production.json")
        if key == pointer(project) and is_name(project):
            try:
                found.append(production(store, project))
            except IntegrityError as error:
                _log.warning("project %s is left out: %s", project, error)
    return sorted((each for each in found if each), key=lambda each: each.deployed, reverse=True)


def put_in_production(space: Workspace, version: str, forced: Sequence[str] = ()) -> str | None:
    """Make `version`, of this run, the one in production of its project; returns the version before it."""
    before, now = in_production(space), datetime.now(UTC).isoformat()
    made = Production(space.config.project, version, space.run, before, now, tuple(forced))
    space.store.write_json(pointer(made.project), asdict(made))
    return before


def chosen_production(store: Store, project: str) -> tuple[Production, list[Production]]:
    """What is in production in `project`, or, where that is "", what was deployed last; and the other projects'.

    Raises ConfigError where there is none, with the projects that have some.
    """
    if project and not is_name(project):
        raise ConfigError([Problem("--project", project, "is not a project name", "Use the name of a project.")])
    named, found = production(store, project) if project else None, productions(store)
    for each in (named, *found):
        if each and project in ("", each.project):
            return each, [other for other in found if other != each]
    known = f"Projects with a model in production: {', '.join(each.project for each in found)}." if found else ""
    problem = f"nothing is in production in {store.url}"
    if not found and _has(store, BEFORE_PROJECTS):
        problem += f", for its {BEFORE_PROJECTS} is of a version of latentac without projects"
    remedy = known or "Deploy a run first, or name one: --run."
    raise ConfigError([Problem("--project", project or None, problem, remedy)])


def in_production(space: Workspace) -> str | None:
    """The version in production in this run's project that is not of this run: where this run is there already, the
    one before it."""
    found = production(space.store, space.config.project)
    if found is None:
        return None
    return found.previous if found.run == space.run else found.version


def load_incumbent(space: Workspace, base: "Policy") -> Incumbent:
    """The incumbent as it is served, from the verified files of models/<version>, if it fits: the backbone and the
    sizes of `base`, this run's untrained policy. Its kernel is its own."""
    version = in_production(space)
    if version is None:
        if _has(space.store, BEFORE_PROJECTS):
            message = "%s is of a version of latentac without projects; this run is not held against what it names"
            _log.warning(message, f"{space.store.url}/{BEFORE_PROJECTS}")
        return Incumbent(None, None, "", None)
    sha256 = None
    try:
        sha256 = space.store.manifest(f"models/{version}").digest
        return Incumbent(version, sha256, "", _load(space, version, base))
    except (ArtifactNotFound, ConfigError, IntegrityError, ServingError) as error:
        return Incumbent(version, sha256, str(error), None)


def trouble(space: Workspace, version: str, sha256: object) -> str:
    """What is wrong with the incumbent's files in the store, or "". sha256: of the manifest that was evaluated."""
    try:
        manifest = space.store.manifest(f"models/{version}")
        if manifest.digest != sha256:
            return f"models/{version} was replaced after the evaluation"
        space.store.verify(manifest, parents=False)  # what it was made from may have been cleared away
        check_published(space.store, manifest)
    except (ArtifactNotFound, IntegrityError) as error:
        return str(error)
    return ""


def _load(space: Workspace, version: str, base: "Policy") -> "Policy":
    """Raises ServingError where the model does not fit this run, ConfigError where it names what is not to be had."""
    from latentac.backbones.guided import guided
    from latentac.sampling.kernels import KERNELS
    from latentac.sampling.policy import Policy
    from latentac.serving.adapted import load_denoisers
    from latentac.serving.exported import read

    # Named by its content too: a version that was published again is not what lies here from before.
    digest = space.store.manifest(f"models/{version}").digest
    folder = space.folder / "incumbent" / f"{version}-{digest[:8]}"
    fetch_model(space.store, version, folder, cache_beside(space.folder))
    exported, name = read(folder), space.config.backbone.use
    if exported.backbone.use != name:
        raise _unfit(version, f"its backbone is {exported.backbone.use}, that of this run {name}")
    KERNELS.check_row(exported.kernel.use, f"models/{version}", {*operator_allows(), space.config.kernel.use})
    model = exported.model_copy(update={"policies": ["trained"]})  # its base is not compared
    backbone = load_denoisers(model, folder, space.device)["trained"]
    for what, size, own in (
        ("latents", backbone.latent_shape, base.backbone.latent_shape),
        ("images", _image_shape(backbone, space.device), _image_shape(base.backbone, space.device)),
    ):
        if size != own:
            raise _unfit(version, f"its {what} are {size}, those of this run {own}")
    kernel = KERNELS.make(exported.kernel, path="kernel")
    return Policy(guided(backbone, exported.guidance_scale), kernel, base.rows)


def _image_shape(backbone: "Denoiser", device: "torch.device") -> tuple[int, ...]:
    import torch

    return backbone.decode(torch.zeros(1, *backbone.latent_shape, device=device)).shape[1:]


def _unfit(version: str, problem: str) -> ServingError:
    remedy = "Set gate.unfit_incumbent=replace to promote without the comparison"
    return ServingError(f"models/{version}", problem, remedy)


def _has(store: Store, key: str) -> bool:
    try:
        store.read_json(key)
    except (ArtifactNotFound, IntegrityError):
        return False
    return True
