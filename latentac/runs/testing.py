"""Contract tests for extensions of your own: what the tables' own rows are held to, as functions to call in a test.

    from latentac.runs import testing

    def test_my_reward_keeps_the_contract():
        testing.check_reward("my_package.rewards:Sharpness", radius=3)

Each function takes a row's name or `module:Class` and the extension's settings, needs no GPU and seconds, and raises
AssertionError that says what does not hold. They stand on the embedded world's pipelines, which ship with the package.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentac.backbones import BACKBONES, Denoiser, load_backbone
from latentac.config.learning import Critic as CriticSettings
from latentac.config.learning import Policy as PolicySettings
from latentac.config.schema import Reward
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.method.diffusion import GaussianTransition, Kernel, forward_noise, num_stochastic_steps
from latentac.method.randomness import noise_for
from latentac.method.records import Conditioning, Minibatch
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout, steered_rollout
from latentac.sampling.rows import Rows
from latentac.sampling.steering import STEERING, Steering, SteeringSettings
from latentac.sampling.steering.run import SteeringRun
from latentac.training.algorithms import ALGORITHMS, Algorithm
from latentac.worlds.builtin import builtin_pipeline
from latentac.worlds.prompts import Prompt

PROMPTS = ("a red circle", "two blue squares", "a green triangle above a red square", "a cyan circle and a red square")
_CPU = torch.device("cpu")
_MOST_PARTICLES = 3
_STEPS = 4


def check_reward(
    use: str, *, images: np.ndarray | None = None, prompts: Sequence[str] = PROMPTS, **own: Any
) -> ConfiguredReward:
    """One finite number per image, the same at every call, that depends on its own image and prompt only; and the
    right answers to the images that it knows, if it has any.

    images: uint8 [B, H, W, 3] to score, by default random ones of 64 x 64; prompts: B texts. Returns the reward.
    """
    (reward,) = load_rewards([Reward.model_validate({"use": use, "name": "tested", **own})])
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (len(prompts), 64, 64, 3), dtype=np.uint8)
    asked = [Prompt(text, "all") for text in prompts]
    values, order = reward(images, asked), list(range(len(asked)))[::-1]
    _holds(np.array_equal(values, reward(images, asked)), "the same images have the same rewards at every call")
    permuted = reward(images[order], [asked[place] for place in order])
    _holds(np.allclose(permuted, values[order], atol=1e-5), "permuting the batch permutes the rewards")
    alone = np.concatenate([reward(images[place : place + 1], asked[place : place + 1]) for place in order[::-1]])
    _holds(np.allclose(alone, values, atol=1e-5), "an image alone has the reward that it has in a batch")
    known = reward.known()
    if known is not None:
        examples, texts, answers = known
        found = reward(examples, [Prompt(text, "all") for text in texts])
        _holds(
            np.allclose(found, answers, rtol=0.05, atol=1e-3), f"known() gives {answers.tolist()}, not {found.tolist()}"
        )
    return reward


def check_kernel(use: str, **own: Any) -> Kernel:
    """A density that is the normal distribution's, stochastic first steps, and a std that no latents change."""
    kernel: Kernel = KERNELS.build(use, **own)
    backbone = _shipped(kernel.path)
    sigmas = backbone.schedule(_STEPS)
    count = num_stochastic_steps(kernel, sigmas)
    _holds(count > 0, "at least the first step is stochastic")
    latents, conditioning = _noise(backbone)[:, 0], backbone.encode(PROMPTS)
    sigma, after = sigmas[0].expand(len(latents)), sigmas[1].expand(len(latents))
    with torch.no_grad():
        prediction, _ = backbone.predict(latents, sigma, conditioning)
        transition = kernel.transition(latents, prediction, sigma, after)
    _holds(torch.equal(transition.std, kernel.std(sigma, after)), "the transition's std is `std(sigma, sigma_next)`")
    drawn = transition.sample(_noise(backbone, seed=1)[:, 0])
    normal = torch.distributions.Normal(transition.mean, transition.std.reshape(-1, 1, 1, 1))
    expected = normal.log_prob(drawn).flatten(1).sum(1)
    _holds(torch.allclose(transition.log_prob(drawn), expected, rtol=1e-4, atol=1e-2), "log_prob is the normal density")
    return kernel


def check_algorithm(use: str, **own: Any) -> Algorithm:
    """Credit is one finite number per image and step; a step down the loss makes transitions of positive advantage more
    likely and those of negative advantage less likely, and one of advantage 0 gets no gradient."""
    algorithm: Algorithm = ALGORITHMS.build(use, torch.ones(1), **own)
    images, steps = 4 * algorithm.group_size, 3
    prompts = torch.arange(images) // algorithm.group_size
    values = _draw(images, steps, 1 if algorithm.uses_critic else 0, seed=1)
    credit = algorithm.credit(_draw(images, 1), values, prompts)
    _holds(credit.advantages.shape == (images, steps), f"advantages are [B, S], not {list(credit.advantages.shape)}")
    _holds(bool(credit.advantages.isfinite().all()), "advantages are finite")
    _holds(
        credit.returns.shape == values.shape, f"returns have the shape of the values, not {list(credit.returns.shape)}"
    )
    _holds(all(isinstance(kept, Tensor) for kept in algorithm.memory.values()), "memory holds tensors, for checkpoints")

    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.0])
    minibatch, std = _minibatch(advantages)
    mean = minibatch.old_means.clone().requires_grad_()
    algorithm.loss(GaussianTransition(mean, std), minibatch).loss.backward()
    _holds(mean.grad is not None, "the loss has a gradient by the transition's mean")
    gradient = torch.zeros_like(mean) if mean.grad is None else mean.grad
    norms = gradient.flatten(1).norm(dim=1)
    _holds(
        torch.equal(norms > 0, advantages != 0),
        "a transition has a gradient where its advantage is not 0, and only there",
    )
    step = mean.detach() - 1e-3 * gradient / norms.clamp(min=1e-12).reshape(-1, 1, 1, 1)
    change = GaussianTransition(step, std).log_prob(minibatch.next_latents) - minibatch.old_log_probs
    _holds(
        change.sign().tolist() == advantages.sign().tolist(), "a positive advantage raises its transition's log-prob"
    )
    return algorithm


def check_steering(use: str, **own: Any) -> Steering:
    """At weight 0 the image is bitwise the plain one; steered, an image does not depend on the others of its batch;
    it acts at the steps that it names."""
    settings = STEERING.settings(Extension.model_validate({"use": use, **own}))
    _holds(
        isinstance(settings, SteeringSettings), "its Settings derive from latentac.sampling.steering.SteeringSettings"
    )
    backbone = _shipped("variance_preserving")
    # On some processors a row's rounding depends on the number of rows, so that is the same in every forward pass.
    policy = Policy(backbone, KERNELS.build("ddim"), Rows(_MOST_PARTICLES * len(PROMPTS)))
    critic = _opinionated(backbone)
    conditioning, uniforms = backbone.encode(PROMPTS), torch.full((len(PROMPTS), _STEPS), 0.5)

    def steered(weight: float, particles: int, images: slice = slice(None)) -> Tensor:
        steering: Steering = STEERING.build(use, torch.full((1,), weight), particles, **own)
        noise = torch.stack([_noise(backbone, seed=seed) for seed in range(particles)], 1)[images]
        rows = torch.arange(len(PROMPTS))[images]
        run = SteeringRun(steering, uniforms[images])
        return steered_rollout(policy, critic, conditioning.rows(rows), noise, run).latents

    plain = rollout(policy, critic, conditioning, _noise(backbone)).latents
    for particles in (1, _MOST_PARTICLES):
        _holds(torch.equal(steered(0.0, particles), plain), "weight 0 is bitwise the plain rollout")
    together, apart = steered(5.0, 2), torch.cat([steered(5.0, 2, slice(place, place + 1)) for place in range(4)])
    _holds(torch.allclose(together, apart, rtol=1e-3, atol=1e-3), "an image does not depend on the others of its batch")
    made: Steering = STEERING.build(use, torch.ones(1), 3, **own)
    chosen = made.select(_draw(5, 3, 1))
    _holds(chosen.shape == (5,) and bool(((chosen >= 0) & (chosen < 3)).all()), "select chooses one particle per image")
    _holds(set(made.steps(10)) <= set(range(10)), "steps(K) names steps of a rollout")
    return made


def check_critic_body(use: str, **own: Any) -> Critic:
    """A finite summary [B, width] of any state, a gradient by the latents, and the same after saving and loading."""
    backbone = _shipped("variance_preserving")
    critic = _opinionated(backbone, Extension.model_validate({"use": use, **own}))
    latents, sigma, conditioning = _state(backbone)
    latents.requires_grad_()
    prediction, taps = backbone.predict(latents, sigma, conditioning)
    features = critic.features(latents, prediction, taps)
    _holds(all(len(feature) == len(latents) for feature in features.values()), "features have a row per state")
    summary = critic.body(features, sigma, conditioning)
    _holds(summary.shape == (len(latents), critic.body.width), "the summary is [B, width]")
    values = critic(features, sigma, conditioning)
    _holds(bool(values.isfinite().all()), "values are finite")
    (gradient,) = torch.autograd.grad(values.sum(), latents)
    _holds(bool((gradient.flatten(1).abs().amax(1) > 0).all()), "values have a gradient by the latents")
    with tempfile.TemporaryDirectory() as folder:
        critic.save(Path(folder))
        loaded = Critic.load(Path(folder), backbone, own=True)
    with torch.no_grad():
        _holds(torch.equal(loaded(features, sigma, conditioning), values), "a saved critic gives the same values")
    return critic


def check_backbone(use: str, folder: Path | None = None, **own: Any) -> Denoiser:
    """The prediction mixes back to the latents, taps are as announced, a clone learns alone, adapters train and what is
    saved predicts as what was trained.

    folder: a diffusers pipeline for it; by default the embedded world's pipeline of that noise process.
    """
    extension = Extension.model_validate({"use": use, **own})
    path = BACKBONES.load(use).path
    backbone = load_backbone(extension, folder or _pipeline(path), _CPU)
    state = _state(backbone)
    latents, sigma = state[:2]
    with torch.no_grad():
        prediction, taps = backbone.predict(*state)
    _holds(
        prediction.clean.shape == latents.shape and prediction.clean.dtype == torch.float32,
        "x0 is float32 [B, *latent]",
    )
    mixed = forward_noise(prediction.clean, prediction.noise, sigma, backbone.path)
    _holds(torch.allclose(mixed, latents, rtol=1e-3, atol=1e-3), "alpha x0 + sigma n is the noisy latents")
    shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items()}
    _holds(shapes == backbone.tap_shapes, f"taps are as tap_shapes says: {shapes}, not {backbone.tap_shapes}")
    levels = backbone.schedule(_STEPS)
    _holds(len(levels) == _STEPS + 1 and float(levels[-1]) == 0 and bool((levels.diff() < 0).all()), "levels fall to 0")
    images = backbone.decode(latents)
    _holds(images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3, "images are uint8 [B, H, W, 3]")
    for adaptation in ("full", "lora"):
        _check_training(extension, backbone.clone(), state, PolicySettings.model_validate({"adaptation": adaptation}))
    with torch.no_grad():
        again, _ = backbone.predict(*state)
    _holds(torch.equal(again.noise, prediction.noise), "training a clone leaves the original alone")
    return backbone


def _check_training(
    extension: Extension, backbone: Denoiser, state: tuple[Tensor, Tensor, Conditioning], settings: PolicySettings
) -> None:
    backbone.adapt(settings)
    trained = [parameter for parameter in backbone.module.parameters() if parameter.requires_grad]
    _holds(bool(trained), f"adaptation {settings.adaptation} trains something")
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.02)
        expected, _ = backbone.predict(*state)
        with tempfile.TemporaryDirectory() as folder:
            backbone.save(Path(folder) / "saved")
            found, _ = load_backbone(extension, Path(folder) / "saved", _CPU).predict(*state)
    # A merged adapter is rounded once more to the weights' dtype.
    tolerance = max(1e-2, 8 * torch.finfo(trained[0].dtype).eps)
    close = torch.allclose(found.noise, expected.noise, rtol=tolerance, atol=tolerance)
    _holds(close, f"what is saved after {settings.adaptation} training predicts as what was trained")


def _holds(condition: bool, statement: str) -> None:
    if not condition:
        raise AssertionError(f"does not hold: {statement}")


def _pipeline(path: str) -> Path:
    return builtin_pipeline("shapes-unet" if path == "variance_preserving" else "shapes-dit")


def _shipped(path: str) -> Denoiser:
    use = "unet" if path == "variance_preserving" else "dit"
    return load_backbone(Extension(use=use), _pipeline(path), _CPU)


def _opinionated(backbone: Denoiser, body: Extension | None = None) -> Critic:
    """A critic whose values differ from state to state: that of a new one is 0."""
    settings = CriticSettings() if body is None else CriticSettings(body=body)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic = Critic(backbone, ("reward",), settings).eval()
        torch.nn.init.normal_(critic.heads.weight)
    return critic.requires_grad_(False)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _noise(backbone: Denoiser, seed: int = 0) -> Tensor:
    """[4, K+1, *latent]"""
    return noise_for([(place,) for place in range(len(PROMPTS))], seed, _STEPS, backbone.latent_shape)


def _state(backbone: Denoiser) -> tuple[Tensor, Tensor, Conditioning]:
    """Noisy latents, their level and the prompts' conditioning."""
    sigma = backbone.schedule(_STEPS)[1].expand(len(PROMPTS))
    return _noise(backbone)[:, 0], sigma, backbone.encode(PROMPTS)


def _minibatch(advantages: Tensor) -> tuple[Minibatch, Tensor]:
    """Transitions sampled from means of their own, and their stds, from small to large."""
    count = len(advantages)
    std, means = torch.linspace(0.05, 1.0, count), _draw(count, 2, 3, 3)
    old = GaussianTransition(means, std)
    sampled, level = old.sample(_draw(count, 2, 3, 3, seed=1)), torch.ones(count)
    conditioning = Conditioning(torch.zeros(count, 1, 1))
    return (
        Minibatch(means * 0, sampled, level, level / 2, conditioning, means, old.log_prob(sampled), advantages),
        std,
    )
