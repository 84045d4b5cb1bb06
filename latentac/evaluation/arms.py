"""The rows of the steering benchmark: which arm is plain sampling, and which one was best. Without torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from latentac.system.names import PLAIN

Row = Mapping[str, Any]
"""{method, strength, particles, nfe, reward, mean, low, high, n, seconds}, one per arm and reward."""


def plain_arm(rows: Sequence[Row], reward: str) -> Row:
    """The row of plain sampling."""
    return next(row for row in rows if row["reward"] == reward and row["method"] == PLAIN)


def best_arm(rows: Sequence[Row], reward: str) -> Row:
    """The row of `reward` with the highest mean; of equal ones, that of the fewest evaluations."""
    own = [row for row in rows if row["reward"] == reward]
    return max(own, key=lambda row: (row["mean"], -row["nfe"]))


def best_steered(rows: Sequence[Row], reward: str) -> Row | None:
    """The same among the steered arms: the method that the gallery shows and the endpoint uses by default."""
    steered = [row for row in rows if row["method"] != PLAIN and row["reward"] == reward]
    return best_arm(steered, reward) if steered else None
