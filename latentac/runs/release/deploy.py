"""From a trained run to a model that serves: the export, the proof, the registry, and the way back for a person."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentac.evaluation.arms import best_steered
from latentac.runs.release.adapter import fetch_model, place_base, reference
from latentac.runs.release.incumbent import Production, chosen_production, productions, put_in_production
from latentac.runs.release.readme import write_released
from latentac.runs.workspace import EXTENSIONS, Workspace, cache_beside, default_store, open_run, person
from latentac.serving.deployment import Deployment, serve_and_check
from latentac.serving.exported import add_base, export
from latentac.store import Manifest, Store, copy_folder, open_store
from latentac.store.blobs import disk_errors
from latentac.store.published import metric
from latentac.store.published import read as read_published
from latentac.system.errors import ArtifactNotFound, ConfigError, IntegrityError, Problem, ResourceError
from latentac.system.folders import copy_adapter, copy_pipeline
from latentac.system.names import working_folder
from latentac.system.scratch import empty_folder, hidden_folder

_EXAMPLES = 8  # held-out prompts that the endpoint's page offers to begin with
UNFINISHED = ".latentac-fetch"
"""Folder within the one that `fetch_version` fills, for as long as it does."""


@dataclass(frozen=True)
class Candidate:
    """A published model that nobody has asked for an image yet.

    folder: its local copy; manifest: of models/<version> in `space.store`; request: what the proof asks it for
    """

    space: Workspace
    folder: Path
    manifest: Manifest
    version: str
    request: dict[str, Any]


Prove = Callable[[Candidate], Deployment]
"""Serves the candidate and checks its answers; on a cluster it is also what makes users get it. Raises
LatentacError, and then whatever served before serves as before."""


def on_loopback(candidate: Candidate) -> Deployment:
    """The proof on this machine alone: a server that lives as long as the questions take. It may use the run's own
    classes, which have run here in every step before."""
    config = candidate.space.config
    chosen = [config.backbone, config.kernel, config.critic.body, *config.steering.methods]
    own = {each.use for each in chosen if ":" in each.use}
    place = (config.serving.ready_seconds, config.serving.port)
    return serve_and_check(candidate.folder, candidate.request, *place, allowed=own)


def release(space: Workspace, prove: Prove = on_loopback, forced: Sequence[str] = ()) -> tuple[dict[str, Any], bytes]:
    """Publish models/<version>, prove that it serves, and make it the production model of the run's project.

    Returns deployment.json and the served image as PNG. The version is the run and the trained artifact's digest,
    so the same weights have the same version. A model that does not serve stays a candidate. forced: the gate's reasons
    against it, if a person puts it there all the same.
    """
    trained = space.store.manifest(f"{space.run}/train")
    with hidden_folder(space.folder, "model") as temporary:
        folder = temporary / "model"
        version = _export(space, trained, folder)
        published = space.store.publish(
            f"models/{version}",
            folder,
            run=space.run,
            step="deploy",
            config_hash=space.config.hash,
            parents=[trained, *([space.prepared] if space.config.export.weights == "adapter" else [])],
            owned=True,
        )
        place_base(space.store, folder, cache_beside(space.folder))
        space.store.write_json(candidate_key(space.config.project), {"version": version, "run": space.run})
        request = {"prompt": space.presentable[0].text, "seed": space.config.seed, "count": 1}
        proof = prove(Candidate(space, folder, published, version, request))
    content = {
        "version": version,
        "project": space.config.project,
        "previous": put_in_production(space, version, forced),
        "forced": {"by": person(), "reasons": list(forced)} if forced else None,
        "endpoint": proof.endpoint,
        "request": proof.request,
        "image_sha256": proof.image_sha256,
        "values": proof.values,
        "nfe": proof.nfe,
        "ready_seconds": proof.ready_seconds,
        "seconds": proof.seconds,
        "shadow": proof.shadow,
    }
    return content, proof.image


def candidate_key(project: str) -> str:
    """Key of what names the project's model that was published and is not proved."""
    return f"registry/{project}/candidate.json"


def _export(space: Workspace, trained: Manifest, folder: Path, notice: str = "") -> str:
    """Fill `folder` with what the run has trained, as it is served; its version. notice: for whoever uses it."""
    version = f"{space.run}-{trained.digest[:8]}"
    source = space.artifact("train") / "policy"
    adapter, untouched = space.config.export.weights == "adapter", space.artifact("prepare") / "backbone"
    if adapter:
        copy_adapter(source, folder)
    else:
        copy_pipeline(source, folder)
        if space.config.serving.include_base:
            add_base(folder, untouched)
    copy_folder(space.artifact("train") / "critic", folder / "critic")
    examples = list(dict.fromkeys(prompt.text for prompt in space.presentable))[:_EXAMPLES]
    extensions = read_published(space.artifact("prepare") / EXTENSIONS)
    rows = read_published(space.artifact("steer") / "steering.json") if space.finished("steer") else []
    best = best_steered(rows, space.config.gate.reward)
    methods = [method.name for method in space.config.steering.methods]
    check_agreement(space.run, space.config.reward_names, methods, extensions, best)
    details: dict[str, Any] = {"examples": examples, "notice": notice, "extensions": extensions, "best": best}
    if adapter:
        details |= {"base": reference(space), "pipeline": untouched}
    export(folder, space.config, run=space.run, version=version, **details)
    write_released(space, source, folder, "" if notice else version)
    return version


def check_agreement(
    run: str,
    rewards: Collection[str],
    methods: Collection[str],
    extensions: Mapping[str, Any],
    best: Mapping[str, Any] | None,
) -> None:
    """Raises IntegrityError where what the run has published of its rewards and methods is not of its configuration.

    rewards, methods: their names in the configuration. extensions: content of extensions.json. best: the row of
    steering.json that becomes the default.
    """
    for file, missing in (
        (f"prepare/{EXTENSIONS}", {*rewards} - extensions["units"].keys()),
        (f"prepare/{EXTENSIONS}", {*methods} - extensions["methods"].keys()),
        ("steer/steering.json", {best["method"]}.difference(methods) if best else set[str]()),
    ):
        if missing:
            problem = f"it and the run's configuration do not agree on {min(missing)!r}"
            raise IntegrityError(f"{run}/{file}", problem, "Run the step that writes it again")


def fetch_version(version: str, store: str, folder: Path) -> Manifest:
    """Fill `folder` with the verified files of models/<version>; it may exist and be a mount, but only an empty one.

    A folder that holds that model already is left as it is, and one that a killed call left is completed. Nothing that
    this function did not make is removed or replaced. Raises ResourceError if the folder holds anything else,
    ArtifactNotFound, IntegrityError, StoreUnavailable after the store's own retries, ServingError if the artifact is no
    exported model.
    """
    opened, key = open_store(store), f"models/{version}"
    manifest = opened.manifest(key)
    partial = folder / UNFINISHED
    with disk_errors(folder, sum(file.size for file in manifest.files)):
        folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in folder.iterdir() if path.name != "lost+found"]  # the root of a volume has that
        if found and partial not in found:
            return fetch_model(opened, version, folder)  # right as it is, or an error that says so
        empty_folder(partial)
        fetch_model(opened, version, partial / "model")
        foreign = sorted({path.name for path in found} - {path.name for path in (*_parts(partial / "model"), partial)})
        if foreign:
            remedy = "Move it away or choose another folder"
            raise ResourceError(
                str(folder), f"contains files that do not belong to {key}: {', '.join(foreign[:5])}", remedy
            )
        for path in _parts(partial / "model"):
            if not os.path.lexists(folder / path.name):
                path.rename(folder / path.name)
        shutil.rmtree(partial)
        if found:
            fetch_model(opened, version, folder)
    return manifest


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@contextmanager
def model_to_use(run: str, project: str, store: str, output: str) -> Iterator[tuple[Path, str]]:
    """A verified local folder of a model while the context lasts, and a line about what it is.

    run: the model that it deployed, or, where it has deployed none, what it has trained, for inspection: exported into
    a folder that goes again, without a word to the store. "": the model in production in `project`, and where that is
    "" too, the one that was deployed last. Raises ConfigError, ArtifactNotFound for a run that has not trained.
    """
    if run and project:
        remedy = "Name the run, or the project whose model in production is meant."
        raise ConfigError([Problem("--project", project, f"--run names {run} already", remedy)])
    opened = open_store(store or default_store(output))
    if not run:
        chosen, others = chosen_production(opened, project)
        announcement = f"{chosen.version}, {_standing([chosen], chosen.version)}"
        if others and not project:
            names = ", ".join(other.project for other in others)
            announcement += f". It was deployed last; for another project's: --project with one of {names}"
        yield _fetched(opened, chosen.version, working_folder(chosen.run, output) / "model"), announcement
        return
    folder = working_folder(run, output)
    try:
        deployed = opened.manifest(f"{run}/deploy")
    except ArtifactNotFound:
        with _inspected(open_run(run, store, output)) as found:
            yield found
        return
    version = metric(deployed, "version", str)
    yield _fetched(opened, version, folder / "model"), f"{version}, {_standing(productions(opened), version)}"


def _fetched(store: Store, version: str, folder: Path) -> Path:
    fetch_model(store, version, folder, cache_beside(folder.parent))
    return folder


def _standing(found: Sequence[Production], version: str) -> str:
    """Where a deployed version is in production now, and whether it was forced there."""
    for each in found:
        if each.version == version:
            forced = f", forced over its gate ({'; '.join(each.forced)})" if each.forced else ""
            return f"in production in project {each.project}{forced}"
    return "deployed once, and not in production any more"


@contextmanager
def _inspected(space: Workspace) -> Iterator[tuple[Path, str]]:
    """What the run has trained, in a folder for as long as somebody looks at it."""
    trained, decision = space.store.manifest(f"{space.run}/train"), space.decision()
    states = {"hold": "held", "promote": "promoted, but not deployed"}
    state = states[decision["decision"]] if decision else "not decided yet"
    notice = f"{state}: for inspection only, not in production"
    with hidden_folder(space.folder, "inspection") as temporary:
        folder = temporary / "model"
        version = _export(space, trained, folder, notice)
        place_base(space.store, folder, cache_beside(space.folder))
        yield folder, f"{version}, {notice}"


def generate_image(
    folder: Path, prompt: str, seed: int, count: int, weights: Sequence[str], image: Path
) -> dict[str, Any]:
    """Write `count` steered images of `prompt` side by side to the PNG `image`; returns what was used.

    weights: `reward=weight` strings; none means the exported defaults. Raises ConfigError.
    """
    from latentac.evaluation.held_out import contact_sheet
    from latentac.sampling.devices import pick_device
    from latentac.serving.generator import Generator

    steering = dict(_steering_weight(text) for text in weights) or None
    made = Generator(folder, pick_device("auto")).generate(prompt, seed, count, steering=steering)
    contact_sheet(made.images, count).save(image, "PNG")
    used = {"nfe": made.nfe, "weights": made.weights, "seed": made.seed}
    return {**used, "tokens": made.tokens, "truncated": made.truncated}


def _steering_weight(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        remedy = "Write for example --steer shapes_verifier=2"
        raise ConfigError([Problem("--steer", text, "is not reward=weight", remedy)]) from None
