"""The verbs as functions. Read this first: it is what latentac does, in order.

Each verb is one step of the pipeline, one command of the command line and one component. It reads the artifacts of
the steps before from the store, does its work, publishes `<run>/<step>` and returns that manifest. A verb whose
artifact is there already, for the same configuration, returns it at once.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentac.config import Config, merge, read_file, read_overrides, resolve, suggestion
from latentac.errors import ArtifactNotFound, ConfigError, Problem
from latentac.recipes import RECIPES
from latentac.store import Manifest, Store, open_store
from latentac.workspace import Workspace, default_store, open_run

_log = logging.getLogger(__name__)


def prepare(
    run: str, store: str, output: str, recipe: str, config: str = "", overrides: Sequence[str] = ()
) -> Manifest:
    """Resolve the recipe to one configuration, check all that can be checked, fetch backbone and prompts.

    config: a YAML file over the recipe, or ""; overrides: `path=value` over both. Raises ConfigError with every
    problem at once, StoreError, ResourceError or RewardError.
    """
    started = time.monotonic()
    settings = resolve_recipe(recipe, config, overrides)
    opened = open_store(store or default_store(output))
    try:
        published = opened.manifest(f"{run}/prepare")
    except ArtifactNotFound:
        return _prepare(run, opened, Path(output), settings, started)
    if published.config_hash != settings.hash:
        remedy = "Resume it with the options and the version that it was started with, or choose another run id"
        raise ConfigError([Problem("run", run, "exists with another configuration", remedy)])
    return published


def pretrain_value(run: str, store: str, output: str) -> Manifest:
    """Regress the critic on rollouts of the frozen actor. Publishes critic/ and metrics.json."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac import pretraining

        policy = space.base_policy()
        critic = pretraining.new_critic(space.config, policy)
        history, _ = pretraining.pretrain(space.config, policy, critic, space.rewards(), space.prompts)
        critic.save(folder / "critic")
        explained = history[-1]["held_out_explained_variance"]
        _write(folder / "metrics.json", {"explained_variance": explained, "history": history})
        return {"explained_variance": explained}

    return _step(run, store, output, "pretrain-value", ["prepare"], work)


def train(run: str, store: str, output: str) -> Manifest:
    """Train policy and critic as a TorchX app of elastic workers. Its leader publishes policy/, critic/, history.json.

    Goes on from the last checkpoint where there is one.
    """
    space = open_run(run, store, output)
    done = space.finished("train")
    if done is None:
        from latentac.launch import run_app

        settings = space.config.train
        run_app(run, store, output, settings.num_workers, settings.max_restarts)
        done = space.store.manifest(f"{run}/train")
    return done


def evaluate(run: str, store: str, output: str) -> Manifest:
    """Base against trained on held-out prompts and fixed seeds. Publishes evaluation.json and a gallery."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.evaluation import compare

        content, sheets = compare(
            space.config,
            space.base_policy(),
            space.trained_policy(),
            space.critic("train"),
            space.rewards(),
            space.prompts.held_out,
        )
        _write(folder / "evaluation.json", content)
        _write_gallery(folder, sheets)
        reward = space.config.gate.reward
        return {"base": content["base"][reward]["mean"], "trained": content["trained"][reward]["mean"]}

    return _step(run, store, output, "evaluate", ["prepare", "train"], work)


def steer(run: str, store: str, output: str) -> Manifest:
    """Reward against NFE of each way to steer the trained policy. Publishes steering.json and a gallery."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.benchmark import run_benchmark

        rows, sheets = run_benchmark(
            space.config, space.trained_policy(), space.critic("train"), space.rewards(), space.prompts.held_out
        )
        _write(folder / "steering.json", rows)
        _write_gallery(folder, sheets)
        return {"arms": len(rows)}

    return _step(run, store, output, "steer", ["prepare", "train"], work)


def gate(run: str, store: str, output: str) -> Manifest:
    """Decide `promote` or `hold`, with reasons. Publishes gate.json; the decision is in the manifest's metrics too."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.gate import decide

        # What is promoted must be what was evaluated, byte for byte.
        space.store.verify(space.store.manifest(f"{run}/evaluate"))
        verdict = decide(space.config.gate, json.loads((space.artifact("evaluate") / "evaluation.json").read_text()))
        _write(folder / "gate.json", verdict)
        for reason in verdict["reasons"]:
            _log.info("%s: %s", verdict["decision"], reason)
        return {"decision": verdict["decision"]}

    return _step(run, store, output, "gate", ["evaluate", "steer"], work)


def deploy(run: str, store: str, output: str) -> Manifest:
    """Export the model, serve it with KServe on loopback, ask it for a steered picture, and make it the production one.

    Publishes models/<version>, registry/production.json, and deployment.json with the picture.
    """

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.release import release

        content, picture = release(space)
        _write(folder / "deployment.json", content)
        (folder / "picture.png").write_bytes(picture)
        return {"version": content["version"], "picture_sha256": content["picture_sha256"]}

    return _step(run, store, output, "deploy", ["gate", "train"], work)


VERBS: dict[str, Callable[..., Manifest]] = {
    "prepare": prepare,
    "pretrain-value": pretrain_value,
    "train": train,
    "evaluate": evaluate,
    "steer": steer,
    "gate": gate,
    "deploy": deploy,
}


def _step(
    run: str,
    store: str,
    output: str,
    step: str,
    parents: Sequence[str],
    work: Callable[[Workspace, Path], dict[str, Any]],
) -> Manifest:
    """Open the run, return what is done already, or do the work in a temporary folder and publish it."""
    started = time.monotonic()
    space = open_run(run, store, output)
    done = space.finished(step)
    if done is not None:
        return done
    origins = [space.store.manifest(f"{run}/{parent}") for parent in parents]
    with tempfile.TemporaryDirectory(prefix=f".{step}-", dir=space.folder) as folder:
        metrics = work(space, Path(folder))
        metrics["seconds"] = time.monotonic() - started
        return space.store.publish(
            f"{run}/{step}",
            folder,
            run=run,
            step=step,
            config_hash=space.config.hash,
            parents=origins,
            metrics=metrics,
        )


def resolve_recipe(recipe: str, config: str = "", overrides: Sequence[str] = ()) -> Config:
    """The configuration that a recipe, a YAML file over it ("" for none) and `path=value` overrides make together.

    Raises ConfigError with every problem at once; names of tables and folders are checked by `prepare`.
    """
    if recipe not in RECIPES:
        raise ConfigError([Problem("recipe", recipe, "does not exist", suggestion(recipe, list(RECIPES)))])
    fields = RECIPES[recipe]
    if config:
        fields = merge(fields, read_file(Path(config)))
    return resolve(merge(fields, read_overrides(overrides)))


def _prepare(run: str, store: Store, output: Path, settings: Config, started: float) -> Manifest:
    from latentac import preparation
    from latentac.prompts import load_prompts

    preparation.check_names(settings)
    preparation.check_machine(settings, output)
    store.probe()
    prompts = load_prompts(settings.prompts.source)
    preparation.check_rewards(settings)
    preparation.check_prompts(settings, prompts)
    (output / run).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output / run) as temporary:
        folder = Path(temporary)
        preparation.fetch_backbone(settings.backbone.source, folder / "backbone")
        _write(folder / "config.json", settings.model_dump())
        (folder / "prompts.json").write_text(prompts.to_json())
        _write(folder / "environment.json", preparation.environment())
        return store.publish(
            f"{run}/prepare",
            folder,
            run=run,
            step="prepare",
            config_hash=settings.hash,
            metrics={"seconds": time.monotonic() - started},
        )


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_gallery(folder: Path, sheets: dict[str, Any]) -> None:
    """`sheets`: arm -> contact sheet, and "index" -> what gallery.json says of them."""
    (folder / "gallery").mkdir()
    for name, sheet in sheets.items():
        if name == "index":
            _write(folder / "gallery" / "gallery.json", sheet)
        else:
            sheet.save(folder / "gallery" / f"{name}.png")
