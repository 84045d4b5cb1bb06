"""The steps as functions. Read this first: it is what latentac does, in order.

Each step is one function, one command of the command line and one component. It reads the artifacts of
the steps before from the store, does its work, publishes `<run>/<step>` and returns that manifest. A step whose
artifact is there already, for the same configuration, returns it at once.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.runs import package as packages
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation.mirrored import check_sources
from latentac.runs.preparation.publication import given_settings, publish_prepared
from latentac.runs.publishing import track, write_gallery, write_json, write_report_artifact
from latentac.runs.workspace import Workspace, default_store, open_run, person
from latentac.store import Manifest, open_store
from latentac.store.published import parse
from latentac.system.errors import ArtifactNotFound, ConfigError, Problem, TrainingError
from latentac.system.lifetime import refuse_links
from latentac.system.names import working_folder
from latentac.system.scratch import hidden_folder, write_whole
from latentac.system.steps import STEPS, needs

if TYPE_CHECKING:
    from latentac.runs.release.deploy import Prove

_log = logging.getLogger(__name__)


def prepare(
    run: str,
    store: str,
    output: str,
    recipe: str,
    *,
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
        check_sources(fields)
        return publish_prepared(run, opened, Path(output), fields, code, started)
    if published.metrics.get("given") != given_settings(fields, code):
        remedy = "Resume it with the options and the version that it was started with, or choose another run id"
        raise ConfigError([Problem("run", run, "exists with another configuration", remedy)])
    return published


def pretrain_value(run: str, store: str, output: str) -> Manifest:
    """Regress the critic on rollouts of the frozen policy. Publishes critic/, metrics.json, and the scored images that
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
        write_json(folder / "metrics.json", {"explained_variance": explained, "history": history})
        return {"explained_variance": explained}

    return _step(run, store, output, "pretrain-value", work)


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
        remedy = "Resume the run: it continues from its last checkpoint"
        raise TrainingError(f"training app of {run}", "succeeded, but its artifact is not in the store", remedy)
    return done


def evaluate(run: str, store: str, output: str) -> Manifest:
    """Base, trained and the model in production on held-out prompts and fixed seeds.

    Publishes evaluation.json and a gallery. If the model in production cannot be compared, it says why.
    """

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.evaluation.held_out import Sampling, compare
        from latentac.runs.release.incumbent import load_incumbent
        from latentac.runs.reporting.metrics import of_evaluation

        policies = {"base": space.base_policy(), "trained": space.trained_policy()}
        incumbent = load_incumbent(space, policies["base"])
        if incumbent.policy is not None:
            policies["incumbent"] = incumbent.policy
        if incumbent.problem:
            _log.warning("no comparison with the model in production: %s", incumbent.problem)
        reward, sampling = space.config.gate.reward, Sampling.of(space.config)
        given = (policies, space.critic("train"), space.rewards(), space.prompts)
        content, sheets = compare(space.config.evaluation, sampling, *given, main_reward=reward)
        write_json(folder / "evaluation.json", {**content, "production": incumbent.to_dict()})
        write_gallery(folder, sheets)
        track(space, of_evaluation(content, reward))
        figures = {arm: content[arm][reward]["mean"] for arm in policies}
        figures |= {"gain": content["difference"][reward]["mean"], "gain_low": content["difference"][reward]["low"]}
        for arm in policies.keys() - {"trained"}:
            figures[f"diversity_kept_{arm}"] = content["diversity"]["kept"][arm]["ratio"]
            figures[f"latency_ratio_{arm}"] = content["latency"]["ratio"][arm]["median"]
        return {name: value for name, value in sorted(figures.items()) if math.isfinite(value)}

    return _step(run, store, output, "evaluate", work)


def steer(run: str, store: str, output: str) -> Manifest:
    """Reward against NFE of each way to steer the trained policy. Publishes steering.json and a gallery."""

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.evaluation.arms import best_arm, plain_arm
        from latentac.evaluation.benchmark import run_benchmark
        from latentac.evaluation.held_out import Sampling

        config, reward = space.config, space.config.gate.reward
        rows, sheets = run_benchmark(
            config.evaluation,
            config.steering,
            Sampling.of(config),
            space.trained_policy(),
            space.critic("train"),
            space.rewards(),
            prompts=space.prompts.held_out,
            main_reward=reward,
        )
        write_json(folder / "steering.json", rows)
        write_gallery(folder, sheets)
        plain, best = plain_arm(rows, reward), best_arm(rows, reward)
        return {"arms": len(rows), "plain": plain["mean"], "best": best["mean"], "best_nfe": best["nfe"]}

    return _step(run, store, output, "steer", work)


def gate(run: str, store: str, output: str, *, overrides: Sequence[str] = ()) -> Manifest:
    """Decide `promote` or `hold`. Publishes gate.json and the reasons as reasons.md; the decision is in the manifest's
    metrics too.

    overrides: `gate.field=value` over the run's own bounds: decide again from the published evaluation, and publish
    that decision in place of the one before, which it names. Without any, a decision that is there stays.
    """

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.runs.release.gate import markdown

        decision = decide(space, overrides)
        write_json(folder / "gate.json", decision)
        (folder / "reasons.md").write_text(markdown(decision, run), encoding="utf-8")
        for reason in decision["reasons"]:
            _log.info("%s: %s", decision["decision"], reason)
        passed = sum(check["passed"] for check in decision["checks"])
        return {"decision": decision["decision"], "passed": passed, "failed": len(decision["checks"]) - passed}

    return _step(run, store, output, "gate", work, again=bool(overrides))


def decide(space: Workspace, overrides: Sequence[str] = ()) -> dict[str, Any]:
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
    decision = rule.decide(bounds, space.config.reward_names, evaluation, production)
    before, published = space.decision(), space.finished("gate")
    earlier = rule.former(before, published.created) if before and published else []
    record = {"overrides": changed, "by": person() if overrides else None, "former": earlier}
    return {**decision, "production": version, **record}


def deploy(run: str, store: str, output: str, *, prove: "Prove | None" = None, force: bool = False) -> Manifest:
    """Export the model, serve it with KServe on loopback, ask it for a steered image, and make it the production one
    of its project.

    prove: serves and questions it elsewhere (a cluster's rollout) instead. force: also where the gate holds it, and
    also where it was deployed before. Publishes models/<version>, registry/<project>/production.json, and
    deployment.json with the image. Raises ConfigError where the gate holds it and nothing forces it.
    """
    space = open_run(run, store, output)
    done, decided = space.finished("deploy"), space.store.manifest(f"{run}/gate")
    reasons = _reasons_against(space, force)
    current = done is not None and decided.digest in [parent.sha256 for parent in done.parents]

    def work(space: Workspace, folder: Path) -> dict[str, Any]:
        from latentac.runs.release.deploy import on_loopback, release

        content, image = release(space, prove or on_loopback, reasons)
        write_json(folder / "deployment.json", content)
        (folder / "image.png").write_bytes(image)
        return {"version": content["version"], "image_sha256": content["image_sha256"]}

    return _step(run, store, output, "deploy", work, again=force or not current)


def _reasons_against(space: Workspace, force: bool) -> list[str]:
    """What the gate says against deploying the run: nothing, or what is overridden. Raises ConfigError."""
    from latentac.runs.release.gate import against
    from latentac.runs.release.incumbent import in_production
    from latentac.system.commands import typed

    decision = space.decision() or {"decision": "hold", "reasons": ["its decision is of another configuration"]}
    reasons, now = against(decision), in_production(space)
    if now != decision.get("production", now):
        reasons.append(
            f"it was decided against {decision['production'] or 'nothing'}, and {now or 'nothing'} serves now"
        )
    if reasons and not force:
        place = (space.store.url, str(space.folder.parent))
        again = typed("gate", space.run, *place, "--set", "gate.FIELD=VALUE")
        remedy = f"Decide again with other bounds ({again}), or put it in production all the same "
        remedy += f"({typed('deploy', space.run, *place, '--force')})."
        raise ConfigError([Problem("run", space.run, f"is not to be deployed: {'; '.join(reasons)}", remedy)])
    for reason in reasons:
        _log.warning("forced against the gate's decision: %s", reason)
    return reasons


def finish(run: str, store: str, output: str) -> Manifest | None:
    """Write the report and a model card of what the run has published, complete or not, and publish both.

    Publishes `<run>/finish` with report.html, summary.json and card.md, which also lie in `<output>/<run>/` then. It
    is made anew when a step has published since, so a run that was resumed is reported to its end. None where nothing
    is published, not even by `prepare`.
    """
    started = time.monotonic()
    folder = working_folder(run, output)
    url = store or default_store(output)
    opened = open_store(url)
    known = set(opened.keys(run))
    origins = [opened.manifest(f"{run}/{step}") for step in FUNCTIONS if step != "finish" and f"{run}/{step}" in known]
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
            write_report_artifact(run, url, output, scratch)
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


FUNCTIONS: dict[str, Callable[..., Manifest | None]] = {step.name: globals()[step.function] for step in STEPS}


def _step(
    run: str,
    store: str,
    output: str,
    step: str,
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
    origins = [space.store.manifest(f"{run}/{parent}") for parent in needs(step)]
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
