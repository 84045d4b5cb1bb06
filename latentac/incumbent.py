"""The model in production, which a new one is held against: which it is, whether it fits, whether it is whole.

torch is imported only to load it: the gate asks about it without.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentac.errors import ArtifactNotFound, IntegrityError, ServingError
from latentac.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from latentac.backbones import Denoiser
    from latentac.policy import Policy

POINTER = "registry/production.json"


@dataclass(frozen=True)
class Incumbent:
    """version: in production, None where nothing is; sha256: of its manifest.json, None if that cannot be read;
    problem: why its pictures cannot be compared, or ""; policy: None without version or with a problem."""

    version: str | None
    sha256: str | None
    problem: str
    policy: "Policy | None"

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json says of it."""
        return {"version": self.version, "sha256": self.sha256, "problem": self.problem}


def in_production(space: Workspace) -> str | None:
    """The version in production that is not of this run: where this run was promoted already, the one before it."""
    try:
        found = space.store.read_json(POINTER)
    except ArtifactNotFound:
        return None
    try:
        version = found["previous"] if found["run"] == space.run else found["version"]
    except (KeyError, TypeError):
        version = 0
    if version is not None and not isinstance(version, str):
        remedy = "Write it again by deploying a run, or remove it if nothing is in production"
        raise IntegrityError(f"{space.store.url}/{POINTER}", "it names no version and run", remedy)
    return version


def load_incumbent(space: Workspace, base: "Policy") -> Incumbent:
    """The incumbent as it is served, from the verified files of models/<version>, if it fits: the backbone and the
    sizes of `base`, this run's untrained policy. Its kernel is its own."""
    version = in_production(space)
    if version is None:
        return Incumbent(None, None, "", None)
    sha256 = None
    try:
        sha256 = space.store.manifest(f"models/{version}").digest
        return Incumbent(version, sha256, "", _load(space, version, base))
    except (ArtifactNotFound, IntegrityError, ServingError) as error:
        return Incumbent(version, sha256, str(error), None)


def trouble(space: Workspace, version: str, sha256: object) -> str:
    """What is wrong with the incumbent's files in the store, or "". sha256: of the manifest that was evaluated."""
    try:
        manifest = space.store.manifest(f"models/{version}")
        if manifest.digest != sha256:
            return f"models/{version} was replaced after the evaluation"
        space.store.verify(manifest, parents=False)  # what it was made from may have been cleared away
    except (ArtifactNotFound, IntegrityError) as error:
        return str(error)
    return ""


def _load(space: Workspace, version: str, base: "Policy") -> "Policy":
    """Raises ServingError where the model does not fit this run."""
    from latentac.backbones import load_backbone
    from latentac.kernels import KERNELS
    from latentac.policy import Policy
    from latentac.serving.exported import read

    folder = space.folder / "incumbent" / version
    space.store.fetch(f"models/{version}", folder)
    exported, name = read(folder), space.config.backbone.use
    if exported.backbone.use != name:
        raise _unfit(version, f"its backbone is {exported.backbone.use}, that of this run {name}")
    backbone = load_backbone(exported.backbone, folder, space.device)
    for what, size, own in (
        ("latents", backbone.latent_shape, base.backbone.latent_shape),
        ("pictures", _picture_shape(backbone, space.device), _picture_shape(base.backbone, space.device)),
    ):
        if size != own:
            raise _unfit(version, f"its {what} are {size}, those of this run {own}")
    return Policy(backbone, KERNELS.make(exported.kernel))


def _picture_shape(backbone: "Denoiser", device: "torch.device") -> tuple[int, ...]:
    import torch

    return backbone.decode(torch.zeros(1, *backbone.latent_shape, device=device)).shape[1:]


def _unfit(version: str, problem: str) -> ServingError:
    remedy = "Set gate.unfit_incumbent=replace to promote without the comparison"
    return ServingError(f"models/{version}", problem, remedy)
