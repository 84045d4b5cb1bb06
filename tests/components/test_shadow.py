"""What a rollout concludes from shadow prompts: errors, latency, reward; and what is said where one is unknown."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentac.components.cluster.settings import Deploy
from latentac.components.deploy.shadow import Answers, compare, reasons_against, shadow_requests
from latentac.runs.steps import prepare
from latentac.runs.workspace import Workspace, open_run
from latentac.worlds.shapes.captions import parse_caption
from latentac.worlds.shapes.scenes import sample_images

DEPLOY = Deploy(runtime="latentac", service_account="serve")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("run")
    prepare("some-run", "", str(folder), "shapes-unet-smoke")
    return open_run("some-run", "", str(folder))


def right(request: dict[str, Any]) -> bytes:
    """An image that shows what is asked for."""
    (image,) = sample_images([parse_caption(request["prompt"])], np.random.default_rng(0))
    return png(image)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


EMPTY = png(np.full((32, 32, 3), 127, np.uint8))


def answers(images: list[bytes | None], seconds: float = 1.0) -> Answers:
    failed = ["failed"] * images.count(None)
    return Answers([seconds] * (len(images) - len(failed)), images, failed)


def test_prompts_are_held_out_and_fixed(space: Workspace) -> None:
    """Spread over the set, each with a seed of its own, the same for the same run."""
    requests = shadow_requests(space, 8)
    held_out = [prompt.text for prompt in space.prompts.held_out]
    places = [held_out.index(request["prompt"]) for request in requests]
    assert places == sorted(places)
    assert len({*places}) == len({request["seed"] for request in requests}) == 8
    assert requests == shadow_requests(space, 8)
    assert len(shadow_requests(space, len(held_out) + 3)) == len(held_out) + 3


def test_equal_versions_pass(space: Workspace) -> None:
    """The numbers are those that were measured."""
    requests = shadow_requests(space, 4)
    found = compare(
        space, requests, answers([right(each) for each in requests]), answers([right(each) for each in requests])
    )
    assert (found["reward"], found["latency_ratio"], found["reward_loss"]) == ("shapes_verifier", 1.0, 0.0)
    assert found["green"] == {"error_fraction": 0.0, "median_seconds": 1.0, "reward": 1.0, "failures": []}
    assert reasons_against(found, DEPLOY) == found["notes"] == []


def test_each_number_can_speak_against_it(space: Workspace) -> None:
    """A failed answer, twice the time, a reward that falls on every prompt."""
    requests = shadow_requests(space, 8)
    good = [right(each) for each in requests]
    failing = compare(space, requests, answers([None, *good[1:]]), answers([*good]))
    assert reasons_against(failing, DEPLOY) == ["a fraction of 0.125 of the shadow prompts failed, at most 0 allowed"]
    slow = compare(space, requests, answers([*good], 2.0), answers([*good]))
    assert "takes 2.00 times as long" in reasons_against(slow, DEPLOY)[0]
    worse = compare(space, requests, answers([EMPTY] * 8), answers([*good]))
    assert reasons_against(worse, DEPLOY) == [
        "shapes_verifier falls by 1, with 95 % confidence by 1 or more, 0.05 allowed"
    ]


def test_chance_alone_does_not_speak_against_it(space: Workspace) -> None:
    """One prompt of eight that went wrong is not evidence of a loss; four of eight are."""
    requests = shadow_requests(space, 8)
    good = [right(each) for each in requests]
    one = compare(space, requests, answers([EMPTY, *good[1:]]), answers([*good]))
    assert one["reward_loss"] == 0.125
    assert reasons_against(one, DEPLOY) == []
    four = compare(space, requests, answers([*[EMPTY] * 4, *good[4:]]), answers([*good]))
    assert "shapes_verifier falls by 0.5" in reasons_against(four, DEPLOY)[0]


def test_what_was_not_measured_is_said(space: Workspace) -> None:
    """No version before; one that answers nothing; a reward that this image cannot load."""
    requests = shadow_requests(space, 2)
    good = [right(each) for each in requests]
    first = compare(space, requests, answers([*good]))
    assert first["blue"] is None
    assert "no version served before" in first["notes"][0]
    silent = compare(space, requests, answers([*good]), answers([None, None]))
    assert silent["latency_ratio"] is silent["reward_loss"] is None
    assert "latency was not compared" in silent["notes"][0]
    rewards = [space.config.rewards[0].model_copy(update={"use": "nowhere:Reward"})]
    config = space.config.model_copy(update={"rewards": rewards})
    other = Workspace(space.run, space.store, space.folder, config, space.prepared)
    unknown = compare(other, requests, answers([*good]), answers([*good]))
    assert unknown["reward_loss"] is None
    assert "the reward was not measured: " in unknown["notes"][0]
    assert reasons_against(unknown, DEPLOY) == []


def test_number_that_is_not_finite_speaks_against_it(space: Workspace) -> None:
    """Closed, as the gate is."""
    requests = shadow_requests(space, 2)
    good = [right(each) for each in requests]
    found = compare(space, requests, answers([*good], float("nan")), answers([*good]))
    assert "times as long" in reasons_against(found, DEPLOY)[0]
    assert reasons_against(
        {**found, "latency_ratio": None, "reward_loss": 1.0, "reward_loss_low": float("nan")}, DEPLOY
    )


def test_a_release_needs_no_torch() -> None:
    """Neither torch nor kserve is in the image in which the step launches and decides: nothing imports them, and each
    reward that needs a network says so."""
    script = (
        "import sys\n"
        "absent = ('torch', 'kserve', 'diffusers', 'transformers', 'fastapi')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import components.deploy.rollout, latentac.runs.steps, latentac.runs.release.deploy\n"
        "from latentac.rewards import REWARDS\n"
        "from latentac.system.errors import RewardError\n"
        "for name in REWARDS:\n"
        "    if name in ('remote', 'judge', 'geneval'):\n"
        "        continue\n"
        "    given = {'aesthetic': 'head', 'hpsv2': 'source', 'image_reward': 'source'}\n"
        "    reward = REWARDS.build(name, **({given[name]: 'there'} if name in given else {}))\n"
        "    images, prompts, _ = getattr(reward, 'known', REWARDS.build('shapes_clip').known)()\n"
        "    try:\n"
        "        reward(images, prompts)\n"
        "    except RewardError as error:\n"
        "        print(name, error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    told = [line.partition(" packages: one is missing: ")[0] for line in done.stdout.splitlines()]
    assert told == ["shapes_clip", "clip_score", "pickscore", "aesthetic", "hpsv2", "vqa", "image_reward"]
