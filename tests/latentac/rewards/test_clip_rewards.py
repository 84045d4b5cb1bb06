"""The rewards that look through a CLIP, on miniatures in the published layout, against transformers' own classes.

Those whose weights are published as pickles are in test_converted_rewards.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from latentac.config.schema import Reward
from latentac.rewards import REWARDS
from latentac.rewards.clip_folder import Clip, locate
from latentac.rewards.configured import load_rewards
from latentac.runs import testing
from latentac.runs.preparation.prepare import fetch_rewards
from latentac.system.errors import ConfigError, RewardError
from tests.latentac import miniatures
from tests.latentac.hub import cached, serving

PROMPTS = ["a red circle", "three blue squares", "", "a green triangle above a red square " * 5, "a painting of Zürich"]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def copy(clip: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(clip, tmp_path / "copy"))


def by_hand(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's logits of each image for its own prompt, and its unit vectors of the images."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    pictures = [Image.fromarray(image) for image in IMAGES]
    inputs = processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True, truncation=True, max_length=16)
    with torch.no_grad():
        found = model(**inputs)
    return found.logits_per_image.diag(), found.image_embeds


def test_clip_score_is_the_librarys_cosine(clip: Path) -> None:
    """Times its scale. One prompt is longer than the text encoder reads, and one is empty."""
    model = CLIPModel.from_pretrained(clip)
    cosines = (by_hand(clip)[0] / model.logit_scale.exp()).detach().numpy()
    found = REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    assert found == pytest.approx(cosines, abs=1e-6)
    assert found.std() > 0.01
    scaled = REWARDS.build("clip_score", source=str(clip), scale=2.5)
    assert scaled(IMAGES, PROMPTS) == pytest.approx(2.5 * cosines, abs=1e-5)
    assert "2.5 times the cosine" in scaled.unit


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_convert_rgb": True},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2},
        {"size": 48, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1 / 128},
        {"do_resize": False, "do_normalize": False},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_images_are_prepared_as_the_folder_says(copy: Path, settings: dict[str, Any], nested: bool) -> None:
    """Bitwise what CLIPProcessor makes of them, in the older form of the file and in the newer ones."""
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    if nested:
        CLIPProcessor(CLIPImageProcessor.from_pretrained(copy), CLIPTokenizer.from_pretrained(copy)).save_pretrained(
            copy
        )
        file.unlink()
        assert "image_processor" in json.loads((copy / "processor_config.json").read_text())
        miniatures._older_form(copy)
    processor = CLIPProcessor.from_pretrained(copy)
    expected = processor(images=[Image.fromarray(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
    found = Clip(str(copy), locate(str(copy)), torch.float32).prepare(IMAGES)
    assert torch.equal(found, expected)
    assert found.shape == (5, 3, 32, 32)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_changes_nothing_but_rounding(clip: Path, batch_size: int) -> None:
    """Alone, in another order, and in parts."""
    expected = REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    reward = REWARDS.build("clip_score", source=str(clip), batch_size=batch_size)
    assert reward(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-6)
    order = [3, 1, 4, 0, 2]
    permuted = reward(IMAGES[order], [PROMPTS[place] for place in order])
    assert permuted == pytest.approx(expected[order], abs=1e-6)
    assert reward(IMAGES[:0], []).shape == (0,)


@pytest.mark.parametrize(("dtype", "tolerance"), [("auto", 1e-6), ("bfloat16", 0.03), ("float16", 1e-6)])
def test_a_lower_precision_is_close(clip: Path, dtype: str, tolerance: float) -> None:
    """bfloat16 by its rounding. `auto` and float16 are float32 on a CPU."""
    expected = REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    found = REWARDS.build("clip_score", source=str(clip), dtype=dtype, device="cpu")(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=tolerance)


def test_threads_share_one_clip(clip: Path) -> None:
    """Read once, and its tokenizer used by one at a time."""
    reward = REWARDS.build("clip_score", source=str(clip))
    with ThreadPoolExecutor(4) as threads:
        values = list(threads.map(lambda _: reward(IMAGES, PROMPTS), range(12)))
    assert all((each == values[0]).all() for each in values)


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Memory for `most` images at once; the sizes that were tried."""
    tried: list[int] = []
    forward = CLIPModel.get_image_features

    def bounded(self: Any, pixel_values: torch.Tensor, **more: Any) -> Any:
        tried.append(len(pixel_values))
        if len(pixel_values) > most:
            raise error
        return forward(self, pixel_values=pixel_values, **more)

    monkeypatch.setattr(CLIPModel, "get_image_features", bounded)
    return tried


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_that_does_not_fit_is_halved(clip: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It stays so, and the numbers are the same."""
    expected = REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    reward = REWARDS.build("clip_score", source=str(clip))
    tried = limited(monkeypatch, 2, error)
    assert reward(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-6)
    assert tried == [5, 3, 2, 2, 1]
    assert reward(IMAGES[:4], PROMPTS[:4]) == pytest.approx(expected[:4], abs=1e-6)
    assert tried[5:] == [2, 2]


def test_memory_for_no_image_is_one_error(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error of another kind is what it is."""
    limited(monkeypatch, 0, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(RewardError, match=r"memory: is too small for one image \(out of memory\)"):
        REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    limited(monkeypatch, 0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)


def test_it_keeps_the_contract_of_rewards(clip: Path) -> None:
    """The tests that every reward must pass."""
    testing.check_reward("clip_score", source=str(clip))


def test_pickscore_is_the_librarys_logit(clip: Path) -> None:
    """For the image's own prompt, divided by 26 as in Flow-GRPO, or by what the settings say."""
    logits = by_hand(clip)[0].numpy()
    assert REWARDS.build("pickscore", source=str(clip))(IMAGES, PROMPTS) == pytest.approx(logits / 26, abs=1e-5)
    published = REWARDS.build("pickscore", source=str(clip), divisor=1.0)
    assert published(IMAGES, PROMPTS) == pytest.approx(logits, abs=1e-4)
    assert "26" not in published.unit
    testing.check_reward("pickscore", source=str(clip))


# The aesthetic predictor

WIDTHS = (1024, 128, 64, 16, 1)


def published_head(width: int) -> torch.nn.Sequential:
    """As its authors wrote it, dropout included, with weights of its own."""
    torch.manual_seed(0)
    one, two, three, four, five = (
        torch.nn.Linear(inputs, outputs) for inputs, outputs in zip((width, *WIDTHS), WIDTHS, strict=False)
    )
    dropout = torch.nn.Dropout
    layers = torch.nn.Sequential(one, dropout(0.2), two, dropout(0.2), three, dropout(0.1), four, five)
    for layer in (one, two, three, four, five):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return layers.eval()


@pytest.fixture
def head(tmp_path: Path) -> Path:
    state = {f"layers.{name}": tensor for name, tensor in published_head(24).state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_aesthetic_is_the_published_head_on_unit_vectors(clip: Path, head: Path) -> None:
    """By hand: one matrix for all layers, as there are no activations. The prompts play no part."""
    vectors = by_hand(clip)[1]
    with torch.no_grad():
        expected = published_head(24)(vectors)[:, 0].numpy()
    reward = REWARDS.build("aesthetic", source=str(clip), head=str(head), batch_size=2)
    found = reward(IMAGES, PROMPTS)
    assert found == pytest.approx(expected, abs=1e-5)
    held = load_file(head)
    matrix, offset = torch.eye(24), torch.zeros(24)
    for name in (0, 2, 4, 6, 7):
        matrix = held[f"layers.{name}.weight"] @ matrix
        offset = held[f"layers.{name}.weight"] @ offset + held[f"layers.{name}.bias"]
    assert found == pytest.approx((vectors @ matrix.T + offset)[:, 0].numpy(), abs=1e-5)
    assert found.std() > 0.01
    assert (reward(IMAGES, ["another"] * 5) == found).all()
    testing.check_reward("aesthetic", source=str(clip), head=str(head))


def resaved(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Path]:
    def save(head: Path) -> Path:
        state = load_file(head)
        change(state)
        save_file(state, head)
        return head

    return save


def wider(head: Path) -> Path:
    save_file({f"layers.{name}": tensor for name, tensor in published_head(768).state_dict().items()}, head)
    return head


def truncated(head: Path) -> Path:
    head.write_bytes(head.read_bytes()[:-4])
    return head


HEADS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle": (
        lambda head: head.with_suffix(".pth"),
        "pickles can run code and are never loaded.*--kind aesthetic --from",
    ),
    "not there": (lambda head: head.with_name("none.safetensors"), "cannot be read"),
    "cut off": (truncated, "was cut off"),
    "wrong width": (wider, "takes vectors of 768 numbers, and the CLIP of `source` gives 24"),
    "other layers": (resaved(lambda held: held.pop("layers.6.bias")), "layers.6.bias is missing"),
    "empty": (lambda head: (save_file({}, head), head)[1], r"layers.0.weight is missing"),
    "flat": (resaved(lambda held: held.update({"layers.0.weight": torch.zeros(24)})), r"layers.0.weight is \[24\]"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_cannot_be_used_is_one_error(clip: Path, head: Path, name: str) -> None:
    """Found by `fetch`, with the command that converts a pickle."""
    spoil, words = HEADS[name]
    settings = {"use": "aesthetic", "source": str(clip), "head": str(spoil(head))}
    (reward,) = load_rewards([Reward.model_validate(settings)])
    with pytest.raises(ConfigError, match=words) as caught:
        fetch_rewards([reward])
    (problem,) = caught.value.problems
    assert problem.path == "rewards.aesthetic.head"
    assert problem.remedy
    with pytest.raises(RewardError, match=words):
        reward.reward(IMAGES, PROMPTS)


# Folders


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def changed(name: str, **fields: Any) -> Callable[[Path], None]:
    """fields: of the JSON file; those of a half are merged into it."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for field, value in fields.items():
            content[field] = {**content[field], **value} if isinstance(content.get(field), dict) else value
        (folder / name).write_text(json.dumps(content))

    return change


def half(folder: Path) -> None:
    CLIPTextModel(CLIPModel.from_pretrained(folder).config.text_config).save_pretrained(folder)


def lost(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def linked(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    file.rename(folder.parent / "elsewhere.json")
    file.symlink_to(folder.parent / "elsewhere.json")


def adapted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle only": (pickled, "CLIPModel: has no safetensors weights, but pytorch_model.bin: pickles can run code"),
    "no weights": (without("model.safetensors"), "CLIPModel: has no weights"),
    "cut off": (cut, "it was cut off"),
    "no configuration": (without("config.json"), "CLIPModel: has no config.json"),
    "no vocabulary": (without("vocab.json"), "CLIPTokenizer: has neither tokenizer.json nor vocab.json"),
    "no image settings": (without("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "half of one": (half, "config.json says CLIPTextModel, and only CLIPModel is supported"),
    "another class": (changed("config.json", architectures=["SiglipModel"]), "says SiglipModel, and only CLIPModel"),
    "other images": (changed("preprocessor_config.json", crop_size=24), "make 24 x 24 pixels, and .*image_size is 32"),
    "huge images": (changed("preprocessor_config.json", size=2**20), "size is 1048576, and must be a whole number"),
    "no resampler": (changed("preprocessor_config.json", resample="x"), "resample is x, and must be from 0 to 5"),
    "other processor": (
        changed("preprocessor_config.json", feature_extractor_type="ViTImageProcessor"),
        "says ViTImageProcessor, and only CLIPImageProcessor is supported",
    ),
    "small vocabulary": (changed("config.json", text_config={"vocab_size": 100}), "has a token .*vocab_size is 100"),
    "deeper": (changed("config.json", text_config={"num_hidden_layers": 3}), "lacks text_model|asks for .* numbers"),
    "lost weight": (lost, "lacks visual_projection.weight"),
    "link": (linked, "preprocessor_config.json: is a link that leads out of the folder"),
    "adapter": (
        adapted,
        "adapter_config.json: is an adapter of peft",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_used_is_one_error(copy: Path, name: str) -> None:
    """Of `fetch` or, where only the tensors show it, of the first call: the folder, what is wrong, a remedy."""
    spoil, words = BROKEN[name]
    spoil(copy)
    (reward,) = load_rewards([Reward.model_validate({"use": "clip_score", "source": str(copy), "name": "mine"})])
    if name in {"deeper", "lost weight"}:
        with pytest.raises(RewardError, match=words) as raised:
            reward.reward(IMAGES, PROMPTS)
        assert str(copy) in str(raised.value)
        return
    with pytest.raises(ConfigError, match=words) as caught:
        fetch_rewards([reward])
    (problem,) = caught.value.problems
    assert problem.path == "rewards.mine.source"
    assert problem.value == str(copy)
    assert problem.remedy
    with pytest.raises(RewardError, match=words):
        reward.reward(IMAGES, PROMPTS)


def test_code_that_a_folder_names_is_never_looked_at(copy: Path, clip: Path) -> None:
    """`auto_map` and its like are dropped before the library reads the folder."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        changed(name, auto_map={"AutoModel": "run.Me"}, _name_or_path="elsewhere/model")(copy)
    (copy / "run.py").write_text("raise SystemExit('ran')")
    expected = REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    assert (REWARDS.build("clip_score", source=str(copy))(IMAGES, PROMPTS) == expected).all()


def test_all_problems_of_all_rewards_are_reported_together(tmp_path: Path) -> None:
    """A folder that is not there, and a revision of one that has none."""
    (tmp_path / "empty").mkdir()
    given = [
        {"use": "clip_score", "source": str(tmp_path / "none")},
        {"use": "clip_score", "name": "other", "source": str(tmp_path / "empty"), "revision": "v1.0"},
    ]
    with pytest.raises(ConfigError) as caught:
        fetch_rewards(load_rewards([Reward.model_validate(one) for one in given]))
    first, second = caught.value.problems
    assert (first.path, first.problem) == ("rewards.clip_score.source", "is not a folder here")
    assert second.path == "rewards.other.revision"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_hub_id_works_from_the_offline_cache(clip: Path, cache: Path) -> None:
    """In the true layout, whose files are links to blobs. One that is not there is elsewhere, and one error."""
    cached(cache, "someone/a-clip", clip)
    reward = REWARDS.build("clip_score", source="someone/a-clip")
    reward.fetch()
    assert not reward.elsewhere
    expected = REWARDS.build("clip_score", source=str(clip))(IMAGES, PROMPTS)
    assert (reward(IMAGES, PROMPTS) == expected).all()
    absent = REWARDS.build("clip_score", source="someone/another")
    assert absent.elsewhere
    with pytest.raises(ConfigError, match="could not be had from the hub"):
        absent.fetch()


FETCH = """
import sys
from latentac.rewards import REWARDS
from latentac.system.errors import ConfigError
for name in sys.argv[1:]:
    try:
        REWARDS.build("clip_score", source=name).fetch()
    except ConfigError as error:
        print(error)
"""


@pytest.mark.timeout(400)
def test_only_the_files_that_are_used_are_downloaded(copy: Path, tmp_path: Path) -> None:
    """By the hub's own client from a hub on loopback. Of a repository of pickles only descriptions are."""
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "onnx/model.onnx"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"x" * 1000)
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def fetch(home: str, url: str) -> str:
        asked = [sys.executable, "-W", "ignore", "-c", FETCH, "someone/a-clip"]
        settings = {**environment, "HF_HOME": str(tmp_path / home), "HF_ENDPOINT": url}
        return subprocess.run(asked, env=settings, capture_output=True, text=True, check=True).stdout

    small = {"config.json", "merges.txt", "preprocessor_config.json", "special_tokens_map.json", "vocab.json"}
    small |= {"tokenizer_config.json"}
    with serving("someone/a-clip", copy) as hub:
        assert fetch("one", hub.url) == ""
        assert sorted(hub.fetched) == sorted({*small, "model.safetensors"})
        (copy / "model.safetensors").unlink()
        hub.fetched.clear()
        assert "has no safetensors weights: pickles can run code and are never loaded" in fetch("two", hub.url)
        assert "pytorch_model.bin" not in hub.fetched
