"""The pipeline's tokenizer, text encoder, UNet and scheduler, their joint training, and a sampler to score them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 64
TEXT_LENGTH = 16  # the longest caption has 10 tokens, its two marks included
LATENT_SHAPE = (4, 8, 8)
TRAIN_TIMESTEPS = 1000
# The byte-pair merges, most frequent first, "/" for the end of a word. They were learned once, by the trainer of the
# tokenizers library, from the words of the language; its order among equally frequent pairs changes from run to run.
_MERGES = """
r e, a n, l e, r i, c i, e l, l e/, o w/, q u, r c, s qu, t ri, an g, le s/, ci rc, squ a, tri ang, a b, a g,
a n/, b l, b el, c y, e n, e n/, f o, f t/, g h, g re, h re, l ow/, m ag, o v, o f/, r e/, t w, t a/, t hre, u
e/, u r/, y el, re s/, re d/, an d/, le ft/, ri gh, circ le/, circ les/, squa re/, squa res/, triang le/,
triang les/, ab ov, bl ue/, bel ow/, cy an/, en ta/, fo ur/, gre en/, mag enta/, tw o/, thre e/, yel low/,
righ t/, abov e/
"""
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class DenoiserTraining:
    """`caption_dropout` is the share of captions replaced by the empty one, for classifier-free guidance."""

    batch: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    caption_dropout: float = 0.1
    ema_decay: float = 0.99


@dataclass(frozen=True)
class Denoiser:
    """What turns a caption and noise into latents; the two modules are trained together."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.text_encoder, self.unet])


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the shapes language is one token and any other text still has tokens.
    Its `vocab.json` and `merges.txt` are written to `folder`.
    """
    merges = [tuple(pair.replace("/", "</w>").split()) for pair in _MERGES.split(",")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    """1.0 M + 0.15 M parameters, no dropout anywhere; weights from torch's global generator."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as in Stable Diffusion; trailing timesteps do not use it
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )
    return Denoiser(tokenizer, text_encoder, unet, scheduler)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids int64 [B, TEXT_LENGTH], padded and cut as StableDiffusionPipeline does."""
    return tokenizer(
        list(texts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def train_denoiser(
    denoiser: Denoiser,
    latents: tuple[Tensor, Tensor],
    token_ids: Tensor,
    training: DenoiserTraining,
    after_step: Callable[[int, float, nn.Module], bool],
) -> None:
    """Fits UNet and text encoder in place to predict the noise, until `after_step(step, loss, ema)` says stop.

    `latents`: mean and standard deviation of the *scaled* latents, float32 [N, 4, 8, 8] each; `token_ids` int64
    [N, TEXT_LENGTH]. `ema` holds the averaged weights in the order of `Denoiser.modules`; they are put in at the end.
    Random numbers come from torch's global generator.
    """
    modules = denoiser.modules()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=training.learning_rate, weight_decay=1e-4)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, 1.0, training.warmup_steps)
    ema = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema_decay)
    )
    empty = tokenize(denoiser.tokenizer, [""])
    stop, step = False, 0
    while not stop:
        rows = torch.randint(len(token_ids), (training.batch,))
        dropped = torch.rand(training.batch, 1) < training.caption_dropout
        loss = _noise_loss(
            denoiser,
            latents[0][rows] + latents[1][rows] * torch.randn(training.batch, *LATENT_SHAPE),
            torch.where(dropped, empty, token_ids[rows]),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        ema.update_parameters(modules)
        step += 1
        stop = after_step(step, loss.item(), ema.module)
    modules.load_state_dict(ema.module.state_dict())


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser, texts: Sequence[str], steps: int, generator: torch.Generator, eta: float = 1.0
) -> Tensor:
    """Scaled latents float32 [B, 4, 8, 8] for `texts`, by DDIM with trailing timesteps, without guidance."""
    hidden = denoiser.text_encoder(tokenize(denoiser.tokenizer, texts)).last_hidden_state
    latents = torch.randn(len(texts), *LATENT_SHAPE, generator=generator)
    denoiser.scheduler.set_timesteps(steps)
    for timestep in denoiser.scheduler.timesteps:
        noise = denoiser.unet(latents, timestep, encoder_hidden_states=hidden).sample
        latents = denoiser.scheduler.step(noise, timestep, latents, eta=eta, generator=generator).prev_sample
    return latents


def _noise_loss(denoiser: Denoiser, clean: Tensor, token_ids: Tensor) -> Tensor:
    noise = torch.randn_like(clean)
    timesteps = torch.randint(TRAIN_TIMESTEPS, (len(clean),))
    noisy = denoiser.scheduler.add_noise(clean, noise, timesteps)
    hidden = denoiser.text_encoder(token_ids).last_hidden_state
    return functional.mse_loss(denoiser.unet(noisy, timesteps, encoder_hidden_states=hidden).sample, noise)
