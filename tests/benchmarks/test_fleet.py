"""Predictions for many GPUs, against closed forms."""

import math
import statistics

import pytest

from benchmarks.fleet import (
    BUCKET_BYTES,
    LATENCY_SECONDS,
    MODELS,
    NETWORKS,
    PEAK,
    SHARE,
    Fleet,
    Job,
    best_interval,
    goodput,
    iteration,
    main,
)

SD15 = MODELS[0]


def test_an_iteration_on_one_gpu_is_its_computation_and_the_last_rewards() -> None:
    """K forwards of the rollout, K forwards and backwards of the update, and the decoder, for each image."""
    job = Job(images=64, block=8, steps=10, reward_seconds=0.01)
    found = iteration(SD15, NETWORKS[0], job, 1)
    assert found.compute == pytest.approx(64 * (30 * SD15.forward + SD15.decoding) / (SHARE * PEAK))
    assert found.gradients == found.latents == 0
    assert found.seconds == pytest.approx(found.compute + 8 * 0.01)


def test_all_weights_cost_another_forward_and_their_bytes() -> None:
    """A backward pass costs two forwards where all weights are trained; an all-reduce sends 2 (N - 1) / N of them."""
    job = Job(images=512, full=True, updates=1)
    found = iteration(SD15, NETWORKS[1], job, 64)
    buckets = math.ceil(4 * SD15.parameters / BUCKET_BYTES)
    sent = 2 * 63 / 64 * 4 * SD15.parameters / NETWORKS[1].between
    assert found.gradients == pytest.approx(sent + 2 * 6 * LATENCY_SECONDS * buckets)
    assert found.compute == pytest.approx(8 * (40 * SD15.forward + SD15.decoding) / (SHARE * PEAK))


def test_workers_without_a_block_are_refused_and_uneven_blocks_wait_for_the_busiest() -> None:
    """Nine blocks on eight workers take as long as sixteen."""
    even, uneven = (iteration(SD15, NETWORKS[0], Job(images=images), 8) for images in (128, 72))
    assert even.compute == uneven.compute
    with pytest.raises(ValueError, match="8 blocks for 16 workers"):
        iteration(SD15, NETWORKS[0], Job(images=64), 16)


def test_without_failures_checkpoints_alone_cost_time() -> None:
    """The share is T / (T + C / c)."""
    calm = Fleet(1, hours_between_failures=1e12)
    assert goodput(calm, 10.0, 5.0, 4, seed=0) == pytest.approx(10 / (10 + 5 / 4), rel=1e-3)
    assert goodput(calm, 10.0, 0.0, 1, seed=0) == pytest.approx(1.0, rel=1e-4)


def test_failures_cost_half_an_interval_and_the_recovery() -> None:
    """To first order, with rare failures: 1 - (c T / 2 + R) / M."""
    fleet = Fleet(64, hours_between_failures=5_000.0, recovery=100.0)
    found = statistics.mean(goodput(fleet, 10.0, 0.0, 20, seed, days=60.0) for seed in range(20))
    assert found == pytest.approx(1 - (20 * 10 / 2 + 100) / fleet.failure_seconds, abs=0.002)


def test_the_best_interval_is_that_of_young() -> None:
    """No other of these choices does clearly better in the simulation."""
    fleet, seconds, saving = Fleet(512, hours_between_failures=20_000.0), 5.0, 20.0
    best = round(best_interval(fleet, saving) / seconds)

    def mean(every: int) -> float:
        return statistics.mean(goodput(fleet, seconds, saving, every, seed) for seed in range(20))

    assert best > 10
    assert mean(best) > max(mean(best // 6), mean(best * 6))
    assert mean(best) > max(mean(best // 2), mean(best * 2)) - 0.003


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Three of them, and more GPUs never do fewer images."""
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|---") for line in lines) == 3
    for line in lines[2:14]:
        rates = [float(cell.split("(")[0].replace(",", "")) for cell in line.strip("| ").split(" | ")[2:]]
        assert rates == sorted(rates)
