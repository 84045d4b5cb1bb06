"""What every backbone promises, and that each is the pipeline of diffusers whose folder it reads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from latentac.backbones import BACKBONES, load_backbone
from latentac.backbones.guided import Guided, guided, unconditional
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.method.diffusion import forward_noise
from latentac.method.randomness import noise_for
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac import miniatures

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square", "a cyan circle and a red square"]
PIPELINES = {"unet": "shapes-unet", "dit": "shapes-dit"}
"""The backbones that have a built-in pipeline. The tests of each other family make a miniature."""


def load(name):
    torch.set_num_threads(1)
    return load_backbone(Extension(use=name), miniatures.pipeline_of(name), CPU)


@pytest.fixture(scope="module")
def loaded():
    return {name: load(name) for name in PIPELINES}


@pytest.fixture(params=sorted(PIPELINES))
def backbone(request, loaded):
    return loaded[request.param]


def noise_of(backbone, num_steps=5, prompts=PROMPTS):
    return noise_for([(index,) for index in range(len(prompts))], 0, num_steps, backbone.latent_shape)


def some_state(backbone, seed=0):
    """Latents at the second level of five, and what the prompts say."""
    latents = torch.randn(len(PROMPTS), *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))
    return latents, backbone.schedule(5)[1].expand(len(PROMPTS)), backbone.encode(PROMPTS)


def test_threads_may_encode_at_once(backbone):
    """What a thread reads of its prompts does not depend on what others encode meanwhile."""
    alone = [backbone.encode([prompt]).tokens for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(20):
            together = list(pool.map(lambda prompt: backbone.encode([prompt]).tokens, PROMPTS))
            for one, other in zip(alone, together, strict=True):
                assert torch.equal(one, other)


def test_tokens_are_counted_as_the_encoder_reads_them(backbone):
    """Its marks included: a prompt of `max_tokens` is read whole, one more word changes nothing. Also in threads, while
    others are encoded; with guidance it is the same."""
    words, most = (
        "red circle above blue square left of green triangle two cyan squares yellow".split(),
        backbone.max_tokens,
    )
    text = next(t for n in range(1, 40) if backbone.count_tokens([t := " ".join((words * 3)[:n])]) == [most])
    assert backbone.count_tokens(["", text, f"{text} red"]) == [2, most, most + 1]
    exact, cut, other = (backbone.encode([each]).tokens for each in (text, f"{text} red", text.rpartition(" ")[0]))
    assert torch.equal(exact, cut)
    assert not torch.equal(exact, other)
    with ThreadPoolExecutor(4) as pool:
        encoded = [pool.submit(backbone.encode, PROMPTS) for _ in range(20)]
        assert set(pool.map(lambda _: tuple(backbone.count_tokens([text, "a"])), range(20))) == {(most, 3)}
        assert all(torch.equal(one.result().tokens, backbone.encode(PROMPTS).tokens) for one in encoded)
    twice = Guided(backbone, 3.0)
    assert (twice.max_tokens, twice.count_tokens([text])) == (most, [most])


def test_both_tokenizers_of_a_dit_count():
    """What either of them would cut is cut."""
    backbone = load("dit")
    backbone._pipeline.tokenizer_2.add_tokens(["circle"])
    backbone._pipeline.tokenizer.add_tokens(["red circle"])
    text = "a red circle"
    counts = [len(one(text).input_ids) for one in (backbone._pipeline.tokenizer, backbone._pipeline.tokenizer_2)]
    assert counts[0] != counts[1]
    assert backbone.count_tokens([text]) == [max(counts)]


def test_a_rollout_without_noise_is_what_plain_diffusers_samples():
    """The unet's eta 0 is StableDiffusionPipeline with its DDIM scheduler. Latents, to float error."""
    backbone = load("unet")
    noise = noise_of(backbone)
    policy = Policy(backbone, KERNELS.build("ddim", noise=0.0))
    ours = rollout(policy, None, backbone.encode(PROMPTS), noise).clean
    pipeline = StableDiffusionPipeline.from_pretrained(builtin_pipeline("shapes-unet"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=noise[:, 0], num_inference_steps=5, eta=0.0, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_rollout_without_noise_is_what_plain_diffusers_samples(shift, tmp_path):
    """The dit's Euler rollout is StableDiffusion3Pipeline at the same levels: latents to float error, and the decoded
    image. The zero tokens that stand where T5 would be are left out by `max_sequence_length=0`."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        builtin_pipeline("shapes-dit"), text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, shift=shift)
    pipeline.save_pretrained(tmp_path)
    backbone = load_backbone(Extension(use="dit"), tmp_path, CPU)
    noise = noise_of(backbone)
    policy = Policy(backbone, KERNELS.build("cps", noise=0.0))
    ours = rollout(policy, None, backbone.encode(PROMPTS), noise).clean
    settings = {
        "latents": noise[:, 0],
        "sigmas": np.linspace(1, 1 / 5, 5).tolist(),
        "guidance_scale": 1.0,
        "max_sequence_length": 0,
    }
    torch.testing.assert_close(ours, pipeline(PROMPTS, output_type="latent", **settings).images, rtol=1e-4, atol=1e-4)
    images = (pipeline(PROMPTS, output_type="np", **settings).images * 255).round().astype(int)
    assert np.abs(images - backbone.decode(ours)).max() <= 1


def test_texts_of_77_tokens_are_followed_by_zeros_where_t5_would_be(tmp_path):
    """As Stable Diffusion 3 without T5 is used: 256 zero tokens after those of CLIP."""
    backbone = load("dit")
    own = backbone.encode(PROMPTS).tokens
    assert own.shape == (4, backbone._pipeline.tokenizer_max_length, backbone.text_width)
    assert bool((own[..., 96:] == 0).all())
    long = load_backbone(Extension(use="dit"), miniatures.sd3(tmp_path, max_length=77), CPU)
    padded = long.encode(PROMPTS).tokens
    assert padded.shape == (4, 77 + 256, long.text_width)
    assert bool((padded[:, 77:] == 0).all())


def test_the_prediction_mixes_to_the_latents(backbone):
    """alpha clean + sigma noise gives back the noisy latents that were asked about."""
    latents, sigma, conditioning = some_state(backbone)
    with torch.no_grad():
        prediction, _ = backbone.predict(latents, sigma, conditioning)
    mixed = forward_noise(prediction.clean, prediction.noise, sigma, backbone.path)
    torch.testing.assert_close(mixed, latents, rtol=1e-4, atol=1e-4)


def test_taps_are_feature_maps_of_that_forward(backbone):
    """Named and shaped as announced, finite, differentiable in the latents, and those of the calling forward."""
    latents, sigma, conditioning = some_state(backbone)
    latents.requires_grad_(True)
    _, taps = backbone.predict(latents, sigma, conditioning)
    assert {name: tuple(tap.shape[1:]) for name, tap in taps.items()} == backbone.tap_shapes
    assert all(bool(tap.isfinite().all()) for tap in taps.values())
    (gradient,) = torch.autograd.grad(sum(tap.square().mean() for tap in taps.values()), latents)
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())


def test_taps_of_a_transformer_lie_on_the_latents_grid():
    """Changing one patch of the latents changes that tap cell most, in row and column."""
    backbone = load("dit")
    latents, sigma, conditioning = some_state(backbone)
    changed = latents.clone()
    changed[:, :, 2:4, 4:6] += 0.5
    name = next(iter(backbone.tap_shapes))
    with torch.no_grad():
        before, after = (backbone.predict(x, sigma, conditioning)[1][name] for x in (latents, changed))
    difference = (after - before).square().sum(1).flatten(1)
    assert difference.argmax(1).tolist() == [1 * 4 + 2] * len(PROMPTS)


def test_a_clone_predicts_the_same_and_learns_alone(backbone):
    """Bitwise the same predictions and taps; changing the clone's weights leaves the original's predictions and taps
    alone, and each hands out the taps of its own forward."""
    state = some_state(backbone)
    with torch.no_grad():
        prediction, taps = backbone.predict(*state)
        clone = backbone.clone()
        same, same_taps = clone.predict(*state)
        assert torch.equal(same.clean, prediction.clean)
        assert torch.equal(same.noise, prediction.noise)
        assert all(torch.equal(same_taps[name], tap) for name, tap in taps.items())
        for parameter in clone.module.parameters():
            parameter.mul_(1.1)
        other, other_taps = clone.predict(*state)
        again, again_taps = backbone.predict(*state)
    assert not torch.equal(other.clean, prediction.clean)
    assert torch.equal(again.clean, prediction.clean)
    for name, tap in taps.items():
        assert not torch.equal(other_taps[name], tap)
        assert torch.equal(again_taps[name], tap)


def test_guidance_goes_from_no_prompt_through_the_given_one(backbone):
    """Scale 0 is the prediction without a prompt, 1 that of the prompt, and the others lie on the line through both,
    clean and noise alike; the taps are the prompt's at every scale."""
    latents, sigma, conditioning = some_state(backbone)
    with torch.no_grad():
        nothing = unconditional(backbone).rows(torch.zeros(len(latents), dtype=torch.int64))
        empty, _ = backbone.predict(latents, sigma, nothing)
        given, taps = backbone.predict(latents, sigma, conditioning)
        for scale in (0.0, 1.0, 2.5, -1.0):
            found, found_taps = Guided(backbone, scale).predict(latents, sigma, conditioning)
            for part in ("clean", "noise"):
                without, within = getattr(empty, part), getattr(given, part)
                expected = without + scale * (within - without)
                torch.testing.assert_close(getattr(found, part), expected, rtol=1e-3, atol=1e-4)
            for name, tap in taps.items():
                torch.testing.assert_close(found_taps[name], tap, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(empty.clean, given.clean, atol=1e-2)


def test_guidance_of_1_is_the_backbone_itself(backbone):
    """It costs what no guidance costs; any other is a denoiser of its own with the same taps and latents."""
    assert guided(backbone, 1.0) is backbone
    wrapped = guided(backbone, 3.0)
    assert isinstance(wrapped, Guided)
    assert (wrapped.latent_shape, wrapped.tap_shapes, wrapped.path) == (
        backbone.latent_shape,
        backbone.tap_shapes,
        backbone.path,
    )
    assert torch.equal(wrapped.schedule(5), backbone.schedule(5))
    assert torch.equal(wrapped.encode(PROMPTS).tokens, backbone.encode(PROMPTS).tokens)


def test_gradients_flow_through_guidance(backbone):
    """By the latents, from predictions and taps alike, as value-gradient steering needs them."""
    latents, sigma, conditioning = some_state(backbone)
    latents.requires_grad_()
    prediction, taps = Guided(backbone, 3.0).predict(latents, sigma, conditioning)
    for output in (prediction.clean, *taps.values()):
        (gradient,) = torch.autograd.grad(output.square().sum(), latents, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_what_is_saved_samples_as_what_was_trained(name, adaptation, tmp_path):
    """An adapted clone taps, trains without touching the original, and is saved as plain diffusers: adapters merged,
    safetensors only, and the loaded folder gives its predictions."""
    original = load(name)
    backbone = original.clone()
    backbone.adapt(PolicySettings(adaptation=adaptation, lora_rank=4))
    assert not any(parameter.requires_grad for parameter in original.module.parameters())
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    backbone.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    saved = load_backbone(Extension(use=name), tmp_path / "saved", CPU)
    state = some_state(backbone)
    with torch.no_grad():
        (expected, taps), (found, found_taps) = backbone.predict(*state), saved.predict(*state)
        before, _ = original.predict(*state)
    assert not torch.allclose(expected.noise, before.noise, atol=1e-2)
    torch.testing.assert_close(found.noise, expected.noise, rtol=1e-3, atol=1e-3)
    for tap in taps:
        torch.testing.assert_close(found_taps[tap], taps[tap], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_importing_a_backbone_prints_nothing(name):
    """Its libraries warn of packages that nothing here needs."""
    command = [sys.executable, "-c", f"from latentac.backbones import BACKBONES; BACKBONES.load({name!r})"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
