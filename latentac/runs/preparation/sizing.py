"""What a run needs: disk and memory, item by item, from its configuration and the headers of its weights.

An estimate with a stated formula (`requirements`). Its constants for a GPU were derived from measurements of SD1.5 and
SD3.5-M at 512 px, those for a CPU from one smoke run of the embedded world; other sizes were not measured.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentac.backbones import layout_of
from latentac.backbones.inspection import weights_of
from latentac.backbones.layout import Layout, listing, used
from latentac.backbones.weights import header, shapes
from latentac.config.schema import Config
from latentac.config.sections import Extension
from latentac.runs.preparation.memory import compute_device, free_memory
from latentac.sampling.encoding import KEPT_BYTES, WHOLE_BYTES
from latentac.sampling.steering import STEERING
from latentac.system.errors import ConfigError, ResourceError
from latentac.system.modelfiles import read_json

COPIES = 2
"""Of each artifact on a file:// store: the published one, and the working copy beside it. One on a bucket's machine."""

_FLOAT = 4
_INTERPRETER = 800 * 2**20  # a worker's own pages of torch, diffusers and transformers (630 measured), share of agent
_CUDA_CONTEXT = 500 * 2**20
# Kept of a layer for the gradient, in units of its tokens times its width.
_SAVED_TENSORS = {"unet": 28, "transformer": 20}
_BLOCK = _SAVED_TENSORS["transformer"] / _SAVED_TENSORS["unet"]  # of a UNet's layer, which has one or more
_PASSED_TENSORS = 8  # of a layer, without a gradient: fitted to a server's peak at 4 to 4,096 rows on a CPU
_SMALL = 8 * 2**20  # reports, logs, critic: what does not grow with the model
_ARMS = 20  # of evaluation and steering, each with a gallery
_POLICIES = 3  # of evaluation: base, trained, in production
_NUMBER = 24  # bytes of one in JSON


@dataclass(frozen=True)
class Requirements:
    """Bytes by item. disk: of the run's lifetime, its peak; memory: of one training process; workers: so many at once;
    device: `cpu`, where they share the machine's memory, or `cuda`, where each has a device of its own."""

    disk: dict[str, int]
    memory: dict[str, int]
    workers: int
    device: str

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    @property
    def memory_bytes(self) -> int:
        """Of one worker's device: of all workers together where that is the CPU."""
        return sum(self.memory.values()) * (self.workers if self.device == "cpu" else 1)

    def to_dict(self) -> dict[str, Any]:
        return {"disk": self.disk, "memory": self.memory, "workers": self.workers, "device": self.device}


@dataclass(frozen=True)
class Model:
    """Counts that follow from a folder. files: bytes that are used; network, frozen: weights of the denoiser and of all
    other parts; adapters: weights of LoRA of the configured rank; latent, picture: numbers in one (a picture's are
    bytes); units: tokens times width, summed over the denoiser's layers; decoder: numbers of the decoder's largest map;
    text: numbers a prompt; taps: numbers of the feature maps of a state that a critic may keep, of so many channels."""

    files: int
    network: int
    frozen: int
    adapters: int
    latent: int
    picture: int
    units: int
    decoder: int
    text: int
    taps: int
    channels: int


def requirements(config: Config, folder: Path, num_prompts: int = 0, device: str = "") -> Requirements:
    """What a run of `config` with the pipeline in `folder` needs. num_prompts: of training; device: cpu or cuda, by
    default what `backbone.device` means here.

    With P weights of the denoiser, F frozen weights (text encoders, autoencoder), N that train (P, or the adapters'
    r (in + out) summed over the adapted layers), K steps, B = train.block_images, D numbers a latent, all of 4 bytes:

    memory of a worker
        weights      P + F, and N of adapters; P for each copy: the reference (algorithm.prediction_kl), a critic's own
        training     N gradients, 2 N moments of AdamW, N average (policy.ema_decay), N best (early stopping)
        images       images of a worker * ((2 K + 1) D of the rollout, L C of the prompt); K of what the critic keeps of
                     a state for the images of an iteration or of value pretraining; the critic's replay
        text         L C of each training prompt, up to 64 MiB; beyond, in the host's memory, up to 1 GiB; there also of
                     each image of value pretraining
        activations  the largest of these, for a state c tensors a layer of tokens times width with a gradient (28 of a
                     UNet, 20 of the transformer), 8 without:
                     an update, with a gradient, B K / updates_per_iteration states; a rollout, B, with a gradient where
                     algorithm.value_guidance is on; an arm of steering, B times its candidates, with a gradient where
                     its method takes one; the server, serving.batch_rows; the critic's replay, or with a gradient its
                     own backbone, B K / critic.updates_per_pass; value pretraining with pretrain.forward_noised, or
                     with a gradient such a backbone, pretrain.minibatch_states; the decoder: 3 of its largest maps for
                     each of B pictures, and of each state that the critic `pixel` is shown
        other policies  what evaluation needs beyond all that: 3 (P + F), and on a CPU its pictures, bytes for each of
                     3.25 evaluation.num_images
        process      800 MiB; 500 MiB on a CUDA device
    disk, each but the temporary COPIES times
        base         the files that are used
        trained      P + F
        exported     P + F, and P again with serving.include_base, and the adapters
        checkpoints  keep_checkpoints, the one being written and its temporary copy, of N weights, 2 N moments, N
                     average, N best, and the critic's replay
        scored       latents that the critic learned from
        scores       24 bytes for each of evaluation.num_images, three policies and the rewards
        galleries    evaluation.num_gallery_prompts pictures of 20 arms, uncompressed
        small        8 MiB
    """
    layout = layout_of(config.backbone)
    network = layout.network if layout is not None else "unet"
    return count(config, _read(folder, layout, config), network, num_prompts, device or compute_device(config))


def count(config: Config, model: Model, network: str, num_prompts: int, device: str) -> Requirements:
    """`requirements` of a model that was read already. network: the name of its part, `unet` or `transformer`."""
    train, policy = config.train, config.policy
    trains = model.adapters if policy.adaptation == "lora" else model.network
    merged = trains if policy.adaptation == "lora" else 0
    kept = trains * (1 + (policy.ema_decay > 0) + (train.early_stopping is not None))
    replay = config.critic.replay_images * (model.latent + 8)
    own = {"lora": model.network, "copy": 4 * model.network}.get(config.critic.body.use, 0)
    parts = model.network + model.frozen
    memory = {
        "weights": parts + merged,
        "reference": model.network if config.algorithm.own.get("prediction_kl", 0) > 0 else 0,
        "critic's own backbone": own,
        "training": 3 * trains + kept - trains,
        "images": _images(config, model) + replay,
        "text": _text(config, model, num_prompts, device),
        "activations": _activations(config, model, network),
    }
    # Evaluation has the base, the trained policy and the one in production, and nothing of the training.
    workers = train.num_workers if device == "cpu" else 1
    evaluation = _POLICIES * parts + math.ceil(_pictures(config, model, device) / _FLOAT)
    memory["other policies"] = max(0, math.ceil(evaluation / workers) - sum(memory.values()))
    memory = {item: _FLOAT * count for item, count in memory.items() if count}
    memory["process"] = _INTERPRETER if device == "cpu" else _CUDA_CONTEXT
    disk = {
        "base": COPIES * model.files,
        "trained": COPIES * _FLOAT * parts,
        "exported": COPIES * _FLOAT * (parts + model.network * config.serving.include_base + merged),
        "checkpoints": (train.keep_checkpoints + 2) * _FLOAT * (kept + 2 * trains + replay + own),
        "scored": COPIES * _FLOAT * config.pretrain.num_images * (model.latent + 8),
        "scores": COPIES * config.evaluation.num_images * _POLICIES * len(config.rewards) * _NUMBER,
        "galleries": COPIES * config.evaluation.num_gallery_prompts * _ARMS * model.picture,
        "small": COPIES * _SMALL,
    }
    return Requirements(disk, memory, train.num_workers, device)


def _images(config: Config, model: Model) -> int:
    """Numbers that a worker keeps of its images: of each state, and of its prompt."""
    train, steps = config.train, config.kernel.num_steps
    images = math.ceil(train.images_per_iteration / train.num_workers)
    body = config.critic.body
    seen = {"lora": model.latent, "copy": model.latent, "latent_cnn": model.latent, "pixel": model.picture}
    # Without attention the critic keeps a mean and a spread a channel alone.
    taps = 2 * model.channels + (model.taps if body.own.get("num_queries", 4) else 0)
    states = max(images, _pretrained(config)) * steps * seen.get(body.use, taps)
    return images * ((2 * steps + 1) * model.latent + model.text) + states


def _pretrained(config: Config) -> int:
    """Images of value pretraining, shared out as if the workers of the training had them."""
    settings = config.pretrain
    images = settings.num_images and settings.num_images + settings.num_held_out_images
    return math.ceil(images / config.train.num_workers)


def _text(config: Config, model: Model, num_prompts: int, device: str) -> int:
    """Numbers of what is encoded of prompts and kept: of few training prompts all, on the device; of many the latest,
    in the host's memory, where value pretraining has its own."""
    whole = num_prompts * model.text
    many, host = _FLOAT * whole > WHOLE_BYTES, device == "cpu"
    training = min(whole, KEPT_BYTES // _FLOAT) * host if many else whole
    return max(training, _pretrained(config) * model.text * host)


def _activations(config: Config, model: Model, network: str) -> int:
    """Numbers of the largest forward that there is, with what its gradient needs where one is taken."""
    train, steps, block = config.train, config.kernel.num_steps, config.train.block_images
    passed, saved = _PASSED_TENSORS * model.units, _SAVED_TENSORS.get(network, 28) * model.units
    decoded, body = 3 * model.decoder, config.critic.body.use
    observed = passed + (decoded if body == "pixel" else 0)
    learnt = math.ceil(block * steps / config.critic.updates_per_pass)
    needed = [
        saved * math.ceil(block * steps / train.updates_per_iteration),
        decoded * block,
        (saved if config.algorithm.own.get("value_guidance", 0) > 0 else passed) * block,
        (passed + decoded) * config.serving.batch_rows,
    ]
    for method in config.steering.methods:
        candidates = max(method.own.get("candidates") or [1])
        needed.append((saved if _takes_gradient(method) else passed) * block * candidates)
    if config.critic.replay_images > 0:
        needed.append(observed * learnt)
    minibatch = config.pretrain.minibatch_states if config.pretrain.num_images else 0
    if body in ("lora", "copy"):
        needed.append(saved * max(learnt, minibatch))
    # A minibatch of the critic has the text of each of its states.
    noised = observed if config.pretrain.forward_noised > 0 else 0
    return max(*needed, (noised + model.text) * minibatch)


def _takes_gradient(method: Extension) -> bool:
    try:
        return bool(getattr(STEERING.load(method.use), "needs_gradient", True))
    except ConfigError:  # told with all other problems
        return True


def _pictures(config: Config, model: Model, device: str) -> int:
    """Bytes of the pictures that evaluation holds, in the host's memory: of each policy, and of the trained one a
    quarter as many of training prompts."""
    settings = config.evaluation
    more = _POLICIES * settings.num_diversity_prompts * settings.pictures_per_prompt
    return int(((_POLICIES + 0.25) * settings.num_images + more) * model.picture) if device == "cpu" else 0


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
        remedy = "Use a smaller train.block_images or pretrain.minibatch_states, policy.adaptation=lora, "
        remedy += "fewer train.num_workers or more memory"
        total = _size(sum(memory.values()) * shared)
        problem = f"has {_size(available)} free, and {whose} needs {total}: {_sum(memory)}{each}"
        raise ResourceError(f"memory ({needed.device})", problem, remedy)


def describe(needed: Requirements) -> list[str]:
    """Lines for a person: disk and memory by item."""
    workers = f" in each of {needed.workers} workers" if needed.workers > 1 else ""
    return [f"disk: {_sum(needed.disk)}", f"memory ({needed.device}): {_sum(needed.memory)}{workers}"]


def _read(folder: Path, layout: Layout | None, config: Config) -> Model:
    if layout is None:
        files = [folder / name for name in listing(folder) if name.endswith(".safetensors")]
        count = sum(_count(header(file)) for file in files)
        return Model(sum(file.stat().st_size for file in files), count, 0, count, 0, 0, 0, 0, 0, 0, 0)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in layout.parts:
        weights = weights_of(folder, part)
        if weights is not None:
            found[part.name] = shapes(folder / part.name, weights)
    own = found[layout.network]
    suffixes = tuple(f".{name}.weight" for name in layout.adapted)
    adapted = [shape for name, shape in own.items() if name.endswith(suffixes) and len(shape) == 2]
    settings = {part.name: read_json(folder / part.name / "config.json") for part in layout.parts if part.stem}
    return Model(
        files=sum((folder / name).stat().st_size for name in used(folder, layout)),
        network=_count(own),
        frozen=sum(_count(tensors) for name, tensors in found.items() if name != layout.network),
        adapters=config.policy.lora_rank * sum(sum(shape) for shape in adapted),
        **_maps(layout, settings),
    )


def _maps(layout: Layout, settings: dict[str, Any]) -> dict[str, int]:
    """The sizes of what the parts compute, from their configurations."""
    own, vae, text = settings[layout.network], settings["vae"], settings["text_encoder"]
    size = own.get("sample_size", 64)
    height, width = size if isinstance(size, list) else (size, size)
    levels = vae.get("block_out_channels", [64])
    cells = height * width
    picture = cells * 4 ** (len(levels) - 1)
    length = (text.get("text_config") or text).get("max_position_embeddings", 77)
    if layout.network == "unet":
        channels, layers = own.get("block_out_channels", [320, 640, 1280, 1280]), own.get("layers_per_block", 2)
        depth = layers if isinstance(layers, int) else max(layers)
        kept = [round(each * more) for each, more in zip(channels, _blocks(own, len(channels)), strict=True)]
        units = sum((cells >> (2 * level)) * each for level, each in enumerate(kept)) * (2 * depth + 1)
        text_width = own.get("cross_attention_dim", 1280)
        taps = min(cells >> (2 * (len(channels) - 1)), 256) * channels[-1] + min(cells, 256) * channels[0]
        seen = channels[-1] + channels[0]
    else:
        inner = own.get("num_attention_heads", 18) * own.get("attention_head_dim", 64)
        tokens = cells // own.get("patch_size", 2) ** 2
        length += 256 if length >= 77 else 0
        units = (tokens + length) * inner * own.get("num_layers", 18)
        text_width = own.get("joint_attention_dim", 4096)
        taps = 3 * min(tokens, 256) * inner
        seen = 3 * inner
    return {
        "latent": own.get("in_channels", 4) * cells,
        "picture": 3 * picture,
        "units": units,
        "decoder": picture * levels[min(1, len(levels) - 1)],
        "text": length * text_width,
        "taps": taps,
        "channels": seen,
    }


def _blocks(unet: dict[str, Any], num_levels: int) -> list[float]:
    """Of each level of a UNet: what its layers keep, in units of a layer with one transformer block."""
    found = unet.get("transformer_layers_per_block", 1)  # or one per level, or per layer of each level
    levels = found if isinstance(found, list) else [found] * num_levels
    return [1 + (max(each if isinstance(each, list) else [each]) - 1) * _BLOCK for each in levels]


def _count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _sum(items: dict[str, int]) -> str:
    parts = ", ".join(f"{item} {_size(count)}" for item, count in items.items())
    return f"{_size(sum(items.values()))} ({parts})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
