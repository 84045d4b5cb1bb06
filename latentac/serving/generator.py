"""Images from an exported model: the same request gives the same bytes, whoever shares a batch with it."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from latentac.backbones import BACKBONES
from latentac.backbones.guided import guided
from latentac.critic import Critic
from latentac.method.randomness import noise_for, uniforms_for
from latentac.sampling.devices import map_blocks
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout, steered_rollout
from latentac.sampling.steering import STEERING, Steering, evaluations
from latentac.sampling.steering.run import SteeringRun
from latentac.serving import exported
from latentac.serving.adapted import load_denoisers
from latentac.serving.forms import forms_of
from latentac.serving.request import Request, shortened, validated
from latentac.system.errors import ConfigError, Problem, ServingError, describe
from latentac.system.modelfiles import shorten
from latentac.system.names import PLAIN

Observe = Callable[[int, np.ndarray], None]
"""Gets the step and float32 [images, N, M], the values of each image's N particles, in the rewards' units."""


@dataclass(frozen=True)
class Kind:
    """What images must have in common to be drawn together. Unsteered, method is `none`, particles 1."""

    policy: str
    num_steps: int
    guidance_scale: float
    method: str
    particles: int

    @property
    def steers(self) -> bool:
        return self.method != PLAIN


@dataclass(frozen=True)
class Slot:
    """One image to draw: its place in its request. weights: of the M heads."""

    kind: Kind
    prompt: str
    seed: int
    index: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Drawn:
    """An image, uint8 [H, W, 3], and the critic's values on the way, float32 [K, M], in the rewards' units."""

    image: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Generated:
    """What one request gave.

    images: uint8 [N, H, W, 3]
    values: float32 [N, K, M], the critic's estimate at each denoised state, in each reward's own unit
    reward_names: the M heads          weights: reward name -> steering weight used, empty where none was
    nfe: function evaluations of the denoiser an image, a backward counted as 2
    tokens: of the prompt; truncated: whether these are more than the text encoder reads, so that the rest was cut off
    """

    images: np.ndarray
    values: np.ndarray
    reward_names: tuple[str, ...]
    weights: dict[str, float]
    nfe: int
    seed: int
    tokens: int
    truncated: bool


class _RowByRow(nn.Linear):
    """A linear layer whose result for a row does not depend on the row's place. MKL's product of a matrix with few
    columns does: a processor's vectors hold several of its rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """[B, N] to [B, M]."""
        return (input[:, None, :] * self.weight).sum(-1) + self.bias


class Generator:
    """An exported folder on a device. Everything may be called from any thread, several at a time."""

    def __init__(self, folder: Path, device: torch.device, base: Path | None = None) -> None:
        """base: folder with the base of an adapter, by default `base/` in `folder`. Raises ServingError if `folder` is
        not an exported model, or is damaged, or its base is not the one that it was trained on."""
        self._folder = folder
        self.exported = exported.read(folder)
        self.forms = forms_of(self.exported)
        self.device = device
        try:
            _check_rows(self.exported, folder)
            self._backbones = load_denoisers(self.exported, folder, device, base)
            # A critic with a backbone of its own makes it of one without adapters, and then loads its weights.
            plain = self._backbones.get("base", self._backbones["trained"])
            self.critic = Critic.load(folder / "critic", plain)
            self.critic.heads = _RowByRow(self.critic.heads)
            self._kernel = KERNELS.make(self.exported.kernel)
            for name, method in self.exported.methods.items():
                STEERING.settings(method.extension, f"{exported.FILE}: methods.{name}.extension")
        except ConfigError as error:  # the folder's, not the caller's
            report = "; ".join(_described(problem) for problem in error.problems)
            raise ServingError(str(folder), f"cannot be loaded: {shorten(report)}", error.problems[0].remedy) from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ServingError(str(folder), f"cannot be loaded: {reason}", "Fetch the model again.") from error
        names = tuple(reward.name for reward in self.exported.rewards)
        if self.critic.reward_names != names:
            problem = f"the critic's heads {self.critic.reward_names} are not the rewards {names} of {exported.FILE}"
            raise ServingError(str(folder), problem, "Deploy the run again.")

    def rehearse(self) -> None:
        """Generate one image in two steps. Raises ServingError where the model loads but cannot generate."""
        try:
            self.generate("ready", num_steps=2)
        except Exception as error:
            problem = f"loads, but cannot generate an image: {shorten(describe(error))}"
            raise ServingError(str(self._folder), problem, "Fetch the model again, or deploy the run again.") from error

    def policy(self, name: str, guidance_scale: float = 1.0) -> Policy:
        """The policy `trained` or `base`, with classifier-free guidance; 1 is none."""
        return Policy(guided(self._backbones[name], guidance_scale), self._kernel)

    def generate(
        self,
        prompt: str,
        seed: int | None = None,
        count: int | None = None,
        *,
        num_steps: int | None = None,
        method: str | None = None,
        steering: dict[str, float] | None = None,
        particles: int | None = None,
        guidance_scale: float | None = None,
        policy: str | None = None,
    ) -> Generated:
        """`count` images of `prompt`. Image i depends on (seed, i), not on `count` or on the number of cores.

        What is None has the default of a request: see `latentac.serving.request.Request`. steering: reward name ->
        weight in standard deviations of that reward; a reward that is not named has weight 0; all at 0 do not steer.
        particles: rollouts per image. guidance_scale: of classifier-free guidance, 1 is none. policy: `trained`
        weights, or `base`. Raises ConfigError with every problem.
        """
        fields = {
            "prompt": prompt,
            "seed": seed,
            "count": count,
            "num_steps": num_steps,
            "method": method,
            "steering": steering,
            "particles": particles,
            "guidance_scale": guidance_scale,
            "policy": policy,
        }
        request = validated(self.forms.request, fields)
        self.check([("prompt", request)])
        slots = self.slots(request)
        room = self.room(slots[0].kind)
        blocks = [slots[start : start + room] for start in range(0, len(slots), room)]
        return self.generated(request, [one for block in map_blocks(self.draw, blocks, self.device) for one in block])

    @property
    def max_tokens(self) -> int:
        """What is read of a prompt."""
        return self._backbones["trained"].max_tokens

    def check(self, requests: Sequence[tuple[str, Request]]) -> None:
        """requests: each with its prompt's path. Raises ConfigError for all that would be cut, unless it is allowed."""
        if self.exported.limits.allow_truncation:
            return
        most, counts = self.max_tokens, self._backbones["trained"].count_tokens([one.prompt for _, one in requests])
        problems = [
            Problem(path, shortened(request.prompt), f"has {count} tokens, and the model reads {most}", "Shorten it.")
            for (path, request), count in zip(requests, counts, strict=True)
            if count > most
        ]
        if problems:
            raise ConfigError(problems)

    def weights(self, request: Request) -> dict[str, float]:
        """Reward name -> the steering weight that the request has; those at 0 are left out."""
        method = self.method(request)
        if method == PLAIN:
            return {}
        given = self.exported.default_weights(method) if request.steering is None else request.steering
        return {name: float(weight) for name, weight in given.items() if weight}

    def method(self, request: Request) -> str:
        """The method that the request names, or the model's default."""
        return request.method or self.exported.default_method

    def kind(self, request: Request) -> Kind:
        """What the request's images are; with all weights at 0 they are plain ones, whatever the method."""
        method = self.method(request) if self.weights(request) else PLAIN
        particles = 1 if method == PLAIN else request.particles or self.exported.methods[method].particles
        return Kind(
            policy=request.policy,
            num_steps=request.num_steps or self.exported.kernel.num_steps,
            guidance_scale=float(request.guidance_scale),
            method=method,
            particles=particles,
        )

    def slots(self, request: Request) -> list[Slot]:
        """The request's images, all of one kind."""
        kind, weights = self.kind(request), self.weights(request)
        heads = tuple(weights.get(name, 0.0) for name in self.critic.reward_names)
        return [Slot(kind, request.prompt, request.seed, index, heads) for index in range(request.count)]

    def room(self, kind: Kind) -> int:
        """How many images of a kind are drawn together."""
        return max(1, self.exported.batching.batch_rows // kind.particles)

    def draw(self, slots: Sequence[Slot], observe: Observe | None = None) -> list[Drawn]:
        """At most `room` images of one kind. What `observe` raises ends the work.

        A network's rounding depends on the shape of a batch, but a row's not on the other rows. So each batch of a kind
        has the same shape: free places are filled with the last image again.
        """
        kind = slots[0].kind
        filled = [*slots, *[slots[-1]] * (self.room(kind) - len(slots))]
        policy, prompts = self.policy(kind.policy, kind.guidance_scale), [slot.prompt for slot in filled]
        backbone = policy.backbone
        conditioning = backbone.encode(prompts)
        noise = torch.stack([self._noise(slot) for slot in filled]).to(self.device)

        def callback(step: int, values: Tensor) -> None:
            if observe is not None:
                observe(step, values[: len(slots)].cpu().numpy())

        if kind.steers:
            weights = torch.tensor([slot.weights for slot in filled], device=self.device)
            steering = self._steering(kind, weights)
            uniforms = torch.cat([uniforms_for([_key(slot)], slot.seed, kind.num_steps) for slot in filled])
            run = SteeringRun(steering, uniforms.to(self.device), callback=callback)
            trajectory = steered_rollout(policy, self.critic, conditioning, noise, run)
        else:
            run = SteeringRun(callback=callback)
            trajectory = rollout(policy, self.critic, conditioning, noise.flatten(0, 1), steering=run)
        images, values = backbone.decode(trajectory.clean), trajectory.values.cpu().numpy()
        return [Drawn(images[row], values[row]) for row in range(len(slots))]

    def generated(self, request: Request, drawn: Sequence[Drawn]) -> Generated:
        """The answer to `request`, whose images are drawn. Raises ConfigError where the weights were too strong."""
        values, weights = np.stack([one.values for one in drawn]), self.weights(request)
        if not np.isfinite(values).all():
            raise ConfigError([Problem("steering", weights, "drove the latents to infinity", "Use smaller weights.")])
        (tokens,) = self._backbones["trained"].count_tokens([request.prompt])
        return Generated(
            images=np.stack([one.image for one in drawn]),
            values=values,
            reward_names=self.critic.reward_names,
            weights=weights,
            nfe=self.nfe(self.kind(request)),
            seed=request.seed,
            tokens=tokens,
            truncated=tokens > self.max_tokens,
        )

    def nfe(self, kind: Kind) -> int:
        """Function evaluations per image."""
        steering = self._steering(kind, torch.zeros(1)) if kind.steers else None
        return evaluations(steering, kind.num_steps, guided=kind.guidance_scale != 1)

    def _steering(self, kind: Kind, weights: Tensor) -> Steering:
        extension = self.exported.methods[kind.method].extension
        steering: Steering = STEERING.make(extension, weights, kind.particles)
        return steering

    def _noise(self, slot: Slot) -> Tensor:
        """[N, K+1, *latent]"""
        keys = [(*_key(slot), particle) for particle in range(slot.kind.particles)]
        return noise_for(keys, slot.seed, slot.kind.num_steps, self._backbones["trained"].latent_shape)


def _key(slot: Slot) -> tuple[str, int]:
    return "serving", slot.index


def _described(problem: Problem) -> str:
    """A problem of the folder: one under `backbone.source` names its file."""
    if problem.path == "backbone.source":
        return problem.problem
    return f"{problem.path} = {shorten(repr(problem.value))}: {problem.problem}"


def _check_rows(model: exported.Exported, folder: Path) -> None:
    """What a folder names is imported, so it may name rows of the tables only, or what the operator allows."""
    where = str(folder / exported.FILE)
    BACKBONES.check_row(model.backbone.use, where)
    KERNELS.check_row(model.kernel.use, where)
    for method in model.methods.values():
        STEERING.check_row(method.extension.use, where)


def png(image: np.ndarray) -> bytes:
    """An image, uint8 [H, W, 3], as a PNG file without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
