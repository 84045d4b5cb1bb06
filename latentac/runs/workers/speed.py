"""Floating-point operations per second of training, for the log."""

import logging
from typing import Any

import torch

from latentac.backbones import Denoiser
from latentac.config.schema import Config
from latentac.method.records import Conditioning
from latentac.runs.gpus import peak_of

_log = logging.getLogger(__name__)


class Throughput:
    """Adds TFLOP/s, and their share of the GPUs' peak where it is known, to what is logged of an iteration."""

    def __init__(self, config: Config, backbone: Denoiser, conditioning: Conditioning, gpu: str) -> None:
        """conditioning: of one prompt, for the text encoders are gone by now; gpu: as its driver calls it."""
        # Counting takes a second, so a CPU, whose peak is not known, does without.
        from latentac.runs.preparation.costs import count_operations, operations_per_image

        self._peak, self._operations = peak_of(gpu), 0.0
        try:
            self._operations = operations_per_image(config, count_operations(config, backbone, conditioning))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            # A backbone of one's own may do what cannot be counted, and trains all the same.
            _log.warning("the operations of this backbone cannot be counted, so TFLOP/s are not logged (%s)", error)

    def add(self, speed: dict[str, Any], workers: int) -> None:
        """speed: of an entry of the history."""
        if self._operations:
            speed["tflops"] = speed["images_per_second"] * self._operations / 1e12
            if self._peak:
                speed["peak_share"] = speed["tflops"] / workers / self._peak


def throughput(config: Config, backbone: Denoiser, conditioning: Conditioning) -> Throughput | None:
    """That of the device that the backbone is on; None on a CPU. With sharded weights, `backbone` must be whole."""
    if backbone.device.type != "cuda":
        return None
    return Throughput(config, backbone, conditioning, torch.cuda.get_device_name(backbone.device))
