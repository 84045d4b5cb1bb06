"""The KServe model: requests in KServe's V1 protocol to pictures, one generation at a time, off the event loop."""

import asyncio
import base64
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from kserve import InferRequest, Model

from latentac.distributed import pick_device
from latentac.errors import ConfigError
from latentac.serving.generator import Generator, Pictures, png
from latentac.serving.request import Request, parse


class SteeredDiffusion(Model):
    """POST /v1/models/<name>:predict. A synchronous predict would hold up the probes for as long as it draws, so the
    drawing has a thread of its own."""

    def __init__(self, name: str, folder: Path, device_name: str = "auto") -> None:
        super().__init__(name)
        self._folder, self._device = folder, pick_device(device_name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")

    def load(self) -> bool:
        """Load the folder and draw one picture: ready means that it has drawn. Raises ServingError."""
        if self._device.type == "cuda":  # same request, same bytes: the gradients need it, and before cuBLAS starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._generator = Generator(self._folder, self._device)
        self._generator.generate("ready", num_steps=2)
        self.ready = True
        return self.ready

    async def preprocess(self, payload: Any, headers: dict[str, str] | None = None) -> list[Request]:
        """The body's requests. Raises ConfigError with every problem, before any of them is drawn."""
        if isinstance(payload, InferRequest):
            raise NotImplementedError(f"This model speaks KServe's V1 protocol: POST /v1/models/{self.name}:predict.")
        return parse(payload, self._generator.exported)

    async def predict(self, payload: list[Request], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """{"predictions": [...]}, one a request, in order."""
        loop = asyncio.get_running_loop()
        return {"predictions": [await loop.run_in_executor(self._thread, self._draw, request) for request in payload]}

    def _draw(self, request: Request) -> dict[str, Any]:
        pictures = self._generator.generate(**request.model_dump())
        return {
            "images": [base64.b64encode(png(image)).decode() for image in pictures.images],
            "seed": pictures.seed,
            "nfe": pictures.nfe,
            "method": request.method,
            "steering": pictures.weights,
            "values": _values(pictures),
            "version": self._generator.exported.version,
        }


def _values(pictures: Pictures) -> dict[str, list[list[float]]]:
    """Reward name -> for each picture, the critic's value at each step."""
    return {name: pictures.values[:, :, head].tolist() for head, name in enumerate(pictures.reward_names)}


async def refuse(request: HTTPRequest, error: Exception) -> JSONResponse:
    """The answer to a ConfigError: 422 and each problem with its field, value and remedy."""
    problems = error.problems if isinstance(error, ConfigError) else ()
    told = [{"field": p.path, "value": p.value, "problem": p.problem, "remedy": p.remedy} for p in problems]
    return JSONResponse(status_code=422, content={"error": str(error), "problems": told})
