"""From a trained run to a model that serves: the export, the proof, the registry, and the way back for a person."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentac.errors import ArtifactNotFound, ConfigError, Problem
from latentac.serving.deployment import serve_and_check
from latentac.serving.exported import export
from latentac.store import Manifest, open_store
from latentac.workspace import Workspace, default_store

PRODUCTION, CANDIDATE = "registry/production.json", "registry/candidate.json"


def release(space: Workspace) -> tuple[dict[str, Any], bytes]:
    """Publish models/<version>, prove that it serves, and make it the production model.

    Returns deployment.json and the served picture as PNG. The version is the run and the trained artifact's digest,
    so the same weights have the same version. A model that does not serve stays a candidate.
    """
    trained = space.store.manifest(f"{space.run}/train")
    version = f"{space.run}-{trained.digest[:8]}"
    with tempfile.TemporaryDirectory(prefix=".model-", dir=space.folder) as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(space.artifact("train") / "policy", folder)
        shutil.copytree(space.artifact("train") / "critic", folder / "critic")
        export(folder, space.config, run=space.run, version=version)
        space.store.publish(
            f"models/{version}",
            folder,
            run=space.run,
            step="deploy",
            config_hash=space.config.hash,
            parents=[trained],
        )
        space.store.write_json(CANDIDATE, {"version": version, "run": space.run})
        request = {"prompt": space.prompts.held_out[0].text, "seed": space.config.seed, "count": 1}
        serving = space.config.serving
        proof = serve_and_check(folder, request, serving.ready_seconds, serving.port)
    before = _production(space)
    space.store.write_json(PRODUCTION, {"version": version, "run": space.run, "previous": before})
    content = {
        "version": version,
        "previous": before,
        "endpoint": proof.endpoint,
        "request": proof.request,
        "picture_sha256": proof.picture_sha256,
        "values": proof.values,
        "nfe": proof.nfe,
        "ready_seconds": proof.ready_seconds,
        "seconds": proof.seconds,
    }
    return content, proof.picture


def fetch_model(run: str, store: str, output: str) -> Path:
    """The verified local copy of the model that `run` deployed. Raises ArtifactNotFound if it deployed none."""
    opened = open_store(store or default_store(output))
    deployed: Manifest = opened.manifest(f"{run}/deploy")
    version = deployed.metrics["version"]
    folder = Path(output) / run / "model"
    opened.fetch(f"models/{version}", folder)
    return folder


def generate_picture(
    folder: Path, prompt: str, seed: int, count: int, dials: Sequence[str], picture: Path
) -> dict[str, Any]:
    """Write `count` steered pictures of `prompt` side by side to the PNG `picture`; returns what was used.

    dials: `reward=weight` strings; none means the exported defaults. Raises ConfigError.
    """
    from latentac.distributed import pick_device
    from latentac.evaluation import contact_sheet
    from latentac.serving.generator import Generator

    steering = dict(_dial(dial) for dial in dials) or None
    pictures = Generator(folder, pick_device("auto")).generate(prompt, seed, count, steering=steering)
    contact_sheet(pictures.images, count).save(picture, "PNG")
    return {"nfe": pictures.nfe, "weights": pictures.weights, "seed": pictures.seed}


def _production(space: Workspace) -> str | None:
    """The version that is in production and is not of this run."""
    try:
        found = space.store.read_json(PRODUCTION)
    except ArtifactNotFound:
        return None
    return found["previous"] if found["run"] == space.run else found["version"]


def _dial(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        remedy = "Write for example --steer shapes_verifier=2"
        raise ConfigError([Problem("--steer", text, "is not reward=weight", remedy)]) from None
