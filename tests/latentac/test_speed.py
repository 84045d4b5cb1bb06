"""What is logged of the speed of training."""

import logging
from typing import Any

import pytest
import torch

from latentac.runs.gpus import GPUS, peak_of
from latentac.runs.preparation.costs import count_operations, operations_per_image
from latentac.runs.reporting.metrics import PHASES, SPEED, of_iteration
from latentac.runs.workers.speed import Throughput, throughput
from latentac.training import timing
from latentac.training.distributed import PeerLost, Traffic
from tests.latentac.trainers import make_trainer

PROMPT = "a red circle"


def test_one_worker_waits_for_nobody_and_moves_nothing() -> None:
    """Its phases fill the iteration but for what lies between them."""
    entry = make_trainer().iterate()
    speed = entry["speed"]
    assert speed["images_per_second"] == pytest.approx(entry["images"] / entry["seconds"])
    assert (speed["straggler"], speed["moved_bytes"], speed["phases"]["waiting"]) == (1.0, 0, [0.0])
    spent = sum(speed["phases"][name][0] for name in ("rollout", "policy", "critic"))
    assert 0.5 * entry["seconds"] < spent <= entry["seconds"]


def test_every_number_has_a_meaning_and_is_logged() -> None:
    """By its name in the definitions, and each worker's seconds by its rank."""
    entry = make_trainer().iterate()
    assert set(entry["speed"]) <= {*SPEED, "phases"}
    assert set(entry["speed"]["phases"]) == set(PHASES) == set(timing.PHASES)
    logged = of_iteration(entry)
    assert logged["time/images_per_second"] == entry["speed"]["images_per_second"]
    assert all(f"time/{name}/worker_00" in logged for name in PHASES)


def test_time_in_operations_counts_also_where_they_fail() -> None:
    """What such an operation raises comes from the other workers."""
    traffic = Traffic()
    with traffic.operation(torch.zeros(3)):
        pass
    with pytest.raises(PeerLost), traffic.operation(torch.zeros(2)):
        raise RuntimeError("Connection closed by peer")
    seconds, sent = traffic.take()
    assert (seconds > 0, sent) == (True, 20)
    assert traffic.take() == (0.0, 0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_operations_are_those_of_the_prediction(scale: float) -> None:
    """Per image, as the dry run counts them, guidance once; the share is of the peak of all workers' GPUs."""
    trainer = make_trainer(policy={"guidance_scale": scale})
    backbone, config = trainer.policy.backbone, trainer.config
    speed: dict[str, Any] = {"images_per_second": 100.0}
    text, given = trainer.conditioning.rows(torch.tensor([0])), backbone.encode([PROMPT])
    trainer.conditioning.release_encoders()  # as on a GPU
    Throughput(config, backbone, text, "NVIDIA H100 80GB HBM3").add(speed, 4)
    expected = 100.0 * operations_per_image(config, count_operations(config, backbone, given)) / 1e12
    assert speed["tflops"] == pytest.approx(expected)
    assert speed["peak_share"] == pytest.approx(expected / 4 / GPUS["h100"])
    assert throughput(config, backbone, text) is None, "a CPU has no known peak"


def test_a_backbone_that_cannot_be_counted_trains_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """A warning, and no number."""
    trainer = make_trainer()
    speed: dict[str, Any] = {"images_per_second": 100.0}

    class Odd:
        def __getattr__(self, name: str) -> Any:
            if name == "predict":
                raise NotImplementedError("own kernel")
            return getattr(trainer.policy.backbone, name)

    with caplog.at_level(logging.WARNING):
        Throughput(trainer.config, Odd(), trainer.conditioning.rows(torch.tensor([0])), "NVIDIA L4").add(speed, 1)
    assert "own kernel" in caplog.text
    assert speed == {"images_per_second": 100.0}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_gpu_is_known_by_its_own_name_alone(name: str, gpu: str | None) -> None:
    """Not by a part of it: an L40 is no L4."""
    assert peak_of(name) == (None if gpu is None else GPUS[gpu])
