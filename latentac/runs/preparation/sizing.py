"""What a run needs: disk and memory, item by item, from its configuration and the headers of its weights.

An estimate with a stated formula (`requirements`). Its constants for a GPU were derived from measurements of SD1.5 and
SD3.5-M at 512 px, those for a CPU from one smoke run of the embedded world; other sizes were not measured.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentac.config.learning import Pretrain, Train
from latentac.config.schema import Config, Evaluation
from latentac.config.sections import Extension
from latentac.runs.preparation.memory import compute_device, count_workers, free_memory
from latentac.runs.preparation.model_sizes import Model, bytes_per_weight, read_model
from latentac.sampling.encoding import KEPT_BYTES, WHOLE_BYTES
from latentac.sampling.steering import STEERING
from latentac.system.errors import ConfigError, ResourceError

COPIES = 2
"""Of each artifact on a file:// store: the published one, and the working copy beside it. One on a bucket's machine."""

_FLOAT = 4
_INTERPRETER = 800 * 2**20  # a worker's own pages of torch, diffusers and transformers (630 measured), share of agent
_CUDA_CONTEXT = 500 * 2**20
_PASSED_TENSORS = 8  # of a layer, without a gradient: fitted to a server's peak at 4 to 4,096 rows on a CPU
_SMALL = 8 * 2**20  # reports, logs, critic: what does not grow with the model
_ARMS = 20  # of evaluation and steering, each with a gallery
_POLICIES = 3  # of evaluation: base, trained, in production
_NUMBER = 24  # bytes of one in JSON


@dataclass(frozen=True)
class Requirements:
    """Bytes by item. disk: of the run's lifetime, its peak; memory: of one training process; workers: so many at once;
    device: `cpu`, where they share the machine's memory, or `cuda`, where each has a device of its own; kept: what is
    learned from -> its size and its place by `train.memory`, in words, where there is more than one place."""

    disk: dict[str, int]
    memory: dict[str, int]
    workers: int
    device: str
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    @property
    def memory_bytes(self) -> int:
        """Of one worker's device: of all workers together where that is the CPU."""
        return sum(self.memory.values()) * (self.workers if self.device == "cpu" else 1)

    def to_dict(self) -> dict[str, Any]:
        return {"disk": self.disk, "memory": self.memory, "workers": self.workers, "device": self.device}


def requirements(config: Config, folder: Path, num_prompts: int = 0, device: str = "") -> Requirements:
    """What a run of `config` with the pipeline in `folder` needs. num_prompts: of training; device: cpu or cuda, by
    default what `backbone.device` means here.

    With P weights of the denoiser, F frozen weights (text encoders, autoencoder), N that train (P, or the adapters'
    r (in + out) summed over the adapted layers), K steps, B = train.block_images, R rows per forward pass, D numbers a
    latent. Weights, activations and text have b bytes by backbone.precision; all else has 4. R is train.micro_images;
    `auto` is a whole batch on a CPU, and 1 on a GPU, where it is halved until it fits.

    memory of a worker
        weights      b (P + F), and b N of adapters; b P for each copy: the reference (algorithm.prediction_kl); 4 P for
                     a critic's own
         training     N gradients, 2 N moments of AdamW (of a quarter of the bytes with policy.optimizer=adamw_8bit), N
                      masters where b is 2, N average (policy.ema_decay), N best (early stopping)
                      With train.sharding=full, both divided by the workers, but for the F frozen weights. The whole
                      weights of the block of layers that is computed are not counted.
        images       images of a worker * ((2 K + 1) D of the rollout, L C of the prompt); K of what the critic keeps of
                     a state for the images of an iteration or of value pretraining; the critic's replay. By
                     train.memory some of it is not on the device: then a block of trajectories counts, and nothing of
                     value pretraining or the replay. Features that are computed again count D each on a CPU
        text         L C of each training prompt, up to 64 MiB; beyond, in the host's memory, up to 1 GiB; there also of
                     each image of value pretraining
        activations  the largest of these, for a state c tensors a layer of tokens times width with a gradient (28 of a
                     UNet, 20 of a transformer, 45 of Z-Image's), 8 without or with backbone.gradient_checkpointing:
                     an update, with a gradient, B K / updates_per_iteration states; a rollout, B, with a gradient where
                     algorithm.value_gradient is on; an arm of steering, B times its particles, with a gradient where
                     its method takes one; the server, serving.batch_rows; the critic's replay, or with a gradient its
                     own backbone, B K / critic.updates_per_pass; value pretraining with pretrain.forward_noised, or
                     with a gradient such a backbone, pretrain.minibatch_states; the decoder: 3 of its largest maps for
                     each of B images, and of each state that the critic `pixel` is shown. No more than R states are
                     counted, except for a critic's own backbone and the particles of one image
        other policies  what evaluation needs beyond all that: 3 b (P + F), and on a CPU its images, bytes for each of
                     3.25 evaluation.num_images
        process      800 MiB; 500 MiB on a CUDA device
    disk, each but the temporary COPIES times
        base         the files that are used
        trained      P + F
        exported     P + F, and P again with serving.include_base, and the adapters; with export.weights=adapter the
                     adapters alone
        checkpoints  keep_checkpoints, the one being written and the one being uploaded, of N weights, 2 N moments, N
                     average, N best, and the critic's replay
        scored       latents that the critic learned from
        scores       24 bytes for each of evaluation.num_images, three policies and the rewards
        galleries    evaluation.num_gallery_prompts images of 20 arms, uncompressed
        small        8 MiB
    """
    return count(config, read_model(folder, config), num_prompts, device or compute_device(config.backbone))


def count(config: Config, model: Model, num_prompts: int, device: str) -> Requirements:
    """`requirements` of a model that was read already."""
    train, policy, sizes = config.train, config.policy, model.sizes
    half = bytes_per_weight(config.backbone, device)
    trains = model.adapters if policy.adaptation == "lora" else model.network
    merged = trains if policy.adaptation == "lora" else 0
    kept = trains * (1 + (policy.ema_decay > 0) + (train.early_stopping is not None))
    replay = config.critic.replay_images * (sizes.latent + 8)
    own = {"lora": model.network, "copy": 4 * model.network}.get(config.critic.body.use, 0)
    parts = model.network + model.frozen
    alone = config.export.weights == "adapter"
    exported = merged if alone else parts + model.network * config.serving.include_base + merged
    number = count_workers(train, device)
    moments = 2 * trains * (1 if policy.optimizer == "adamw_8bit" else _FLOAT)
    reference = model.network if config.algorithm.own.get("prediction_kl", 0) > 0 else 0
    shares = number if train.sharding == "full" else 1
    trained = _FLOAT * (kept + (trains if half < _FLOAT else 0)) + moments
    memory = {
        "weights": half * (model.frozen + math.ceil((model.network + merged) / shares)),
        "reference": half * math.ceil(reference / shares),
        "critic's own backbone": _FLOAT * math.ceil(own / shares),
        "training": math.ceil(trained / shares),
        "images": _images(config, model, number, half, device) + _replay_here(config, replay, device),
        "text": half * _text(_pretrained(config.pretrain, number), model.sizes.text, num_prompts, half, device),
        "activations": half * _activations(config, model, device),
    }
    # Evaluation has the base, the trained policy and the one in production, and nothing of the training.
    workers = number if device == "cpu" else 1
    evaluation = half * _POLICIES * parts + _evaluated_images(config.evaluation, model.sizes.image) * (device == "cpu")
    memory["other policies"] = max(0, math.ceil(evaluation / workers) - sum(memory.values()))
    memory = {item: count for item, count in memory.items() if count}
    memory["process"] = _INTERPRETER if device == "cpu" else _CUDA_CONTEXT
    disk = {
        "base": COPIES * model.files,
        "trained": COPIES * _FLOAT * parts,
        "exported": COPIES * _FLOAT * exported,
        "checkpoints": (train.keep_checkpoints + 2) * (_FLOAT * (kept + replay + own) + moments),
        "scored": COPIES * _FLOAT * config.pretrain.num_images * (sizes.latent + 8),
        "scores": COPIES * config.evaluation.num_images * _POLICIES * len(config.rewards) * _NUMBER,
        "galleries": COPIES * config.evaluation.num_gallery_prompts * _ARMS * sizes.image,
        "small": COPIES * _SMALL,
    }
    return Requirements(disk, memory, number, device, _kept(config, model, number, half, device))


def _images(config: Config, model: Model, workers: int, half: int, device: str) -> int:
    """Bytes that a worker keeps on its device of its images: of each state, and of its prompt."""
    train, steps, sizes = config.train, config.kernel.num_steps, model.sizes
    images = _trajectories(train, workers, device)
    features = _FLOAT * steps * _state(config, model)
    place = train.memory.place_of_features(features * _pretrained(config.pretrain, 1), device)
    # It is one process, which on a CPU has the memory of all workers.
    pretrained = _pretrained(config.pretrain, workers if device == "cpu" else 1)
    if place == "again":
        states = max(images * features, (_FLOAT * pretrained * steps * sizes.latent) * (device == "cpu"))
    else:
        states = features * max(images, pretrained * (device == "cpu" or place == "device"))
    return _FLOAT * images * (2 * steps + 1) * sizes.latent + states + half * images * sizes.text


def _trajectories(train: Train, workers: int, device: str) -> int:
    """Images whose trajectories a worker has on its device at once."""
    images = math.ceil(train.images_per_iteration / workers)
    return min(images, train.block_images) if device == "cuda" and train.memory.trajectories == "host" else images


def _replay_here(config: Config, replay: int, device: str) -> int:
    """Bytes of the replay on the device. replay: numbers."""
    return _FLOAT * replay * config.train.memory.fits_device(_FLOAT * replay, device)


def _kept(config: Config, model: Model, workers: int, half: int, device: str) -> dict[str, str]:
    """`Requirements.kept`."""
    train, steps, sizes = config.train, config.kernel.num_steps, model.sizes
    images, pretrained = math.ceil(train.images_per_iteration / workers), _pretrained(config.pretrain, 1)
    state, words = _FLOAT * _state(config, model), {"device": "on the GPU", "host": "in the host's memory"}
    states = steps * state * pretrained
    place, lines = train.memory.place_of_features(states, device), {}
    if device == "cuda":
        size = images * (_FLOAT * (2 * steps + 1) * sizes.latent + steps * state + half * sizes.text)
        lines["trajectories"] = f"{_size(size)} {words[train.memory.trajectories]}"
    if states and (device == "cuda" or place == "again"):
        where = words.get(place, "would be too many, so each pass computes them again")
        lines["features of value pretraining"] = f"{_size(states)} {where}"
    replay = _FLOAT * config.critic.replay_images * sizes.latent
    if replay and device == "cuda":
        lines["replay"] = f"{_size(replay)} {words['device' if train.memory.fits_device(replay, device) else 'host']}"
    return lines


def _state(config: Config, model: Model) -> int:
    """Numbers that the critic keeps of a state."""
    sizes = model.sizes
    body = config.critic.body
    inputs = {"lora": sizes.latent, "copy": sizes.latent, "latent_cnn": sizes.latent, "pixel": sizes.image}
    # Without attention the critic keeps a mean and a spread a channel alone.
    taps = 2 * sizes.channels + (sizes.taps if body.own.get("num_queries", 4) else 0)
    return inputs.get(body.use, taps)


def _pretrained(settings: Pretrain, workers: int) -> int:
    """Images of value pretraining, shared out as if the workers of the training had them."""
    images = settings.num_images and settings.num_images + settings.num_held_out_images
    return math.ceil(images / workers)


def _text(pretrained: int, size: int, num_prompts: int, half: int, device: str) -> int:
    """Numbers of what is encoded of prompts and kept: of few training prompts all, on the device; of many the latest,
    in the host's memory, where value pretraining has its own. size: numbers a prompt; half: bytes of each."""
    whole = num_prompts * size
    many, host = half * whole > WHOLE_BYTES, device == "cpu"
    training = min(whole, KEPT_BYTES // half) * host if many else whole
    return max(training, pretrained * size * host)


def _activations(config: Config, model: Model, device: str) -> int:
    """Numbers of the largest forward that there is, with what its gradient needs where one is taken."""
    train, steps, block, sizes = config.train, config.kernel.num_steps, config.train.block_images, model.sizes
    most = train.micro_images if train.micro_images != "auto" else (1 if device == "cuda" else block * steps)
    passed = _PASSED_TENSORS * sizes.units
    saved = passed if config.backbone.own.get("gradient_checkpointing") else sizes.saved * sizes.units
    shown, body = 3 * sizes.decoder, config.critic.body.use
    observed = passed + (shown if body == "pixel" else 0)
    learnt = math.ceil(block * steps / config.critic.updates_per_pass)
    needed = [
        saved * min(most, math.ceil(block * steps / train.updates_per_iteration)),
        shown * min(most, block),
        (saved if config.algorithm.own.get("value_gradient", 0) > 0 else passed) * min(most, block),
        (passed + shown) * config.serving.batch_rows,
    ]
    for method in config.steering.methods:
        particles = max(method.own.get("sweep_particles") or [1])
        rows = max(particles, min(most, block * particles))
        needed.append((saved if _takes_gradient(method) else passed) * (rows if device == "cpu" else particles))
    if config.critic.replay_images > 0:
        needed.append(observed * min(most, learnt))
    minibatch = config.pretrain.minibatch_states if config.pretrain.num_images else 0
    if body in ("lora", "copy"):
        needed.append(saved * max(learnt, minibatch))
    # A minibatch of the critic has the text of each of its states.
    noised = observed * min(most, minibatch) if config.pretrain.forward_noised > 0 else 0
    return max(*needed, noised + sizes.text * minibatch)


def _takes_gradient(method: Extension) -> bool:
    try:
        return bool(getattr(STEERING.load(method.use), "needs_gradient", True))
    except ConfigError:  # reported with all other problems
        return True


def _evaluated_images(settings: Evaluation, size: int) -> int:
    """Bytes of the images that evaluation holds, in the host's memory: of each policy, and of the trained one a quarter
    as many of training prompts."""
    more = _POLICIES * settings.num_diversity_prompts * settings.images_per_prompt
    return int(((_POLICIES + 0.25) * settings.num_images + more) * size)


def check_room(needed: Requirements, output: Path, store: str) -> None:
    """Raises ResourceError, with the sum by item, where the disk or the memory of this machine has less than needed.

    A run with a store elsewhere has steps on machines that are not known here: then only what `prepare` itself takes
    is compared, one copy of the base and its weights in memory.
    """
    disk, memory, whose, workers = needed.disk, needed.memory, "this run", needed.workers
    if store.startswith("file://"):
        places = [output, Path(store.removeprefix("file://"))]
    else:
        places, whose, workers = [output], "this step", 1
        disk = {"base": disk["base"] // COPIES}
        memory = {item: memory[item] for item in ("weights", "process")}
    devices = {place.stat().st_dev: place for place in map(_existing, places)}
    for place in devices.values():  # on two disks lies half of it each
        free = shutil.disk_usage(place).free
        if free < sum(disk.values()) / len(devices):
            here = " in all, half of it here" if len(devices) > 1 else ""
            remedy = "Free some space, or set another --output, train.keep_checkpoints or serving.include_base=false"
            raise ResourceError(str(place), f"has {_size(free)} free, and {whose} needs {_sum(disk)}{here}", remedy)
    shared = workers if needed.device == "cpu" else 1
    available = free_memory(needed.device)
    if available is not None and available < sum(memory.values()) * shared:
        each = f" in each of {shared} workers" if shared > 1 else ""
        remedy = "Use a smaller train.micro_images, train.block_images or pretrain.minibatch_states, "
        remedy += "policy.adaptation=lora, fewer train.num_workers or more memory"
        total = _size(sum(memory.values()) * shared)
        problem = f"has {_size(available)} free, and {whose} needs {total}: {_sum(memory)}{each}"
        raise ResourceError(f"memory ({needed.device})", problem, remedy)


def describe(needed: Requirements) -> list[str]:
    """Lines for a person: disk and memory by item."""
    workers = f" in each of {needed.workers} workers" if needed.workers > 1 else ""
    lines = [f"disk: {_sum(needed.disk)}", f"memory ({needed.device}): {_sum(needed.memory)}{workers}"]
    kept = "; ".join(f"{item} {place}" for item, place in needed.kept.items())
    return [*lines, f"kept: {kept}"] if kept else lines


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _sum(items: dict[str, int]) -> str:
    parts = ", ".join(f"{item} {_size(count)}" for item, count in items.items())
    return f"{_size(sum(items.values()))} ({parts})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
