"""A folder's scheduler says which noise its model learned to remove, and what latentac makes of the network's output is
what that scheduler's own arithmetic makes of it."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from latentac.backbones import BACKBONES
from latentac.backbones.schedulers import FLOW, VARIANCE_PRESERVING, flow_shift, variance_preserving
from latentac.method.diffusion import CPS, DDIM, forward_noise
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.system.errors import ConfigError
from tests.latentac import miniatures

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own, by the thousand

CPU = torch.device("cpu")
PREDICTIONS = ("epsilon", "v_prediction")
BETAS: dict[str, dict[str, Any]] = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "class's own": {},
    "trained_betas": {"trained_betas": np.linspace(0.0005, 0.015, 1000).tolist()},
}


class Echo(torch.nn.Module):
    """Stands for the network: gives the same noise whatever it is asked, so that only the arithmetic counts."""

    def __init__(self, output):
        super().__init__()
        self.output, self.timesteps = output, []

    def forward(self, latents, timestep, *arguments, **named):
        self.timesteps.append(named.get("timestep", timestep))
        return (self.output[: len(latents)],)


def written(folder, name, **settings):
    """A scheduler's file with only what is given: the rest is the class's."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    described = {"_class_name": name, "_diffusers_version": "0.21.4", **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return miniatures.sd15(tmp_path_factory.mktemp("sd15") / "model")


def at_timestep(folder, scheduler, timestep):
    """(our x0, that of the scheduler's own step) for one network output at one timestep."""
    backbone = BACKBONES.build("unet", folder, CPU)
    generator = torch.Generator().manual_seed(timestep)
    clean, noise, output = (torch.randn(1, *backbone.latent_shape, generator=generator) for _ in range(3))
    alpha_bar = scheduler.alphas_cumprod[timestep].double()
    sigma = (1 - alpha_bar).sqrt().float()[None]
    latents = forward_noise(clean, noise, sigma, "variance_preserving")
    backbone.module = Echo(output)
    prediction, _ = backbone.predict(latents, sigma, backbone.encode(["a red circle"]))
    assert backbone.module.timesteps[0].tolist() == [timestep]
    return prediction.clean, theirs(scheduler, timestep, latents, output, alpha_bar)


def theirs(scheduler, timestep, latents, output, alpha_bar):
    """The predicted x0 as the scheduler's own class computes it from latents of variance 1."""
    ratio = len(scheduler.alphas_cumprod) // 10
    scheduler.set_timesteps(10)
    scheduler.timesteps = torch.tensor([float(timestep)])
    if hasattr(scheduler, "sigmas"):
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt().float()
        scheduler.sigmas = torch.stack([sigma, torch.zeros(())])
        scheduler._step_index = 0
    if hasattr(scheduler, "convert_model_output"):  # the solvers for which x0 is a step of its own; DEIS' is the noise
        converted = scheduler.convert_model_output(output, sample=latents)
        if isinstance(scheduler, diffusers.DEISMultistepScheduler):
            converted = (latents - (1 - alpha_bar).sqrt() * converted) / alpha_bar.sqrt()
        return converted
    if isinstance(scheduler, diffusers.PNDMScheduler):  # its first step is DDIM's without noise: solve it for x0
        previous = timestep - ratio
        moved = scheduler.step_plms(output, timestep, latents).prev_sample
        alpha_next = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        noise = output
        if scheduler.config.prediction_type == "v_prediction":
            noise = (alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents).float()
        return (moved - (1 - alpha_next).sqrt() * noise) / alpha_next.sqrt()
    if hasattr(scheduler, "sigmas"):  # the k-diffusion family scales latents by 1 / alpha
        scaled = latents / alpha_bar.sqrt().float()
        if hasattr(scheduler, "sigmas_interpol"):
            scheduler.sigmas_interpol = scheduler.sigmas
        if hasattr(scheduler, "sigmas_up"):
            scheduler.sigmas_up, scheduler.sigmas_down = torch.zeros(2), scheduler.sigmas
        return scheduler.step(output, scheduler.timesteps[0], scaled).pred_original_sample
    return scheduler.step(output, timestep, latents).pred_original_sample


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", sorted(VARIANCE_PRESERVING))
def test_x0_is_what_the_folders_own_scheduler_predicts(folder, name, prediction):
    """For every accepted class and prediction type, from little noise to much."""
    settings = BETAS["scaled_linear"] | {"prediction_type": prediction, "clip_sample": False}
    if name == "PNDMScheduler":
        settings["skip_prk_steps"] = True
    written(folder, name, **settings)
    for timestep in (20, 500, 999):
        scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
        ours, own = at_timestep(folder, scheduler, timestep)
        torch.testing.assert_close(ours, own.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("betas", sorted(BETAS))
@pytest.mark.parametrize("name", sorted(VARIANCE_PRESERVING))
def test_noise_levels_are_those_of_the_folders_own_class(tmp_path, name, betas):
    """Whatever the file leaves to its class: Heun's and KDPM2's default betas are not DDIM's."""
    written(tmp_path, name, **BETAS[betas])
    own = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler")
    torch.testing.assert_close(variance_preserving(tmp_path).alphas_cumprod, own.alphas_cumprod, rtol=0, atol=1e-6)


def test_settings_that_the_class_does_not_know_have_no_effect(tmp_path):
    """PNDM knows no rescaled betas, so a file that was converted from another class's keeps its levels."""
    written(tmp_path, "PNDMScheduler", rescale_betas_zero_snr=True, thresholding=True, **BETAS["scaled_linear"])
    assert float(variance_preserving(tmp_path).alphas_cumprod[-1]) == pytest.approx(0.00466, rel=0.01)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_with_v_prediction_starts_from_noise_alone(tmp_path, name):
    """At the first level alpha is 0: x0 is -v, the noise is the latents, and nothing is divided by zero."""
    miniatures.sd15(tmp_path, prediction_type="v_prediction")
    written(tmp_path, name, prediction_type="v_prediction", rescale_betas_zero_snr=True, **BETAS["scaled_linear"])
    backbone = BACKBONES.build("unet", tmp_path, CPU)
    sigmas = backbone.schedule(10)
    assert float(sigmas[0]) == 1
    conditioning = backbone.encode(["a red circle"])
    noise = torch.randn(1, 11, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction, _ = backbone.predict(noise[:, 0], sigmas[:1], conditioning)
        velocity = backbone.module(noise[:, 0], 999, conditioning.tokens).sample
    torch.testing.assert_close(prediction.clean, -velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction.noise, noise[:, 0], rtol=1e-4, atol=1e-4)
    trajectory = rollout(Policy(backbone, DDIM(1.0)), None, conditioning, noise)
    assert bool(trajectory.latents.isfinite().all())
    assert bool(trajectory.log_probs.isfinite().all())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sample": ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
    "unknown prediction": ("DDIMScheduler", {"prediction_type": "score"}, "prediction_type is 'score'"),
    "flow prediction": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "use_flow_sigmas is true",
    ),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "FlowMatchEulerDiscreteScheduler is not known"),
    "EDM": ("EDMEulerScheduler", {"sigma_data": 0.5}, "EDMEulerScheduler is not known"),
    "EDM multistep": ("EDMDPMSolverMultistepScheduler", {}, "EDMDPMSolverMultistepScheduler is not known"),
    "EDM by Euler": (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        "timestep_type is continuous",
    ),
    "LCM": ("LCMScheduler", {}, "LCMScheduler is not known"),
    "TCD": ("TCDScheduler", {}, "TCDScheduler is not known"),
    "Karras VE": ("KarrasVeScheduler", {}, "KarrasVeScheduler is not known"),
    "unknown class": ("MyScheduler", {}, "MyScheduler is not known"),
    "zero SNR with epsilon": ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "the last timestep has no signal"),
    "zero SNR with epsilon, Euler": (
        "EulerDiscreteScheduler",
        {"rescale_betas_zero_snr": True},
        "the last timestep has no signal",
    ),
    "cosine with epsilon": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "the last timestep has no signal"),
    "thresholding": ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding is true"),
    "unknown betas": ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "cannot be built"),
    "betas beyond 1": ("DDIMScheduler", {"beta_end": 1.5, "beta_schedule": "linear"}, "make no noise schedule"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_another_noise_process_is_refused_by_name(tmp_path, case):
    """A UNet is not sampled with a noise that it never learned; the message names what is supported or what to set."""
    name, settings, message = REFUSED[case]
    written(tmp_path, name, **(BETAS["scaled_linear"] | settings))
    with pytest.raises(ConfigError, match=message) as caught:
        variance_preserving(tmp_path)
    assert caught.value.problems[0].path == "backbone.source"
    assert caught.value.problems[0].remedy


def test_a_refused_scheduler_is_not_loaded_either(tmp_path):
    """Not only `prepare`: whoever loads the backbone gets the same answer, today 235 grey levels away from right."""
    miniatures.sd15(tmp_path)
    written(tmp_path, "DDIMScheduler", prediction_type="sample", **BETAS["scaled_linear"])
    with pytest.raises(ConfigError, match="prediction_type is 'sample'"):
        BACKBONES.build("unet", tmp_path, CPU)


@pytest.mark.parametrize("name", sorted(FLOW))
def test_velocity_is_read_as_the_flows_own_scheduler_reads_it(tmp_path, name):
    """x0 = x - sigma v at each of the scheduler's own levels, at the timestep that it gives the network."""
    miniatures.sd3(tmp_path)
    written(tmp_path, name, shift=3.0, num_train_timesteps=1000)
    backbone = BACKBONES.build("dit", tmp_path, CPU)
    scheduler = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(5)
    output = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    backbone.module, conditioning = Echo(output), backbone.encode(["a red circle"])
    for k in (0, 2):
        scheduler.set_timesteps(5)
        timestep, sigma, sigma_next = scheduler.timesteps[k], scheduler.sigmas[k], scheduler.sigmas[k + 1]
        prediction, _ = backbone.predict(latents, sigma[None], conditioning)
        assert float(backbone.module.timesteps[-1]) == pytest.approx(float(timestep), rel=1e-5)
        moved = scheduler.step(output, timestep, latents).prev_sample
        euler = CPS(0.0).transition(latents, prediction, sigma[None], sigma_next[None]).mean
        if name == "FlowMatchEulerDiscreteScheduler":
            torch.testing.assert_close(euler, moved, rtol=1e-4, atol=1e-4)
        else:  # Heun's first stage is Euler's
            torch.testing.assert_close(latents + (sigma_next - sigma) * output, moved, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(euler, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_is_diffusers_own(tmp_path, kind):
    """The levels that the pipeline of the folder draws at, for the size of its images."""
    settings: dict[str, Any] = {
        "use_dynamic_shifting": True,
        "time_shift_type": kind,
        "shift": 3.0,
        "base_image_seq_len": 4,
    }
    miniatures.sd3(tmp_path, max_image_seq_len=64, **settings)
    backbone = BACKBONES.build("dit", tmp_path, CPU)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red circle", sigmas=np.linspace(1, 1 / 5, 5).tolist(), max_sequence_length=0, output_type="latent")
    torch.testing.assert_close(backbone.schedule(5), pipeline.scheduler.sigmas, rtol=1e-5, atol=1e-6)


FLOW_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "variance-preserving": ("DDPMScheduler", {}, "DDPMScheduler is not known"),
    "inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas is True"),
    "terminal": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "shift_terminal is 0.1"),
    "karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
    "exponential": ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
    "zero shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 0.0}, "shift is 0.0"),
    "LCM": ("FlowMatchLCMScheduler", {}, "FlowMatchLCMScheduler is not known"),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"base_image_seq_len": 256, "max_image_seq_len": 256},
        {"max_shift": None},
        {"max_shift": "much"},
        {"base_shift": 1e6, "max_shift": 1e5},
    ],
)
def test_dynamic_shifting_by_numbers_that_give_no_shift_is_refused(tmp_path, settings):
    """A division by zero, a missing number, an overflow: the file and the four numbers."""
    written(tmp_path, "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, **settings)
    with pytest.raises(ConfigError, match="use_dynamic_shifting needs four numbers that give a shift, and has base_"):
        flow_shift(tmp_path, 16)


@pytest.mark.parametrize("case", sorted(FLOW_REFUSED))
def test_another_process_is_refused_for_a_flow_too(tmp_path, case):
    """By name, and with what is supported or what to set."""
    name, settings, message = FLOW_REFUSED[case]
    written(tmp_path, name, **settings)
    with pytest.raises(ConfigError, match=message):
        flow_shift(tmp_path, 16)


def test_a_missing_scheduler_is_named(tmp_path: Path):
    """Today's message is one about a hub that nobody asked."""
    with pytest.raises(ConfigError, match=r"scheduler_config\.json: is missing"):
        variance_preserving(tmp_path)
