"""Steering against the closed forms of a linear-Gaussian chain: laws, normalisers, signs, and nothing at strength 0."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentac.backbones.guided import guided
from latentac.evaluation.arms import best_arm, best_steered, plain_arm
from latentac.evaluation.benchmark import arms
from latentac.method.diffusion import GaussianTransition, broadcast
from latentac.method.randomness import noise_for, uniforms_for
from latentac.method.records import Trajectory
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import Keep, rollout, steered_rollout
from latentac.sampling.steering import STEERING, SteeredRollout, Steering, SteeringState, evaluations
from latentac.sampling.steering.resampling import Particles, Resampling, systematic
from latentac.sampling.steering.run import SteeringRun
from latentac.sampling.steering.twisted import Twisted, TwistedParticles
from latentac.sampling.steering.value_gradient import ascent
from latentac.sampling.true_reward import TrueReward
from latentac.training.value_pretraining import new_critic
from latentac.worlds.prompts import Prompt
from tests.latentac.trainers import PROMPTS, SHIPPED, TRAINERS, Redness, configured, make_config, shipped
from tests.latentac.worlds import (
    NOISY,
    REWARD,
    STEPS,
    AffineStep,
    AnalyticCritic,
    GaussianBackbone,
    Quadratic,
    affine_steps,
)

PARTICLES = 8


DDIM = KERNELS.build("ddim", noise=1.0)
CPS = KERNELS.build("cps", noise=0.5)


def whole(**settings) -> dict[str, Any]:
    """Settings with which all steps are steered."""
    return {"start": 0.0, "stop": 1.0, **settings}


def build(name: str, weights: Tensor, particles: int = 1, settings: Mapping[str, Any] | None = None) -> Steering:
    """The method with those of the settings that it has."""
    known = STEERING.load(name).Settings.model_fields
    own = {field: value for field, value in (settings or {}).items() if field in known}
    made: Steering = STEERING.build(name, weights, particles, **own)
    return made


def world(kernel):
    """(policy, V* as its critic)."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    return policy, AnalyticCritic(policy.backbone, kernel)


def told_to(found: list[Tensor]) -> SteeringRun:
    """It steers nothing and collects each step's values."""
    return SteeringRun(callback=lambda _, values: found.append(values))


def sample(policy, critic, steering, images: int, seed: int = 0, callback=None):
    """One steered trajectory an image."""
    noise = torch.randn(images, steering.particles, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    uniforms = torch.rand(images, STEPS, generator=torch.Generator().manual_seed(seed + 1))
    prompts = [""] * images
    conditioning = policy.backbone.encode(prompts)
    return steered_rollout(policy, critic, conditioning, noise, SteeringRun(steering, uniforms, callback=callback))


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
@pytest.mark.parametrize("name", STEERING)
def test_each_method_raises_the_reward_and_the_other_sign_lowers_it(name, kernel):
    """With V*, a positive weight gives more reward than a plain rollout, a negative one less."""
    policy, critic = world(kernel)

    def mean_reward(weight: float) -> float:
        steering = build(name, torch.tensor([weight]), 4, whole())
        return float(REWARD(sample(policy, critic, steering, 2000).clean.flatten()).mean())

    plain = sample(policy, critic, build("best_of_n", torch.zeros(1), 1), 8000)
    unsteered = float(REWARD(plain.clean.flatten()).mean())
    assert mean_reward(1.0) > unsteered + 0.03
    assert mean_reward(-1.0) < unsteered - 0.03


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", STEERING)
def test_strength_0_is_bitwise_the_plain_rollout(name, kernel, particles):
    """Weights of 0 ask for nothing: the first particle goes its own way, bit for bit, and is the one that is kept."""
    policy, critic = world(kernel)
    steering = build(name, torch.zeros(1), particles, whole())
    noise = torch.randn(16, particles, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    prompts = [""] * 16
    conditioning = policy.backbone.encode(prompts)
    steered = steered_rollout(policy, critic, conditioning, noise, SteeringRun(steering, torch.full((16, STEPS), 0.5)))
    plain = rollout(policy, critic, conditioning, noise[:, 0])
    assert torch.equal(steered.latents, plain.latents)
    assert torch.equal(steered.log_probs, plain.log_probs)


@pytest.mark.parametrize("backbone", SHIPPED)
@pytest.mark.parametrize("name", STEERING)
def test_strength_0_is_bitwise_the_plain_rollout_with_guidance(name, backbone):
    """The same under classifier-free guidance, on the shipped networks with a critic of random opinions."""
    config = make_config(backbone)
    kernel = KERNELS.make(config.kernel)
    policy = Policy(guided(shipped(backbone), 3.0), kernel)
    critic = new_critic(config, policy)
    torch.nn.init.normal_(critic.heads.weight)
    conditioning = policy.backbone.encode(PROMPTS[:2])
    noise = noise_for([(index,) for index in range(4)], 0, 3, policy.backbone.latent_shape)
    steering = build(name, torch.zeros(len(config.rewards)), 2, whole())
    uniforms = torch.full((2, 3), 0.5)
    parted = noise.unflatten(0, (2, 2))
    steered = steered_rollout(policy, critic, conditioning, parted, SteeringRun(steering, uniforms))
    rows = torch.arange(2).repeat_interleave(2)
    plain = rollout(policy, critic, conditioning.rows(rows), noise)
    assert torch.equal(steered.latents, plain.latents[::2])


@pytest.mark.parametrize("kernel", [DDIM, CPS], ids=repr)
@pytest.mark.parametrize("name", STEERING)
def test_each_image_may_have_weights_of_its_own(name, kernel):
    """A row of weights is one image's, shared by its particles: image by image, bitwise the batch in which all have
    that image's weights; and a row for each is as one for all where they are equal."""
    policy, critic = world(kernel)
    rows = torch.tensor([[3.0], [0.0], [-2.0], [30.0]])
    together = sample(policy, critic, build(name, rows, 4, whole()), 4)
    for image, row in enumerate(rows):
        alone = sample(policy, critic, build(name, row, 4, whole()), 4)
        assert torch.equal(together.latents[image], alone.latents[image])
        assert torch.equal(together.values[image], alone.values[image])
        same = sample(policy, critic, build(name, row.expand(4, -1), 4, whole()), 4)
        assert torch.equal(same.latents, alone.latents)
    assert len({tuple(row.flatten().tolist()) for row in together.latents}) == 4


@pytest.mark.parametrize("name", STEERING)
def test_a_callback_gets_each_steps_values(name):
    """All particles' values, in the reward's own unit and cut off from any graph, before some go on from others; the
    one that is kept has them in its trajectory."""
    policy, critic = world(DDIM)
    reported: list[tuple[int, Tensor]] = []
    trajectory = sample(
        policy, critic, build(name, torch.tensor([4.0]), 4), 3, callback=lambda *args: reported.append(args)
    )
    assert [step for step, _ in reported] == list(range(STEPS))
    assert all(values.shape == (3, 4, 1) and not values.requires_grad for _, values in reported)
    last = reported[-1][1][..., 0]
    assert all(float(trajectory.values[image, -1]) in last[image].tolist() for image in range(3))


def test_a_plain_rollout_may_be_observed():
    """The values are those that it would be told at the end, to float error, and the images are the same, bitwise;
    without a critic there are none."""
    policy, critic = world(DDIM)
    noise = torch.randn(5, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    reported: list[Tensor] = []
    prompts = [""] * 5
    conditioning = policy.backbone.encode(prompts)
    plain = rollout(policy, critic, conditioning, noise)
    seen = rollout(policy, critic, conditioning, noise, steering=told_to(reported))
    assert torch.equal(seen.latents, plain.latents)
    assert torch.equal(torch.stack(reported, 1)[:, :, :, 0], seen.values)
    torch.testing.assert_close(seen.values, plain.values)
    reported.clear()
    rollout(policy, None, conditioning, noise, steering=told_to(reported))
    assert [values.shape for values in reported] == [(5, 1, 0)] * STEPS


def test_an_observer_may_end_the_rollout():
    """What it raises comes through, and no further step is done."""
    policy, critic = world(DDIM)
    reported = []

    def callback(step: int, values: Tensor) -> None:
        reported.append(step)
        if step == 2:
            raise TimeoutError("nobody waits any more")

    with pytest.raises(TimeoutError, match="nobody waits"):
        sample(policy, critic, build("svdd", torch.ones(1), 2), 2, callback=callback)
    assert reported == [0, 1, 2]


OFTEN = 0.999
"""Of the effective sample size: below it particles are resampled, so that a test sees a good many resamplings."""


class Watched(Resampling):
    """Resampling that lets a test see its particles at the end of the rollout."""

    made_of = Particles
    made: Particles

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        self.made = self.made_of(self, uniforms)
        return self.made


class WatchedTwisted(Watched):
    class Settings(Twisted.Settings):
        """Those of the method."""

    needs_gradient = True
    made_of = TwistedParticles


def law_at(index: int, backbone: GaussianBackbone, kernel) -> tuple[float, float]:
    """Mean and variance of a state of a plain rollout, which begins at N(0, 1)."""
    mean, variance = 0.0, 1.0
    for step in affine_steps(backbone, kernel, STEPS)[:index]:
        mean, variance = step.slope * mean + step.offset, step.slope**2 * variance + step.std**2
    return mean, variance


def tilted(mean: float, variance: float, psi: Quadratic) -> tuple[float, float, float]:
    """(log Z, mean, variance) of N(mean, variance) exp(psi) / Z."""
    precision = 1 / variance - psi.p
    centre = (mean / variance + psi.q) / precision
    log_z = psi.r - 0.5 * math.log(variance * precision) + 0.5 * (precision * centre**2 - mean**2 / variance)
    return log_z, centre, 1 / precision


SCHEDULES = {
    "whole": whole(resample_below=OFTEN),
    "tempered": whole(resample_below=OFTEN, tempering=1.5),
    "late": {"resample_below": OFTEN, "start": 0.4, "stop": 1.0},
    "early": {"resample_below": OFTEN, "start": 0.0, "stop": 0.6},
    "window": {"resample_below": OFTEN, "start": 0.25, "stop": 0.8, "tempering": 1.0},
    "normalised": whole(resample_below=OFTEN, normalised=True, tempering=0.5),
    "lazy": whole(resample_below=0.5, tempering=1.0),
}


def made_settings(make, settings):
    """The method's settings, those of `settings` that it has."""
    return make.Settings(**{name: value for name, value in settings.items() if name in make.Settings.model_fields})


def law_of(steering: Watched, trajectory: Trajectory) -> tuple[Tensor, Tensor, int]:
    """(mass [B, N], state [B, N], step): the particles of the last state that was steered, and what each weighs."""
    particles, last = steering.made, steering.steps(STEPS)[-1]
    mass = (particles.log_normaliser[:, None] + particles.log_weights).exp() / PARTICLES
    return mass, trajectory.latents[:, last].reshape(-1, PARTICLES), last


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
@pytest.mark.parametrize("make", [Watched, WatchedTwisted])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_particles_have_the_tilted_law_and_its_normaliser(schedule, make, kernel):
    """Weighted, the particles at the last state that is steered have the mean and variance of p(z) exp(V*), and the
    estimate of the normaliser is unbiased; with a good many resamplings on the way, whatever the schedule."""
    policy, critic = world(kernel)
    steering, images = make(made_settings(make, schedule), torch.ones(1), PARTICLES), 4000
    noise = torch.randn(images * PARTICLES, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    uniforms = torch.rand(images, STEPS, generator=torch.Generator().manual_seed(6))
    prompts = [""] * len(noise)
    conditioning = policy.backbone.encode(prompts)
    trajectory = rollout(policy, critic, conditioning, noise, steering=SteeringRun(steering, uniforms))
    if schedule["resample_below"] == OFTEN:
        assert float((steering.made.log_normaliser != 0).float().mean()) > 0.05
    # The transitions after that state add their own p / q to the weights, 1 in expectation.
    mass, state, last = law_of(steering, trajectory)
    log_z, mean, variance = tilted(*law_at(last, GaussianBackbone(kernel.path), kernel), critic.values[last])
    found = mass.sum(1)
    assert abs(float(found.mean()) - math.exp(log_z)) < 4 * float(found.std()) / images**0.5
    for moment, expected in ((state, mean), ((state - mean) ** 2, variance)):
        estimate = (mass * moment).sum(1)
        error = float((estimate - expected * found).std()) / images**0.5 / float(found.mean())
        assert abs(float(estimate.mean() / found.mean()) - expected) < 4 * error


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
@pytest.mark.parametrize("name", STEERING)
def test_each_method_raises_the_reward_at_some_of_the_steps_too(name, kernel):
    """Steered in a window of the trajectory, or up a gradient of length 1, a positive weight gives more reward."""
    policy, critic = world(kernel)
    plain = sample(policy, critic, build("best_of_n", torch.zeros(1), 1), 8000)
    unsteered = float(REWARD(plain.clean.flatten()).mean())
    for schedule in ({"start": 0.25, "stop": 0.9}, whole(normalised=True)):
        steered = sample(policy, critic, build(name, torch.ones(1), 4, schedule), 2000)
        assert float(REWARD(steered.clean.flatten()).mean()) > unsteered + 0.02


@pytest.mark.parametrize("name", ["value_gradient", "resampling", "twisted", "svdd"])
def test_outside_its_window_a_method_does_nothing(name):
    """Before `start` particles go their own way, bit for bit, and so they do from `stop` on, from where they are."""
    kernel = CPS
    policy, critic = world(kernel)
    steering = build(name, torch.tensor([9.0]), 4, {"start": 0.5, "stop": 0.75, "resample_below": 1.0})
    assert list(steering.steps(STEPS)) == [4, 5]
    noise = torch.randn(8 * 4, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    prompts, uniforms = [""] * 32, torch.full((8, STEPS), 0.5)
    conditioning = policy.backbone.encode(prompts)
    plain = rollout(policy, critic, conditioning, noise)
    found = rollout(policy, critic, conditioning, noise, steering=SteeringRun(steering, uniforms))
    origin = (found.latents[:, None, 0] == plain.latents[None, :, 0]).flatten(2).all(2).float().argmax(1)
    assert torch.equal(found.latents[:, :5], plain.latents[origin, :5])
    assert not torch.equal(found.latents[:, 6], plain.latents[:, 6])
    for step in (6, 7):
        sigma, sigma_next = found.sigmas[step].expand(32), found.sigmas[step + 1].expand(32)
        transition = policy.transition(found.latents[:, step], sigma, sigma_next, conditioning)
        assert torch.equal(transition.sample(noise[:, step + 1]), found.latents[:, step + 1])


def test_a_normalised_gradient_gives_steps_of_one_length():
    """As many standard deviations of the transition as the weights say, for each image by its own, up the gradient."""
    latents = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    transition = GaussianTransition(torch.zeros(6, 2, 3, 3), torch.tensor([0.5, 0.5, 2.0, 2.0, 1.0, 1.0]))
    weights = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]])

    def state() -> SteeringState:
        values = torch.stack([(latents**3).sum((1, 2, 3)), -latents.sum((1, 2, 3))], 1)
        return SteeringState(0, latents, transition, values)

    shift = ascent(state(), weights, normalised=True)
    lengths = shift.flatten(1).norm(dim=1) / transition.std
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 3.0, 3.0, 0.0, 0.0]))
    uphill = ascent(state(), weights, normalised=False)
    cosines = torch.nn.functional.cosine_similarity(shift.flatten(1), uphill.flatten(1))
    torch.testing.assert_close(cosines[:4], torch.ones(4))


class ExactTwist(Particles):
    """Proposes from p(z') exp(psi_{k+1}(z')) itself, which the Gaussian world has in closed form."""

    twists: list[Quadratic]

    def propose(self, state: SteeringState) -> GaussianTransition:
        if state.step + 1 >= len(self.twists):
            return state.transition
        twist, variance = self.twists[state.step + 1], state.transition.std**2
        precision = 1 / variance - twist.p
        mean = state.transition.mean / broadcast(variance, state.latents) + twist.q
        return GaussianTransition(mean / broadcast(precision, state.latents), precision.rsqrt())


def soft_values(steps: list[AffineStep], last: Quadratic) -> list[Quadratic]:
    """psi_k(z) = log E[exp(psi_{k+1}(z'))], backed up from psi of the last denoised state."""
    values = [last]
    for step in reversed(steps[:-1]):
        a, b, s, psi = step.slope, step.offset, step.std, values[0]
        shrink = 1 - s**2 * psi.p
        p = a**2 * psi.p / shrink
        q = a * (psi.p * b + psi.q) / shrink
        r = psi.r - 0.5 * math.log(shrink) + (psi.p * b**2 / 2 + psi.q * b + psi.q**2 * s**2 / 2) / shrink
        values.insert(0, Quadratic(p, q, r))
    return values


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_the_exact_twist_gives_constant_weights(kernel):
    """Where critic and proposal are the exact twist, nothing but the first state's own weight is left, so a particle's
    weight is exp(psi_0(z_0)) to the end, and with it the law is tilted."""
    policy, critic = world(kernel)
    critic.values = soft_values(affine_steps(policy.backbone, kernel, STEPS), critic.values[STEPS - 1])

    class Exact(Resampling):
        def begin(self, uniforms: Tensor) -> SteeredRollout:
            self.made = ExactTwist(self, uniforms)
            self.made.twists = critic.values
            return self.made

    steering = Exact(made_settings(Exact, whole(resample_below=0.0)), torch.ones(1), PARTICLES)
    noise = torch.randn(200 * PARTICLES, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    prompts, uniforms = [""] * len(noise), torch.full((200, STEPS), 0.5)
    conditioning = policy.backbone.encode(prompts)
    trajectory = rollout(policy, critic, conditioning, noise, steering=SteeringRun(steering, uniforms))
    first = critic.values[0](trajectory.latents[:, 0].reshape(200, PARTICLES))
    torch.testing.assert_close(steering.made.log_weights, first, atol=2e-3, rtol=1e-3)


def test_systematic_resampling_is_unbiased_and_even():
    """Over uniform draws a particle gets N times its share in places, and in each draw the whole number below or above;
    equal shares keep every particle where it is."""
    shares = torch.tensor([0.05, 0.6, 0.0, 0.35])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    chosen = systematic(shares.expand(1000, -1), uniforms)
    counts = torch.stack([(chosen == index).sum(1) for index in range(4)], 1).float()
    torch.testing.assert_close(counts.mean(0), 4 * shares, atol=2e-3, rtol=0)
    assert bool(((counts >= (4 * shares).floor()) & (counts <= (4 * shares).ceil())).all())
    assert bool((chosen.diff(dim=1) >= 0).all())
    assert systematic(torch.full((3, 4), 0.25), torch.tensor([0.01, 0.5, 0.99])).tolist() == [[0, 1, 2, 3]] * 3


def test_a_resampled_row_has_the_past_of_the_row_that_it_goes_on_from():
    """Latents, log-probs, values and features of a row form one trajectory: its own transitions explain it from the
    first state to the last."""
    kernel = DDIM
    policy, critic = world(kernel)
    noise = noise_for([(index,) for index in range(32)], 0, STEPS, (1, 1, 1))
    uniforms = uniforms_for([(index,) for index in range(4)], 0, STEPS)
    prompts = [""] * 32
    conditioning = policy.backbone.encode(prompts)
    steering = Watched(made_settings(Watched, whole(resample_below=OFTEN)), torch.tensor([8.0]), 8)
    trajectory = rollout(
        policy, critic, conditioning, noise, steering=SteeringRun(steering, uniforms), keep=Keep(features=True)
    )
    assert len(trajectory.latents[:, 0].unique()) < 32, "nobody was resampled"
    for step in range(trajectory.num_stochastic_steps):
        state, sigma = trajectory.latents[:, step], trajectory.sigmas[step].expand(32)
        transition = policy.transition(state, sigma, trajectory.sigmas[step + 1].expand(32), conditioning)
        torch.testing.assert_close(transition.log_prob(trajectory.latents[:, step + 1]), trajectory.log_probs[:, step])
        torch.testing.assert_close(critic.values[step](state.flatten()), trajectory.values[:, step, 0])
        assert torch.equal(trajectory.features["state"][:, step, 0], state[:, 0])


def test_the_highest_past_value_never_falls():
    """The potential `max` weighs by the rise of the highest value so far: a fall costs nothing."""
    particles = Particles(
        Resampling(made_settings(Resampling, whole(potential="max")), torch.ones(1), 2), torch.full((1, 3), 0.5)
    )
    latents, still = torch.zeros(2, 1, 1, 1), GaussianTransition(torch.zeros(2, 1, 1, 1), torch.ones(2))
    for step, values in enumerate(([0.1, -0.2], [-0.3, 0.0], [0.2, -0.1])):
        state = SteeringState(step, latents, still, torch.tensor(values)[:, None])
        assert particles.resample(state) is None
    assert particles.log_weights.tolist() == [[pytest.approx(0.2), pytest.approx(0.0)]]


def test_function_evaluations_count_a_backward_twice():
    """K N forwards, three times as many where there is a gradient, and twice as many with classifier-free guidance."""
    weights = torch.ones(1)
    found = {name: evaluations(build(name, weights, 4, whole()), 10) for name in STEERING}
    assert found == {"value_gradient": 120, "best_of_n": 40, "resampling": 40, "twisted": 120, "svdd": 40}
    assert evaluations(None, 10) == 10
    assert evaluations(None, 10, guided=True) == 20
    assert evaluations(build("twisted", weights, 4, whole()), 10, guided=True) == 240
    assert evaluations(build("twisted", weights, 4, {"start": 0.2, "stop": 0.7}), 10) == 80
    assert evaluations(build("svdd", weights, 4, {"stop": 0.7}), 10) == 40


def test_many_particles_without_uniforms_are_refused():
    """They would be resampled by chance that nobody drew."""
    policy, critic = world(DDIM)
    prompts = [""] * 2
    with pytest.raises(ValueError, match="need uniforms"):
        rollout(
            *(policy, critic, policy.backbone.encode(prompts), torch.zeros(2, STEPS + 1, 1, 1, 1)),
            steering=SteeringRun(build("twisted", torch.ones(1), 2)),
        )


def test_the_benchmark_steers_each_arm_as_it_says():
    """Plain sampling first; then each method at its strengths, whose weights are the strength times each reward's
    weight, with the settings that the configuration gives it."""
    own = {"start": 0.0, "stop": 0.5}
    config = make_config(
        rewards=[{"use": f"{TRAINERS}:Brightness", "weight": 2.0}, {"use": f"{TRAINERS}:Redness", "weight": 0.0}],
        gate={"reward": "Brightness"},
        steering={
            "methods": [
                {"use": "value_gradient", "sweep": [4.0, 9.0], "sweep_particles": [2], **own},
                {"use": "best_of_n", "sweep_particles": [2, 4], **own},
                {"use": "resampling", "name": "strong", "strength": 7.0, "sweep_particles": [2], **own},
                {"use": "resampling", "name": "weak", "strength": 3.0, "sweep_particles": [2], **own},
            ]
        },
    )
    plain, *found = arms(config.steering, [reward.weight for reward in config.rewards])
    assert (plain.method, plain.strength, plain.particles, plain.steering) == ("none", 0.0, 1, None)
    assert [(plan.method, plan.strength, plan.particles) for plan in found] == [
        *(("value_gradient", 4.0, 1), ("value_gradient", 9.0, 1), ("value_gradient", 20.0, 2)),
        *(("best_of_n", 1.0, 2), ("best_of_n", 1.0, 4), ("strong", 7.0, 2), ("weak", 3.0, 2)),
    ]
    for plan in found:
        steering = plan.steering
        assert steering is not None
        assert (steering.particles, list(steering.steps(4))) == (plan.particles, [0, 1])
        assert vars(steering)["weights"].tolist() == [2 * plan.strength, 0]


def test_the_best_arm_is_by_the_mean_then_by_the_evaluations():
    """The one that the endpoint uses by default is the best of those that steer."""
    rows = [
        {"method": method, "reward": reward, "mean": mean, "nfe": nfe}
        for method, reward, mean, nfe in (
            *(("none", "a", 0.9, 10), ("gradient", "a", 0.7, 30), ("particles", "a", 0.7, 20)),
            *(("none", "b", 0.1, 10), ("gradient", "b", 0.8, 30), ("particles", "b", 0.2, 20)),
        )
    ]
    assert plain_arm(rows, "b")["mean"] == 0.1
    assert (best_arm(rows, "a")["method"], best_arm(rows, "b")["method"]) == ("none", "gradient")
    best = best_steered(rows, "a")
    assert best is not None
    assert best["method"] == "particles"
    assert best_steered(rows[:1], "a") is None


def painted(policy, prompts, images: int = 3, particles: int = 4):
    """Noise, uniforms and prompts for a few images of the shipped network."""
    keys = [(image, particle) for image in range(images) for particle in range(particles)]
    noise = noise_for(keys, 0, 4, policy.backbone.latent_shape).unflatten(0, (images, particles))
    return noise, uniforms_for([(image,) for image in range(images)], 0, 4), list(prompts[:images])


@pytest.mark.parametrize("backbone", SHIPPED)
def test_the_true_reward_may_steer_and_choose(backbone):
    """In a critic's place it values each state by the image that the denoiser guesses, so at the last state by the
    image itself; as the judge it chooses among the finished images, whatever steered them."""
    config = make_config(backbone)
    policy = Policy(shipped(backbone), KERNELS.make(config.kernel))
    noise, uniforms, prompts = painted(policy, PROMPTS)
    scale, rewards = new_critic(config, policy), [configured(Redness())]
    scale.update_scale(torch.tensor([[0.1], [0.14]]))
    conditioning, rows = policy.backbone.encode(prompts), [prompt for prompt in prompts for _ in range(4)]
    truth = TrueReward(policy.backbone, rewards, [Prompt(row, "all") for row in rows], scale)
    weights = torch.tensor([50.0])
    schedule = whole(resample_below=0.9)
    steering = build("resampling", weights, 4, schedule)
    found = steered_rollout(policy, truth, conditioning, noise, SteeringRun(steering, uniforms))
    images = policy.backbone.decode(found.clean)
    torch.testing.assert_close(found.values[:, -1, 0], torch.from_numpy(Redness()(images, prompts)))
    plain = build("best_of_n", torch.ones(1), 4)
    best = steered_rollout(policy, scale, conditioning, noise, SteeringRun(plain, uniforms), judge=truth.judge)
    each = [
        Redness()(policy.backbone.decode(rollout(policy, None, conditioning, part).clean), prompts)
        for part in noise.unbind(1)
    ]
    highest = torch.from_numpy(np.stack(each, 1)).max(1).values
    torch.testing.assert_close(torch.from_numpy(Redness()(policy.backbone.decode(best.clean), prompts)), highest)
    assert float(found.values[:, -1].mean()) > float(np.stack(each).mean())
