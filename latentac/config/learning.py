"""The sections of the configuration that say how policy and critic learn."""

from typing import Annotated, Literal

from pydantic import Field

from latentac.config.sections import (
    Extension,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Seconds,
    Section,
)


class Policy(Section):
    """The policy: the diffusion model while it is trained."""

    adaptation: Literal["full", "lora"] = "full"
    """Train all weights, or low-rank adapters on the attention layers."""
    lora_rank: Positive = 32
    """Rank of the adapters."""
    lora_alpha: Positive = 64
    """LoRA's alpha: the adapters' output is multiplied by alpha / rank."""
    guidance_scale: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Scale of classifier-free guidance in rollouts, updates and evaluation, and the default of the endpoint. 1 is
    none. With guidance, the log-probabilities are those of the guided policy, and each image costs two rows per forward
    pass."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps AdamW's moments in 8 bits, each 256 numbers with a scale: 2 bytes per trained weight instead
    of 8. Entries of the gradient that are far below the largest of their 256 take steps of another size. It needs
    bitsandbytes: `pip install 'latentac[optimizers]'`."""
    learning_rate: Rate = 6e-5
    """Learning rate of AdamW. Example: `1e-4`."""
    warmup_updates: Annotated[int, Field(ge=0)] = 20
    """Optimizer updates during which the learning rate rises linearly to its value."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of AdamW."""
    gradient_clip: Rate = 1.0
    """Largest L2 norm of the gradient."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per update of the EMA of the weights, which is published; 0 publishes the last weights."""


class Critic(Section):
    """One value head per reward, on a critic body that reads latents."""

    body: Extension = Extension(use="frozen_taps")
    """The critic body: `frozen_taps` (features of the policy's own forward pass), or `lora` or `copy` (a second
    backbone). For comparison: `pixel` (the decoded prediction of the image) and `latent_cnn` (shares nothing with the
    backbone). Or `module:Class`."""
    hidden: Annotated[int, Field(gt=0, le=8192)] = 128
    """Units of the MLP between the body's output and the heads."""
    shared_head: bool = False
    """One head for all rewards; an ablation."""
    num_passes: Positive = 2
    """Passes over the states of each iteration."""
    updates_per_pass: Positive = 4
    """Optimizer updates per pass."""
    replay_images: Annotated[int, Field(ge=0)] = 0
    """Size of the replay: the newest scored images that are kept. For each state of a rollout, the critic also learns
    from one noised image of the replay; 0 for no replay."""
    learning_rate: Rate = 2e-3
    """Learning rate of AdamW, for all weights of the critic except a pretrained backbone in its body."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of AdamW."""
    gradient_clip: Rate = 1.0
    """Largest L2 norm of the gradient."""
    target_clip: Rate = 5.0
    """Bound of the value targets, in standard deviations of the reward."""


class Pretrain(Section):
    """Monte-Carlo regression of the critic on rollouts of the frozen policy."""

    num_images: Annotated[int, Field(ge=0)] = 2048
    """Images that are made and scored for the critic to learn from; 0 for no pretraining."""
    num_held_out_images: Positive = 256
    """Images of held-out prompts on which the critic is measured."""
    num_passes: Positive = 5
    """Passes over the states."""
    minibatch_states: Positive = 256
    """States per optimizer update."""
    forward_noised: Fraction = 0.0
    """Share of the minibatches that consist of scored images with fresh noise, instead of states of the rollouts."""


class Algorithm(Extension):
    """How rewards become advantages, and advantages become a loss."""

    use: str = "ppo"
    """`ppo` (the critic is the baseline), `grpo` (the baseline is the mean of a prompt's group), `ddpo` (the baseline
    is the mean of all images or of a prompt's images so far), or `module:Class`."""


class Memory(Section):
    """Where a worker keeps what it learns from. It changes results only by rounding; on a CPU there is one memory, and
    they are bitwise the same."""

    trajectories: Literal["device", "host"] = "device"
    """Where the trajectories of an iteration wait for its updates: latents, means, value gradients, the critic's
    features and the prompts' text. From `host`, a minibatch at a time is moved to the GPU."""
    states_gib: NonNegative = 8.0
    """GPU memory in GiB for each of two things that the critic learns from: its features of all states of value
    pretraining, and the latents of its replay. What is larger is kept in the host's memory, and a minibatch at a time
    is moved to the GPU."""
    host_states_gib: NonNegative | None = None
    """Host memory in GiB for the features of value pretraining. If they are larger, only latents are kept, and each
    pass computes the features again: one more forward pass per state and pass. Default: no bound."""

    def fits_device(self, size: int, device: str) -> bool:
        """Whether `size` bytes that the critic learns from are kept on a device, `cpu` or `cuda`."""
        return device == "cpu" or size <= self.states_gib * 2**30

    def place_of_features(self, size: int, device: str) -> Literal["device", "host", "again"]:
        """Where the features of value pretraining, of `size` bytes, are kept; `again` where they are not. On a CPU,
        which has one memory, they are never on the `device`."""
        if device != "cpu" and self.fits_device(size, device):
            return "device"
        return "host" if self.host_states_gib is None or size <= self.host_states_gib * 2**30 else "again"


class EarlyStopping(Section):
    """Stop when a reward that is not trained on stops rising, and publish the weights of its best iteration."""

    reward: str
    """The reward that is watched. Its weight must be 0, and it has no floor."""
    window: Positive = 5
    """Number of iterations over which its mean is taken."""
    patience: Positive = 10
    """Training ends after this many iterations without a rise."""
    min_delta: NonNegative = 0.0
    """Smallest rise that counts, in the reward's unit."""


class DivergenceCheck(Section):
    """Bounds beyond which training counts as diverged. The first time, the run returns to its last checkpoint and goes
    on with a lower learning rate. The second time, it fails. An update that is not finite also counts."""

    max_kl: Rate = 1.0
    """Largest mean KL of one denoising step in an iteration, in nats."""
    max_clip_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Largest share of clipped ratios in an iteration."""
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on the policy's learning rate after the return."""
    max_first_ratio_share: Rate = 0.1
    """Largest mean |ratio - 1| before the first update of an iteration, as a share of the clip range. There the ratio
    is 1 but for rounding. Beyond this bound, training ends with an error."""


class Train(Section):
    """Iterations of rollouts and updates, divided among the workers."""

    num_iterations: Positive = 30
    """Number of iterations. An iteration makes rollouts, then updates."""
    images_per_iteration: Positive = 256
    """Images per iteration, over all workers."""
    updates_per_iteration: Positive = 4
    """Optimizer updates of the policy per iteration."""
    block_images: Positive = 32
    """Images that go through the model together. Blocks are distributed over the workers, as evenly as their number
    allows; the number of workers does not change the results. Smaller blocks need less memory."""
    micro_images: Positive | Literal["auto"] = "auto"
    """Rows per forward pass of the network. It changes results only by rounding. `auto` is a whole block on a CPU. On a
    GPU it begins with a block and is halved each time memory runs out."""
    num_workers: Positive | Literal["auto"] = "auto"
    """Worker processes on this machine. `auto` is one per GPU, or two on a CPU, and at most one per block. A cluster
    has its own setting."""
    sharding: Literal["none", "full"] = "none"
    """How weights lie on the workers. `none`: each worker has all of them, and the gradients are summed. `full`: each
    worker has a share of the weights of the policy and of the critic's own backbone, of their gradients, of the
    optimizers' state and of the EMA (FSDP2): about 1 / N of the memory on N workers, for more communication. The
    results are the same but for rounding, and so are the checkpoints."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often workers that ended are started again."""
    checkpoint_every: Positive = 2
    """Iterations between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the newest checkpoints are kept: in the store, and in the run's folder of the worker that writes
    them."""
    max_seconds_without_store: Seconds = 900.0
    """How long training goes on while the store does not answer. Its checkpoints stay in the run's folder until then.
    Beyond this bound, training ends with exit code 75 after the iteration. Example: `3600`."""
    memory: Memory = Memory()
    """Where trajectories and the critic's states are kept."""
    divergence: DivergenceCheck = DivergenceCheck()
    """The divergence check."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the last iteration; by default, never."""

    @property
    def num_blocks(self) -> int:
        """Per iteration, over all workers."""
        return self.images_per_iteration // self.block_images
