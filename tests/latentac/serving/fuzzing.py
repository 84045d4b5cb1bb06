"""How much is tried, from which seed, and what came of it: `make fuzz` prints it at its end."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings

from latentac.serving.process import ServerProcess

EXAMPLES = int(os.environ.get("LATENTAC_FUZZ_EXAMPLES", "20"))
"""For each operation of the document, and for each kind of misuse; 1,200 in `make fuzz`."""
SEED = int(os.environ.get("LATENTAC_FUZZ_SEED", "0"))

_COUNTED: defaultdict[str, Counter[str]] = defaultdict(Counter)


def fuzzed(share: float = 1.0) -> Callable[[Any], Any]:
    """Decorates a hypothesis test: `share` of EXAMPLES, from SEED, nothing remembered from run to run."""
    bounds = settings(
        max_examples=max(10, int(EXAMPLES * share)),
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(bounds(test))


def counted(category: str, statuses: Iterable[int | str] = (), *, connections: int = 0, requests: int = 0) -> None:
    """requests: those that were sent where nobody looked for an answer, beside one for each of `statuses`."""
    each = list(statuses)
    _COUNTED[category].update(f"{status}"[0] + "xx" for status in each)
    _COUNTED[category].update(requests=len(each) + requests, connections=connections)


def answered() -> Iterator[str]:
    """A line a category."""
    for category, counts in sorted(_COUNTED.items()):
        classes = ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items()) if name.endswith("xx"))
        sent = f"{counts['requests']:,} requests on {counts['connections']:,} connections"
        yield f"{category}: {sent}; answers: {classes or 'none'}"


def faults(server: ServerProcess) -> list[str]:
    """What a server has written of its own failures: tracebacks, errors and answers of the 500s."""
    signs = ("Traceback", " ERROR ", " CRITICAL ", '"status": 5')
    return [line for line in server.log(2**30).splitlines() if any(sign in line for sign in signs)]
