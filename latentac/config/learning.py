"""The sections of the configuration that say how actor and critic learn."""

from typing import Annotated, Literal

from pydantic import Field

from latentac.config.sections import (
    Extension,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Section,
)


class Policy(Section):
    """The actor: the diffusion model while it is trained."""

    adaptation: Literal["full", "lora"] = "full"
    """Train all weights, or low-rank adapters on the attention."""
    lora_rank: Positive = 32
    """Rank of the adapters."""
    lora_alpha: Positive = 64
    """Scale of the adapters, times their rank."""
    learning_rate: Rate = 6e-5
    """Of AdamW: `1e-4`."""
    warmup_updates: Annotated[int, Field(ge=0)] = 20
    """Optimizer updates over which the learning rate rises to its value."""
    weight_decay: NonNegative = 1e-4
    """Of AdamW."""
    gradient_clip: Rate = 1.0
    """Largest L2 norm of the gradient."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per update of the average of the weights that is published; 0 publishes the last weights."""


class Critic(Section):
    """One value head per reward on a body that reads latents."""

    body: Extension = Extension(use="frozen_taps")
    """What the heads read: `frozen_taps` (the policy's own forward), `lora` or `copy` (a backbone of its own); to
    compare with, `pixel` (the decoded guess of the picture) and `latent_cnn` (shares nothing), or `module:Class`."""
    hidden: Annotated[int, Field(gt=0, le=8192)] = 128
    """Units of the MLP between the body's summary and the heads."""
    shared_head: bool = False
    """One head for all rewards, as an ablation."""
    num_passes: Positive = 2
    """Passes over the states of each iteration."""
    updates_per_pass: Positive = 4
    """Optimizer updates per pass."""
    replay_images: Annotated[int, Field(ge=0)] = 0
    """Newest scored pictures that are kept. With each state of a rollout the critic learns from a forward-noised state
    of one of them; 0 for none."""
    learning_rate: Rate = 2e-3
    """Of AdamW, for all weights of the critic but a pretrained backbone in its body."""
    weight_decay: NonNegative = 1e-4
    """Of AdamW."""
    gradient_clip: Rate = 1.0
    """Largest L2 norm of the gradient."""
    target_clip: Rate = 5.0
    """Bound of the value targets, in standard deviations of the reward."""


class Pretrain(Section):
    """Monte-Carlo regression of the critic on rollouts of the frozen actor."""

    num_images: Annotated[int, Field(ge=0)] = 2048
    """Pictures that are drawn and scored to learn from; 0 for no pretraining."""
    num_held_out_images: Positive = 256
    """Pictures of held-out prompts that measure the critic."""
    num_passes: Positive = 5
    """Passes over the states."""
    minibatch_states: Positive = 256
    """States per optimizer update."""
    forward_noised: Fraction = 0.0
    """Share of the minibatches that are fresh noise on the scored pictures instead of states of the rollouts."""


class Algorithm(Extension):
    """How rewards become advantages, and advantages become a loss."""

    use: str = "ppo"
    """`ppo` (the critic is the baseline), `grpo` (the group of a prompt's rollouts is), `ddpo` (the mean of all images
    is, or of each prompt so far), or `module:Class`."""


class EarlyStopping(Section):
    """Stop when a reward that is not trained on stops rising, and publish the weights of its best iteration."""

    reward: str
    """The watched reward: one of weight 0."""
    window: Positive = 5
    """Iterations over which its mean is taken."""
    patience: Positive = 10
    """Iterations without a rise after which training ends."""
    min_delta: NonNegative = 0.0
    """Smallest rise that counts, in the reward's unit."""


class Guard(Section):
    """When training has diverged. The run then goes back to its last checkpoint once, at a lower learning rate; the
    second time it fails. An update that is not finite counts as well."""

    max_kl: Rate = 1.0
    """Largest mean KL of one denoising step in an iteration, in nats."""
    max_clip_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Largest share of clipped ratios in an iteration."""
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What the actor's learning rate is multiplied by after going back."""


class Train(Section):
    """Iterations of rollouts and updates, shared by the workers."""

    num_iterations: Positive = 30
    """Iterations: rollouts, then updates."""
    images_per_iteration: Positive = 256
    """Pictures per iteration, of all workers together."""
    updates_per_iteration: Positive = 4
    """Optimizer updates of the actor per iteration."""
    block_images: Positive = 32
    """Pictures that go through the model together. Blocks are dealt to the workers; more or fewer workers change no
    result. Smaller blocks need less memory."""
    num_workers: Positive = 2
    """Processes on this machine. A cluster has its own setting."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often lost workers are started again."""
    checkpoint_every: Positive = 2
    """Iterations between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that are kept."""
    guard: Guard = Guard()
    """Bounds beyond which training has diverged."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the last iteration; by default never."""
