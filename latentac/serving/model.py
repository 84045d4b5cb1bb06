"""The KServe model: requests in either of its protocols to images, which are drawn off the event loop."""

import asyncio
import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kserve import InferRequest, InferResponse, Model

from latentac.sampling.devices import num_cores, pick_device
from latentac.serving import observing
from latentac.serving.batching import Batcher, Callback, Job
from latentac.serving.generator import Drawn, Generator, png
from latentac.serving.observing import Record
from latentac.serving.request import Request, validated
from latentac.serving.tensors import INPUTS, OUTPUTS, described, infer_response, instances


class TooLong(Exception):
    """A request was not answered within the time that it may take."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not drawn within {seconds:g} s")


@dataclass(frozen=True)
class Asked:
    """What a payload asks for. infer: the V2 request that it came as, or None."""

    requests: list[Request]
    infer: InferRequest | None


@dataclass(frozen=True)
class Answer:
    """A prediction for each request of `asked`, in order."""

    asked: Asked
    predictions: list[dict[str, Any]]


class SteeredDiffusion(Model):
    """`submit` and `finish` are what all routes use; `__call__`, KServe's own, goes through them too."""

    def __init__(self, name: str, folder: Path, device_name: str = "auto", base: Path | None = None) -> None:
        """base: folder with the base of an adapter, by default `base/` in `folder`."""
        super().__init__(name)
        self._folder, self._device, self._base = folder, pick_device(device_name), base

    def load(self) -> bool:
        """Load the folder and generate one image: ready means that it can. Raises ServingError."""
        if self._device.type == "cuda":  # same request, same bytes: the gradients need it, and before cuBLAS starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.generator = Generator(self._folder, self._device, self._base)
        self.generator.rehearse()
        workers = num_cores() if self._device.type == "cpu" else 1
        self._batcher = Batcher(self.generator, self.generator.exported.batching, workers, observing.drew)
        observing.watch_queue(lambda: self._batcher.queued)
        self.ready = True
        return self.ready

    def close(self) -> None:
        """Draw what waits, and end the workers."""
        self._batcher.close()

    def submit(self, requests: Sequence[Request], callback: Callback | None = None) -> list[Job]:
        """Queue the requests, all or none. callback: is called at every step. Raises Busy."""
        return self._batcher.submit([(self.generator.slots(request), callback) for request in requests])

    async def finish(self, requests: Sequence[Request], jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """A prediction a request, once its job is done. Cancelled, or too long, it abandons the jobs.

        Raises ConfigError where weights drove the latents to infinity, TooLong.
        """
        seconds = self.generator.exported.batching.request_seconds
        try:
            async with asyncio.timeout(seconds):
                drawn = [await asyncio.wrap_future(job.future) for job in jobs]
        except TimeoutError:
            raise TooLong(seconds) from None
        finally:
            for job in jobs:
                if not job.future.done():
                    self._batcher.abandon(job)
        if (record := observing.CURRENT.get()) is not None:
            self._record(record, requests, jobs)
        parts = zip(requests, drawn, strict=True)
        return await asyncio.to_thread(lambda: [self._prediction(request, given) for request, given in parts])

    async def preprocess(self, payload: Any, headers: dict[str, str] | None = None) -> Asked:
        """The body's requests. Raises ConfigError with every problem, before any of them is drawn."""
        infer = payload if isinstance(payload, InferRequest) else None
        fields = instances(infer, self.generator.exported.limits) if infer else payload
        requests = validated(self.generator.forms.body, fields).instances
        self.generator.check([(f"instances.{index}.prompt", request) for index, request in enumerate(requests)])
        return Asked(requests, infer)

    async def predict(self, payload: Asked, headers: dict[str, str] | None = None) -> Answer:
        """One prediction a request, in order. Raises Busy."""
        return Answer(payload, await self.finish(payload.requests, self.submit(payload.requests)))

    async def postprocess(
        self, result: Answer, headers: dict[str, str] | None = None
    ) -> dict[str, Any] | InferResponse:
        """In the protocol of the question."""
        if result.asked.infer is not None:
            return infer_response(result.asked.infer, self.name, result.predictions)
        return {"predictions": result.predictions}

    def get_input_types(self) -> list[dict[str, Any]]:
        return described(INPUTS)

    def get_output_types(self) -> list[dict[str, Any]]:
        return described(OUTPUTS)

    def _record(self, record: Record, requests: Sequence[Request], jobs: Sequence[Job]) -> None:
        record.asked(requests)
        kinds = [self.generator.kind(request) for request in requests]
        counted = [(kind, job.count, self.generator.nfe(kind)) for kind, job in zip(kinds, jobs, strict=True)]
        record.drawn(counted, max(job.waited for job in jobs))

    def _prediction(self, request: Request, drawn: Sequence[Drawn]) -> dict[str, Any]:
        made, kind = self.generator.generated(request, drawn), self.generator.kind(request)
        return {
            "images": [base64.b64encode(png(image)).decode() for image in made.images],
            "seed": made.seed,
            "num_steps": kind.num_steps,
            "guidance_scale": kind.guidance_scale,
            "policy": kind.policy,
            "method": kind.method,
            "particles": kind.particles,
            "steering": made.weights,
            "nfe": made.nfe,
            "tokens": made.tokens,
            "truncated": made.truncated,
            "values": {name: made.values[:, :, head].tolist() for head, name in enumerate(made.reward_names)},
            "version": self.generator.exported.version,
        }
