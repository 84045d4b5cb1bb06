"""Pictures from an exported model: the same request gives the same bytes."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from latentac.backbones import load_backbone
from latentac.critic import Critic
from latentac.diffusion import KERNELS
from latentac.distributed import map_blocks, noise_for, uniforms_for
from latentac.errors import ConfigError, Problem, ServingError
from latentac.policy import Policy
from latentac.rollout import rollout, steered_rollout
from latentac.serving import exported
from latentac.serving.request import METHODS, Request, checked
from latentac.steering import Steering, evaluations, make_steering


@dataclass(frozen=True)
class Pictures:
    """What one request gave.

    images: uint8 [N, H, W, 3]
    values: float32 [N, K, M], the critic's estimate at each denoised state, in each reward's own unit
    reward_names: the M heads          weights: reward name -> steering weight used, empty where none was
    nfe: function evaluations of the denoiser an image, a backward counted as 2
    """

    images: np.ndarray
    values: np.ndarray
    reward_names: tuple[str, ...]
    weights: dict[str, float]
    nfe: int
    seed: int


class Generator:
    """An exported folder on a device. `generate` may be called from any thread, one call at a time."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises ServingError if `folder` is no exported model, or is damaged."""
        self.exported = exported.read(folder)
        self.device = device
        kernel = KERNELS[self.exported.kernel.name](self.exported.kernel.noise)
        try:
            self.policy = Policy(load_backbone(self.exported.backbone, folder, device), kernel)
            self.critic = Critic.load(folder / "critic", self.policy.backbone)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ServingError(str(folder), f"cannot be loaded: {reason}", "Fetch the model again.") from error
        names = tuple(reward.name for reward in self.exported.rewards)
        if self.critic.reward_names != names:
            problem = f"the critic's heads {self.critic.reward_names} are not the rewards {names} of {exported.FILE}"
            raise ServingError(str(folder), problem, "Deploy the run again.")

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        count: int = 1,
        num_steps: int | None = None,
        method: str = METHODS[0],
        steering: dict[str, float] | None = None,
        candidates: int = 4,
    ) -> Pictures:
        """`count` pictures of `prompt`. Picture i depends on (seed, i), not on `count` or on the number of cores.

        num_steps: the exported default if None. steering: reward name -> weight in standard deviations of that reward,
        the exported defaults if None; a reward that is not named has weight 0, and all at 0 is the plain rollout.
        candidates: rollouts a picture; value_gradient has one alone. Raises ConfigError with every problem.
        """
        request = checked(
            self.exported,
            prompt=prompt,
            seed=seed,
            count=count,
            num_steps=num_steps,
            method=method,
            steering=steering,
            candidates=candidates,
        )
        weights = self._weights(request)
        guide = self._steering(request, weights)
        steps = request.num_steps or self.exported.kernel.num_steps
        # One block a picture: its bytes then do not depend on which others share the request.
        parts = map_blocks(lambda index: self._picture(request, index, steps, guide), range(count), self.device)
        values = np.stack([value for _, value in parts])
        if not np.isfinite(values).all():
            raise ConfigError([Problem("steering", weights, "drove the latents to infinity", "Use smaller weights.")])
        return Pictures(
            images=np.stack([image for image, _ in parts]),
            values=values,
            reward_names=self.critic.reward_names,
            weights=weights,
            nfe=evaluations(guide, steps),
            seed=seed,
        )

    def _weights(self, request: Request) -> dict[str, float]:
        if request.method == "none":
            return {}
        given = self.exported.default_weights if request.steering is None else request.steering
        return {name: float(weight) for name, weight in given.items() if weight}

    def _steering(self, request: Request, weights: dict[str, float]) -> Steering | None:
        if not weights:
            return None
        heads = torch.tensor([weights.get(name, 0.0) for name in self.critic.reward_names], device=self.device)
        return make_steering(request.method, heads, 1 if request.method == "value_gradient" else request.candidates)

    def _picture(
        self, request: Request, index: int, num_steps: int, steering: Steering | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [H, W, 3] and values [K, M]."""
        backbone = self.policy.backbone
        conditioning = backbone.encode([request.prompt])
        keys = [("serving", index, candidate) for candidate in range(steering.candidates if steering else 1)]
        noise = noise_for(keys, request.seed, num_steps, backbone.latent_shape).to(self.device)
        if steering is None:
            trajectory = rollout(self.policy, self.critic, [request.prompt], conditioning, noise)
        else:
            uniforms = uniforms_for([("serving", index)], request.seed, num_steps).to(self.device)
            prompts = [request.prompt]
            trajectory = steered_rollout(
                self.policy, self.critic, prompts, conditioning, noise[None], steering, uniforms
            )
        return backbone.decode(trajectory.clean)[0], trajectory.values[0].cpu().numpy()


def png(image: np.ndarray) -> bytes:
    """A picture, uint8 [H, W, 3], as a PNG file without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
