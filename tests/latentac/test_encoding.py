"""Many prompts: what is encoded when, what it costs, and that it changes no bit of any result."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from latentac.backbones.guided import Guided
from latentac.method.records import Conditioning
from latentac.sampling.encoding import Encoded
from latentac.training.checkpoint import read_state, write_state
from latentac.training.distributed import Mesh
from latentac.worlds.prompts import load_prompts
from tests.latentac.trainers import CPU, SHIPPED, make_trainer, rolled_out, same, shipped, snapshot

BOUNDS: dict[str, Any] = Encoded.__init__.__kwdefaults__ or {}
TEXTS = [prompt.text for prompt in load_prompts("builtin:shapes").train]


class Counting(Guided):
    """The shipped backbone, unchanged, that notes how many prompts it encodes at once."""

    def __init__(self, name: str) -> None:
        self.sizes: list[int] = []
        super().__init__(shipped(name), 1.0)
        self.sizes.clear()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.sizes.append(len(prompts))
        return self.backbone.encode(prompts)


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_have_the_same_bits_however_they_are_encoded(name):
    """At once, or when they are asked for, in any order and company, kept or encoded again."""
    counting = Counting(name)
    whole, lazy = Encoded(counting, TEXTS), Encoded(counting, TEXTS, whole_bytes=0, kept_bytes=300_000)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 40, 7, 200, 3):
        index = torch.randint(len(TEXTS), (count,), generator=generator)
        index[-1] = index[0]
        expected, found = whole.rows(index), lazy.rows(index)
        assert torch.equal(expected.tokens, found.tokens)
        pooled = [each.pooled for each in (expected, found) if each.pooled is not None]
        assert len(pooled) == (2 if name == "dit" else 0)
        assert not pooled or torch.equal(*pooled)
    assert sorted(counting.sizes) == sorted([1, 1, len(TEXTS)] + [32] * (len(counting.sizes) - 3))
    kept = sum(row.tokens.untyped_storage().nbytes() for row in lazy._kept.values())
    assert 100_000 < kept <= 300_000


def test_what_was_asked_for_lately_is_not_encoded_again():
    """And what was not is dropped first."""
    counting = Counting(SHIPPED[0])
    lazy = Encoded(counting, TEXTS, whole_bytes=0, kept_bytes=4 * 16 * 64 * 4)
    for rows in ([0, 1, 2, 3], [0, 1], [4], [0, 1, 3, 4], [2]):
        lazy.rows(torch.tensor(rows))
    assert counting.sizes == [1, 32, 32, 32]
    assert set(lazy._kept) == {1, 3, 4, 2}


class Releasing(Counting):
    """It notes whether its text encoders were released."""

    released = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.backbone: Any = self  # as seen through classifier-free guidance

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.sizes.append(len(prompts))
        return shipped(SHIPPED[0]).encode(prompts)

    def release_text_encoders(self) -> None:
        self.released = True


@pytest.mark.parametrize(("kept", "released"), [(10**9, True), (50_000, False)])
def test_text_encoders_are_released_when_all_texts_are_kept(kept, released):
    """Every text is encoded once before. Where there is no room for all, the encoders stay."""
    backbone = Releasing(SHIPPED[0])
    expected = Encoded(backbone, TEXTS).rows(torch.arange(70))
    lazy = Encoded(backbone, TEXTS, whole_bytes=0, kept_bytes=kept)
    backbone.sizes.clear()
    lazy.release_encoders()
    assert backbone.released is released
    assert (sum(backbone.sizes) >= len(TEXTS)) is released
    backbone.sizes.clear()
    assert torch.equal(lazy.rows(torch.arange(70)).tokens, expected.tokens)
    assert (not backbone.sizes) is released


@pytest.mark.parametrize("name", SHIPPED)
def test_released_encoders_encode_the_same(name):
    backbone = shipped(name).clone()
    expected = backbone.encode(TEXTS[:3])
    released: Any = backbone
    released.release_text_encoders()
    assert torch.equal(backbone.encode(TEXTS[:3]).tokens, expected.tokens)


@pytest.fixture
def lazily(monkeypatch):
    """Nothing is small enough to be encoded at once, and few rows are kept."""
    monkeypatch.setitem(BOUNDS, "whole_bytes", 0)
    monkeypatch.setitem(BOUNDS, "kept_bytes", 50_000)


def test_training_is_the_same_and_resumes_bitwise(lazily, tmp_path):
    """With images that are remembered, and so prompts of long ago, and as one of two workers."""
    sections: dict[str, Any] = {"critic": {"replay_images": 12}}
    resumed = make_trainer(**sections)
    resumed.iterate()
    write_state(tmp_path / "state", *resumed.state())
    resumed = make_trainer(**sections)
    resumed.load_state(*read_state(tmp_path / "state"))
    resumed.iterate()
    assert resumed.conditioning._whole is None
    half = rolled_out(make_trainer(mesh=Mesh(1, 2, CPU), **sections), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BOUNDS, "whole_bytes", 2**30)
        whole = make_trainer(**sections)
        expected = rolled_out(whole, 1).trajectory
        assert torch.equal(expected.latents, half.trajectory.latents)
        whole.iterate()
        whole.iterate()
        assert whole.conditioning._whole is not None
    assert same(snapshot(whole), snapshot(resumed))


def test_twenty_thousand_prompts_start_in_seconds_and_little_memory():
    """The trainer holds none of them encoded, and an iteration encodes what it draws."""
    script = (
        "import resource, sys, time\n"
        "from tests.latentac import trainers\n"
        "from latentac.worlds.prompts import Prompt\n"
        "trainers.make_trainer()\n"
        "few = trainers.prompts()\n"
        "many = tuple(Prompt(f'{p.text} {n}', p.category) for n in range(800) for p in few)[:20_000]\n"
        "trainers.prompts = lambda: many\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, started = peak(), time.process_time()\n"
        "trainer = trainers.make_trainer()\n"
        "seconds = time.process_time() - started\n"
        "trainer.iterate()\n"
        "print((peak() - before) / 1024, seconds)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    mebibytes, seconds = map(float, done.stdout.split())
    assert mebibytes < 150, f"{mebibytes:.0f} MiB"
    assert seconds < 5, f"{seconds:.1f} s"


def test_twenty_thousand_prompts_are_counted_in_seconds():
    """What `prepare` does with each of them."""
    texts = [f"{text} {number}" for number in range(20) for text in TEXTS][:20_000]
    started = time.process_time()
    counts = shipped(SHIPPED[0]).count_tokens(texts)
    assert len(counts) == 20_000
    assert time.process_time() - started < 10
