"""What an operator sees of the endpoint: Prometheus metrics, and one line of JSON a request on stdout."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from latentac.serving.generator import Kind
from latentac.serving.request import Request

_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_IMAGES = (1, 2, 4, 8, 16, 32)

REQUESTS = Counter("latentac_requests", "Requests for images that were answered", ["protocol", "status"])
REQUEST_SECONDS = Histogram(
    "latentac_request_seconds", "From a request's arrival to its answer", ["protocol"], buckets=_SECONDS
)
WAIT_SECONDS = Histogram("latentac_wait_seconds", "From a request's arrival to its first step", buckets=_SECONDS)
QUEUED = Gauge("latentac_queued_images", "Images that wait to be drawn")
BATCH_IMAGES = Histogram("latentac_batch_images", "Images that were drawn together", buckets=_IMAGES)
BATCH_SECONDS = Histogram("latentac_batch_seconds", "Time to draw a batch", buckets=_SECONDS)
IMAGES = Counter("latentac_images", "Images that were drawn", ["policy", "method"])
NFE = Counter("latentac_function_evaluations", "Evaluations of the denoiser, a backward counted as 2", ["method"])

CURRENT: ContextVar["Record | None"] = ContextVar("CURRENT", default=None)
"""The request that is being answered."""

_log = logging.getLogger("latentac.requests")


def log_requests() -> None:
    """One line of JSON a request on stdout, from now on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers, _log.propagate = [handler], False
    _log.setLevel(logging.INFO)


def watch_queue(queued: Callable[[], int]) -> None:
    """The gauge asks `queued` whenever it is read."""
    QUEUED.set_function(queued)


def drew(images: int, seconds: float) -> None:
    """A batch was drawn."""
    BATCH_IMAGES.observe(images)
    BATCH_SECONDS.observe(seconds)


@dataclass
class Record:
    """One request as the operator's log has it. Prompts are left out unless `prompts` says otherwise."""

    protocol: str
    id: str
    prompts: bool
    began: float = field(default_factory=time.monotonic)
    fields: dict[str, Any] = field(default_factory=dict)

    def asked(self, requests: Sequence[Request]) -> None:
        """What was asked for, once it is known to be valid."""
        fields = ("seed", "count", "num_steps", "guidance_scale", "policy", "method", "particles")
        shown = [{name: getattr(one, name) for name in fields} for one in requests]
        if self.prompts:
            shown = [{"prompt": one.prompt, **rest} for one, rest in zip(requests, shown, strict=True)]
        self.fields["asked"] = shown

    def drawn(self, kinds: Sequence[tuple[Kind, int, int]], waited: float) -> None:
        """kinds: of each request, with its images and their NFE each; waited: seconds before the first step."""
        for kind, count, nfe in kinds:
            IMAGES.labels(kind.policy, kind.method).inc(count)
            NFE.labels(kind.method).inc(count * nfe)
        WAIT_SECONDS.observe(waited)
        self.fields |= {"nfe": sum(count * nfe for _, count, nfe in kinds), "waited_seconds": round(waited, 4)}

    def answered(self, status: int) -> None:
        """The end of it; 499 where the caller went away."""
        seconds = time.monotonic() - self.began
        REQUESTS.labels(self.protocol, str(status)).inc()
        REQUEST_SECONDS.labels(self.protocol).observe(seconds)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": self.id,
            "protocol": self.protocol,
            "status": status,
            "seconds": round(seconds, 4),
            **self.fields,
        }
        _log.info(json.dumps(line))
