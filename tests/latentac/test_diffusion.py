"""Kernels: their densities, the identities that they reduce to, and the marginals that they keep."""

import math

import pytest
import torch
from torch.distributions import Normal

from latentac.method.diffusion import (
    DeterministicTransition,
    GaussianTransition,
    Prediction,
    alpha_of,
    forward_noise,
    num_stochastic_steps,
)
from latentac.sampling.kernels import KERNELS
from tests.latentac.worlds import FLOW, MEAN, STD, GaussianBackbone, affine_steps

NOISY = [KERNELS.build("ddim", noise=1.0), *(KERNELS.build(name, noise=0.7) for name in KERNELS)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_log_prob_is_the_summed_normal_density(kernel):
    """log_prob equals torch.distributions.Normal, summed over the latent's dimensions."""
    latents, clean = draw(5, 3, 4, 4), draw(5, 3, 4, 4, seed=1)
    sigma, sigma_next = torch.full((5,), 0.8), torch.full((5,), 0.6)
    prediction = Prediction(clean, draw(5, 3, 4, 4, seed=2))
    transition = kernel.transition(latents, prediction, sigma, sigma_next)
    sampled = transition.sample(draw(5, 3, 4, 4, seed=3))
    expected = Normal(transition.mean, transition.std[:, None, None, None]).log_prob(sampled).sum((1, 2, 3))
    torch.testing.assert_close(transition.log_prob(sampled), expected, rtol=1e-5, atol=1e-4)


def test_ddim_eta_1_is_the_ddpm_posterior():
    """Eta 1 gives q(x' | x, x0) of DDPM (Ho et al. 2020, eq. 6 and 7), mean and variance."""
    clean, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    sigma, sigma_next = torch.full((4,), 0.9), torch.full((4,), 0.7)
    latents = forward_noise(clean, noise, sigma, "variance_preserving")
    abar, abar_next = float(1 - sigma[0] ** 2), float(1 - sigma_next[0] ** 2)
    step = abar / abar_next  # alpha_t of DDPM
    mean = math.sqrt(abar_next) * (1 - step) / (1 - abar) * clean
    mean = mean + math.sqrt(step) * (1 - abar_next) / (1 - abar) * latents
    variance = (1 - abar_next) / (1 - abar) * (1 - step)
    found = KERNELS.build("ddim", noise=1.0).transition(latents, Prediction(clean, noise), sigma, sigma_next)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std, torch.full((4,), math.sqrt(variance)))


def test_ddim_eta_0_is_the_probability_flow_ode():
    """Eta 0 moves along (x0, n) without noise: x' = alpha' x0 + sigma' n."""
    clean, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    sigma, sigma_next = torch.full((4,), 0.9), torch.full((4,), 0.7)
    latents = forward_noise(clean, noise, sigma, "variance_preserving")
    found = KERNELS.build("ddim", noise=0.0).transition(latents, Prediction(clean, noise), sigma, sigma_next)
    assert torch.equal(found.std, torch.zeros(4))
    torch.testing.assert_close(found.mean, forward_noise(clean, noise, sigma_next, "variance_preserving"))


@pytest.mark.parametrize("kernel", [KERNELS.build(name, noise=0.0) for name in FLOW], ids=repr)
def test_flow_kernels_without_noise_are_the_euler_step(kernel):
    """With no noise every flow kernel is x + (s' - s) v."""
    clean, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    sigma, sigma_next = torch.full((4,), 0.8), torch.full((4,), 0.5)
    latents = forward_noise(clean, noise, sigma, "flow")
    found = kernel.transition(latents, Prediction(clean, noise), sigma, sigma_next)
    torch.testing.assert_close(found.mean, latents + (0.5 - 0.8) * (noise - clean), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.std, torch.zeros(4))


def end_error(kernel, num_steps: int) -> float:
    """|mean - MEAN| + |std - STD| at the chain's end, by exact moments."""
    backbone = GaussianBackbone(kernel.path)
    sigma = backbone.schedule(num_steps)[:1]
    alpha = float(alpha_of(sigma, kernel.path))
    mean, variance = alpha * MEAN, alpha**2 * STD**2 + float(sigma) ** 2
    for step in affine_steps(backbone, kernel, num_steps):
        mean = step.slope * mean + step.offset
        variance = step.slope**2 * variance + step.std**2
    return abs(mean - MEAN) + abs(math.sqrt(variance) - STD)


@pytest.mark.parametrize(
    ("use", "noise"), [("ddim", 1.0), ("ddim", 0.5), ("ddim", 0.0), ("dance_sde", 0.7), ("cps", 0.0)]
)
def test_the_marginal_error_falls_like_1_over_k(use, noise):
    """On Gaussian data with the exact denoiser, four times the steps leave a quarter of the error."""
    kernel = KERNELS.build(use, noise=noise)
    coarse, fine = end_error(kernel, 128), end_error(kernel, 512)
    assert fine < 0.01
    assert 3 < coarse / fine < 5, f"error {coarse:.5f} at 128 steps, {fine:.5f} at 512"


def test_the_flow_sde_keeps_the_marginals():
    """Its diffusion is singular at pure noise, which costs the clean rate but not the limit."""
    kernel = KERNELS.build("flow_sde", noise=0.7)
    assert end_error(kernel, 1024) < min(0.002, end_error(kernel, 16) / 5)


def test_the_dance_sde_drifts_along_the_score():
    """Its mean is Euler's plus g^2 / 2 times the score -n / s, backwards in time (Song et al. 2021, eq. 6)."""
    clean, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    sigma, sigma_next = torch.full((4,), 0.8), torch.full((4,), 0.5)
    latents = forward_noise(clean, noise, sigma, "flow")
    prediction = Prediction(clean, noise)
    euler = KERNELS.build("dance_sde", noise=0.0).transition(latents, prediction, sigma, sigma_next).mean
    found = KERNELS.build("dance_sde", noise=0.6).transition(latents, prediction, sigma, sigma_next)
    torch.testing.assert_close(found.mean, euler + 0.6**2 / 2 * (-noise / 0.8) * 0.3)
    torch.testing.assert_close(found.std, torch.full((4,), 0.6 * math.sqrt(0.3)))


def test_cps_keeps_the_noise_coefficient_exactly():
    """std^2 + direction^2 = sigma_next^2 at every step, whatever the noise."""
    zero = torch.zeros(1, 1, 1, 1)
    sigma, sigma_next = torch.tensor([0.8]), torch.tensor([0.6])
    found = KERNELS.build("cps", noise=0.7).transition(zero, Prediction(zero, zero + 1), sigma, sigma_next)
    assert float(found.std**2 + found.mean.flatten() ** 2) == pytest.approx(0.36, abs=1e-6)


def test_samples_have_the_mean_and_std_of_the_transition():
    """sample(noise) is mean + std * noise, so its moments are the transition's."""
    transition = GaussianTransition(torch.full((20000, 1, 1, 1), 0.3), torch.full((20000,), 0.5))
    samples = transition.sample(draw(20000, 1, 1, 1))
    assert abs(float(samples.mean()) - 0.3) < 0.02
    assert abs(float(samples.std()) - 0.5) < 0.02


def test_a_deterministic_transition_has_no_density():
    """Asking for one raises, where a placeholder would train on nothing."""
    transition = GaussianTransition(torch.zeros(2, 1, 1, 1), torch.tensor([0.5, 0.0]))
    with pytest.raises(DeterministicTransition):
        transition.log_prob(torch.zeros(2, 1, 1, 1))


def test_the_last_ddim_step_is_left_out():
    """DDIM to noise level 0 has std 0: K - 1 steps are stochastic, and a gap among them is refused."""
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0])
    assert num_stochastic_steps(KERNELS.build("ddim", noise=1.0), sigmas) == 2
    assert num_stochastic_steps(KERNELS.build("ddim", noise=0.0), sigmas) == 0
    with pytest.raises(ValueError, match="contiguous"):
        num_stochastic_steps(KERNELS.build("ddim", noise=1.0), torch.tensor([0.9, 0.9, 0.3, 0.0]))
