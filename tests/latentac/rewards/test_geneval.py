"""GenEval with miniatures of its two networks in their published layouts, through the prompt file's metadata."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerForUniversalSegmentation

from latentac.config.schema import Reward
from latentac.rewards.clip_folder import Clip
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.rewards.detector_folder import Detector, box_of
from latentac.rewards.geneval_network import GenevalNetwork, cut_out
from latentac.rewards.geneval_tasks import COLOURS, Detection
from latentac.runs.preparation.prepare import fetch_rewards
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.promptfiles import read_file
from latentac.worlds.prompts import Prompt
from tests.latentac import miniatures
from tests.latentac.rewards.test_clip_rewards import changed, cut, pickled, without

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
LOW = 0.02


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The detector and the CLIP."""
    root = tmp_path_factory.mktemp("geneval")
    return miniatures.mask2former(root / "detector"), miniatures.clip(root / "clip")


def single(kind: str) -> Prompt:
    return Prompt(f"a photo of a {kind}", metadata={"tag": "single_object", "include": [{"class": kind, "count": 1}]})


def configured(places: tuple[Path, Path], **own: Any) -> ConfiguredReward:
    given = {"use": "geneval", "source": str(places[0]), "clip_source": str(places[1]), **own}
    (reward,) = load_rewards([Reward.model_validate(given)])
    return reward


def test_the_detector_is_the_librarys(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Scores, classes and masks of its own post-processing, which works at 384 pixels."""
    folder = Path(shutil.copytree(places[0], tmp_path / "detector"))
    changed("preprocessor_config.json", do_resize=False)(folder)
    images = np.random.default_rng(1).integers(0, 256, (2, 384, 384, 3), dtype=np.uint8)
    detector = Detector("", folder, torch.float32)
    with torch.no_grad():
        found = detector.find(images, 0.0)
        given = detector._processor(list(images), return_tensors="pt", input_data_format="channels_last")
        outputs = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()(**given)
    for own, library in zip(
        found, detector._processor.post_process_instance_segmentation(outputs, threshold=0.0), strict=True
    ):
        expected = {(detector.labels[one["label_id"]], round(one["score"], 4)) for one in library["segments_info"]}
        assert expected
        assert expected <= {(name, round(one.score, 4)) for name, one in own}
    assert all(one.mask is not None and one.mask.shape == (384, 384) for own in found for _, one in own)


def test_the_reward_is_1_where_the_detector_finds_what_is_asked_for(places: tuple[Path, Path]) -> None:
    """And 0 elsewhere: for each class and each image, with thresholds that some of them reach."""
    detector = Detector("", places[0], torch.float32)
    with torch.no_grad():
        best = [
            {name: max((one.score for kind, one in found if kind == name), default=0.0) for name in detector.labels}
            for found in detector.find(IMAGES, 0.0)
        ]
    threshold = float(np.median([score for each in best for score in each.values()]))
    reward = configured(places, threshold=threshold)
    values = {name: reward(IMAGES, [single(name)] * 4) for name in detector.labels}
    assert values == {name: pytest.approx([float(each[name] > threshold) for each in best]) for name in detector.labels}
    assert {0.0, 1.0} == {float(value) for each in values.values() for value in each}
    assert "0 or 1 per image" in reward.unit


def test_the_batch_and_the_order_change_nothing(places: tuple[Path, Path]) -> None:
    """Alone, reversed, and in parts."""
    prompts = [single(name) for name in ("dog", "tv", "person", "dog")]
    expected = configured(places, threshold=LOW)(IMAGES, prompts)
    reward = configured(places, threshold=LOW, batch_size=1)
    assert (reward(IMAGES, prompts) == expected).all()
    assert (reward(IMAGES[::-1], prompts[::-1]) == expected[::-1]).all()


def test_colours_are_those_that_clip_finds_nearest(places: tuple[Path, Path]) -> None:
    """By hand: unit vectors of three descriptions a colour, their mean, and the object alone on grey."""
    clip = Clip("", places[1], torch.float32)
    network = GenevalNetwork(Detector("", places[0], torch.float32), clip)
    mask = np.zeros((48, 64), bool)
    mask[8:24, 16:40] = True
    mask[8, 16] = False
    one = Detection(box_of(mask), 0.9, mask)
    assert list(one.box) == [16, 8, 40, 24]
    shown = cut_out(IMAGES[0], one)
    assert shown.shape == (16, 24, 3)
    assert shown[0, 0].tolist() == [153, 153, 153]
    assert (shown[1:] == IMAGES[0, 9:24, 16:40]).all()
    with torch.no_grad():
        vector, nearest = clip.image_vectors(clip.prepare(shown[None]))[0], []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            mean = clip.text_vectors(clip.tokenize(texts)).mean(0)
            nearest.append(float(vector @ mean / mean.norm()))
        assert network.colours(IMAGES[0], "dog", [one, one]) == [COLOURS[int(np.argmax(nearest))]] * 2


def test_a_colour_is_asked_of_clip_through_the_whole_reward(places: tuple[Path, Path]) -> None:
    """One colour of ten is right for what was found."""
    prompts = [
        Prompt(
            f"a photo of a {colour} dog",
            metadata={"tag": "colors", "include": [{"class": "dog", "count": 1, "color": colour}]},
        )
        for colour in COLOURS
    ]
    reward = configured(places, threshold=0.0)
    assert reward(IMAGES[:1].repeat(len(COLOURS), 0), prompts).sum() == 1


def test_the_prompt_file_of_geneval_gives_the_metadata(places: tuple[Path, Path], tmp_path: Path) -> None:
    """As it is published: tag, include and exclude beside each text."""
    lines = [
        {"tag": "single_object", "include": [{"class": "tv", "count": 1}], "prompt": "a photo of a tv"},
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "tv", "count": 1, "position": ["left of", 0]}],
            "prompt": "a photo of a tv left of a dog",
        },
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (rows,), flaws = read_file(tmp_path / "prompts.jsonl")[0].values(), read_file(tmp_path / "prompts.jsonl")[1]
    assert not flaws
    prompts = [Prompt(row.text, row.category, row.metadata) for row in rows]
    assert configured(places, threshold=0.0)(IMAGES[:2], prompts)[0] == 1


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("a dog"), "prompt 'a dog'.*its metadata are no task: include is empty or missing"),
        (single("zebra"), "prompt 'a photo of a zebra'.*'zebra' is no class of the detector"),
    ],
)
def test_a_prompt_that_can_have_no_reward_is_one_error(places: tuple[Path, Path], prompt: Prompt, words: str) -> None:
    """With its text, as its reward would be 0 whatever the image shows."""
    with pytest.raises(RewardError, match=words):
        configured(places)(IMAGES[:1], [prompt])


def test_it_notices_that_every_reward_will_be_0(places: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """An error where nothing was found at all, a warning where only other things were, and silence after a 1."""
    blind = configured(places, threshold=1.0, self_test_images=6)
    assert blind(IMAGES, [single("dog")] * 4).sum() == 0
    with pytest.raises(RewardError, match="found nothing in 6 images, so every reward is 0"):
        blind(IMAGES, [single("dog")] * 4)
    off = configured(places, threshold=1.0, self_test_images=0)
    assert off(IMAGES.repeat(3, 0), [single("dog")] * 12).sum() == 0
    many = Prompt("many dogs", metadata={"tag": "single_object", "include": [{"class": "dog", "count": 16}]})
    with caplog.at_level(logging.WARNING):
        assert configured(places, threshold=LOW, self_test_images=4)(IMAGES, [many] * 4).sum() == 0
    assert "all of the first 4 rewards of geneval are 0; found were" in caplog.text
    caplog.clear()
    assert configured(places, threshold=0.0, self_test_images=4)(IMAGES, [single("dog")] * 4).sum() == 4
    assert "rewards of geneval" not in caplog.text


def test_memory_that_is_too_small_halves_the_batch(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is one error."""
    prompts = [single("dog")] * 4
    expected = configured(places, threshold=LOW)(IMAGES, prompts)
    forward, tried, most = Mask2FormerForUniversalSegmentation.forward, list[int](), [1]

    def bounded(self: Any, pixel_values: torch.Tensor, **more: Any) -> Any:
        tried.append(len(pixel_values))
        if tried[-1] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, pixel_values=pixel_values, **more)

    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "forward", bounded)
    reward = configured(places, threshold=LOW)
    assert (reward(IMAGES, prompts) == expected).all()
    assert tried == [4, 2, 1, 1, 1, 1]
    most[0] = 0
    with pytest.raises(RewardError, match="memory: is too small for one image"):
        reward(IMAGES, prompts)


def test_bfloat16_runs(places: tuple[Path, Path]) -> None:
    """Scores differ by rounding, so only the values are looked at."""
    assert set(configured(places, dtype="bfloat16", device="cpu", threshold=LOW)(IMAGES, [single("dog")] * 4)) <= {0, 1}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle only": (pickled, "has no safetensors weights, but pytorch_model.bin: pickles can run code"),
    "no weights": (without("model.safetensors"), "has no weights"),
    "cut off": (cut, "it was cut off"),
    "garbage": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "is not a safetensors file"),
    "no image settings": (without("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "wrong image settings": (
        changed("preprocessor_config.json", image_mean="x"),
        "preprocessor_config.json: cannot be",
    ),
    "another class": (changed("config.json", architectures=["DetrForObjectDetection"]), "says DetrForObjectDetection"),
    "no names": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "id2label": {"0": "LABEL_0"}})
        ),
        "no names for its classes, so every reward would be 0",
    ),
    "no classes": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "id2label": None})
        ),
        "id2label does not name the classes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_used_is_one_error(places: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """Of `fetch`, under the setting `source`."""
    spoil, words = BROKEN[name]
    folder = Path(shutil.copytree(places[0], tmp_path / "copy"))
    spoil(folder)
    reward = configured((folder, places[1]), name="mine")
    with pytest.raises(ConfigError, match=words) as caught:
        fetch_rewards([reward])
    assert caught.value.problems[0].path == "rewards.mine.source"
    assert caught.value.problems[0].remedy


def test_what_is_wrong_with_the_clip_has_its_own_setting(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where a folder has no revision."""
    folder = Path(shutil.copytree(places[1], tmp_path / "clip"))
    without("vocab.json")(folder)
    with pytest.raises(ConfigError, match=r"has neither tokenizer\.json nor vocab\.json") as caught:
        fetch_rewards([configured((places[0], folder))])
    assert caught.value.problems[0].path == "rewards.geneval.clip_source"
    with pytest.raises(ConfigError) as caught:
        fetch_rewards([configured(places, clip_revision="v1")])
    assert caught.value.problems[0].path == "rewards.geneval.clip_revision"
    assert configured((places[0], Path("someone/a-clip")), clip_source="someone/a-clip").elsewhere
    assert not configured(places).elsewhere


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "found nothing in 4 images"), (None, "lacks class_pred")])
def test_weights_that_do_not_fit_are_an_error(
    places: tuple[Path, Path], tmp_path: Path, factor: float | None, words: str
) -> None:
    """A detector that gives NaN finds nothing, which the test of itself tells."""
    folder = Path(shutil.copytree(places[0], tmp_path / "copy"))
    held = load_file(folder / "model.safetensors")
    values = held.pop("class_predictor.weight")
    changed_one = {} if factor is None else {"class_predictor.weight": values * factor}
    save_file(held | changed_one, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=words):
        configured((folder, places[1]), self_test_images=4)(IMAGES, [single("dog")] * 4)
