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
from latentac.backbones.weights import header, read_json, shapes
from latentac.config import Config
from latentac.errors import ResourceError

COPIES = 2
"""Of each artifact on a file:// store: the published one, and the working copy beside it. One on a bucket's machine."""

_FLOAT = 4
_INTERPRETER = 800 * 2**20  # a worker's own pages of torch, diffusers and transformers (630 measured), share of agent
_CUDA_CONTEXT = 500 * 2**20
# Kept of a layer for the gradient, in units of its tokens times its width.
_SAVED_TENSORS = {"unet": 28, "transformer": 20}
_PASSED_TENSORS = 8  # of a layer, without a gradient: fitted to a server's peak at 4 to 4,096 rows on a CPU
_SMALL = 8 * 2**20  # reports, logs, critic: what does not grow with the model
_ARMS = 20  # of evaluation and steering, each with a gallery


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
    text: numbers a prompt; taps: numbers a state that a critic may keep."""

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


def requirements(config: Config, folder: Path, num_prompts: int = 0, device: str = "") -> Requirements:
    """What a run of `config` with the pipeline in `folder` needs. num_prompts: of training; device: cpu or cuda, by
    default what `backbone.device` means here.

    With P weights of the denoiser, F frozen weights (text encoders, autoencoder), N that train (P, or the adapters'
    r (in + out) summed over the adapted layers), K steps, B = train.block_images, D numbers a latent, all of 4 bytes:

    memory of a worker
        weights      P + F, and N of adapters; P for each copy: the reference (algorithm.prediction_kl), a critic's own
        training     N gradients, 2 N moments of AdamW, N average (policy.ema_decay), N best (early stopping)
        images       images of a worker * (2 K + 1) D of the rollout; K of what the critic keeps of a state for the
                     images of an iteration or of value pretraining; the critic's replay
        text         L C of each training prompt
        activations  the largest of an update's: c tensors a layer of tokens times width (28 of a UNet, 20 of the
                     transformer) for each of B K / updates_per_iteration states; the decoder's: 3 of its largest maps
                     for each of B pictures; steering's: 8 tensors a layer for each of B times the candidates of an arm;
                     and the server's: 8 tensors a layer and the decoder's 3 for each of serving.batch_rows
        process      800 MiB; 500 MiB on a CUDA device
    disk, each but the temporary COPIES times
        base         the files that are used
        trained      P + F
        exported     P + F, and P again with serving.include_base, and the adapters
        checkpoints  keep_checkpoints, the one being written and its temporary copy, of N weights, 2 N moments, N
                     average, N best, and the critic's replay
        scored       latents that the critic learned from
        galleries    evaluation.num_gallery_prompts pictures of 20 arms, uncompressed
        small        8 MiB
    """
    layout = layout_of(config.backbone)
    network = layout.network if layout is not None else "unet"
    return count(config, _read(folder, layout, config), network, num_prompts, device or _device(config))


def count(config: Config, model: Model, network: str, num_prompts: int, device: str) -> Requirements:
    """`requirements` of a model that was read already. network: the name of its part, `unet` or `transformer`."""
    train, policy, steps = config.train, config.policy, config.kernel.num_steps
    lora = policy.adaptation == "lora"
    trains = model.adapters if lora else model.network
    kept = trains * (1 + (policy.ema_decay > 0) + (train.early_stopping is not None))
    images = math.ceil(train.images_per_iteration / train.num_workers)
    rows = math.ceil(train.block_images * steps / train.updates_per_iteration)
    update, decode = _SAVED_TENSORS.get(network, 28) * model.units * rows, 3 * model.decoder * train.block_images
    candidates = max((max(method.own.get("candidates") or [1]) for method in config.steering.methods), default=1)
    steered = _PASSED_TENSORS * model.units * train.block_images * candidates
    served = (_PASSED_TENSORS * model.units + 3 * model.decoder) * config.serving.batch_rows
    replay = config.critic.replay_images * (model.latent + 8)
    own = {"lora": model.network, "copy": 4 * model.network}.get(config.critic.body.use, 0)
    # Without attention the critic keeps but a few numbers a state.
    seen = steps * (model.taps if config.critic.body.own.get("num_queries", 4) else 0)
    watched = max(images, math.ceil(config.pretrain.num_images / train.num_workers))
    memory = {
        "weights": model.network + model.frozen + (trains if lora else 0),
        "reference": model.network if config.algorithm.own.get("prediction_kl", 0) > 0 else 0,
        "critic's own backbone": own,
        "training": 3 * trains + kept - trains,
        "images": images * (2 * steps + 1) * model.latent + watched * seen + replay,
        "text": num_prompts * model.text,
        "activations": max(update, decode, steered, served),
    }
    memory = {item: _FLOAT * count for item, count in memory.items() if count}
    memory["process"] = _INTERPRETER if device == "cpu" else _CUDA_CONTEXT
    exported = model.network * (1 + config.serving.include_base) + model.frozen + (trains if lora else 0)
    disk = {
        "base": COPIES * model.files,
        "trained": COPIES * _FLOAT * (model.network + model.frozen),
        "exported": COPIES * _FLOAT * exported,
        "checkpoints": (train.keep_checkpoints + 2) * _FLOAT * (kept + 2 * trains + replay + own),
        "scored": COPIES * _FLOAT * config.pretrain.num_images * (model.latent + 8),
        "galleries": COPIES * config.evaluation.num_gallery_prompts * _ARMS * model.picture,
        "small": COPIES * _SMALL,
    }
    return Requirements(disk, memory, train.num_workers, device)


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
    free_memory = _free_memory(needed.device)
    if free_memory is not None and free_memory < sum(memory.values()) * shared:
        each = f" in each of {shared} workers" if shared > 1 else ""
        remedy = "Use a smaller train.block_images, policy.adaptation=lora, fewer train.num_workers or more memory"
        total = _size(sum(memory.values()) * shared)
        problem = f"has {_size(free_memory)} free, and {whose} needs {total}: {_sum(memory)}{each}"
        raise ResourceError(f"memory ({needed.device})", problem, remedy)


def describe(needed: Requirements) -> list[str]:
    """Lines for a person: disk and memory by item."""
    workers = f" in each of {needed.workers} workers" if needed.workers > 1 else ""
    return [f"disk: {_sum(needed.disk)}", f"memory ({needed.device}): {_sum(needed.memory)}{workers}"]


def _read(folder: Path, layout: Layout | None, config: Config) -> Model:
    if layout is None:
        files = [folder / name for name in listing(folder) if name.endswith(".safetensors")]
        count = sum(_count(header(file)) for file in files)
        return Model(sum(file.stat().st_size for file in files), count, 0, count, 0, 0, 0, 0, 0, 0)
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
        units = sum((cells >> (2 * level)) * each for level, each in enumerate(channels)) * (2 * depth + 1)
        text_width = own.get("cross_attention_dim", 1280)
        taps = min(cells >> (2 * (len(channels) - 1)), 256) * channels[-1] + min(cells, 256) * channels[0]
    else:
        inner = own.get("num_attention_heads", 18) * own.get("attention_head_dim", 64)
        tokens = cells // own.get("patch_size", 2) ** 2
        length += 256 if length >= 77 else 0
        units = (tokens + length) * inner * own.get("num_layers", 18)
        text_width = own.get("joint_attention_dim", 4096)
        taps = 3 * min(tokens, 256) * inner
    return {
        "latent": own.get("in_channels", 4) * cells,
        "picture": 3 * picture,
        "units": units,
        "decoder": picture * levels[min(1, len(levels) - 1)],
        "text": length * text_width,
        "taps": taps,
    }


def _count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def _device(config: Config) -> str:
    if config.backbone.device != "auto":
        return config.backbone.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _free_memory(device: str) -> int | None:
    """Bytes that a process may still take: of the GPU, or of the machine and of the control group that it is in."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    limits = [_meminfo(), _control_group()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _control_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of a container's own limit."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        statistics = (root / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in statistics if line.startswith("file "))
    except (OSError, ValueError, StopIteration):
        return None
    return None if limit == "max" else int(limit) - used + cached


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _sum(items: dict[str, int]) -> str:
    parts = ", ".join(f"{item} {_size(count)}" for item, count in items.items())
    return f"{_size(sum(items.values()))} ({parts})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
