"""The Python that draws in plain diffusers what the endpoint draws without steering; the model card shows it.

A folder of diffusers carries weights and scheduler, but neither the number of steps, nor guidance, nor the noise. The
scheduler's own step is that of an ODE (DDIM's with `eta` apart), and training samples an SDE. Between two levels both
are linear in the latents and in the noise that the network sees in them, so a callback makes the one from the other:
so much of the latents before the step, so much of those after it, and so much fresh noise.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latentac.backbones import Denoiser
from latentac.backbones.guided import Guided
from latentac.backbones.pipeline import PipelineBackbone
from latentac.method.diffusion import DDIM, Kernel, Prediction, alpha_of
from latentac.method.diffusion import Path as Mixing
from latentac.sampling.policy import Policy
from latentac.system.reading import read_record
from latentac.system.terminal import printable

PURPOSE = "serving"
"""What the endpoint's noise is drawn for: a word of the key that `latentac.method.randomness.noise_for` hashes."""

_CLOSE = 1e-5

_HEAD = """\
import hashlib

import torch
from diffusers import {imports}

{pipeline}

"""

_NOISE = '''
def generator(seed, index=0):
    """The noise of the image `index` of a request with this seed, as the endpoint draws it."""
    digest = hashlib.sha256(repr((seed, "{purpose}", index, 0)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

'''

_PLAIN = """
image = pipeline(
    {prompt},
    {arguments},
    generator=generator({seed}),
).images[0]
image.save("image.png")
"""

_RENEWED = """
# Training samples with noise in each step. Of a step of the scheduler it makes so much of the latents before it, so
# much of those after it, and so much fresh noise:
before = {before}
after = {after}
fresh = {fresh}


def draw(prompt, seed, index=0):
    noise = generator(seed, index)
    latents = {first}
    state = [latents.to(pipeline.device)]

    def renew(pipeline, step, timestep, tensors):
        drawn = {next}.to(pipeline.device)
        state[0] = before[step] * state[0] + after[step] * tensors["latents"] + fresh[step] * drawn
        return {{"latents": state[0]}}

    return pipeline(
        prompt,
        {arguments},
        latents=latents.to(pipeline.device),
        callback_on_step_end=renew,
    ).images[0]


image = draw({prompt}, seed={seed})
image.save("image.png")
"""


@dataclass(frozen=True)
class _Steps:
    """The levels of a scheduler's own steps, float64 [K'], before and after, K' >= K; and what its call needs for them.

    eta: whether the call takes DDIM's, and the levels follow each other without a gap.
    """

    sigmas: Tensor
    ends: Tensor
    arguments: dict[str, str]
    eta: bool = False


def usage(policy: Policy, folder: Path, num_steps: int, prompt: str, seed: int, adapter: str = "") -> str:
    """Python to be run in the exported `folder`, or "" where its scheduler cannot sample as `policy` does.

    prompt, seed: of the image that it draws, with `num_steps`; adapter: where the base comes from
    (`base_of`), to load the low-rank adapters onto it instead.
    """
    steps, scheduler = _steps(folder, num_steps)
    if steps is None or steps.sigmas.shape < (num_steps,):
        return ""
    levels = policy.backbone.schedule(num_steps).double()
    if not torch.allclose(levels[:-1], steps.sigmas[:num_steps], atol=_CLOSE, rtol=0):
        return ""
    scale, backbone = _unguided(policy.backbone)
    called: dict[str, str] = {}
    if isinstance(backbone, PipelineBackbone):
        if scale != 1 and not backbone.guides:
            return ""
        called, scale = backbone.call(), round(scale - 1 + backbone.unguided, 9)
    arguments = {"num_inference_steps": str(num_steps), "guidance_scale": repr(scale)} | called | steps.arguments
    fields = {"prompt": _quoted(prompt), "seed": seed, "purpose": PURPOSE}
    loaded = _adapted(folder, scheduler, adapter) if adapter else _loaded(folder)
    imports = f"DiffusionPipeline, {scheduler}" if adapter else "DiffusionPipeline"
    head = _HEAD.format(imports=imports, pipeline=loaded) + _NOISE.format(**fields)
    moves = _moves(policy.kernel, levels)
    if moves is None:
        return ""
    if steps.eta and (eta := _eta(moves, levels)) is not None:
        arguments["eta"] = repr(eta)
        return head + _PLAIN.format(arguments=_joined(arguments, 4), **fields)
    before, after, fresh = map(_numbers, _parts(moves, levels, steps, policy.backbone.path))
    draws = _draws(backbone)
    return head + _RENEWED.format(
        before=before, after=after, fresh=fresh, arguments=_joined(arguments, 8), **draws, **fields
    )


def _unguided(backbone: Denoiser) -> tuple[float, Denoiser]:
    """The scale of classifier-free guidance, and the backbone below it."""
    return (float(backbone.scale), backbone.backbone) if isinstance(backbone, Guided) else (1.0, backbone)


def _draws(backbone: Denoiser) -> dict[str, str]:
    """Python for the noise of the first level and for that of a step, as the pipeline's call takes latents."""
    first = f"torch.randn({', '.join(map(str, (1, *backbone.latent_shape)))}, generator=noise)"
    packed = backbone.packed if isinstance(backbone, PipelineBackbone) else "{}"
    same = packed == "{}"
    return {
        "first": packed.format(first),
        "next": "torch.randn(latents.shape, generator=noise)" if same else packed.format(first),
    }


def base_of(source: str) -> str:
    """Python for the folder or hub id of a configuration's `backbone.source`; of a folder the name alone."""
    if source.startswith("builtin:"):
        return f"builtin_pipeline({json.dumps(source.removeprefix('builtin:'))})"
    return _quoted(source if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) else Path(source).name)


_T5 = ", text_encoder_3=None, tokenizer_3=None"


def _loaded(folder: Path) -> str:
    without = _T5 if _lacks_t5(folder) else ""
    return f'# This folder, or its id on the hub:\npipeline = DiffusionPipeline.from_pretrained("."{without})'


def _adapted(folder: Path, scheduler: str, base: str) -> str:
    checked = _index(folder)["_class_name"] == "StableDiffusionPipeline"
    without = _T5 if _lacks_t5(folder) else ", safety_checker=None" if checked else ""
    lines = [
        f"base = {base}  # the untouched model",
        f"pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32{without})",
        'pipeline.load_lora_weights("lora")  # of this folder',
        f'pipeline.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")',
    ]
    if base.startswith("builtin_pipeline"):
        lines = ["from latentac.worlds.builtin import builtin_pipeline", "", *lines]
    return "\n".join(lines)


def _steps(folder: Path, num_steps: int) -> tuple[_Steps | None, str]:
    """What the folder's scheduler does in `num_steps` steps, and its class."""
    _, name = _index(folder)["scheduler"]
    if name == "FlowMatchEulerDiscreteScheduler":
        flow: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        flow.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)])
        sigmas = flow.sigmas.double()
        spaced = f"[1 - step / {num_steps} for step in range({num_steps})]"
        return _Steps(sigmas[:-1], sigmas[1:], {"sigmas": spaced}), name
    if name != "DDIMScheduler":
        return None, name
    ddim: Any = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ddim.set_timesteps(num_steps)
    timesteps, total = ddim.timesteps, ddim.config.num_train_timesteps
    # For some numbers of steps diffusers takes one more, at the timestep -1, which the callback undoes.
    ends = timesteps - total // num_steps
    known = torch.cat([ddim.alphas_cumprod.double(), ddim.final_alpha_cumprod.double().reshape(1)])
    sigmas, after = ((1 - known[where]).sqrt() for where in (timesteps, torch.where(ends < 0, total, ends)))
    fits = len(timesteps) == num_steps and torch.equal(ends[:-1], timesteps[1:])
    return _Steps(sigmas, after, {}, eta=fits), name


def _moves(kernel: Kernel, levels: Tensor) -> list[tuple[float, float, float]] | None:
    """Each step's next latents as a sum: how much of the clean ones, of the noise in them, and of fresh noise. None
    where they are no such sum."""
    moves = []
    for sigma, sigma_next in zip(levels[:-1].unsqueeze(1), levels[1:].unsqueeze(1), strict=True):

        def mean(clean: float, noise: float, sigma: Tensor = sigma, sigma_next: Tensor = sigma_next) -> float:
            latents = (alpha_of(sigma, kernel.path) * clean + sigma * noise).view(1, 1)
            prediction = Prediction(torch.full_like(latents, clean), torch.full_like(latents, noise))
            return float(kernel.transition(latents, prediction, sigma, sigma_next).mean)

        of_clean, of_noise = mean(1, 0), mean(0, 1)
        if abs(mean(20, -30) - (20 * of_clean - 30 * of_noise)) > _CLOSE:
            return None
        moves.append((of_clean, of_noise, float(kernel.std(sigma, sigma_next))))
    return moves


def _eta(moves: Sequence[tuple[float, float, float]], levels: Tensor) -> float | None:
    """The eta with which these moves are DDIM's; None if there is none."""
    most = _moves(DDIM(1.0), levels) or []
    eta = round(moves[0][2] / most[0][2], 6)
    same = _moves(DDIM(eta), levels)
    return eta if np.allclose(moves, same or most, rtol=0, atol=_CLOSE) else None


def _parts(moves: Sequence[tuple[float, float, float]], levels: Tensor, steps: _Steps, path: Mixing) -> Tensor:
    """[3, K']: how much of the latents before each step of the scheduler, of those after it, and of fresh noise."""
    sigmas, ends = levels[:-1], steps.ends[: len(moves)]
    scheduled = torch.stack([torch.stack([alpha_of(each, path), each], -1) for each in (sigmas, ends)], -1)
    wanted = torch.tensor(moves, dtype=torch.float64)
    of_latents = torch.linalg.solve(scheduled, wanted[:, :2])
    rows = torch.cat([of_latents, wanted[:, 2:]], 1)
    surplus = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(len(steps.ends) - len(moves), 3)
    return torch.cat([rows, surplus]).T


def _lacks_t5(folder: Path) -> bool:
    """Stable Diffusion 3 without T5, which a pipeline of diffusers then misses."""
    index = _index(folder)
    missing = (index.get("text_encoder_3") or [None])[0] is None
    return missing and str(index["_class_name"]).startswith("StableDiffusion3")


def _index(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_record(folder / "model_index.json")
    return content


def _quoted(text: str) -> str:
    return printable(json.dumps(text, ensure_ascii=False))  # its escapes are Python's, too


def _joined(arguments: dict[str, str], indent: int) -> str:
    return (",\n" + " " * indent).join(f"{name}={value}" for name, value in arguments.items())


def _numbers(values: Tensor) -> str:
    """A list of Python, a few to a line."""
    written = [f"{value:.9g}" for value in np.asarray(values)]
    lines = [", ".join(written[start : start + 8]) for start in range(0, len(written), 8)]
    return "[" + ",\n    ".join(lines) + "]"
