"""The memory that is free on this machine, on its GPU, and within a control group."""

from pathlib import Path

from latentac.config.learning import Train
from latentac.config.schema import Backbone


def compute_device(settings: Backbone) -> str:
    """cpu or cuda."""
    if settings.device != "auto":
        return settings.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def count_workers(train: Train, device: str) -> int:
    """Worker processes that training starts on this machine. device: cpu or cuda.

    Raises ConfigError for more workers than GPUs.
    """
    from latentac.sampling import devices

    return devices.count_workers(train.num_workers, train.num_blocks, device)


def free_memory(device: str) -> int | None:
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
