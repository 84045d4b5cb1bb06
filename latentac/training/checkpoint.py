"""Training state as files: complete, atomic and free of pickle. Publishing and verifying is the store's part."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentac.store.published import read
from latentac.system.errors import IntegrityError, LatentacError, as_os_error, describe

VERSION = 1
"""Of what a checkpoint holds. A change that makes an older state unreadable, or means another thing by it, raises it
here and in `latentac.store.shapes.Progress`."""


Part = Callable[[Tensor, Tensor], Tensor]
"""From a tensor and the weight that it belongs to, to another part of that tensor: see `sharding.Sharding`."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str, whole: Part) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors, all rows of them, in the dtypes that it has: moments, step counts,
    and the tables and scales of quantised moments. A whole number becomes an int64 tensor of no axes."""
    return {
        f"{prefix}.{index}.{name}": whole(torch.as_tensor(value).detach(), weight).cpu()
        for index, weight in enumerate(_weights(optimizer))
        for name, value in optimizer.state.get(weight, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor], own: Part) -> None:
    """Undo `optimizer_tensors`. The parameters must be the same, in the same order."""
    state: dict[int, dict[str, Tensor | int]] = {}
    weights = _weights(optimizer)
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            number = value.ndim == 0 and value.dtype == torch.int64
            state.setdefault(int(index), {})[name] = int(value) if number else own(value, weights[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def write_state(folder: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """state.safetensors and progress.json into `folder`, which says the version of this form. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "state.safetensors"
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise as_os_error(error, str(file)) or error from error
    (folder / "progress.json").write_text(json.dumps({**progress, "version": VERSION}) + "\n")


@contextmanager
def loading(where: str) -> Iterator[None]:
    """What libraries raise of an artifact's weights that are not what they should be, as IntegrityError."""
    try:
        yield
    except (LatentacError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        remedy = "Delete it from the store, and run the step that makes it"
        raise IntegrityError(where, f"it cannot be loaded ({describe(error, 300)})", remedy) from error


def read_state(folder: Path, where: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote. where: the folder's place for messages, if that is another than its path.

    Raises IntegrityError for anything else, and for a state of another version.
    """
    where = where or str(folder)
    with loading(f"{where}/state.safetensors"):
        tensors = load_file(folder / "state.safetensors")
    return tensors, read(folder / "progress.json", f"{where}/progress.json")
