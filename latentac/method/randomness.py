"""Seeded randomness: every random draw is a function of what it is for: (seed, purpose, iteration, prompt, rollout).

No generator's state is stored, so a resumed run and a run on another number of workers draw the same numbers.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_for(seed: int, *purpose: object) -> int:
    """A seed that depends on `seed` and `purpose` alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on `seed` and `purpose` alone."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


def noise_for(keys: Sequence[tuple[object, ...]], seed: int, num_steps: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal [len(keys), K+1, *shape]: the first latents and each step's draw of one rollout a key.

    Drawn one after the other, as a pipeline of diffusers does that is given the key's generator.
    """
    generators = [generator_for(seed, *key) for key in keys]
    draws = [[torch.randn(*shape, generator=each) for _ in range(num_steps + 1)] for each in generators]
    return torch.stack([torch.stack(steps) for steps in draws])


def uniforms_for(keys: Sequence[tuple[object, ...]], seed: int, num_steps: int) -> Tensor:
    """U(0, 1) [len(keys), K]: one number a step for whatever chooses among the particles of an image."""
    return torch.stack([torch.rand(num_steps, generator=generator_for(seed, "uniforms", *key)) for key in keys])
