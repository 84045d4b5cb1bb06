"""The reward `ocr`: both engines on drawn words, how readings are compared, threads, and what is missing."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from latentac.config.schema import Reward
from latentac.rewards import REWARDS
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.rewards.ocr import closeness, normalised, quoted
from latentac.runs import testing
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.prompts import Prompt
from tests.latentac.rewards.alone import OFFLINE, alone

PACKAGE = Path(str(importlib.util.find_spec("rapidocr").origin)).parent  # type: ignore[union-attr]
ENGINES = ("tesseract", "rapidocr")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
WORDS = ("lamp", "garden", "fig", "zebra", "tree", "boat")
PROMPTS = [f'the word "{word}" on a wall' for word in WORDS]


def drawn(text: str, font: str = "DejaVuSans.ttf", size: tuple[int, int] = (96, 32)) -> np.ndarray:
    """uint8 [H, W, 3]: dark blue on a light ground."""
    image = Image.new("RGB", size, (235, 230, 220))
    letters = ImageFont.truetype(FONTS / font, size[1] * 2 // 3)
    ImageDraw.Draw(image).text((size[0] / 2, size[1] / 2), text, (20, 20, 90), letters, anchor="mm")
    return np.asarray(image)


IMAGES = np.stack([drawn(word) for word in WORDS])


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def configured(**own: object) -> ConfiguredReward:
    (reward,) = load_rewards([Reward.model_validate({"use": "ocr", **own})])
    return reward


@pytest.mark.parametrize("font", ["DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"])
def test_a_drawn_word_is_read(engine: str, font: str) -> None:
    """Each word has 1 for its own prompt, at 32 x 96 pixels, and less for another's."""
    images = np.stack([drawn(word, font) for word in WORDS])
    reward = REWARDS.build("ocr", engine=engine, layout="line")
    scores = reward(images, PROMPTS)
    assert scores.dtype == np.float32
    assert scores.tolist() == [1.0] * len(WORDS)
    assert (reward(images, PROMPTS[1:] + PROMPTS[:1]) < 0.7).all()


@pytest.mark.parametrize("layout", ["page", "block", "line", "word", "sparse"])
def test_known_images_have_their_rewards_in_each_layout(engine: str, layout: str) -> None:
    """And enlarged or not; `prepare` asks for them."""
    for enlarge in (0, 96):
        reward = REWARDS.build("ocr", engine=engine, layout=layout, enlarge=enlarge)
        images, prompts, expected = reward.known()
        assert reward(images, prompts) == pytest.approx(expected)


def test_it_keeps_the_contract_of_rewards(engine: str) -> None:
    """The same at every call, whatever else is in the batch; and it has a unit."""
    assert testing.check_reward("ocr", images=IMAGES, prompts=PROMPTS, engine=engine).unit.endswith("0 to 1")
    assert REWARDS.build("ocr", engine=engine)(IMAGES[:0], []).shape == (0,)


def test_a_reading_does_not_depend_on_what_was_read_before(engine: str) -> None:
    """Scores of hard images, in another order and by a new engine, are the same."""
    noise = np.random.default_rng(0).integers(-70, 70, IMAGES.shape)
    hard = (IMAGES.astype(int) + noise).clip(0, 255).astype(np.uint8)
    reward = REWARDS.build("ocr", engine=engine, layout="line", engines=1)
    first = reward(hard, PROMPTS)
    assert (reward(hard[::-1], PROMPTS[::-1])[::-1] == first).all()
    assert (REWARDS.build("ocr", engine=engine, layout="line", engines=1)(hard, PROMPTS) == first).all()


def test_calls_from_several_threads_share_the_engines(engine: str) -> None:
    """Six calls at once with two engines give what one call gives."""
    reward = REWARDS.build("ocr", engine=engine, layout="line", engines=2)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: reward(IMAGES, PROMPTS).tolist(), range(6)))
    assert found == [[1.0] * len(WORDS)] * 6


def test_several_lines_are_one_text(engine: str) -> None:
    """All quoted texts of the prompt, without the white space between them."""
    image = Image.new("RGB", (320, 160), "white")
    letters = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 48)
    for line, text in enumerate(("OPEN", "LATE")):
        ImageDraw.Draw(image).text((160, 45 + 70 * line), text, "black", letters, anchor="mm")
    reward = REWARDS.build("ocr", engine=engine, layout="block")
    prompts = ['a sign "open" above "late"', 'a sign "Open Late"', 'a sign "open"']
    assert reward(np.stack([np.asarray(image)] * 3), prompts).tolist() == [1.0, 1.0, 0.0]
    free = REWARDS.build("ocr", engine=engine, layout="block", contained=True)
    assert free(np.asarray(image)[None], prompts[2:]).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (8, 8), (64, 64), (10, 4000)])
def test_an_image_without_text_has_nothing(engine: str, shape: tuple[int, int]) -> None:
    """Also one that is no place for text, enlarged or not."""
    for enlarge in (0, 32, 64):
        reward = REWARDS.build("ocr", engine=engine, enlarge=enlarge)
        assert reward(np.full((1, *shape, 3), 128, np.uint8), ['"lamp"']).tolist() == [0.0]


def test_a_word_in_a_long_strip_is_read(engine: str) -> None:
    """At 40 x 1600 pixels."""
    strip = drawn("lantern", size=(1600, 40))[None]
    assert REWARDS.build("ocr", engine=engine, layout="sparse")(strip, ['"lantern"']).tolist() == [1.0]


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("lamp", "lamp", 1.0),
        ("", "lamp", 0.0),
        ("lamb", "lamp", 0.75),
        ("amp", "lamp", 0.75),
        ("clamp", "lamp", 0.75),
        ("lampe!", "lamp", 0.5),
        ("pmal", "lamp", 0.0),
        ("lamplamp", "lamp", 0.0),
        ("x" * 100_000, "lamp", 0.0),
        ("kitten", "sitting", 1 - 3 / 7),
        ("saturday", "sunday", 0.5),
    ],
)
def test_a_reading_is_compared_by_edit_distance(read: str, wanted: str, score: float) -> None:
    """In characters of the wanted text, and at least 0."""
    assert closeness(read, wanted) == pytest.approx(score)


def test_flow_grpo_lets_other_text_stand() -> None:
    """Its rule is a setting: a reading that contains the text has 1."""
    assert closeness("thelampisred", "lamp", contained=True) == 1.0
    assert closeness("thelumpisred", "lamp", contained=True) == 0.0


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('the word "Lamp" in red', "lamp"),
        ('"New York" in lights', "newyork"),
        ("the word “lamp”", "lamp"),
        ('"open" and "\tclosed\n"', "openclosed"),
        ('a "STRASSE" or "Straße"', "strassestrasse"),
        ('"ＡＢＣ１"', "abc1"),
        ('it\'s "ice" 5" wide', "ice"),
    ],
)
def test_the_text_is_what_stands_between_double_quotes(prompt: str, text: str) -> None:
    """Normalised as what is read."""
    assert quoted(prompt) == text
    assert normalised(text) == text


@pytest.mark.parametrize("prompt", ["a red lamp", "the word 'lamp'", 'the word "lamp', '""', '" \n"', ""])
def test_a_prompt_without_quoted_text_is_named(prompt: str) -> None:
    """With the remedy; the engine is not asked."""
    with pytest.raises(RewardError, match="has no text between double quotes") as caught:
        configured()(IMAGES[:1], asked([prompt]))
    assert repr(prompt) in str(caught.value)
    assert 'the word "lamp"' in caught.value.remedy


def asked(texts: list[str]) -> list[Prompt]:
    return [Prompt(text, "all") for text in texts]


def test_no_engine_uses_the_network(engine: str, tmp_path: Path) -> None:
    """Neither asks for an address, RapidOCR changes nothing in its package, and onnxruntime, whose telemetry is not in
    Python's sight, leaves no identifier at home."""
    models = PACKAGE / "models"
    before = {path.name: path.stat().st_mtime_ns for path in models.iterdir()}
    script = (
        f"{OFFLINE}"
        "from latentac.rewards import REWARDS\n"
        f"reward = REWARDS.build('ocr', engine={engine!r})\n"
        "reward.fetch()\n"
        "images, prompts, _ = reward.known()\n"
        "print(reward(images, prompts).tolist())\n"
    )
    assert alone(script, HOME=str(tmp_path)).strip() == "[1.0, 0.75, 0.0, 0.0]"
    assert {path.name: path.stat().st_mtime_ns for path in models.iterdir()} == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("own", "absent"),
    [({}, "tesserocr"), ({"engine": "rapidocr"}, "rapidocr"), ({"engine": "rapidocr"}, "onnxruntime")],
)
def test_a_missing_engine_is_told_with_its_remedy(own: dict[str, str], absent: str) -> None:
    """`fetch` names it as a problem of the configuration; a step that has no `fetch` as a failure of the reward."""
    script = (
        f"import sys\nsys.modules[{absent!r}] = None\n"
        "from latentac.config.schema import Reward\n"
        "from latentac.rewards.configured import load_rewards\n"
        "from latentac.system.errors import LatentacError\n"
        "from latentac.worlds.prompts import Prompt\n"
        f"(reward,) = load_rewards([Reward.model_validate({{'use': 'ocr', **{own!r}}})])\n"
        "images, texts, _ = reward.known()\n"
        "for work in (reward.fetch, lambda: reward(images, [Prompt(text, 'all') for text in texts])):\n"
        "    try:\n        work()\n"
        "    except LatentacError as error:\n        print(type(error).__name__, error)\n"
    )
    told = alone(script).splitlines()
    assert [line.partition(" ")[0] for line in told] == ["ConfigError", "RewardError"]
    for line in told:
        assert "cannot be loaded" in line
        assert absent in line
        assert "pip install 'latentac[ocr]'" in line
    assert told[0].startswith("ConfigError rewards.ocr.engine = ")


def test_missing_language_data_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place is named, and Debian's package; also where a file is damaged."""
    with pytest.raises(ConfigError, match=r"no data of tesseract for 'tlh\+chi_sim'") as caught:
        configured(language="tlh+chi_sim").fetch()
    assert "apt-get install tesseract-ocr-tlh tesseract-ocr-chi-sim" in str(caught.value)
    with pytest.raises(ConfigError, match=f"for 'eng' in {tmp_path}") as caught:
        configured(language_data=str(tmp_path)).fetch()
    assert "tesseract-ocr-eng" in str(caught.value)
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    with pytest.raises(ConfigError, match=f"for 'eng' in {tmp_path}"):
        configured().fetch()
    (tmp_path / "eng.traineddata").write_bytes(b"no data")
    with pytest.raises(ConfigError, match="tesseract cannot use the data of 'eng'"):
        configured().fetch()
    with pytest.raises(RewardError, match="tesseract cannot use the data of 'eng'"):
        configured()(IMAGES[:1], asked(PROMPTS[:1]))


def test_weights_that_are_not_in_the_package_are_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RapidOCR would; here it is an error that names the file."""
    configured(engine="rapidocr").fetch()
    import rapidocr

    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match=r"has no weights .*models/\*_det_\*.onnx") as caught:
        configured(engine="rapidocr").fetch()
    assert "pip install 'latentac[ocr]'" in str(caught.value)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x_det_y.onnx").write_bytes(b"no weights")
    (tmp_path / "models" / "x_rec_y.onnx").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        configured(engine="rapidocr").fetch()


@pytest.mark.parametrize(
    "own", [{"language": "../eng"}, {"language": ""}, {"engine": "abbyy"}, {"engines": 0}, {"enlarge": 100_000}]
)
def test_settings_have_bounds(own: dict[str, object]) -> None:
    """A language is a name, not a path."""
    with pytest.raises(ConfigError, match=rf"rewards\.0\.{next(iter(own))}"):
        configured(**own)
