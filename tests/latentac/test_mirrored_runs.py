"""Runs behind an air gap: processes that reach loopback alone, with models, rewards and prompts from a store."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from latentac.runs.configuration import recipe_fields
from latentac.runs.mirroring import Mirrored, mirror
from latentac.runs.reference import commented_yaml
from latentac.store import open_store, sources
from tests.latentac import airgap
from tests.latentac.test_mirroring import LEARNED, MINIATURES, OWN, SIZELESS
from tests.latentac.workers import SMALL
from tools.minio import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore::FutureWarning")]

JUDGES = {
    "unet": ("clip_score", "pickscore"),
    "sdxl": ("aesthetic",),
    "dit": ("hpsv2",),
    "flux": ("image_reward",),
    "zimage": ("vqa", "geneval"),
}
"""Backbone -> the learned rewards that are watched beside it: each one is somewhere."""
TASK = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
PROMPTS = {
    "train": [{"text": text, **TASK} for text in ("a red circle", "two blue squares", "a cyan circle")],
    "held_out": [{"text": text, **TASK} for text in ("a red square", "two blue circles")],
}
NO_GAIN = "gate={min_gain: -1000.0, min_lower_bound: -1000.0, max_loss_fraction: 1000.0, min_diversity_kept: 0.0}"
FEW = ["evaluation={num_images: 8, num_diversity_prompts: 2, images_per_prompt: 2, num_gallery_prompts: 2}"]
FEW += ["steering={num_images: 8, methods: [{use: best_of_n, sweep_particles: [2]}]}", NO_GAIN]


def outside(folder: Path, judges: tuple[str, ...], more: list[str], url: str) -> list[Mirrored]:
    """Mirror a small run with these rewards, which are watched, and write mirrored.yaml. Then the originals go."""
    originals = folder / "originals"
    originals.mkdir()
    (originals / "prompts.json").write_text(json.dumps(PROMPTS))
    rewards: list[dict[str, Any]] = [{"use": "jpeg_compressibility"}]
    for name in judges:
        (originals / name).mkdir()
        rewards.append({"use": name, "weight": 0.0, **LEARNED[name](originals / name)})
    settings = [*SMALL, f"prompts.source={originals}/prompts.json", f"rewards={json.dumps(rewards)}", *FEW, *more]
    done, config, services = mirror(recipe_fields("shapes-unet-smoke", "", settings), url)
    assert not services
    (folder / "mirrored.yaml").write_text(commented_yaml(config))
    shutil.rmtree(originals)
    return done


def called(folder: Path, *words: str, **variables: str) -> str:
    """What the command prints, which must succeed without a try to reach a network."""
    done = airgap.latentac(*words, folder=folder / "inside", **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert not airgap.attempts(folder / "inside")
    return done.stdout


def miniature(folder: Path, name: str) -> list[str]:
    model = MINIATURES[name](folder / "model", **({} if name in SIZELESS else {"size": 32}))
    return [f"backbone.use={name}", f"backbone.source={model}", *OWN[name]]


def test_each_backbone_and_each_reward_is_here() -> None:
    assert JUDGES.keys() == MINIATURES.keys()
    assert {name for judges in JUDGES.values() for name in judges} == set(LEARNED)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_run_is_prepared_from_the_store_alone(name: str, tmp_path: Path) -> None:
    """`prepare` loads the backbone, takes a step, and calls each reward on an image. With a file gone it names that."""
    done = outside(tmp_path, JUDGES[name], miniature(tmp_path, name), f"file://{tmp_path}/mirror")
    shutil.rmtree(tmp_path / "model")
    assert {one.setting for one in done} >= {"backbone.source", "prompts.source"}
    called(tmp_path, "prepare", "--run", "first", "--config", "mirrored.yaml")
    for one in done:
        address = sources.parse_address(one.address)
        assert address is not None
        manifest = open_store(address.store).manifest(address.key)
        (tmp_path / "mirror" / manifest.folder / manifest.files[-1].path).unlink(missing_ok=True)  # two may be one
    lost = airgap.latentac("prepare", "--run", "second", "--config", "mirrored.yaml", folder=tmp_path / "inside")
    assert lost.returncode == 2
    for one in done:
        assert f"{one.setting} = '{one.address}': is incomplete in the store. Missing: " in lost.stderr
        assert one.manifest.files[-1].path in lost.stderr


def whole_run(folder: Path, store: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """`latentac run` to its end, and the numbers of its evaluation."""
    (folder / "inside").mkdir()
    called(folder, "run", "--config", "mirrored.yaml", "--output", "runs", "--store", store, **variables)
    (run,) = [path.name for path in (folder / "runs").iterdir() if (path / "request.json").exists()]
    found: dict[str, Any] = json.loads((folder / "runs" / run / "evaluate" / "evaluation.json").read_text())
    assert (folder / "runs" / run / "report.html").exists()
    return found


def test_a_whole_run_of_an_embedded_model_reads_a_bucket_alone(
    tmp_path: Path, minio_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `prepare` to an endpoint that answers. A reward in a process of its own reads the bucket there. A file that
    is gone from it is named."""
    for name, value in minio_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    url = f"s3://{minio_server.bucket}/airgap"
    done = outside(tmp_path, ("clip_score", "aesthetic"), ["rewards.aesthetic.processes=1"], url)
    assert [one.setting for one in done] == [
        "prompts.source",
        "rewards.clip_score.source",
        "rewards.aesthetic.source",
        "rewards.aesthetic.head",
    ]
    variables = minio_server.environment
    evaluation = whole_run(tmp_path, f"s3://{minio_server.bucket}/runs", variables)
    assert {"jpeg_compressibility", "clip_score", "aesthetic"} <= set(evaluation["trained"])
    address = sources.parse_address(done[1].address)
    assert address is not None
    gone = f"airgap/{done[1].manifest.folder}/model.safetensors"
    minio_server.client().remove_object(minio_server.bucket, gone)
    words = ("prepare", "--run", "second", "--config", "mirrored.yaml")
    lost = airgap.latentac(*words, folder=tmp_path / "inside", **variables)
    assert lost.returncode == 2
    assert f"rewards.clip_score.source = '{done[1].address}'" in lost.stderr
    assert "Missing: model.safetensors" in lost.stderr


def test_a_whole_run_of_a_real_family_reads_a_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 1.5 in small, with LoRA, judged by PickScore."""
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    more = [*miniature(tmp_path, "unet"), "policy.adaptation=lora"]
    outside(tmp_path, ("pickscore",), more, f"file://{tmp_path}/mirror")
    shutil.rmtree(tmp_path / "model")
    evaluation = whole_run(tmp_path, f"file://{tmp_path}/runs/store", {})
    assert {"jpeg_compressibility", "pickscore"} <= set(evaluation["trained"])
