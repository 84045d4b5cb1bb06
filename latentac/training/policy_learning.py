"""How the policy learns: its loss on the transitions of rollouts, and the optimizer's steps."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentac.backbones.precision import MasterWeights
from latentac.config.learning import Policy as PolicySettings
from latentac.config.learning import Train
from latentac.method.losses import prediction_kl
from latentac.method.randomness import generator_for
from latentac.method.records import Minibatch, Trajectory, flatten_steps
from latentac.sampling.policy import Policy
from latentac.system.errors import Diverged
from latentac.training.algorithms import Algorithm
from latentac.training.checkpoint import optimizer_tensors, restore_optimizer
from latentac.training.distributed import GradientSum
from latentac.training.optimizers import policy_optimizer
from latentac.training.sharding import Sharding

REMEDY = "Start another run with a lower policy.learning_rate; a run keeps the configuration that it began with"
_EPS_DIMENSIONS = 256


@dataclass(frozen=True)
class Block:
    """The rollouts of one block.

    prompts: int64 [B], indices of the training prompts; rewards: [B, M].
    """

    index: int
    trajectory: Trajectory
    prompts: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class CreditedBlock(Block):
    """advantages: [B, S]; returns: [B, K, M], the critic's targets, None where no critic learns; counts: bool [B, S] in
    the host's memory, which advantages are not 0."""

    advantages: Tensor
    returns: Tensor | None
    counts: Tensor


class PolicyLearner:
    """The policy's trainable weights, their optimizer and their average. The same on every worker.

    parameters: name -> float32 weight that the optimizer updates; the network may compute with a rounded copy
    ema: name -> float32 average of that weight; empty without `policy.ema_decay`
    adam_eps: Adam's eps
    """

    def __init__(
        self,
        settings: PolicySettings,
        train: Train,
        policy: Policy,
        algorithm: Algorithm,
        sharding: Sharding,
        *,
        seed: int,
    ) -> None:
        """`policy` is trainable already. Where weights are sharded, it gets a denoiser with this worker's share."""
        self.settings, self.policy, self.algorithm = settings, policy, algorithm
        self.sharding, self.mesh = sharding, sharding.mesh
        mesh = sharding.mesh
        self._num_blocks, self._updates, self._seed = train.num_blocks, train.updates_per_iteration, seed
        if policy.rows.limit is None and mesh.device.type == "cuda":
            policy.rows.limit = train.block_images  # from here on it is halved until it fits
        policy.rows.fixed = sharding.active
        self._reference = _frozen(policy) if algorithm.prediction_kl > 0 else None
        for each in (policy, self._reference):
            if each is not None:
                each.backbone = sharding.shard(each.backbone)
        self._masters = MasterWeights(policy.backbone.module)
        self.parameters = self._masters.tensors
        # With sharded weights, each backward pass sums the gradients.
        self._sum = GradientSum(mesh, self._masters.pairs, active=not sharding.active)
        self.adam_eps = _adam_eps(policy)
        self.optimizer = policy_optimizer(settings, self.parameters.values(), self.adam_eps, mesh.device)
        # Only float16 needs it: its smallest gradients would be 0.
        float16 = any(parameter.dtype == torch.float16 for parameter in policy.backbone.module.parameters())
        self._scaler = torch.amp.GradScaler(mesh.device.type, enabled=float16)
        self.ema = self.copy() if settings.ema_decay > 0 else {}
        # Other terms of the loss have a gradient where the advantage is 0.
        self._only_advantages = not algorithm.value_gradient and self._reference is None

    def update(self, blocks: Sequence[CreditedBlock], iteration: int, update: int, rate: float) -> dict[str, float]:
        """One optimizer step on this update's share of every block's transitions. Returns means over all transitions
        that `minibatch` keeps.

        iteration: the number of iterations before this one; rate: the learning rate. Raises Diverged when a number is
        not finite.
        """
        sums = self._gradients(blocks, iteration, update)
        parameters = list(self.parameters.values())
        self._sum.finish()
        self._scaler.unscale_(self.optimizer)
        norm = self.sharding.clip(parameters, self.settings.gradient_clip)
        below = _share_below(parameters, self.adam_eps, self.sharding.sum)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._masters.publish()
        for name, average in self.ema.items():
            average.lerp_(self.parameters[name].detach(), 1 - self.settings.ema_decay)
        totals = self.mesh.gather(torch.stack(list(sums.values()))[None]).sum(0)
        # One transfer to the host per update: each makes a GPU wait.
        names = [*sums, "gradient_norm", "gradient_below_eps"]
        metrics = dict(zip(names, torch.cat([totals, torch.stack([norm, below]).to(totals)]).tolist(), strict=True))
        # The scaler leaves out an update whose gradients overflow in float16.
        checked = metrics if not self._scaler.is_enabled() else {name: metrics[name] for name in sums}
        if not all(map(math.isfinite, checked.values())):
            where = f"iteration {iteration + 1}, update {update + 1}"
            raise Diverged(where, f"the update is not finite ({metrics})", REMEDY)
        return metrics

    def copy(self) -> dict[str, Tensor]:
        """A copy of the weights, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All rows of weights, or of what has their shapes, by name; see `Sharding.whole`."""
        return {name: self.sharding.whole(tensor, self.parameters[name]) for name, tensor in tensors.items()}

    def own(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Undo `whole`, of the entries of `tensors` below `prefix`: this worker's rows, on its device."""
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        rows = {name: self.sharding.own(tensor, self.parameters[name]) for name, tensor in found.items()}
        return {name: tensor.to(self.mesh.device) for name, tensor in rows.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put weights, by name, into the policy; this worker's rows of them where they are sharded."""
        self._masters.load(tensors)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `update` depends on: tensors, and what is not a tensor; see `Trainer.state`."""
        tensors = {f"actor.{name}": tensor for name, tensor in self.whole(self.parameters).items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.whole(self.ema).items()}
        scaler = {"scaler": self._scaler.state_dict()} if self._scaler.is_enabled() else {}
        return tensors | optimizer_tensors(self.optimizer, "actor_optimizer", self.sharding.whole), scaler

    def load_state(self, tensors: dict[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.load(self.own(tensors, "actor."))
        self.ema = self.own(tensors, "ema.")
        restore_optimizer(self.optimizer, "actor_optimizer", tensors, self.sharding.own)
        if "scaler" in progress:
            self._scaler.load_state_dict(progress["scaler"])

    def _gradients(self, blocks: Sequence[CreditedBlock], iteration: int, update: int) -> dict[str, Tensor]:
        """Add the gradients of this worker's blocks. Returns its metrics, summed so that the sum over the workers is a
        mean. When memory runs out, it starts again with fewer rows per forward pass.

        Where weights are sharded, a worker with fewer passes than others repeats its last one, which then counts
        nothing.
        """
        self._sum.begin()
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            sums: dict[str, Tensor] = {}
            most = 0
            idle = self._idle(blocks, iteration, update)
            try:
                for block in blocks:
                    minibatch = self.minibatch(block, iteration, update)
                    most = max(most, len(minibatch))
                    every = len(self._transitions(block, iteration, update))
                    for part in self.policy.rows.parts(len(minibatch)):
                        share = len(part) / len(minibatch)
                        with self._sum.last_pass(block is blocks[-1] and part.stop == len(minibatch)):
                            metrics = self.add_gradient(minibatch.part(part), len(part) / every)
                        for name, value in metrics.items():
                            before = sums.get(name, torch.zeros((), device=self.mesh.device))
                            sums[name] = before + share * value / self._num_blocks
                for _ in range(idle):
                    self.add_gradient(minibatch.part(part), 0.0)
                return sums
            except torch.OutOfMemoryError as error:
                failed = error.with_traceback(None)  # its frames hold the tensors that take the memory
            self.policy.rows.halve(most, failed)

    def add_gradient(self, minibatch: Minibatch, share: float = 1.0) -> dict[str, Tensor]:
        """Add a minibatch's gradient to the weights', as `share` of one of the update's blocks. Returns its metrics."""
        arguments = minibatch.latents, minibatch.sigma, minibatch.sigma_next, minibatch.conditioning
        output = self.policy.forward(*arguments)
        found = self.algorithm.loss(output.transition, minibatch)
        loss, metrics = found.loss, {"policy_loss": found.loss.detach(), **found.metrics}
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference.forward(*arguments).prediction
            drift = prediction_kl(output.prediction, reference, self.policy.backbone.path)
            loss = loss + self.algorithm.prediction_kl * drift
            metrics["prediction_kl"] = drift.detach()
        self._scaler.scale(loss * share / self._num_blocks).backward()
        return metrics

    def minibatch(self, block: CreditedBlock, iteration: int, update: int) -> Minibatch:
        """The transitions of a block that belong to `update`. Those with advantage 0 are left out where they have no
        gradient; one stays, so that each worker has a gradient to send."""
        steps = block.trajectory.num_stochastic_steps
        rows = self._kept(block, iteration, update)
        if block.trajectory.latents.device == self.mesh.device:
            rows = rows.to(self.mesh.device)
        return flatten_steps(block.trajectory, block.advantages, rows // steps, rows % steps)

    def _kept(self, block: CreditedBlock, iteration: int, update: int) -> Tensor:
        """Those of `_transitions` that `minibatch` keeps."""
        rows = self._transitions(block, iteration, update)
        if not self._only_advantages:
            return rows
        kept = rows[block.counts.flatten()[rows]]
        return kept if len(kept) else rows[:1]

    def _idle(self, blocks: Sequence[CreditedBlock], iteration: int, update: int) -> int:
        """The passes that this worker has to add to those of its blocks; see `Sharding.idle`."""
        if not self.sharding.active:
            return 0
        counts = [len(self._kept(block, iteration, update)) for block in blocks]
        return self.sharding.idle(sum(len(self.policy.rows.parts(count)) for count in counts))

    def _transitions(self, block: CreditedBlock, iteration: int, update: int) -> Tensor:
        """int64 [N] in the host's memory, the flattened (image, step) that belong to `update`, in random order."""
        generator = generator_for(self._seed, "order", "actor", iteration, block.index)
        order = torch.randperm(block.advantages.numel(), generator=generator)
        return order.tensor_split(self._updates)[update]


def _frozen(policy: Policy) -> Policy:
    """The policy as it is now, for good."""
    backbone = policy.backbone.clone()
    backbone.module.requires_grad_(False)
    return Policy(backbone, copy.copy(policy.kernel), policy.rows)


def _adam_eps(policy: Policy) -> float:
    """1e-8 at the 256 latent dimensions of the built-in models, where the defaults were chosen, and 1 / D beyond.

    The log-probability is an average over the D dimensions. The gradient of a weight that acts on few of them falls as
    1 / D, and with a fixed eps so would its steps.
    """
    return 1e-8 * min(1.0, _EPS_DIMENSIONS / math.prod(policy.backbone.latent_shape))


def _share_below(parameters: Sequence[Tensor], eps: float, total: Callable[[Tensor], Tensor]) -> Tensor:
    """[], the share of gradient entries whose absolute value is below `eps`: Adam hardly moves these weights. total:
    from counts of this worker's entries to those of all entries."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    below = torch.stack([(gradient.abs() < eps).sum() for gradient in gradients]).sum()
    below, every = total(torch.stack([below, below.new_tensor(sum(map(torch.numel, gradients)))]))
    return below / every
