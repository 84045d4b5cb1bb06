"""What `evaluate` and `steer` publish beside their numbers, and that each is one work with one time left."""

from typing import Any

import pytest
import torch

from latentac.config.fields import merge
from latentac.config.schema import Config
from latentac.config.validation import resolve
from latentac.critic import Critic
from latentac.evaluation.benchmark import arms, run_benchmark
from latentac.evaluation.held_out import Sampling, compare
from latentac.runs.workspace import Workspace
from latentac.system import progress
from tests.latentac.workers import prepared

pytestmark = pytest.mark.slow

SMALL = (
    "evaluation={num_images: 8, num_gallery_prompts: 3, num_diversity_prompts: 2, images_per_prompt: 2}",
    "steering.num_images=8",
)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepared(tmp_path_factory.mktemp("evaluation"), *SMALL)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A line for every update, and what was printed so far."""
    plain = progress._Lines

    def every_time(total: int | None, description: str, unit: str, done: int) -> Any:
        import sys

        return plain(total, description, unit, sys.stderr, done=done, every=0.0)

    monkeypatch.setattr(progress, "_display", every_time)
    return lambda: capsys.readouterr().err.splitlines()


def last(found: list[str]) -> dict[str, str]:
    """What was done when each part ended, in their order."""
    return {line.split("  ")[0]: line.split("  ")[1] for line in found}


def test_evaluation_is_one_work_of_all_policies(space: Workspace, lines: Any) -> None:
    """Each policy in turn, then training prompts, then diversity and latency: one count to 100 %."""
    policy = space.base_policy()
    policies = {"base": policy, "trained": policy}
    config, critic = space.config, space.critic("pretrain-value")
    given = (config.evaluation, Sampling.of(config), policies, critic, space.rewards(), space.prompts)
    content, sheets = compare(*given, main_reward=config.gate.reward)
    found = lines()
    assert list(last(found).items()) == [
        ("evaluate, policy 1 of 2: base", "8/22 [36%]"),
        ("evaluate, policy 2 of 2: trained", "16/22 [73%]"),
        ("evaluate, trained, on training prompts", "18/22 [82%]"),
        ("evaluate, diversity and latency", "22/22 [100%]"),
    ]
    assert all("left" in line for line in found)
    assert "0s left" in found[-1]
    (name,) = space.config.reward_names
    scores = sheets["scores"]
    assert len(scores["prompts"]) == len(scores["rewards"]["trained"][name]) == 8
    assert sum(scores["rewards"]["trained"][name]) / 8 == pytest.approx(content["trained"][name]["mean"])
    assert scores["noise"] == {
        "seed": space.config.seed,
        "num_steps": space.config.kernel.num_steps,
        "latent_shape": list(policy.backbone.latent_shape),
    }
    index = sheets["index"]
    assert index["rewards"]["base"][name] == scores["rewards"]["base"][name][:3]
    assert index["prompts"] == scores["prompts"][:3]


def benchmark(space: Workspace, config: Config, critic: Critic) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return run_benchmark(
        config.evaluation,
        config.steering,
        Sampling.of(config),
        space.base_policy(),
        critic,
        space.rewards(),
        prompts=space.prompts.held_out,
        main_reward=config.gate.reward,
    )


def test_steering_says_which_arm_of_how_many(space: Workspace, lines: Any) -> None:
    """`arm 3 of 9` with one time left for the whole step, in evaluations, which is what arms differ in."""
    _, sheets = benchmark(space, space.config, space.critic("pretrain-value"))
    found, count = lines(), len(arms(space.config.steering, [1.0]))
    parts = list(last(found))
    assert parts[0] == f"steer, arm 1 of {count}: plain"
    assert [part.partition(":")[0] for part in parts[:-1]] == [
        f"steer, arm {n} of {count}" for n in range(1, count + 1)
    ]
    assert parts[-1] == "steer, gallery"
    assert "[100%]  0s left" in found[-1]
    assert all("evaluations" in line for line in found)
    done = [int(line.partition("/")[0].rpartition("  ")[2]) for line in found]
    assert done == sorted(done)
    assert set(sheets["index"]["rewards"]) == {"steered"}


def test_the_gallery_shows_the_arm_that_was_best(space: Workspace) -> None:
    """By the gate's reward, whichever method that is and wherever it stands in the configuration."""
    sizes: dict[str, Any] = {"evaluation": {"num_gallery_prompts": 8}}
    own: dict[str, Any] = {
        "value_gradient": {"sweep": [0.01], "sweep_particles": []},
        "best_of_n": {"sweep_particles": [8]},
    }
    for methods in (["best_of_n", "value_gradient"], ["value_gradient", "best_of_n"]):
        sizes["steering"] = {"num_images": 8, "methods": [{"use": name, **own[name]} for name in methods]}
        config = resolve(merge(space.config.model_dump(), sizes))
        critic = space.critic("pretrain-value")
        torch.manual_seed(0)
        torch.nn.init.normal_(critic.heads.weight, std=0.5)
        rows, sheets = benchmark(space, config, critic)
        (name,) = config.reward_names
        means = {row["method"]: row["mean"] for row in rows if row["method"] != "none"}
        assert len(set(means.values())) == 2
        shown = sheets["index"]["rewards"]["steered"][name]
        assert sum(shown) / 8 == pytest.approx(max(means.values()))
