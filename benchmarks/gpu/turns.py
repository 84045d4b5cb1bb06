"""Arms that train the same model take turns in one process; an arm that does not fit beside the others comes after."""

import gc
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.gpu.budget import Budget, OverBudget, say

TURNS = 3
"""Measured iterations of an arm, after one that does not count; fewer where the time does not suffice."""
_FEWEST_ROWS = 4  # a group of GRPO
_SPARE = 1.1  # a turn may take so much longer than the last one

Record = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One iteration. images: that it trained on; seconds: in all; rollout: of these, for making and scoring the images;
    watched: further numbers of it."""

    images: int
    seconds: float
    rollout: float
    watched: Mapping[str, float | None] = field(default_factory=dict)


class Arm(Protocol):
    """images: per iteration; rows: that go through the network together; trained: transitions per image."""

    images: int
    rows: int
    trained: int

    def iterate(self) -> Turn: ...


Make = Callable[[int], Arm]
"""An arm that works with so many rows."""


@dataclass
class Measured:
    """What is known of an arm. memory: bytes at the most in its first iteration, without what other arms hold; None on
    a CPU. beside: whether it took turns with the others. note: why something is missing."""

    rows: int = 0
    trained: int = 0
    memory: int | None = None
    beside: bool = True
    note: str = ""
    turns: list[Turn] = field(default_factory=list)

    def record(self) -> Record:
        rates = [turn.images / turn.seconds for turn in self.turns]
        found: Record = {name: value for name, value in asdict(self).items() if name != "turns"}
        found |= {"turns": len(rates), "images_per_second": rates}
        if not self.turns:
            return found
        found["images"] = self.turns[0].images
        for name in ("seconds", "rollout"):
            found[name] = statistics.median(getattr(turn, name) for turn in self.turns)
        found["update"] = statistics.median(turn.seconds - turn.rollout for turn in self.turns)
        return found | dict(self.turns[-1].watched)


def measure(
    makers: Mapping[str, Make], rows: int, device: torch.device, budget: Budget, turns: int = TURNS
) -> dict[str, Measured]:
    """Every arm by name, within the present part of `budget`."""
    found = {name: Measured() for name in makers}
    try:
        alone = _together(makers, found, rows, device, budget, _Plan(turns))
        while alone:
            name, *alone = alone
            found[name].beside = False
            _together({name: makers[name]}, found, rows, device, budget, _Plan(turns, len(alone)))
    except OverBudget as stopped:
        for one in found.values():
            if len(one.turns) < turns and not one.note:
                one.note = str(stopped)
    release(device)
    return found


@dataclass(frozen=True)
class _Plan:
    """turns: of each arm, at the most; behind: arms that come after these, and need time too."""

    turns: int
    behind: int = 0


def _together(
    makers: Mapping[str, Make],
    found: Mapping[str, Measured],
    rows: int,
    device: torch.device,
    budget: Budget,
    plan: _Plan,
) -> list[str]:
    """Turns of all `makers`. Returns those for which there was no memory beside the others."""
    live: dict[str, Arm] = {}
    alone: list[str] = []
    before = budget.left
    for name, make in makers.items():
        say(f"        {name}: first iteration")
        arm = _begin(make, found[name], rows, device, alone=not live)
        if arm is not None:
            live[name] = arm
        elif not found[name].note:
            alone.append(name)
    beginning, last = before - budget.left, 0.0
    for turn in range(plan.turns if live else 0):
        reserved = (len(alone) + plan.behind) * (beginning + last) / len(live)  # each begins, and has a turn
        if turn and budget.left - reserved < _SPARE * last:
            for name in live:
                found[name].note = f"{turn} of {plan.turns} turns: no time for more"
            break
        before = budget.left
        for name in list(live)[:: -1 if turn % 2 else 1]:  # none is always the first
            taken = live[name].iterate()
            found[name].turns.append(taken)
            say(f"        {name}: {taken.images / taken.seconds:.2f} images per second")
        last = before - budget.left
    live.clear()
    release(device)
    return alone


def _begin(make: Make, known: Measured, rows: int, device: torch.device, *, alone: bool) -> Arm | None:
    """The arm after its first iteration; None where it failed, which `known` then says, or found no memory beside
    others. Alone, it halves its rows until it fits."""
    arm: Arm | None
    while True:
        held = allocated(device)
        try:
            arm = make(rows)
            reset_peak(device)
            arm.iterate()
            highest = peak_memory(device)
            known.memory = None if highest is None or held is None else highest - held
            known.rows, known.trained = rows, arm.trained
            return arm
        except torch.OutOfMemoryError:
            problem = f"out of memory with {rows} rows"
        except Exception as error:  # noqa: BLE001 - whatever fails in one arm, the others are still worth their numbers
            traceback.print_exc()
            known.note = described(error)
            return None
        arm = None  # what it holds goes before the next attempt
        release(device)
        say(f"        {problem}{'' if alone else ', beside the others'}")
        if not alone:
            return None
        if rows <= _FEWEST_ROWS:
            known.note = problem
            return None
        rows //= 2


def described(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".")


def allocated(device: torch.device) -> int | None:
    """Bytes that tensors hold on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that tensors held on a GPU at the most, since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give back the memory of a GPU that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def compared(first: Measured, second: Measured) -> Record | None:
    """Images per second of the first arm over those of the second, turn by turn: {median, low, high, n}, the lowest and
    the highest; None where one has no turn. Of arms that did not take turns, every pair counts."""
    rates = [[turn.images / turn.seconds for turn in arm.turns] for arm in (first, second)]
    if not all(rates):
        return None
    paired = first.beside and second.beside
    ratios = [a / b for a, b in zip(*rates, strict=False)] if paired else [a / b for a in rates[0] for b in rates[1]]
    return spread(ratios)


def spread(numbers: Sequence[float]) -> Record:
    """{median, low, high, n}, with the lowest and the highest number."""
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers), "n": len(numbers)}
