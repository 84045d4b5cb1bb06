"""How the steps of a run on this machine are run: in processes (`embedded`) or in `containers`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Way:
    """How the steps run. runner: kfp.local's; store, output, config: as the steps see them; place: called with each
    task of the graph. keep: whether the artifacts can be served when the run has ended. errors: what the runner may
    raise where a step does not come to run."""

    runner: Any
    store: str
    output: Path
    config: str
    place: Callable[[Any], object] | None = None
    keep: bool = True
    errors: tuple[type[Exception], ...] = ()
