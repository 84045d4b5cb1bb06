"""Rows per forward pass, memory that runs out, precision, and Adam at any number of dimensions."""

import math
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentac.backbones import load_backbone
from latentac.backbones.precision import MasterWeights, compute_dtype
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.method.randomness import noise_for
from latentac.sampling import devices
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import Keep, rollout
from latentac.sampling.rows import Rows
from latentac.system.errors import ConfigError, ResourceError, TrainingError
from latentac.training.policy_learning import _adam_eps, _share_below
from latentac.training.value_pretraining import new_critic
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac.trainers import CPU, PAIRS, PROMPTS, SHIPPED, make_config, make_trainer, rolled_out, shipped


def gradient_of(trainer: Any) -> Tensor:
    """The policy's gradient of the first update, flat."""
    blocks, *_ = trainer._credit([rolled_out(trainer, index) for index in range(2)])
    trainer.policy_learner._gradients(blocks, 0, 0)
    return torch.cat([p.grad.flatten() for p in trainer.policy_learner.parameters.values() if p.grad is not None])


def close(first: Tensor, second: Tensor, tolerance: float) -> None:
    scale = second.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(first / scale, second / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("name", SHIPPED)
def test_rows_per_forward_change_the_gradient_by_rounding_only(name, adaptation):
    """One row, three (which divide neither a block nor an update's share), and all at once, with the value gradient and
    the penalty towards the base."""
    sections: dict[str, Any] = {"algorithm": {"value_gradient": 2.0, "prediction_kl": 0.1}}
    sections["policy"] = {"adaptation": adaptation}
    whole = gradient_of(make_trainer(name, **sections))
    for rows in (1, 3):
        close(gradient_of(make_trainer(name, train={"micro_images": rows}, **sections)), whole, 1e-4)


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("name", SHIPPED)
def test_gradient_checkpointing_changes_nothing(name, adaptation):
    sections: dict[str, Any] = {"policy": {"adaptation": adaptation}}
    plain = make_trainer(name, **sections)
    saving = make_trainer(name, **sections)
    network: Any = saving.policy.backbone.module
    network.enable_gradient_checkpointing()
    close(gradient_of(saving), gradient_of(plain), 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # torch.compile warns within itself, and fails where warnings are errors
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", SHIPPED)
def test_compiled_blocks_compute_the_same(name):
    """Prediction, taps and gradients, but for rounding."""
    found = []
    for mode in ("none", "blocks"):
        extension = Extension.model_validate({"use": name, "compile": mode})
        backbone = load_backbone(extension, builtin_pipeline(f"shapes-{name}"), CPU)
        backbone.module.requires_grad_(True)
        latents = noise_for([(place,) for place in range(4)], 0, 1, backbone.latent_shape)[:, 0]
        prediction, taps = backbone.predict(latents, torch.full((4,), 0.7), backbone.encode(PROMPTS))
        prediction.noise.square().mean().backward()
        gradients = [p.grad.flatten() for p in backbone.module.parameters() if p.grad is not None]
        found.append([prediction.noise, *taps.values(), torch.cat(gradients)])
    for plain, compiled in zip(*found, strict=True):
        close(compiled.detach(), plain.detach(), 1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_rollout_in_parts_is_the_whole_one(name):
    """All that a trajectory keeps, and every row under its own prompt."""
    config = make_config(name)
    backbone = shipped(name)
    critic = new_critic(config, Policy(backbone, KERNELS.make(config.kernel)))
    nn.init.normal_(critic.heads.weight, std=0.1)
    noise = noise_for([(place,) for place in range(4)], 0, 3, backbone.latent_shape)
    found = []
    for limit in (None, 3):
        policy = Policy(backbone, KERNELS.make(config.kernel), Rows(limit))
        keep = Keep(features=True, value_gradient=torch.ones(1))
        found.append(rollout(policy, critic, backbone.encode(PROMPTS), noise, keep=keep))
    whole, parts = found
    assert whole.value_gradients is not None
    assert parts.value_gradients is not None
    pairs = [(getattr(whole, name), getattr(parts, name)) for name in ("latents", "means", "log_probs", "values")]
    pairs += [(whole.value_gradients.gradients, parts.value_gradients.gradients)]
    pairs += [(whole.features[key], parts.features[key]) for key in whole.features]
    for first, second in pairs:
        assert first.shape == second.shape
        close(second, first, 1e-4)
    assert torch.equal(whole.value_gradients.known, parts.value_gradients.known)
    assert torch.equal(whole.conditioning.tokens, parts.conditioning.tokens)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_first_ratio_is_bitwise_1_with_the_same_rows(name, adaptation, precision):
    """In each precision, also in later iterations, when the weights are no longer those of the folder."""
    backbone = load_backbone(
        Extension.model_validate({"use": name, "precision": precision}), builtin_pipeline(f"shapes-{name}"), CPU
    )
    sections: dict[str, Any] = {"policy": {"adaptation": adaptation, "warmup_updates": 0, "learning_rate": 1e-4}}
    train = {"micro_images": 2, "divergence": {"max_kl": 1e3, "max_clip_share": 1.0}}
    trainer = make_trainer(name, backbone=backbone, train=train, **sections)
    for _ in range(2):
        entry = trainer.iterate()
        assert entry["first_ratio_deviation"] == 0
        assert entry["rows_per_forward"] == 2
    assert entry["ratio_deviation"] > 0


class Small:
    """A denoiser on a device that has memory for `most` rows."""

    def __init__(self, backbone: Any, most: int) -> None:
        self._backbone, self.most = backbone, most
        self.latent_shape = backbone.latent_shape
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Any) -> Any:
        self.asked.append(len(latents))
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._backbone.predict(latents, sigma, conditioning)


def test_memory_that_runs_out_halves_the_rows_once(caplog):
    """Training goes on, the limit is kept, and the gradient is that of the whole batch."""
    whole = gradient_of(make_trainer(train={"micro_images": 4}))
    small = Small(shipped("unet").clone(), 1)
    trainer = make_trainer(backbone=small, train={"micro_images": 4})
    close(gradient_of(trainer), whole, 1e-4)
    assert trainer.policy.rows.limit == 1
    assert "rows per forward pass do not fit into memory: from now on 1" in caplog.text
    small.asked.clear()
    trainer.iterate()
    assert set(small.asked) == {1}


def test_one_image_that_does_not_fit_is_one_error():
    with pytest.raises(ResourceError, match=r"memory: is too small for one image per forward pass .*gradient_checkp"):
        make_trainer(backbone=Small(shipped("unet").clone(), 0)).iterate()


class Imprecise(Small):
    """A denoiser that computes something else where a gradient is taken."""

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Any) -> Any:
        offset = 1e-2 if torch.is_grad_enabled() else 0.0
        return self._backbone.predict(latents + offset, sigma, conditioning)


def test_a_first_ratio_beyond_its_share_of_the_clip_range_ends_training():
    """With the deviation, the bound and a remedy. A larger share lets it pass."""
    backbone = Imprecise(shipped("unet").clone(), 99)
    with pytest.raises(TrainingError, match=r"ratio deviates from 1 by .* 0\.1 of the clip range .*precision=float32"):
        make_trainer(backbone=backbone).iterate()
    backbone = Imprecise(shipped("unet").clone(), 99)
    trainer = make_trainer(backbone=backbone, train={"divergence": {"max_first_ratio_share": 1e6, "max_kl": 1e6}})
    assert trainer.iterate()["first_ratio_deviation"] > 0


def test_masters_keep_what_bfloat16_would_round_away():
    """Steps of 1e-4 on weights of 1 are below half a unit of bfloat16 (2^-9). Their sum is not."""
    module = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    masters = MasterWeights(module)
    optimizer = torch.optim.SGD(masters.tensors.values(), lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        for _ in range(2):  # two micro-batches, whose gradients add up
            (module(torch.ones(1, 4, dtype=torch.bfloat16)).sum() / 2).backward()
        assert module.weight.grad is None
        gradient = masters.tensors["weight"].grad
        assert gradient is not None
        assert torch.equal(gradient, torch.ones(1, 4))
        optimizer.step()
        masters.publish()
    torch.testing.assert_close(masters.tensors["weight"].detach(), torch.full((1, 4), 0.99))
    assert torch.equal(module.weight.detach(), masters.tensors["weight"].detach().bfloat16())


def test_gradients_of_micro_batches_add_up_in_float32():
    """1 + 2^-9 is 1 in bfloat16."""
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    masters = MasterWeights(module)
    for value in (1.0, 2.0**-9):
        module(torch.full((1, 1), value, dtype=torch.bfloat16)).backward()
    gradient = masters.tensors["weight"].grad
    assert gradient is not None
    assert float(gradient) == 1 + 2.0**-9


def test_a_float32_weight_is_its_own_master():
    module = nn.Linear(2, 2)
    masters = MasterWeights(module)
    assert all(masters.tensors[name] is parameter for name, parameter in module.named_parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_saved_in_bfloat16_training_are_the_masters(name, tmp_path):
    """In float32, so that a small step is in the files though the network rounds it away."""
    backbone = load_backbone(
        Extension.model_validate({"use": name, "precision": "bfloat16"}), builtin_pipeline(f"shapes-{name}"), CPU
    )
    backbone.adapt(PolicySettings())
    masters = MasterWeights(backbone.module)
    key = max(masters.tensors, key=lambda each: masters.tensors[each].numel())
    with torch.no_grad():
        masters.tensors[key].mul_(1 + 2.0**-12)
    masters.publish()
    backbone.save(tmp_path / "saved")
    whole = load_backbone(Extension.model_validate({"use": name, "precision": "float32"}), tmp_path / "saved", CPU)
    assert torch.equal(dict(whole.module.named_parameters())[key], masters.tensors[key])


def moved(weights: Tensor, noise: Tensor, eps: float) -> Tensor:
    """The steps of ten updates that make `noise` more likely, by log-probabilities averaged over dimensions."""
    own = nn.Parameter(weights.clone())  # one per dimension
    optimizer = torch.optim.AdamW([own], 1e-3, (0.9, 0.95), eps=eps, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        (-(noise * own).mean() * 1e-6).backward()
        optimizer.step()
    return own.detach() - weights


def test_adam_moves_as_far_in_a_hundred_times_the_dimensions():
    """Tiled dimensions move as those that they are copies of; with a fixed eps they hardly move."""
    generator = torch.Generator().manual_seed(0)
    weights, noise = torch.randn(256, generator=generator), torch.randn(256, generator=generator)
    eps = {}
    for dimensions in (256, 25_600):
        backbone = Small(shipped("unet").clone(), 99)
        backbone.latent_shape = (dimensions, 1, 1)
        eps[dimensions] = _adam_eps(Policy(backbone, KERNELS.build("ddim")))
    assert eps[256] == 1e-8
    few = moved(weights, noise, eps[256])
    many = moved(weights.repeat(100), noise.repeat(100), eps[25_600])
    torch.testing.assert_close(many, few.repeat(100), rtol=1e-3, atol=1e-9)
    fixed = moved(weights.repeat(100), noise.repeat(100), 1e-8)
    assert float(fixed.abs().mean()) < 0.2 * float(many.abs().mean())


def test_the_share_of_gradient_entries_below_eps_is_logged():
    """It counts entries of all weights together, by their absolute value."""
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(5))]
    weights[0].grad, weights[1].grad = torch.tensor([0.0, -2e-8, 9e-9]), torch.tensor([-9e-9])
    assert float(_share_below(weights, 1e-8, lambda counts: counts)) == 0.75
    assert 0 <= make_trainer().iterate()["gradient_below_eps"] < 1


@pytest.mark.parametrize(
    ("wanted", "gpus", "blocks", "expected"),
    [
        ("auto", 0, 8, 2),
        ("auto", 0, 3, 2),
        ("auto", 0, 1, 1),
        ("auto", 1, 8, 1),
        ("auto", 4, 8, 4),
        ("auto", 4, 6, 4),
        (3, 0, 6, 3),
        (2, 4, 8, 2),
    ],
)
def test_workers_follow_the_gpus(monkeypatch, wanted, gpus, blocks, expected):
    """As many as divide the blocks."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices.count_workers(wanted, blocks, "cuda" if gpus else "cpu") == expected


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"train\.num_workers = 2: each worker needs a GPU, and 1 is visible.*auto"):
        devices.count_workers(2, 8, "cuda")


def test_precision_follows_the_device():
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"float16.*not supported on a CPU"):
        compute_dtype("float16", CPU)


@pytest.mark.parametrize(("limit", "count", "sizes"), [(None, 5, [5]), (2, 5, [2, 2, 1]), (8, 5, [5])])
def test_parts_cover_every_row_once(limit: int | None, count: int, sizes: Sequence[int]):
    parts = Rows(limit).parts(count)
    assert [len(part) for part in parts] == sizes
    assert [row for part in parts for row in part] == list(range(count))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1])
def test_a_guided_policy_trains_on_its_own_log_probabilities(pair):
    """With classifier-free guidance the first ratio is bitwise 1, and the means are those of the guided prediction."""
    name, kernel = pair
    trainer = make_trainer(name, kernel={"use": kernel}, policy={"guidance_scale": 3.0})
    block = rolled_out(trainer, 0)
    state, levels = block.trajectory.latents[:, 0], block.trajectory.sigmas
    backbone, conditioning = shipped(name), block.trajectory.conditioning
    with torch.no_grad():
        given, _ = backbone.predict(state, levels[0].expand(2), conditioning)
        empty, _ = backbone.predict(state, levels[0].expand(2), backbone.encode(["", ""]))
    noise = empty.noise + 3 * (given.noise - empty.noise)
    clean = empty.clean + 3 * (given.clean - empty.clean)
    mean = trainer.policy.kernel.transition(
        state, type(given)(clean, noise), levels[0].expand(2), levels[1].expand(2)
    ).mean
    torch.testing.assert_close(block.trajectory.means[:, 0], mean, rtol=1e-3, atol=1e-4)
    assert trainer.iterate()["first_ratio_deviation"] == pytest.approx(0, abs=1e-7)
    assert math.isfinite(trainer.history[0]["kl"])
