"""The reward `nsfw`: NudeNet's network on a photograph and on made images, its settings, and what is missing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from latentac.config.schema import Gate, Reward
from latentac.rewards import REWARDS
from latentac.rewards.configured import load_rewards
from latentac.rewards.nsfw import EXPLICIT, LABELS
from latentac.runs import testing
from latentac.runs.release.gate import decide
from latentac.system.errors import ConfigError
from latentac.worlds.shapes.captions import parse_caption
from latentac.worlds.shapes.scenes import sample_images
from tests.latentac.rewards.alone import OFFLINE, alone
from tests.latentac.test_gate import ALONE, NOTHING

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"  # public domain
FACES = {"classes": ["FACE_FEMALE", "FACE_MALE"]}


def portrait() -> np.ndarray:
    """uint8 [1, 512, 512, 3]: a woman in uniform."""
    return np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))[None, :512, :512]


def test_images_without_nudity_have_one() -> None:
    """Shapes, noise, and a dressed person; a class that the person does show costs."""
    reward = REWARDS.build("nsfw")
    shapes = sample_images([parse_caption(prompt) for prompt in testing.PROMPTS], np.random.default_rng(0))
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    for images in (shapes, noise, portrait()):
        found = reward(images, [""] * len(images))
        assert found.dtype == np.float32
        assert found.tolist() == [1.0] * len(images)
    (face,) = REWARDS.build("nsfw", **FACES)(portrait(), [""])
    assert 0.1 < face < 0.6
    assert reward(portrait()[:0], []).shape == (0,)


def test_the_score_is_that_of_the_package_for_a_file() -> None:
    """NudeNet reads a file blue first; so does the reward with an array."""
    from nudenet import NudeDetector

    (found,) = NudeDetector().detect(str(PHOTOGRAPH))
    (score,) = REWARDS.build("nsfw", **FACES)(np.asarray(Image.open(PHOTOGRAPH))[None], [""])
    assert found["class"] in FACES["classes"]
    assert score == pytest.approx(1 - found["score"], abs=0.02)  # OpenCV and Pillow decode a JPEG each in its way


def test_its_classes_are_those_of_the_package() -> None:
    """And the default is a part of them."""
    from nudenet import nudenet

    assert set(vars(nudenet)["__labels"]) == LABELS
    assert set(EXPLICIT) < LABELS
    for wrong in (["FACE"], [], "FACE_MALE"):
        with pytest.raises(ConfigError, match=r"rewards\.0\.classes"):
            load_rewards([Reward.model_validate({"use": "nsfw", "classes": wrong})])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_keeps_the_contract_of_rewards(batch_size: int) -> None:
    """In batches of any size, and from several threads at once."""
    images = np.concatenate([portrait(), portrait()[:, :, ::-1], np.zeros_like(portrait()), 255 - portrait()])
    reward = testing.check_reward("nsfw", images=images, batch_size=batch_size, **FACES)
    assert "0 to 0.75" in reward.unit
    own = REWARDS.build("nsfw", batch_size=batch_size, **FACES)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: own(images, [""] * 4).tolist(), range(4)))
    assert found == [found[0]] * 4
    assert len(set(found[0])) > 1


def test_the_network_is_not_asked(tmp_path: Path) -> None:
    """Nor does onnxruntime leave an identifier at home."""
    script = (
        f"{OFFLINE}"
        "import numpy as np\n"
        "from latentac.rewards import REWARDS\n"
        "reward = REWARDS.build('nsfw')\n"
        "reward.fetch()\n"
        "print(reward(np.zeros((1, 64, 64, 3), np.uint8), ['']).tolist())\n"
    )
    assert alone(script, HOME=str(tmp_path)).strip() == "[1.0]"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("absent", ["nudenet", "onnxruntime", "cv2"])
def test_a_missing_package_is_told_with_its_remedy(absent: str) -> None:
    """By `fetch`, and by a step that has no `fetch`."""
    script = (
        f"import sys\nsys.modules[{absent!r}] = None\n"
        "import numpy as np\n"
        "from latentac.config.schema import Reward\n"
        "from latentac.rewards.configured import load_rewards\n"
        "from latentac.system.errors import LatentacError\n"
        "from latentac.worlds.prompts import Prompt\n"
        "(reward,) = load_rewards([Reward.model_validate({'use': 'nsfw'})])\n"
        "image = np.zeros((1, 64, 64, 3), np.uint8)\n"
        "for work in (reward.fetch, lambda: reward(image, [Prompt('a', 'all')])):\n"
        "    try:\n        work()\n"
        "    except LatentacError as error:\n        print(type(error).__name__, error)\n"
    )
    told = alone(script).splitlines()
    assert [line.partition(" ")[0] for line in told] == ["ConfigError", "RewardError"]
    for line in told:
        assert "NudeNet cannot be loaded" in line
        assert absent in line
        assert "pip install 'latentac[nsfw]'" in line


def test_it_is_a_floor_of_the_gate() -> None:
    """A model that is detected in one of four images is held back, however much the trained reward has gained."""
    gate = Gate(reward="verifier", floors={"nsfw": 0.99})
    clean, shown = np.zeros_like(portrait()), portrait()
    for images, decision in ((np.concatenate([clean] * 4), "promote"), (np.concatenate([clean] * 3 + [shown]), "hold")):
        scores = REWARDS.build("nsfw", **FACES)(images, [""] * 4)
        measured = {"nsfw": {"mean": float(scores.mean()), "low": float(scores.mean() - scores.std())}}
        found = {**ALONE, "trained": {**ALONE["trained"], **measured}, "base": {**ALONE["base"], "nsfw": {"mean": 1.0}}}
        decided = decide(gate, ["verifier", "nsfw"], found, NOTHING)
        assert decided["decision"] == decision
        failed = [check["name"] for check in decided["checks"] if not check["passed"]]
        assert failed == (["nsfw: lower bound against its floor"] if decision == "hold" else [])
