"""What all rewards with a network share, on a network of three lines; the real ones have tests beside this one."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from latentac.rewards import REWARDS
from latentac.rewards.checkpoints import make
from latentac.rewards.learned import LearnedReward, LearnedSettings
from latentac.system.errors import ConfigError, RewardError
from tests.latentac import miniatures
from tests.latentac.hub import cached
from tests.latentac.rewards import published

IMAGES = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


class Means:
    """The mean of each image, on a device whose memory holds `room` images. No GPU is here: it says that it is one."""

    def __init__(self, room: int) -> None:
        self.room, self.place, self.dtype, self.tried = room, torch.device("cuda"), torch.float32, list[int]()

    @property
    def device(self) -> torch.device:
        return self.place

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.tried:  # not at first, when a machine without a GPU would have it on the CPU
            self.place, self.dtype, self.room = device, dtype, 2

    def means(self, images: np.ndarray) -> torch.Tensor:
        self.tried.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(images.mean((1, 2, 3)))


class Mean(LearnedReward):
    def __init__(self, network: Means, **own: Any) -> None:
        super().__init__(LearnedSettings(source="there", **own))
        self.network = network

    def locate(self) -> Path:
        return Path("there")

    def read(self, folder: Path, dtype: torch.dtype) -> Means:
        assert folder == Path("there")
        return self.network

    def score(
        self, network: Means, images: np.ndarray, prompts: Sequence[str], offsets: Sequence[float] = ()
    ) -> torch.Tensor:
        assert len(images) == len(prompts)
        return network.means(images) + (torch.tensor(offsets) if offsets else 0)


def test_where_no_image_fits_into_the_gpu_the_cpu_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    """With the batch of the settings, which is halved again there. The numbers are the same."""
    reward = Mean(network := Means(room=0), batch_size=4)
    with caplog.at_level(logging.WARNING):
        found = reward(IMAGES, ["a"] * 5)
    assert found == pytest.approx(IMAGES.mean((1, 2, 3)))
    assert found.dtype == np.float32
    assert network.tried == [4, 2, 1, 4, 2, 2, 1]
    assert network.device.type == "cpu"
    assert "the GPU's memory is too small for there: the CPU takes over" in caplog.text
    network.room = 0
    with pytest.raises(RewardError, match="memory: is too small for one image"):
        reward(IMAGES, ["a"] * 5)


def test_values_beside_the_images_are_cut_with_them() -> None:
    """One per image, whatever the batch."""
    offsets = [0.0, 10.0, 20.0, 30.0, 40.0]
    found = Mean(Means(room=2), batch_size=3).scored(IMAGES, ["a"] * 5, {"offsets": offsets})
    assert found == pytest.approx(IMAGES.mean((1, 2, 3)) + offsets)


def test_no_images_have_no_rewards() -> None:
    assert Mean(Means(room=2))(IMAGES[:0], []).shape == (0,)


def _hpsv2(folder: Path) -> Path:
    return miniatures.clip(folder)


def _image_reward(folder: Path) -> Path:
    file = published.pickled(published.image_reward(), folder.with_name("ImageReward.pt"))
    make("image_reward", file, folder, published.bert(folder.with_name("bert")))
    return folder


MADE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "hpsv2": (_hpsv2, "vocab.json", "has neither tokenizer.json nor vocab.json"),
    "image_reward": (_image_reward, "vocab.txt", "has no vocab.txt"),
    "vqa": (miniatures.llava, "tokenizer.json", "has none of tokenizer.json"),
    "geneval": (miniatures.mask2former, "preprocessor_config.json", "preprocessor_config.json is missing"),
}


@pytest.mark.parametrize("use", MADE)
def test_without_a_network_each_missing_file_is_named(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `fetch`, of a hub id in the offline cache: what is not there at all, weights, and what stands beside them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    build, beside, words = MADE[use]
    folder = build(tmp_path / "made")
    more = {"clip_source": str(miniatures.clip(tmp_path / "clip"))} if use == "geneval" else {}

    def fetched(name: str, without: str = "") -> LearnedReward:
        if name != "someone/absent":
            part = Path(shutil.copytree(folder, tmp_path / name.partition("/")[2]))
            if without:
                (part / without).unlink()
            cached(tmp_path / "cache", name, part)
        reward: LearnedReward = REWARDS.build(use, source=name, **more)
        reward.fetch()
        return reward

    assert not fetched("someone/whole").elsewhere
    assert REWARDS.build(use, source="someone/absent", **more).elsewhere
    with pytest.raises(ConfigError, match=r"could not be had from the hub.*HF_HUB_OFFLINE is set"):
        fetched("someone/absent")
    with pytest.raises(ConfigError, match="has no weights"):
        fetched("someone/no-weights", "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        fetched("someone/a-part", beside)
