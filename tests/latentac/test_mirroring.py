"""`latentac mirror`: everything that a run reads from elsewhere, in a store, and runs that reach the store alone."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentac.backbones import BACKBONES, layout_of
from latentac.backbones.layout import copy, listing, used
from latentac.backbones.source import locate
from latentac.config.schema import Config, Reward
from latentac.pipelines.request import Request, local_sources
from latentac.rewards import REWARDS
from latentac.rewards.aesthetic import shapes
from latentac.rewards.checkpoints import make
from latentac.rewards.configured import load_rewards
from latentac.rewards.learned import LearnedReward
from latentac.runs.cli import main
from latentac.runs.configuration import recipe_fields
from latentac.runs.licences import licence_of
from latentac.runs.mirror_command import table
from latentac.runs.mirroring import Mirrored, mirror
from latentac.runs.plan import Given, plan
from latentac.runs.preparation.mirrored import check_sources
from latentac.runs.reference import commented_yaml
from latentac.store import open_store, sources
from latentac.system.errors import ConfigError, IntegrityError
from latentac.worlds.prompts import Prompt
from tests.latentac import airgap, miniatures
from tests.latentac.flux_miniature import flux
from tests.latentac.hub import COMMIT, serving
from tests.latentac.rewards import published
from tests.latentac.rewards.test_clip_rewards import changed
from tests.latentac.zimage_miniature import zimage

MINIATURES: dict[str, Callable[..., Path]] = {
    "unet": miniatures.sd15,
    "sdxl": miniatures.sdxl,
    "dit": miniatures.sd3,
    "flux": flux,
    "zimage": zimage,
}
OWN: dict[str, list[str]] = {
    "unet": [],
    "sdxl": [],
    "dit": ["kernel.use=cps"],
    "flux": ["kernel.use=cps", "backbone.image_size=[32, 32]"],
    "zimage": ["kernel.use=cps", "backbone.image_size=[32, 32]", "backbone.text_tokens=32"],
}
SIZELESS = ("flux", "zimage")
UNUSED = (
    "model.ckpt",
    "LICENSE.bin",
    "safety_checker/model.safetensors",
    "vae/model.onnx",
    "demo.png",
    "vae/model.bin",
)
PROMPTS = {"train": ["a red circle", "two blue squares", "a green triangle"], "held_out": ["a red square", "a circle"]}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
CARD = "---\nlicense: other\nlicense_name: some-community-licence\ntags: [x]\n---\n# A model\n"
SCORE = """
import json, sys
import numpy as np
from latentac.config.schema import Reward
from latentac.rewards.configured import load_rewards
from latentac.worlds.prompts import Prompt
settings, prompts = json.loads(sys.argv[1])
(reward,) = load_rewards([Reward.model_validate(settings)])
images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
reward.fetch()
print(json.dumps(reward(images, [Prompt(**each) for each in prompts]).tolist()))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def at(folder: Path) -> str:
    return f"file://{folder}/store"


def mirrored(folder: Path, *overrides: str, recipe: str = "shapes-unet-smoke") -> tuple[list[Mirrored], Config]:
    done, config, _ = mirror(recipe_fields(recipe, "", overrides), at(folder))
    return done, config


def files_of(address: str) -> dict[str, Path]:
    """Of a source in a store in a folder, by relative name."""
    found = sources.parse_address(address)
    assert found is not None
    folder = Path(found.store.removeprefix("file://")) / open_store(found.store).manifest(found.key).folder
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_every_backbone_is_here() -> None:
    assert MINIATURES.keys() == set(BACKBONES) == OWN.keys()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MINIATURES)
def test_a_backbone_is_copied_with_what_is_used_of_it(name: str, tmp_path: Path) -> None:
    """Byte for byte, with model card and licence, and without pickles, other parts and images. A run's copy of it is
    the one that it would have of the folder. Each file that is missing is named."""
    model = MINIATURES[name](tmp_path / "model", **({} if name in SIZELESS else {"size": 32}))
    for file in UNUSED:
        (model / file).parent.mkdir(exist_ok=True)
        (model / file).write_bytes(b"x" * 1000)
    (model / "README.md").write_text(CARD)
    (model / "LICENSE.txt").write_text("The licence\n")
    settings = [f"backbone.use={name}", f"backbone.source={model}", "gate.reward=jpeg_compressibility"]
    done, config = mirrored(tmp_path, *settings, "rewards=[{use: jpeg_compressibility}]", *OWN[name])
    (one,) = done
    layout = layout_of(config.backbone)
    there = files_of(one.address)
    assert set(there) == {*used(model, layout), "README.md", "LICENSE.txt"}
    assert not set(there) & set(UNUSED)
    assert all(path.read_bytes() == (model / file).read_bytes() for file, path in there.items())
    assert one.about == {
        "source": str(model),
        "revision": "",
        "commit": None,
        "licence": "other (some-community-licence)",
    }
    copy(model, tmp_path / "of-folder", layout)
    shutil.rmtree(model)
    assert config.backbone.source == one.address
    copy(locate(config.backbone.source, layout, config.backbone.revision)[0], tmp_path / "of-store", layout)
    assert listing(tmp_path / "of-store") == listing(tmp_path / "of-folder")
    for file in listing(tmp_path / "of-folder"):
        assert (tmp_path / "of-store" / file).read_bytes() == (tmp_path / "of-folder" / file).read_bytes()
    check_sources(config.model_dump())
    for file, path in there.items():
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(ConfigError) as caught:
            check_sources(config.model_dump())
        assert [(each.path, each.value) for each in caught.value.problems] == [("backbone.source", one.address)]
        assert caught.value.problems[0].problem == f"is incomplete in the store. Missing: {file}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere").rename(path)


def clip_of(folder: Path) -> dict[str, Any]:
    return {"source": str(miniatures.clip(folder / "clip"))}


def aesthetic_of(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes(24).items()}
    save_file(head, folder / "head.safetensors")
    return {**clip_of(folder), "head": str(folder / "head.safetensors")}


def hpsv2_of(folder: Path) -> dict[str, Any]:
    like = miniatures.clip(folder / "like")
    for half in ("text_config", "vision_config"):
        changed("config.json", **{half: {"hidden_act": "gelu"}})(like)
    file = published.pickled(published.open_clip(), folder / "HPS_v2.1_compressed.pt", "{'state_dict': state}")
    make("hpsv2", file, folder / "hpsv2", like)
    return {"source": str(folder / "hpsv2")}


def image_reward_of(folder: Path) -> dict[str, Any]:
    file = published.pickled(published.image_reward(), folder / "ImageReward.pt")
    make("image_reward", file, folder / "image_reward", published.bert(folder / "bert-base-uncased"))
    return {"source": str(folder / "image_reward")}


def geneval_of(folder: Path) -> dict[str, Any]:
    return {
        "source": str(miniatures.mask2former(folder / "detector")),
        "clip_source": str(miniatures.clip(folder / "clip")),
        "threshold": 0.02,
    }


LEARNED: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "clip_score": clip_of,
    "pickscore": clip_of,
    "aesthetic": aesthetic_of,
    "hpsv2": hpsv2_of,
    "image_reward": image_reward_of,
    "vqa": lambda folder: {"source": str(miniatures.llava(folder / "llava"))},
    "geneval": geneval_of,
}


def test_every_learned_reward_is_here() -> None:
    assert set(LEARNED) == {name for name in REWARDS if issubclass(REWARDS.load(name), LearnedReward)}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LEARNED)
def test_a_reward_scores_the_same_from_the_store_alone(name: str, tmp_path: Path) -> None:
    """In a process without a network, with the folders gone. It is only watched, and mirrored all the same. Each file
    that is missing is named with the setting that it belongs to."""
    own = LEARNED[name](tmp_path)
    task = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    prompts = [{"text": text, "metadata": task if name == "geneval" else {}} for text in ("a red circle", "a dog")]
    settings = {"use": name, "name": "watched", "weight": 0.0, "device": "cpu", **own}
    (before,) = load_rewards([Reward.model_validate(settings)])
    expected = before(IMAGES, [Prompt(**each) for each in prompts])  # type: ignore[arg-type]
    rewards = [{"use": "jpeg_compressibility"}, settings]
    fields = recipe_fields("shapes-unet-smoke", "", [f"rewards={json.dumps(rewards)}", "gate.reward=watched"])
    done, config, _ = mirror(fields, at(tmp_path))
    folders = {name: Path(place) for name, place in own.items() if isinstance(place, str)}
    assert [one.setting for one in done] == [f"rewards.watched.{setting}" for setting in folders]
    for place in folders.values():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    now = config.rewards[1].model_dump()
    assert all(now[setting].startswith(f"{at(tmp_path)}/sources/") for setting in folders)
    found = json.loads(airgap.python(SCORE, json.dumps([now, prompts]), folder=tmp_path / "inside"))
    assert found == expected.tolist()
    assert not airgap.attempts(tmp_path / "inside")
    for one in done:
        assert not [file for file in files_of(one.address) if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        for file, path in files_of(one.address).items():
            path.rename(tmp_path / "elsewhere")
            with pytest.raises(ConfigError, match=file.replace(".", r"\.")) as caught:
                check_sources(config.model_dump())
            assert {each.path for each in caught.value.problems} == {one.setting}
            (tmp_path / "elsewhere").rename(path)


def prompt_file(folder: Path) -> Path:
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder / "prompts.json"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides of a configuration with a CLIP and a file of prompts, which are mirrored in seconds."""
    return [
        f"rewards=[{{use: clip_score, source: {miniatures.clip(tmp_path / 'clip')}}}]",
        f"prompts.source={prompt_file(tmp_path)}",
        "gate.reward=clip_score",
    ]


def test_again_nothing_is_copied(tmp_path: Path, small: list[str]) -> None:
    """Addresses stay; only what changed is copied, to a new address, and the old one keeps its bytes."""
    first, config = mirrored(tmp_path, *small)
    assert [one.copied for one in first] == [1, 7]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    second, same = mirrored(tmp_path, *small)
    assert [one.copied for one in second] == [0, 0]
    assert same == config
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    miniatures.clip(tmp_path / "clip", seed=1)
    third, _ = mirrored(tmp_path, *small)
    assert [one.copied for one in third] == [0, 7]
    assert third[1].address != first[1].address
    assert sources.local(first[1].address, "x") != sources.local(third[1].address, "x")


def test_prompts_are_read_from_the_store(tmp_path: Path, small: list[str]) -> None:
    """A file, a folder and two files, each by its address; the same prompts come of them."""
    from latentac.worlds.prompts import load_prompts

    folder = tmp_path / "split"
    folder.mkdir()
    for split, texts in PROMPTS.items():
        (folder / f"{split}.txt").write_text("\n".join(texts))
    for given in (
        small[1],
        f"prompts.source={folder}",
        f"prompts={{source: x, train: {folder}/train.txt, held_out: {folder}/held_out.txt}}",
    ):
        _, config = mirrored(tmp_path, small[0], small[2], given)
        found = load_prompts(sources.with_local_files(config.prompts))
        assert [prompt.text for prompt in found.train] == PROMPTS["train"]
        assert [prompt.text for prompt in found.held_out] == PROMPTS["held_out"]


@pytest.mark.timeout(300)
def test_an_interrupted_copy_cannot_be_read_and_goes_on(tmp_path: Path, small: list[str]) -> None:
    """A process that may not write files of more than 100 kB fails at the weights: no manifest, and the next run copies
    what is left."""
    (tmp_path / "mine.yaml").write_text(f"rewards: [{{use: clip_score, source: {tmp_path}/clip}}]\n")
    arguments = ["mirror", "--recipe", "shapes-unet-smoke", "--config", str(tmp_path / "mine.yaml")]
    arguments += ["--set", small[2], "--to", at(tmp_path), "--write", str(tmp_path / "mirrored.yaml")]
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from latentac.runs.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "store").rglob("manifest.json"))
    assert not (tmp_path / "mirrored.yaml").exists()
    left = {path.name for path in (tmp_path / "store" / "sources").rglob("*") if path.is_file()}
    assert "config.json" in left
    assert "model.safetensors" not in left
    one, _ = mirrored(tmp_path, *small)[0][::-1]
    assert one.copied == 7 - len(left)


def test_other_bytes_of_the_same_size_are_refused_and_replaced(tmp_path: Path, small: list[str]) -> None:
    """Whoever fetches them compares sha256; `--verify` finds them, and copies what is right."""
    done, config = mirrored(tmp_path, *small)
    file = files_of(done[1].address)["config.json"]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content.replace(b"24", b"25", 1))
    check_sources(config.model_dump())  # by its size it is the one
    with pytest.raises(IntegrityError, match=r"config\.json: expected .* Run `latentac mirror --verify` again"):
        sources.local(done[1].address, "x")
    assert mirrored(tmp_path, *small)[0][1].copied == 0
    fields = recipe_fields("shapes-unet-smoke", "", small)
    again, _, _ = mirror(fields, at(tmp_path), verify=True)
    assert [one.copied for one in again] == [0, 1]
    assert (sources.local(done[1].address, "x") / "config.json").read_bytes() == content


def test_a_copy_on_this_machine_is_used_while_it_is_whole(tmp_path: Path, small: list[str], cache: Path) -> None:
    """Without the store; one that was changed is fetched again, and verified."""
    done, _ = mirrored(tmp_path, *small)
    folder = sources.local(done[1].address, "x")
    (tmp_path / "store").rename(tmp_path / "away")
    assert sources.local(done[1].address, "x") == folder
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="is not in the store, or was not mirrored to its end"):
        sources.local(done[1].address, "x")
    (tmp_path / "away").rename(tmp_path / "store")
    assert (sources.local(done[1].address, "rewards.x") / "config.json").is_file()


def test_an_address_means_its_bytes_alone(tmp_path: Path, small: list[str]) -> None:
    """A manifest of other files under it is refused by `prepare` and by whoever fetches it."""
    done, config = mirrored(tmp_path, *small)
    miniatures.clip(tmp_path / "clip", seed=1)
    other = mirrored(tmp_path, *small)[0][1].address
    places = [tmp_path / "store" / "sources" / address.rpartition("/")[2] for address in (done[1].address, other)]
    shutil.rmtree(places[0])
    shutil.copytree(places[1], places[0])
    manifest = places[0] / "manifest.json"
    manifest.write_text(manifest.read_text().replace(places[1].name, places[0].name))
    with pytest.raises(IntegrityError, match="names other files than those that were mirrored"):
        sources.local(done[1].address, "x")
    with pytest.raises(ConfigError, match="names other files"):
        check_sources(config.model_dump())


def test_a_mirror_of_a_mirror_keeps_what_is_known(tmp_path: Path, small: list[str]) -> None:
    """As over a disk that is carried: the same names, bytes and origin in another store."""
    (tmp_path / "clip" / "README.md").write_text(CARD)
    done, config = mirrored(tmp_path, *small)
    shutil.rmtree(tmp_path / "clip")
    again, second, _ = mirror(config.model_dump(), f"file://{tmp_path}/inside")
    assert [one.address.rpartition("sources/")[2] for one in again] == [
        one.address.rpartition("sources/")[2] for one in done
    ]
    assert [one.about for one in again] == [one.about for one in done]
    shutil.rmtree(tmp_path / "store")
    shutil.rmtree(tmp_path / "cache")
    check_sources(second.model_dump())
    assert (sources.local(second.rewards[0].own["source"], "x") / "README.md").read_text() == CARD


def pickled_clip(folder: Path) -> list[str]:
    clip = miniatures.clip(folder / "clip")
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    return [f"rewards=[{{use: clip_score, source: {clip}}}]", "gate.reward=clip_score"]


def pickled_hps(folder: Path) -> list[str]:
    (folder / "HPS_v2.1_compressed.pt").write_bytes(b"x")
    return [f"rewards=[{{use: hpsv2, source: {folder}/HPS_v2.1_compressed.pt}}]", "gate.reward=hpsv2"]


def pickled_head(folder: Path) -> list[str]:
    (folder / "sac.pth").write_bytes(b"x")
    given = {"use": "aesthetic", "source": str(miniatures.clip(folder / "clip")), "head": f"{folder}/sac.pth"}
    return [f"rewards=[{json.dumps(given)}]", "gate.reward=aesthetic"]


def pickled_unet(folder: Path) -> list[str]:
    model = miniatures.sd15(folder / "model")
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    return [f"backbone.source={model}"]


@pytest.mark.parametrize(
    ("broken", "remedy"),
    [
        (pickled_clip, "CLIPModel"),
        (pickled_hps, "latentac convert-weights --kind hpsv2"),
        (pickled_head, "latentac convert-weights --kind aesthetic"),
        (pickled_unet, "Convert what you trust"),
    ],
)
def test_pickles_are_refused_with_what_converts_them(
    broken: Callable[[Path], list[str]], remedy: str, tmp_path: Path
) -> None:
    """Before anything is copied."""
    with pytest.raises(ConfigError) as caught:
        mirrored(tmp_path, *broken(tmp_path))
    assert remedy in str(caught.value)
    assert not list((tmp_path / "store").rglob("*.json"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "not stated"),
        ({"README.md": "# A model\nlicense: mit\n"}, "not stated"),
        ({"README.md": "---\nlicense: mit\n---\n"}, "mit"),
        ({"README.md": "---\r\nlicense: apache-2.0\r\n---\r\ntext"}, "apache-2.0"),
        ({"README.md": "---\nlicense: [mit, openrail]\n---\n"}, "mit, openrail"),
        ({"README.md": "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n"}, "other (x, LICENSE)"),
        ({"README.md": "---\n- a list\n---\n", "LICENSE": "\n  MIT License\n\nCopyright"}, "MIT License (LICENSE)"),
        ({"README.md": "---\n{not yaml\n---\n", "LICENCE.md": "# Apache\n"}, "Apache (LICENCE.md)"),
        ({"README.md": "---\nlicense: " + "x" * 1000 + "\n---\n"}, "x" * 100 + "..."),
        ({"NOTICE": "By somebody"}, "not stated"),
        ({"LICENSE": b"\xff\xfe"}, "\ufffd\ufffd (LICENSE)"),
    ],
)
def test_the_licence_is_what_the_folder_states(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert licence_of(tmp_path) == expected


def test_the_command_writes_a_configuration_that_needs_nothing_else(
    tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints each source with files, size, licence and address. A file of somebody's own is not overwritten."""
    target = tmp_path / "mirrored.yaml"
    arguments = ["mirror", "--recipe", "shapes-unet-smoke", "--to", at(tmp_path), "--write", str(target)]
    arguments += [word for each in small for word in ("--set", each)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "rewards.clip_score.source" in shown
    assert "7 files" in shown
    assert "copied 7" in shown
    assert "licence  not stated" in shown
    assert f"latentac run --run first --config {target}" in shown
    assert recipe_fields("words-dit", str(target)) == {
        **recipe_fields("words-dit", str(target)),
        **mirrored(tmp_path, *small)[1].model_dump(),
    }
    assert main(arguments) == 0
    assert "all there" in capsys.readouterr().out
    target.write_text("seed: 3\n")
    assert main(arguments) == 2
    assert "--write" in capsys.readouterr().err
    assert target.read_text() == "seed: 3\n"


def test_what_comes_with_latentac_is_not_copied_and_services_are_listed(tmp_path: Path) -> None:
    service = "rewards=[{use: remote, url: 'http://127.0.0.1:9'}, {use: clip_score, source: 'builtin:words-clip'}]"
    done, config, services = mirror(recipe_fields("words-dit-smoke", "", [service, "gate.reward=remote"]), at(tmp_path))
    assert (done, services) == ([], ["remote"])
    assert config.backbone.source == "builtin:words-dit"
    shown = "\n".join(table(done, services))
    assert "Nothing is read from elsewhere" in shown
    assert "rewards.remote: a service computes it" in shown


@pytest.mark.parametrize("address", ["file:///x/models/a", "s3://bucket/sources/a-1", "file:///x/sources/../a"])
def test_another_address_of_a_store_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the address of a store, and not of a source in it"):
        locate(address, None)
    reward = {"use": "clip_score", "source": address}
    with pytest.raises(ConfigError, match=r"rewards\.clip_score\.source = .*not of a source in it"):
        load_rewards([Reward.model_validate(reward)])[0].fetch()


PREPARE = """
import sys, time
started = time.monotonic()
from latentac.runs.cli import main
code = main(["prepare", "--run", "first", *sys.argv[1:]])
print(code, "torch" in sys.modules, time.monotonic() - started)
"""


@pytest.mark.timeout(300)
def test_prepare_names_all_missing_files_before_anything_is_loaded(tmp_path: Path, small: list[str]) -> None:
    """Exit code 2 within seconds, without torch, and nothing is published."""
    done, _ = mirrored(tmp_path, *small)
    for one, gone in ((done[0], ["prompts.json"]), (done[1], ["model.safetensors", "merges.txt"])):
        for file in gone:
            files_of(one.address)[file].unlink()
    settings = [f"prompts.source={done[0].address}", f"rewards=[{{use: clip_score, source: '{done[1].address}'}}]"]
    arguments = ["--recipe", "shapes-unet-smoke", *(w for s in (*settings, small[2]) for w in ("--set", s))]
    command = [sys.executable, "-c", PREPARE, "--output", str(tmp_path / "runs"), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    code, torch, seconds = found.stdout.split()
    assert (code, torch) == ("2", "False"), found.stderr
    assert float(seconds) < 20
    assert "Missing: prompts.json" in found.stderr
    assert "Missing: merges.txt, model.safetensors" in found.stderr
    assert done[1].address in found.stderr
    assert "mirror --config FILE --to" in found.stderr
    assert not list((tmp_path / "runs").rglob("manifest.json"))


def test_a_dry_run_looks_at_the_store_and_copies_no_model(tmp_path: Path, small: list[str], cache: Path) -> None:
    """It says what it could not look at, and refuses what `prepare` would refuse. A container gets the store."""
    model = miniatures.sd15(tmp_path / "model", size=32)
    done, config = mirrored(tmp_path, *small, f"backbone.source={model}")
    (tmp_path / "mirrored.yaml").write_text(commented_yaml(config))
    given = Given("shapes-unet-smoke", str(tmp_path / "mirrored.yaml"), (), "")
    found = plan(given, at(tmp_path), tmp_path / "runs")
    assert (found.needs, found.refused) == (None, ())
    assert [path.name for path in (cache / "sources").iterdir()] == [done[1].address.split("/")[-2]]  # the prompts
    file = files_of(done[0].address)["vae/config.json"]
    file.unlink()
    (refused,) = plan(given, at(tmp_path), tmp_path / "runs").refused
    assert "backbone.source" in refused
    assert "Missing: vae/config.json" in refused
    request = Request("shapes-unet-smoke", config=str(tmp_path / "mirrored.yaml"))
    assert local_sources(request) == [str(tmp_path / "store")]


MIRROR = """
import json, sys
from latentac.runs.configuration import recipe_fields
from latentac.runs.mirroring import mirror
done, config, _ = mirror(recipe_fields("shapes-unet-smoke", "", json.loads(sys.argv[1])), sys.argv[2])
print(json.dumps([[one.setting, one.address, one.copied, dict(one.about)] for one in done]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["backbone", "reward"])
def test_a_hub_id_is_mirrored_at_its_commit(kind: str, tmp_path: Path) -> None:
    """Through the hub's own client from a hub on loopback: the files that are used, model card and licence. Then it
    loads without the hub, and without the hub's cache."""
    name = "someone/a-model"
    model = (miniatures.sd15 if kind == "backbone" else miniatures.clip)(tmp_path / "model")
    expected = {*listing(model), "README.md", "LICENSE.md"}
    (model / "README.md").write_text(CARD)
    (model / "LICENSE.md").write_text("Text")
    (model / "demo.png").write_bytes(b"x")
    (model / "pytorch_model.bin").write_bytes(b"x")
    overrides = [f"backbone.source={name}", "backbone.revision=v1.0"]
    if kind == "reward":
        overrides = [f"rewards=[{{use: clip_score, source: {name}, revision: v1.0}}]", "gate.reward=clip_score"]
    with serving(name, model) as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        outside = tmp_path / "outside"
        ((_, address, copied, about),) = json.loads(
            airgap.python(MIRROR, json.dumps(overrides), at(tmp_path), folder=outside, **own)
        )
        assert set(hub.fetched) <= expected
    assert about == {
        "source": name,
        "revision": "v1.0",
        "commit": COMMIT,
        "licence": "other (some-community-licence)",
    }
    assert f"/sources/{name.replace('/', '--')}-" in address
    assert set(files_of(address)) == expected
    assert copied == len(expected)
    if kind == "backbone":
        script = "import sys; from latentac.backbones.source import locate; print(locate(sys.argv[1], None)[1])"
        assert airgap.python(script, address, folder=tmp_path / "inside").strip() == COMMIT
    else:
        asked = json.dumps([{"use": "clip_score", "source": address}, [{"text": "a"}, {"text": "b"}]])
        assert len(json.loads(airgap.python(SCORE, asked, folder=tmp_path / "inside"))) == 2
    assert not airgap.attempts(tmp_path / "inside")


def test_what_refuses_the_network_does() -> None:
    """The processes of these tests cannot connect, and it is noted where a library goes on without it."""
    script = (
        "import urllib.request\n"
        "try:\n    urllib.request.urlopen('http://192.0.2.1/', timeout=1)\nexcept OSError as e:\n    print(e)"
    )
    with tempfile.TemporaryDirectory() as folder:
        assert "the network is off" in airgap.python(script, folder=Path(folder))
        assert "192.0.2.1" in airgap.attempts(Path(folder))
