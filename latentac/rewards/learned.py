"""What the rewards with a network of others have in common: where it is from, batches, device, dtype, and memory.

A reward says how its network is found and read, and what it makes of it, images and prompts: see `clip.py` for those
that look through a CLIP, and `vqa.py` for one that does not.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from latentac.config import extensions
from latentac.store import sources
from latentac.system.errors import ConfigError, Problem, RewardError
from latentac.system.reading import whole_variable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentac.rewards.folders import Checkpoint

_log = logging.getLogger(__name__)
_CPU_MEMORY = "DefaultCPUAllocator"  # what torch's error names where the CPU's memory is too small


class Network(Protocol):
    """What `read` returns: it lies on the CPU until it is moved."""

    @property
    def dtype(self) -> "torch.dtype": ...

    @property
    def device(self) -> "torch.device": ...

    def move(self, device: "torch.device", dtype: "torch.dtype") -> None: ...


class LearnedSettings(extensions.Settings):
    """Where a network comes from and how it computes. Each reward has its own default for `source`."""

    source: str
    """A folder with the model as transformers saves it (safetensors weights), an address of `latentac mirror`, or a hub
    id."""
    revision: str = ""
    """Commit, tag or branch of a hub id. Only a commit is certain to stay the same."""
    batch_size: Annotated[int, Field(gt=0, le=4096)] = 16
    """Images that are scored together. It is halved when memory runs out. It changes a reward only by rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is the worker's GPU where there is one, else the CPU. When a single image does not fit into the GPU's
    memory, the CPU takes over."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Of the network; the score is computed from its output in float32. Published scores are of float32. `auto` is
    bfloat16 on a GPU that supports it, else float32. `float16` is float32 on a CPU."""


class LearnedReward:
    """Base of the rewards with a network. Built without torch; the network is read at the first call."""

    def __init__(self, settings: LearnedSettings) -> None:
        self._settings = settings
        self._lock, self._turns = Lock(), Lock()
        self._loaded: Any = None
        self._batch = settings.batch_size

    def locate(self) -> Path:
        """The network's folder on this machine, fetched if need be, and inspected. Raises ConfigError."""
        raise NotImplementedError

    def read(self, folder: Path, dtype: "torch.dtype") -> Network:
        """The network that `locate` found. Raises ConfigError."""
        raise NotImplementedError

    def used(self, names: Collection[str]) -> set[str]:
        """Those of the folder's file names that are used."""
        raise NotImplementedError

    def checkpoints(self) -> list["Checkpoint"]:
        """All that the reward reads, fetched if need be: what `latentac mirror` copies. Raises ConfigError."""
        folder = self.locate()
        self.examine(folder)
        return [checkpoint("source", "revision", folder, self.used)]

    def examine(self, folder: Path) -> None:
        """Find what is wrong with what the reward reads beside the network in `folder`. Raises ConfigError."""

    def score(self, network: Any, images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        """float32 [B] for at most a batch."""
        raise NotImplementedError

    @property
    def elsewhere(self) -> bool:
        """Whether its files would have to be fetched from the hub or a store."""
        return is_elsewhere(self._settings.source, self._settings.revision)

    def fetch(self) -> None:
        """Have the files on this machine and find what is wrong with them. Raises ConfigError."""
        self.examine(self.locate())

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B] for `images` uint8 [B, H, W, 3]. Raises RewardError for a network that cannot be used, and where
        memory is too small for a single image."""
        return self.scored(images, prompts, {})

    def scored(self, images: np.ndarray, prompts: Sequence[str], more: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """The same. more: what `score` takes beside them, a value per image, by name."""
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:  # a container image that only launches and decides has neither
            remedy = "Score where torch and transformers are installed"
            raise RewardError("packages", f"one is missing: {error}", remedy) from error

        network, parts, done = self._network(), [np.zeros(0, np.float32)], 0
        while done < len(images):
            part = slice(done, min(done + self._batch, len(images)))
            failed: Exception | None = None
            device = network.device
            try:
                with self._turn(network), torch.no_grad():
                    own = {name: values[part] for name, values in more.items()}
                    parts.append(self.score(network, images[part], prompts[part], **own).float().cpu().numpy())
                    done = part.stop
            except (RuntimeError, MemoryError) as error:
                if not _is_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the tensors that take the memory
            if failed is not None and device == network.device:  # otherwise another thread has made room
                self._spare(network, part.stop - part.start, failed)
        return np.concatenate(parts)

    def _turn(self, network: Network) -> AbstractContextManager[Any]:
        """On a GPU one thread at a time computes, as their memory is one."""
        return self._lock if network.device.type == "cuda" else nullcontext()

    def _network(self) -> Any:
        with self._lock:
            if self._loaded is None:
                try:
                    folder = self.locate()
                    self.examine(folder)
                    device = _device(self._settings.device)
                    network = self.read(folder, _dtype(self._settings.dtype, device))
                except ConfigError as error:
                    first = error.problems[0]
                    raise RewardError(f"{first.path} = {first.value!r}", first.problem, first.remedy) from error
                try:
                    network.move(device, network.dtype)
                except RuntimeError as error:
                    if not _is_of_memory(error) or device.type == "cpu":
                        raise
                    self._to_cpu(network)
                self._loaded = network
            return self._loaded

    def _spare(self, network: Network, tried: int, error: Exception) -> None:
        """After `error`, which a batch of `tried` images met: half of it, or else the CPU. Raises RewardError where
        neither is left."""
        if tried > 1:
            self._batch = min(self._batch, (tried + 1) // 2)
            _log.warning("%d images do not fit into memory together: from now on %d", tried, self._batch)
        elif network.device.type == "cuda":
            with self._lock:
                self._to_cpu(network)
            self._batch = self._settings.batch_size
        else:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            remedy = "Use a smaller model, dtype=bfloat16, or a machine with more memory"
            raise RewardError("memory", f"is too small for one image ({reason})", remedy) from error
        _free()

    def _to_cpu(self, network: Network) -> None:
        import torch

        _log.warning("the GPU's memory is too small for %s: the CPU takes over", self._settings.source)
        network.move(torch.device("cpu"), _dtype(self._settings.dtype, torch.device("cpu")))
        _free()


def checkpoint(setting: str, revision: str, folder: Path, used: Callable[[Collection[str]], set[str]]) -> "Checkpoint":
    """The folder that `setting` names, with those of its files that are used."""
    from latentac.rewards.folders import Checkpoint

    names = [path.name for path in folder.iterdir() if path.is_file()]
    return Checkpoint(setting, revision, folder, frozenset(used(names)))


def is_elsewhere(source: str, revision: str) -> bool:
    """Whether the network that `source` names would have to be fetched from the hub or a store."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from latentac.rewards.folders import is_local

    if sources.is_address(source):
        return sources.cached(source) is None
    try:
        return not is_local(source) and not isinstance(
            try_to_load_from_cache(source, "config.json", revision=revision or None), str
        )
    except HFValidationError:
        return False  # `fetch` says what is wrong with it


def _free() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_MEMORY in str(error)


def _device(name: str) -> "torch.device":
    """Raises ConfigError for a GPU that is not there."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError([Problem("device", name, "no CUDA device is usable here", "Use auto or cpu")])
    # Not the current device: that is each thread's own, and rewards are called in new ones.
    return torch.device("cuda", whole_variable("LOCAL_RANK", 0, torch.cuda.device_count() - 1, 0))


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    from latentac.backbones.precision import compute_dtype

    if name == "float16" and device.type == "cpu":
        name = "float32"
    return compute_dtype(name, device)  # type: ignore[arg-type]
