"""The steering of one rollout: the method at work, its uniform random numbers, and a callback."""

from collections.abc import Callable

from torch import Tensor

from latentac.critic import ValueFunction
from latentac.method.diffusion import GaussianTransition
from latentac.sampling.steering import SteeredRollout, Steering, SteeringState

Callback = Callable[[int, Tensor], None]
"""Called with each step and the values of its states, [B, N, M]: B images of N particles, in each reward's own unit.
An exception that it raises ends the rollout."""


class SteeringRun:
    """What `rollout` calls at each step. It is for one rollout.

    method: how to steer; None only calls the callback.
    uniforms: [B, K] from U(0, 1), one row per image; needed where an image has N > 1 particles. These are consecutive
        rows of the rollout.
    callback: called with each step's values as soon as they are known, before any particle continues from another.

    A row that continues from another one has that row's past.
    """

    def __init__(
        self, method: Steering | None = None, uniforms: Tensor | None = None, *, callback: Callback | None = None
    ) -> None:
        self._method, self._uniforms, self._callback = method, uniforms, callback
        self._particles = 1 if method is None else method.particles
        self._rollout, self._steps = SteeredRollout(), range(0)
        self._critic: ValueFunction | None = None

    def begin(self, noise: Tensor, critic: ValueFunction | None) -> None:
        """Before the first step. noise: [B N, K+1, *latent]. Raises ValueError for missing uniforms."""
        self._critic = critic
        if self._method is None:
            return
        num_steps, uniforms = noise.shape[1] - 1, self._uniforms
        if uniforms is None:
            if self._particles > 1:
                raise ValueError(f"{self._particles} particles per image need uniforms, [images, steps]")
            uniforms = noise.new_zeros(len(noise), num_steps)  # one particle alone is never resampled
        self._rollout, self._steps = self._method.begin(uniforms), self._method.steps(num_steps)

    def needs_gradient(self, step: int) -> bool:
        """Whether `act` takes the gradient of the values with respect to the latents at this step."""
        return self._method is not None and step in self._steps and self._method.needs_gradient

    def act(self, state: SteeringState) -> tuple[GaussianTransition, GaussianTransition, Tensor | None]:
        """The policy's transition, the proposal to draw from, and the rows that they continue from: int64 [B N], or
        None where each continues from itself."""
        if self._callback is not None:
            values = state.values.detach()
            shown = values if self._critic is None else self._critic.unstandardise(values)
            self._callback(state.step, shown.unflatten(0, (-1, self._particles)))
        rollout = self._rollout if state.step in self._steps else SteeredRollout()
        proposal, rows = rollout.propose(state), rollout.resample(state)
        if rows is None:
            return state.transition, proposal, None
        transition = state.transition.rows(rows)
        return transition, transition if proposal is state.transition else proposal.rows(rows), rows

    def moved(self, transition: GaussianTransition, proposal: GaussianTransition, next_latents: Tensor) -> None:
        """What was drawn from `proposal`, where the policy has `transition`."""
        self._rollout.moved(transition, proposal, next_latents)

    def select(self, values: Tensor) -> Tensor:
        """The particle that each image keeps, int64 [B]. values: [B, N, M], standardised, at the last state."""
        if self._method is None:
            return values.new_zeros(len(values)).long()
        return self._method.select(values)
