"""The verbs as functions. Read this first: it is what latentac does, in order.

Each verb is one step of the pipeline, one command of the command line and one component. It reads the artifacts of
the steps before from the store, does its work, publishes `<run>/<step>` and returns that manifest. A verb whose
artifact is there already, for the same configuration, returns it at once.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.config.fields import merge, read_file, read_overrides
from latentac.config.recipes import RECIPES, default_project
from latentac.config.schema import Config, suggestion
from latentac.config.validation import resolve
from latentac.runs import package as packages
from latentac.runs.workspace import EXTENSIONS, PACKAGE, Workspace, default_store, open_run, person
from latentac.store import Manifest, Store, open_store
from latentac.store.published import metric, parse
from latentac.system.errors import ArtifactNotFound, ConfigError, Problem, TrainingError
from latentac.system.lifetime import refuse_links
from latentac.system.names import working_folder
from latentac.system.scratch import hidden_folder, write_whole

if TYPE_CHECKING:
    from latentac.runs.release.deploy import Prove

_log = logging.getLogger(__name__)


def prepare(
    run: str,
    store: str,
    output: str,
    recipe: str,
    config: str = "",
    overrides: Sequence[str] = (),
    package: str = "",
) -> Manifest:
    """Resolve the recipe to one configuration, check all that can be checked, fetch backbone and prompts.

    config: a YAML file over the recipe, or ""; overrides: `path=value` over both; package: a folder of code that the
    configuration names classes of, or "" (see `latentac.runs.package`). Raises ConfigError with every problem at once,
    StoreError, ResourceError or RewardError.
    """
    started = time.monotonic()
    fields = recipe_fields(recipe, config, overrides)
    code = packages.read(package) if package else b""
    opened = open_store(store or default_store(output))
    try:
        published = opened.manifest(f"{run}/prepare")
    except ArtifactNotFound:
        return _prepare(run, opened, Path(output), fields, code, started)
    if published.metrics.get("given") != _given(fields, code):
        remedy = "Resume it with the options and the version that it was started with, or choose another run id"
        raise ConfigError([Problem("run", run, "exists with another configuration", remedy)])
    return published


def pretrain_value(run: str, store: str, output: str) -> Manifest:
    """Regress the critic on rollouts of the frozen actor. Publishes critic/, metrics.json, and the scored pictures that
    it learned from, as latents (scored.safetensors)."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.training import value_pretraining as pretraining

        policy = space.base_policy()
        critic = pretraining.new_critic(space.config, policy)
        history, replay = pretraining.pretrain(space.config, policy, critic, space.rewards(), space.prompts)
        critic.save(folder / "critic")
        if replay is not None:
            replay.save(folder)
        explained = history[-1]["held_out_explained_variance"] if history else [0.0] * space.config.kernel.num_steps
        _write(folder / "metrics.json", {"explained_variance": explained, "history": history})
        return {"explained_variance": explained}

    return _step(run, store, output, "pretrain-value", ["prepare"], work)


def train(run: str, store: str, output: str, *, launch: Callable[[Workspace], None] | None = None) -> Manifest:
    """Train policy and critic as a TorchX app of elastic workers. Its leader publishes policy/, critic/, history.json.

    Goes on from the last checkpoint where there is one. launch: runs the workers to their end, with the artifact in
    the store, or raises; by default on this machine (`latentac.runs.workers.launch`).
    """
    space = open_run(run, store, output)
    done = space.finished("train")
    if done is None:
        if launch is None:
            from latentac.runs.workers.launch import run_app

            launch = run_app
        launch(space)
        done = space.finished("train")
    if done is None:
        remedy = "Resume the run: it goes on from its last checkpoint"
        raise TrainingError(f"training app of {run}", "ended well, and its artifact is not in the store", remedy)
    return done


def evaluate(run: str, store: str, output: str) -> Manifest:
    """Base, trained and the model in production on held-out prompts and fixed seeds.

    Publishes evaluation.json and a gallery. If the model in production cannot be compared, it says why.
    """

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.evaluation.held_out import compare
        from latentac.runs.release.incumbent import load_incumbent
        from latentac.runs.reporting.metrics import of_evaluation

        policies = {"base": space.base_policy(), "trained": space.trained_policy()}
        incumbent = load_incumbent(space, policies["base"])
        if incumbent.policy is not None:
            policies["incumbent"] = incumbent.policy
        if incumbent.problem:
            _log.warning("no comparison with the model in production: %s", incumbent.problem)
        content, sheets = compare(space.config, policies, space.critic("train"), space.rewards(), space.prompts)
        _write(folder / "evaluation.json", {**content, "production": incumbent.to_dict()})
        _write_gallery(folder, sheets)
        reward = space.config.gate.reward
        _track(space, of_evaluation(content, reward))
        figures = {arm: content[arm][reward]["mean"] for arm in policies}
        figures |= {"gain": content["difference"][reward]["mean"], "gain_low": content["difference"][reward]["low"]}
        for arm in policies.keys() - {"trained"}:
            figures[f"diversity_kept_{arm}"] = content["diversity"]["kept"][arm]["ratio"]
            figures[f"latency_ratio_{arm}"] = content["latency"]["ratio"][arm]["median"]
        return {name: value for name, value in sorted(figures.items()) if math.isfinite(value)}

    return _step(run, store, output, "evaluate", ["prepare", "train"], work)


def steer(run: str, store: str, output: str) -> Manifest:
    """Reward against NFE of each way to steer the trained policy. Publishes steering.json and a gallery."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.evaluation.arms import best_arm, plain_arm
        from latentac.evaluation.benchmark import run_benchmark

        rows, sheets = run_benchmark(
            space.config, space.trained_policy(), space.critic("train"), space.rewards(), space.prompts.held_out
        )
        _write(folder / "steering.json", rows)
        _write_gallery(folder, sheets)
        reward = space.config.gate.reward
        plain, best = plain_arm(rows, reward), best_arm(rows, reward)
        return {"arms": len(rows), "plain": plain["mean"], "best": best["mean"], "best_nfe": best["nfe"]}

    return _step(run, store, output, "steer", ["prepare", "train"], work)


def gate(run: str, store: str, output: str, *, overrides: Sequence[str] = ()) -> Manifest:
    """Decide `promote` or `hold`. Publishes gate.json and the reasons as reasons.md; the decision is in the manifest's
    metrics too.

    overrides: `gate.field=value` over the run's own bounds: decide again from the published evaluation, and publish
    that verdict in place of the one before, which it names. Without any, a verdict that is there stays.
    """

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.runs.release.gate import markdown

        verdict = judge(space, overrides)
        _write(folder / "gate.json", verdict)
        (folder / "reasons.md").write_text(markdown(verdict, run), encoding="utf-8")
        for reason in verdict["reasons"]:
            _log.info("%s: %s", verdict["decision"], reason)
        passed = sum(check["passed"] for check in verdict["checks"])
        return {"decision": verdict["decision"], "passed": passed, "failed": len(verdict["checks"]) - passed}

    return _step(run, store, output, "gate", ["evaluate", "steer"], work, again=bool(overrides))


def judge(space: Workspace, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `gate` would write to gate.json now; see there. Publishes nothing. Raises ConfigError for the overrides."""
    from latentac.runs.release import gate as rule
    from latentac.runs.release.incumbent import in_production, trouble

    bounds, changed = rule.override(space.config, overrides)
    # What is promoted must be what was evaluated, byte for byte.
    space.store.verify(space.store.manifest(f"{space.run}/evaluate"))
    key = f"{space.run}/evaluate"
    evaluation = parse(space.store.read(key, "evaluation.json"), f"{key}/evaluation.json")
    version, evaluated = in_production(space), evaluation.get("production") or {}
    compared = version is not None and not evaluated.get("problem")
    found = trouble(space, version, evaluated.get("sha256")) if version is not None and compared else ""
    production = {"version": version, "trouble": found}
    verdict = rule.decide(bounds, space.config.reward_names, evaluation, production)
    before, published = space.verdict(), space.finished("gate")
    earlier = rule.former(before, published.created) if before and published else []
    told = {"overrides": changed, "by": person() if overrides else None, "former": earlier}
    return {**verdict, "production": version, **told}


def deploy(run: str, store: str, output: str, *, prove: "Prove | None" = None, force: bool = False) -> Manifest:
    """Export the model, serve it with KServe on loopback, ask it for a steered picture, and make it the production one
    of its project.

    prove: serves and questions it elsewhere (a cluster's rollout) instead. force: also where the gate holds it, and
    also where it was deployed before. Publishes models/<version>, registry/<project>/production.json, and
    deployment.json with the picture. Raises ConfigError where the gate holds it and nothing forces it.
    """
    space = open_run(run, store, output)
    done, judged = space.finished("deploy"), space.store.manifest(f"{run}/gate")
    reasons = _reasons_against(space, force)
    current = done is not None and judged.digest in [parent.sha256 for parent in done.parents]

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.runs.release.deploy import on_loopback, release

        content, picture = release(space, prove or on_loopback, reasons)
        _write(folder / "deployment.json", content)
        (folder / "picture.png").write_bytes(picture)
        return {"version": content["version"], "picture_sha256": content["picture_sha256"]}

    return _step(run, store, output, "deploy", ["gate", "train"], work, again=force or not current)


def _reasons_against(space: Workspace, force: bool) -> list[str]:
    """What the gate says against deploying the run: nothing, or what is overridden. Raises ConfigError."""
    from latentac.runs.release.gate import against
    from latentac.runs.release.incumbent import in_production
    from latentac.system.commands import typed

    verdict = space.verdict() or {"decision": "hold", "reasons": ["its verdict is of another configuration"]}
    reasons, now = against(verdict), in_production(space)
    if now != verdict.get("production", now):
        reasons.append(f"it was judged against {verdict['production'] or 'nothing'}, and {now or 'nothing'} serves now")
    if reasons and not force:
        place = (space.store.url, str(space.folder.parent))
        again = typed("gate", space.run, *place, "--set", "gate.FIELD=VALUE")
        remedy = f"Judge it again with other bounds ({again}), or put it in production all the same "
        remedy += f"({typed('deploy', space.run, *place, '--force')})."
        raise ConfigError([Problem("run", space.run, f"is not to be deployed: {'; '.join(reasons)}", remedy)])
    for reason in reasons:
        _log.warning("forced over the gate: %s", reason)
    return reasons


def finish(run: str, store: str, output: str) -> Manifest | None:
    """Write the report and a model card of what the run has published, complete or not, and publish both.

    Publishes `<run>/finish` with report.html, summary.json and card.md, which also lie in `<output>/<run>/` then. It
    is made anew when a step has published since, so a run that was resumed is told to its end. None where nothing is
    published, not even by `prepare`.
    """
    started = time.monotonic()
    folder = working_folder(run, output)
    url = store or default_store(output)
    opened = open_store(url)
    known = set(opened.keys(run))
    origins = [opened.manifest(f"{run}/{step}") for step in VERBS if step != "finish" and f"{run}/{step}" in known]
    if f"{run}/prepare" not in known:
        return None
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with hidden_folder(folder, "finish") as temporary:
        scratch = temporary / "finish"
        done = opened.manifest(f"{run}/finish") if f"{run}/finish" in known else None
        if done is not None and [parent.sha256 for parent in done.parents] == [origin.digest for origin in origins]:
            opened.fetch(f"{run}/finish", scratch)
        else:
            done = None
            _write_finish(run, url, output, scratch)
        for file in scratch.iterdir():
            write_whole(folder / file.name, file.read_bytes())
        return done or opened.publish(
            f"{run}/finish",
            scratch,
            run=run,
            step="finish",
            config_hash=origins[0].config_hash,
            parents=origins,
            metrics={"seconds": time.monotonic() - started},
            owned=True,
        )


VERBS: dict[str, Callable[..., Manifest | None]] = {
    "prepare": prepare,
    "pretrain-value": pretrain_value,
    "train": train,
    "evaluate": evaluate,
    "steer": steer,
    "gate": gate,
    "deploy": deploy,
    "finish": finish,
}


def _step(
    run: str,
    store: str,
    output: str,
    step: str,
    parents: Sequence[str],
    work: Callable[[Workspace, Path], dict[str, Any]],
    *,
    again: bool = False,
) -> Manifest:
    """Open the run, return what is done already, or do the work in a temporary folder and publish it.

    again: do it also where it is done, and publish it in place of that.
    """
    started = time.monotonic()
    space = open_run(run, store, output)
    done = None if again else space.finished(step)
    if done is not None:
        return done
    origins = [space.store.manifest(f"{run}/{parent}") for parent in parents]
    with hidden_folder(space.folder, step) as folder:
        metrics = work(space, folder)
        metrics["seconds"] = time.monotonic() - started
        return space.store.publish(
            f"{run}/{step}",
            folder,
            run=run,
            step=step,
            config_hash=space.config.hash,
            parents=origins,
            metrics=metrics,
            owned=True,
        )


def load_config(recipe: str = "shapes-unet", overrides: Sequence[str] = (), *, file: str = "") -> Config:
    """The complete configuration of a recipe, a YAML file over it, and `path=value` overrides, for scripts.

    Raises ConfigError with every problem, those of extensions included.
    """
    from latentac.runs.resolution import resolve_all

    return resolve_all(recipe_fields(recipe, file, overrides)).config


def resolve_recipe(recipe: str, config: str = "", overrides: Sequence[str] = ()) -> Config:
    """The configuration that `recipe_fields` make, with the settings of extensions as they were given.

    Raises ConfigError with every problem, of extensions too: where something is wrong, everything is looked at.
    """
    fields = recipe_fields(recipe, config, overrides)
    try:
        return resolve(fields)
    except ConfigError:
        from latentac.runs.resolution import (
            resolve_all,  # imports torch, which a right configuration can do without here
        )

        resolve_all(fields)
        raise


def recipe_fields(recipe: str, config: str = "", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe, a YAML file over it ("" for none) and `path=value` overrides make together, not validated yet.

    Raises ConfigError.
    """
    if recipe not in RECIPES:
        raise ConfigError([Problem("recipe", recipe, "does not exist", suggestion(recipe, list(RECIPES)))])
    named = RECIPES[recipe]
    if config:
        named = merge(named, read_file(Path(config)))
    fields = merge(named, read_overrides(overrides))
    return {"project": default_project(recipe, config, named, fields), **fields}


def _given(fields: dict[str, Any], code: bytes) -> dict[str, str]:
    """What decides whether a run is the same: the configuration as it was given, and the user's own code."""
    return {"config": resolve(fields).hash, "package": packages.digest(code) if code else ""}


def _prepare(run: str, store: Store, output: Path, fields: dict[str, Any], code: bytes, started: float) -> Manifest:
    from latentac.runs.preparation import prepare as preparation
    from latentac.runs.preparation.rehearsal import rehearse
    from latentac.runs.resolution import resolve_all
    from latentac.sampling.devices import pick_device
    from latentac.worlds.prompts import load_prompts

    (output / run).mkdir(parents=True, exist_ok=True)
    with hidden_folder(output / run, "prepare") as temporary:
        folder = temporary
        if code:
            packages.unpack(code, folder / PACKAGE)
            packages.make_importable(folder / PACKAGE)
        extensions = resolve_all(fields)
        settings = extensions.config
        preparation.check_machine(settings, output)
        store.probe()
        prompts = load_prompts(settings.prompts)
        preparation.check_known(extensions.rewards)
        described = preparation.fetch_backbone(settings, folder / "backbone", output, store.url, len(prompts.train))
        rehearsed = rehearse(
            settings, folder / "backbone", prompts.train[0].text, pick_device(settings.backbone.device)
        )
        preparation.check_scoring(extensions.rewards, prompts, rehearsed.pictures[0], settings.train.block_images)
        _write(folder / "backbone.json", {**described, **rehearsed.to_dict()})
        _write(folder / "lengths.json", preparation.check_lengths(settings, prompts, rehearsed.backbone))
        _write(folder / "config.json", settings.model_dump())
        _write(folder / EXTENSIONS, extensions.described())
        (folder / "prompts.json").write_text(prompts.to_json())
        _write(folder / "environment.json", preparation.environment())
        return store.publish(
            f"{run}/prepare",
            folder,
            run=run,
            step="prepare",
            config_hash=settings.hash,
            metrics={"seconds": time.monotonic() - started, "given": _given(fields, code)},
            owned=True,
        )


def _write_finish(run: str, store: str, output: str, folder: Path) -> None:
    from latentac.runs.reporting.card import model_card
    from latentac.runs.reporting.report import write_report
    from latentac.system.reading import read_json

    folder.mkdir()
    report, summary = write_report(run, store, output)
    for path in (report, summary):
        shutil.copyfile(path, folder / path.name)
    (folder / "card.md").write_text(model_card(read_json(summary)), encoding="utf-8")


def _track(space: Workspace, scalars: Mapping[str, float]) -> None:
    """The numbers of the evaluation, to where those of the training are, at the last iteration."""
    from latentac.runs.hyperparameters import hyperparameters
    from latentac.runs.reporting.tracking import Tracker, make_trackers, tracking
    from latentac.runs.reporting.tracking.tensorboard import TensorBoard, all_but_evaluation

    folder, copies = space.folder / "tensorboard", f"tensorboard/{space.run}"
    if not folder.exists():  # another machine has trained
        space.store.read_files(copies, folder)
    board = TensorBoard(folder, all_but_evaluation)
    trackers: list[Tracker] = [board, *make_trackers(space.config, space.folder)]
    iteration = metric(space.store.manifest(f"{space.run}/train"), "iterations", int)
    with tracking(trackers, space.run, hyperparameters(space.config)):
        for tracker in trackers:
            tracker.log(iteration, scalars)
    space.store.write_files(folder, copies, exact=board.rewritten)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_gallery(folder: Path, sheets: dict[str, Any]) -> None:
    """`sheets`: arm -> contact sheet, "index" -> what gallery.json says of them, and "scores" -> scores.json."""
    (folder / "gallery").mkdir()
    for name, sheet in sheets.items():
        if name == "index":
            _write(folder / "gallery" / "gallery.json", sheet)
        elif name == "scores":
            _write(folder / "scores.json", sheet)
        else:
            sheet.save(folder / "gallery" / f"{name}.png")
