"""The public interface: `import latentac` is light, its names are the documented ones, and an experiment learns."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentac
from latentac import Prompt, PromptSet
from latentac.method.randomness import noise_for

SMALL = ["train.num_iterations=2", "train.images_per_iteration=16", "train.block_images=8", "kernel.num_steps=4"]
SMALL += [
    "pretrain.num_images=16",
    "pretrain.num_held_out_images=8",
    "pretrain.num_passes=1",
    "evaluation.num_images=8",
]


class Redness:
    """Share of red in the image."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return images[..., 0].mean((1, 2)) / 255


def small(**arguments: Any) -> latentac.Experiment:
    return latentac.Experiment(latentac.load_config("shapes-unet", SMALL), **arguments)


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_nothing_is_reported_to_the_makers_of_onnxruntime(given: str | None, kept: str) -> None:
    """diffusers imports it to save a pipeline: its telemetry is off by then, unless somebody has decided otherwise."""
    name = "ORT_DISABLE_TELEMETRY"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    script = f"import latentac.system.errors, os; print(os.environ[{name!r}])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kept


def test_every_public_name_can_be_imported() -> None:
    """About 40 names, each the object of the module that its line names."""
    assert 35 <= len(latentac.__all__) <= 45
    assert all(getattr(latentac, name) is not None for name in latentac.__all__)
    assert set(latentac.__all__) <= set(dir(latentac))
    with pytest.raises(AttributeError):
        getattr(latentac, "no_such_name")  # noqa: B009


def test_the_import_is_light() -> None:
    """No torch, and no package that takes long, until a name is used."""
    code = "import sys, latentac; print(sorted({'torch', 'numpy', 'pydantic', 'diffusers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_an_experiment_trains_on_a_callable() -> None:
    """Its own rewards and prompts take the place of the configured ones; only a weight above 0 is trained on."""
    prompts = PromptSet((Prompt("a red circle"), Prompt("a blue square")), (Prompt("a red square"),))
    experiment = small(rewards={"redness": Redness(), "again": Redness()}, weights={"again": 0.0}, prompts=prompts)
    assert [reward.weight for reward in experiment.config.rewards] == [1.0, 0.0]
    passes = experiment.pretrain()
    assert len(passes) == 1
    history = experiment.train(1)
    assert [entry["iteration"] for entry in history] == [1]
    assert history[0]["rewards"]["redness"] == history[0]["rewards"]["again"]
    assert len(experiment.train()) == 2
    found = experiment.evaluate(num_images=4)
    assert found["redness"]["n"] == 4
    assert 0 <= found["redness"]["low"] <= found["redness"]["mean"] <= found["redness"]["high"] <= 1
    with pytest.raises(ValueError, match="must come before"):
        experiment.pretrain()


def test_an_experiment_is_the_loop_of_a_run() -> None:
    """The same seed gives the same numbers, and the noise of an image depends on the seed and its place alone."""
    first, second = small(), small()
    assert [first.pretrain(), first.evaluate()] == [second.pretrain(), second.evaluate()]
    times = {"seconds", "rollout_seconds", "speed"}
    histories = [[{k: v for k, v in e.items() if k not in times} for e in each.train()] for each in (first, second)]
    assert histories[0] == histories[1]
    images = first.sample(["a red circle", "a blue square"], seed=3)
    assert np.array_equal(images[:1], first.sample(["a red circle"], seed=3))
    assert not np.array_equal(images, first.sample(["a red circle", "a blue square"], seed=4))
    assert len(noise_for([("evaluation", 0, 0)], 3, 4, first.policy.backbone.latent_shape)) == 1


def test_training_goes_on_from_the_last_weights() -> None:
    """Not from the average of the weights, which the policy has after the last iteration."""
    average = ["policy.ema_decay=0.5", "policy.learning_rate=1e-3"]
    short = latentac.Experiment(latentac.load_config("shapes-unet", [*SMALL, *average, "train.num_iterations=1"]))
    long = latentac.Experiment(latentac.load_config("shapes-unet", [*SMALL, *average]))
    short.train()
    history, expected = short.train(iterations=1), long.train()
    for name in ("reward_mean", "policy_loss", "gradient_norm"):
        assert [entry[name] for entry in history] == [entry[name] for entry in expected]


def test_a_weight_of_no_reward_is_refused() -> None:
    """In training and in steering; the error names it."""
    with pytest.raises(latentac.ConfigError, match="weights = 'greenness': is not a reward of this experiment"):
        small(rewards={"redness": Redness()}, weights={"greenness": 1.0})
    with pytest.raises(latentac.ConfigError, match="weights = 'greenness'"):
        small().steering(weights={"greenness": 1.0})


def test_steering_of_strength_0_is_plain_sampling() -> None:
    """And an unknown method is refused with the names that exist."""
    experiment = small()
    plain = experiment.sample(["a red circle"])
    assert np.array_equal(plain, experiment.sample(["a red circle"], steering=experiment.steering(strength=0.0)))
    steered = experiment.steering("best_of_n", particles=3)
    named = experiment.sample(["a red circle"], steering="best_of_n")
    assert np.array_equal(named, experiment.sample(["a red circle"], steering=experiment.steering("best_of_n")))
    assert steered.particles == 3
    with pytest.raises(latentac.ConfigError, match=r"no_method.*best_of_n|best_of_n"):
        experiment.steering("no_method")


def test_what_is_saved_is_served_and_loaded(tmp_path) -> None:
    """`policy/` is a diffusers pipeline that another experiment starts from."""
    experiment = small()
    experiment.save(tmp_path)
    config = latentac.load_config("shapes-unet", [*SMALL, f"backbone.source={tmp_path / 'policy'}"])
    again = latentac.Experiment(config)
    assert np.array_equal(again.sample(["a red circle"]), experiment.sample(["a red circle"]))
    assert sorted(path.name for path in (tmp_path / "critic").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_of_the_readme_improves_the_verifiers_reward(tmp_path: Path) -> None:
    """Base, trained, and steered: training helps by more than 0.05, and steering does no harm."""
    readme = Path(__file__).parents[2] / "README.md"
    (script,) = [
        block for block in re.findall(r"```python\n(.*?)```", readme.read_text(), re.S) if "Experiment" in block
    ]
    assert len([line for line in script.splitlines() if line.strip()]) <= 20
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    base, trained, steered = (each["shapes_verifier"]["mean"] for each in printed)
    assert trained > base + 0.05
    assert steered > trained - 0.05
    assert (tmp_path / "trained-model" / "policy" / "model_index.json").exists()
