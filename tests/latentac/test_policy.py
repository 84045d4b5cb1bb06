"""The policy on the shipped pipelines: densities, the ratio, the taps, and where steering leads."""

import pytest
import torch
from torch.distributions import Normal

from latentac.critic import Critic
from latentac.method.randomness import noise_for
from latentac.method.records import flatten_steps
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.sampling.steering import STEERING
from latentac.sampling.steering.run import SteeringRun
from tests.latentac.trainers import PAIRS, PROMPTS, SHIPPED, make_config, shipped


@pytest.fixture(scope="module")
def critics():
    """A critic of each shipped backbone with random heads: those of a new one have no opinion."""
    made = {}
    for name in SHIPPED:
        torch.manual_seed(0)
        made[name] = Critic(shipped(name), ("a", "b"), make_config(name).critic).eval()
        torch.nn.init.normal_(made[name].heads.weight)
    return made


def roll(name, kernel, critic, noise_level=0.7, num_steps=4, steering=None):
    backbone = shipped(name)
    policy = Policy(backbone, KERNELS.build(kernel, noise=noise_level))
    noise = noise_for([(i,) for i in range(len(PROMPTS))], 0, num_steps, backbone.latent_shape)
    return policy, rollout(
        policy, critic, backbone.encode(PROMPTS), noise, steering=SteeringRun(steering) if steering else None
    )


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
@pytest.mark.parametrize("noise_level", [1.0, 0.5])
def test_the_ratio_is_bitwise_1_before_the_first_update(name, kernel, noise_level):
    """log p of the update equals that of the rollout to the last bit, with gradients on; and it is the density of
    torch.distributions. Shuffled over images and steps, in another batch size, it is so to float error: some processors
    multiply matrices in another order then."""
    policy, trajectory = roll(name, kernel, None, noise_level)
    images, steps = trajectory.log_probs.shape
    training = Policy(policy.backbone.clone(), policy.kernel)
    training.backbone.module.requires_grad_(True)

    def again(rows):
        batch = flatten_steps(trajectory, torch.zeros(images, steps), rows // steps, rows % steps)
        return batch, training.transition(batch.latents, batch.sigma, batch.sigma_next, batch.conditioning)

    for step in range(steps):
        batch, transition = again(torch.arange(images) * steps + step)
        log_probs = transition.log_prob(batch.next_latents)
        assert log_probs.requires_grad
        assert torch.equal(log_probs.detach(), batch.old_log_probs)
        assert torch.equal(transition.mean.detach(), batch.old_means)
    batch, transition = again(torch.randperm(images * steps, generator=torch.Generator().manual_seed(1))[:7])
    log_probs = transition.log_prob(batch.next_latents)
    torch.testing.assert_close(log_probs.detach(), batch.old_log_probs, rtol=1e-5, atol=1e-3)
    density = Normal(transition.mean, transition.std[:, None, None, None]).log_prob(batch.next_latents).sum((1, 2, 3))
    torch.testing.assert_close(log_probs, density, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_a_rollout_keeps_its_axes(name, kernel, critics):
    """K + 1 latents, K values a head, a density for each step that has noise, float32 throughout."""
    policy, trajectory = roll(name, kernel, critics[name])
    latent = policy.backbone.latent_shape
    stochastic = int((policy.kernel.std(trajectory.sigmas[:-1], trajectory.sigmas[1:]) > 0).sum())
    assert stochastic >= 3
    assert trajectory.latents.shape == (4, 5, *latent)
    assert trajectory.values.shape == (4, 4, 2)
    assert trajectory.log_probs.shape == (4, stochastic)
    assert trajectory.means.shape == (4, stochastic, *latent)
    for tensor in (trajectory.latents, trajectory.values, trajectory.log_probs, trajectory.sigmas):
        assert tensor.dtype == torch.float32
        assert bool(tensor.isfinite().all())
    images = policy.backbone.decode(trajectory.clean)
    assert images.dtype == "uint8"
    assert images.shape == (4, 32, 32, 3)


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
@pytest.mark.parametrize(("method", "weight"), [("value_gradient", 0.0), ("best_of_n", 1.0)], ids=["grad", "best"])
def test_strength_0_is_bitwise_the_plain_rollout(name, kernel, method, weight, critics):
    """Steering that asks for nothing changes nothing, though it takes gradients: latents and log-probs. Values are
    asked for all states at once in one and step by step in the other: equal to float error."""
    _, plain = roll(name, kernel, critics[name])
    steering = STEERING.build(method, torch.full((2,), weight), 1)
    _, steered = roll(name, kernel, critics[name], steering=steering)
    assert torch.equal(plain.latents, steered.latents)
    assert torch.equal(plain.log_probs, steered.log_probs)
    torch.testing.assert_close(plain.values, steered.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_steering_raises_the_head_that_has_weight(name, kernel, critics):
    """With the same noise a positive weight leads to higher values of that head at the last state than the plain
    rollout, a negative one to lower values."""

    def value(weight: float) -> float:
        steering = STEERING.build("value_gradient", torch.tensor([weight, 0.0]), 1)
        _, trajectory = roll(name, kernel, critics[name], steering=steering)
        return float(trajectory.values[:, -1, 0].mean())

    assert value(-1.0) < value(0.0) < value(1.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_noise_depends_on_the_image_alone(name, critics):
    """An image's rollout is bitwise the same in blocks of 16 and of 32: blocks may be cut and dealt anywhere. So are
    the values, to float error."""
    backbone, prompts = shipped(name), PROMPTS * 8
    noise = noise_for([(i,) for i in range(32)], 0, 3, backbone.latent_shape)
    policy = Policy(backbone, KERNELS.build(dict(PAIRS)[name], noise=0.7))
    whole = rollout(policy, critics[name], backbone.encode(prompts), noise)
    part = rollout(policy, critics[name], backbone.encode(prompts[16:]), noise[16:])
    assert torch.equal(part.latents, whole.latents[16:])
    torch.testing.assert_close(part.values, whole.values[16:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_schedules_descend_to_0_and_keep_their_floats(name):
    """From the noisiest level that the network was trained on; each level is found again exactly."""
    backbone = shipped(name)
    schedule = backbone.schedule(10)
    assert schedule.shape == (11,)
    assert bool((schedule.diff() < 0).all())
    assert float(schedule[-1]) == 0
    assert torch.equal(backbone.schedule(10), schedule)
    assert float(schedule[0]) == float(backbone.schedule(20)[0])
