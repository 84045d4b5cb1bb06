"""What an iteration takes on many GPUs, by arithmetic; and how much of the time counts where nodes are lost.

    python -m benchmarks.fleet

It prints the tables of docs/scaling.md. Nothing is measured here: each figure of `Model`, `Network` and `Fleet` says
where it comes from. The loss of nodes is simulated event by event, with seeds, beside the formula of Young and Daly.
"""

import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

GPUS_PER_NODE = 8
PEAK = 804e12
"""FLOP/s of a bfloat16 product of 8,192 x 8,192 matrices, measured on one H100 80GB."""

SHARE = 0.19
"""Of the peak, over a whole iteration. A plain training loop with LoRA reached it on an H100 80GB, with Stable
Diffusion 1.5 and 3.5-M at 512 x 512 pixels. Of latentac it is assumed."""


@dataclass(frozen=True)
class Model:
    """forward: FLOPs of one denoising step of an image of 512 x 512 pixels; decoding: of the autoencoder; parameters:
    of the denoiser; adapter: trainable ones of LoRA; latent: numbers of a latent image."""

    name: str
    forward: float
    decoding: float
    parameters: float
    adapter: float
    latent: int


MODELS = (
    # Forwards and decoder: counted with torch's FLOP counter on random weights in the true layout. Adapters: rank 16 on
    # the attention's projections, by hand from widths and depths.
    Model("SD1.5", 0.812e12, 2.5e12, 860e6, 3.2e6, 4 * 64 * 64),
    Model("SD3.5-M", 2.479e12, 2.5e12, 2_243e6, 12e6, 16 * 64 * 64),
    # Not counted: 2 FLOPs per parameter and token, of 1,024 image and 512 text tokens; the decoder as the others'.
    Model("FLUX.1", 2 * 11.9e9 * 1536, 2.5e12, 11_900e6, 26e6, 16 * 64 * 64),
)


@dataclass(frozen=True)
class Network:
    """Bus bandwidth of an all-reduce in bytes per second (assumed), inside a node and between nodes."""

    name: str
    inside: float
    between: float


NETWORKS = (
    Network("8 x 400 Gb/s per node", 300e9, 300e9),
    Network("100 Gb/s per node", 300e9, 10e9),
)
LATENCY_SECONDS = 20e-6
"""Of a message between two workers (assumed). NCCL's trees take 2 log2(N) of them for an all-reduce."""

BUCKET_BYTES = 25 * 2**20
"""Of gradients that travel together, as in latentac.training.distributed."""


@dataclass(frozen=True)
class Job:
    """Training as the recipes for these models do it. reward_seconds: per image on the worker's own GPU, for example
    PickScore (assumed); disk: bytes per second of a local disk, and upload: to the store (assumed)."""

    images: int = 512
    block: int = 8
    steps: int = 10
    updates: int = 4
    full: bool = False
    reward_seconds: float = 0.03
    disk: float = 2e9
    upload: float = 1e9


@dataclass(frozen=True)
class Iteration:
    """Seconds of the parts of one iteration, and bytes. rounds: blocks that the busiest worker does."""

    rounds: int
    compute: float
    reward: float
    gradients: float
    latents: float
    checkpoint_bytes: float

    @property
    def seconds(self) -> float:
        """Rewards are scored during the next block's rollout: all but those of the last block are hidden."""
        return self.compute + self.reward / self.rounds + self.gradients + self.latents


def iteration(model: Model, network: Network, job: Job, gpus: int) -> Iteration:
    """Of data-parallel training on `gpus` H100s, each with a copy of everything. Raises ValueError where a worker has
    no block."""
    blocks = job.images // job.block
    if blocks < gpus:
        raise ValueError(f"{blocks} blocks for {gpus} workers")
    rounds = math.ceil(blocks / gpus)
    backward = 2 if job.full else 1  # in forwards: frozen weights need no gradient
    per_image = job.steps * model.forward * (2 + backward) + model.decoding
    trained = model.parameters if job.full else model.adapter
    sent, bandwidth = 4 * trained, network.inside if gpus <= GPUS_PER_NODE else network.between
    buckets = math.ceil(sent / BUCKET_BYTES)
    latency = 2 * math.log2(gpus) * LATENCY_SECONDS
    synchronised = job.updates * (2 * (gpus - 1) / gpus * sent / bandwidth + latency * buckets)
    gathered = 4 * model.latent * job.images
    return Iteration(
        rounds,
        rounds * job.block * per_image / (SHARE * PEAK),
        rounds * job.block * job.reward_seconds,
        synchronised,
        (gpus - 1) / gpus * gathered / bandwidth,
        # Weights, their average, and Adam's two moments, float32.
        4 * 4 * trained,
    )


@dataclass(frozen=True)
class Fleet:
    """nodes: of 8 GPUs. hours_between_failures: per GPU; 419 unexpected interruptions in 54 days on 16,384 H100s give
    50,700 (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4). recovery: seconds until the workers go on:
    detection, a new rendezvous, start and imports (assumed)."""

    nodes: int
    hours_between_failures: float = 50_700.0
    recovery: float = 90.0

    @property
    def failure_seconds(self) -> float:
        """Mean seconds between two failures of the whole fleet."""
        return 3600 * self.hours_between_failures / (GPUS_PER_NODE * self.nodes)


def goodput(fleet: Fleet, seconds: float, saving: float, every: int, seed: int, days: float = 30.0) -> float:
    """The share of `days` that was spent on iterations that were not lost, in one simulated history.

    seconds: of an iteration; saving: seconds that training stands still for a checkpoint; every: iterations between two
    of them. Failures are a Poisson process. One takes all back to the last checkpoint, and may meet a recovery.
    """
    generator = random.Random(seed)
    end, clock, kept, pending = 86_400 * days, 0.0, 0, 0
    failure = generator.expovariate(1 / fleet.failure_seconds)
    while clock < end:
        step = seconds + (saving if pending + 1 == every else 0.0)
        if clock + step <= failure:
            clock += step
            pending += 1
            if pending == every:
                kept, pending = kept + every, 0
            continue
        clock, pending = failure + fleet.recovery, 0
        failure += generator.expovariate(1 / fleet.failure_seconds)
        while failure < clock:  # in the middle of a recovery, which begins anew
            clock = failure + fleet.recovery
            failure += generator.expovariate(1 / fleet.failure_seconds)
    return kept * seconds / clock


def best_interval(fleet: Fleet, saving: float) -> float:
    """Seconds between two checkpoints that lose the least: sqrt(2 C M) (Young 1974; Daly 2006, to first order)."""
    return math.sqrt(2 * saving * fleet.failure_seconds)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def iterations_table(counts: Sequence[int] = (8, 64, 512)) -> Iterator[str]:
    """Images per second, and the share of the time that is computation, with 8 blocks of images for each worker."""
    rows = []
    for model in MODELS:
        for full in (False, True):
            for network in NETWORKS:
                cells = []
                for gpus in counts:
                    job = Job(full=full, images=max(512, 8 * gpus))
                    found = iteration(model, network, job, gpus)
                    share = found.compute / found.seconds
                    cells.append(f"{job.images / found.seconds:,.1f} ({share:.0%})")
                rows.append([f"{model.name}, {'all weights' if full else 'LoRA'}", network.name, *cells])
    return _table(["Training", "Network", *(f"{gpus} GPUs" for gpus in counts)], rows)


def parts_table(gpus: int = 512) -> Iterator[str]:
    """Seconds of the parts of an iteration on `gpus` GPUs with the faster network, and the bytes of a checkpoint."""
    rows = []
    for model in MODELS:
        for full in (False, True):
            job = Job(full=full, images=8 * gpus)
            found = iteration(model, NETWORKS[0], job, gpus)
            parts = (found.compute, found.reward / found.rounds, found.gradients, found.latents)
            upload = found.checkpoint_bytes / job.upload
            name = f"{model.name}, {'all weights' if full else 'LoRA'}"
            rows.append(
                [name, *(f"{part:.2f}" for part in parts), f"{found.checkpoint_bytes / 1e9:.1f}", f"{upload:.1f}"]
            )
    head = ["Training", "Computation", "Rewards not hidden", "Gradients", "Latents", "Checkpoint, GB", "Its upload, s"]
    return _table(head, rows)


def goodput_table(model: Model = MODELS[1], seeds: int = 10) -> Iterator[str]:
    """Mean goodput in 30 days by iterations between two checkpoints, of SD3.5-M with all weights."""
    job, rows = Job(full=True), []
    choices = (1, 4, 16, 64, 256, 1024)
    for gpus in (8, 64, 512, 4096):
        found = iteration(model, NETWORKS[0], replace(job, images=8 * gpus), gpus)
        saving = found.checkpoint_bytes / job.disk
        fleet = Fleet(gpus // GPUS_PER_NODE)
        shares = [
            statistics.mean(goodput(fleet, found.seconds, saving, every, seed) for seed in range(seeds))
            for every in choices
        ]
        best = best_interval(fleet, saving) / found.seconds
        rows.append(
            [f"{gpus:,}", f"{fleet.failure_seconds / 3600:,.1f}", *(f"{share:.3f}" for share in shares), f"{best:.0f}"]
        )
    head = ["GPUs", "Hours between failures", *(f"{every}" for every in choices), "sqrt(2 C M)"]
    return _table(head, rows)


def main() -> int:
    for table in (iterations_table(), parts_table(), goodput_table()):
        print("\n".join(table), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
