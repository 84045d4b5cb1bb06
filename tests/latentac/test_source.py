"""A hub id: from the cache without a network, and over one with only the files that are used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from latentac.backbones import BACKBONES
from latentac.backbones.layout import copy, listing
from latentac.backbones.source import locate
from latentac.backbones.stable_diffusion import DIT, UNET
from latentac.sampling.devices import pick_device
from latentac.system.errors import ConfigError
from tests.latentac import miniatures
from tests.latentac.hub import COMMIT, cached, serving

NAME = "someone/a-model"

LOCATE = """
import json, sys
from latentac.backbones.source import locate
from latentac.backbones import stable_diffusion
from latentac.system.errors import ConfigError
for source, layout, revision in json.loads(sys.argv[1]):
    try:
        folder, commit = locate(source, getattr(stable_diffusion, layout), revision)
        print(json.dumps({"folder": str(folder), "commit": commit}))
    except ConfigError as error:
        print(json.dumps({"problems": [str(problem) for problem in error.problems]}))
"""


def located(requests, cache, endpoint, offline=False):
    """What each of (source, layout, revision) comes to in a process whose client has this hub and this cache."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-W", "ignore", "-c", LOCATE, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_hub_id_works_from_the_offline_cache(tmp_path, cache):
    """In the true layout: the snapshot's files are links to blobs, and the copy is of files."""
    snapshot = cached(cache, NAME, miniatures.sd15(tmp_path / "model"))
    folder, commit = locate(NAME, UNET)
    assert (folder, commit) == (snapshot, COMMIT)
    copy(folder, tmp_path / "copy", UNET)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    BACKBONES.build("unet", tmp_path / "copy", pick_device("cpu"))
    assert locate(str(snapshot), UNET) == (snapshot, None)  # the same folder named as a folder


@pytest.mark.parametrize("revision", [COMMIT, "v1.0"])
def test_a_pinned_revision_is_found_in_the_cache(tmp_path, cache, revision):
    """A commit by its snapshot, a tag or branch by its ref; one that is not there is refused with its name."""
    cached(cache, NAME, miniatures.sd15(tmp_path / "model"), "v1.0")
    assert locate(NAME, UNET, revision)[1] == COMMIT
    with pytest.raises(ConfigError, match=r"at revision v2\.0.*HF_HUB_OFFLINE is set"):
        locate(NAME, UNET, "v2.0")


def test_a_cache_that_holds_half_a_model_says_what_is_missing(tmp_path, cache):
    """Such as one that another program filled with the parts that it used."""
    model = miniatures.sd15(tmp_path / "model")
    shutil.rmtree(model / "vae")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    cached(cache, NAME, model)
    with pytest.raises(ConfigError) as caught:
        locate(NAME, UNET)
    text = str(caught.value)
    assert "vae: is missing" in text
    assert "unet: has no weights" in text


def test_an_unknown_id_is_refused_with_the_remedy(cache):
    """Offline it says that it is offline. However long what was given is, the message is not."""
    for name in ("nobody/nothing", "n" * 100_000, "nobody/no\nthing"):
        with pytest.raises(ConfigError, match=r"could not be had from the hub .*HF_HUB_OFFLINE is set") as caught:
            locate(name, UNET)
        assert len(str(caught.value)) < 2000
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Stable Diffusion 3's repository in small: T5, single files, variants, other formats, images."""
    folder = miniatures.sd3(tmp_path_factory.mktemp("hub") / "repository")
    miniatures.sd3(folder, variant="fp16", sharded=True)
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_3")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_3")
    extra = ["sd3.safetensors", "sd3.ckpt", "README.md", "safety_checker/model.safetensors", "demo.png"]
    extra += ["transformer/diffusion_pytorch_model.bin", "vae/model.onnx", "text_encoder/flax_model.msgpack"]
    extra += [".gitattributes", "transformer/diffusion_pytorch_model.non_ema.safetensors"]
    for name in extra:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x" * 1000)
    return folder


@pytest.mark.timeout(400)
def test_only_the_files_that_are_used_are_downloaded(repository, tmp_path):
    """By the hub's own client from a hub on loopback, once; afterwards it works offline, and a pinned commit and a tag
    come to the same snapshot. What is not there is refused by name."""
    plain = miniatures.sd3(tmp_path / "plain")
    with serving(NAME, repository) as hub:
        requests = [(NAME, "DIT", ""), (NAME, "DIT", COMMIT), (NAME, "DIT", "v1.0"), (NAME, "DIT", "v9")]
        first, pinned, tagged, lost, other, nobody = located(
            [*requests, (NAME, "UNET", ""), ("someone/else", "UNET", "")], tmp_path / "home", hub.url
        )
        assert first == pinned == tagged == {"folder": first["folder"], "commit": COMMIT}
        assert set(hub.fetched) <= set(listing(plain))  # files of one content are fetched once
        assert len(hub.fetched) == len(set(hub.fetched)), "a file was downloaded twice"
        assert "at revision v9" in lost["problems"][0]
        assert "Set backbone.use=dit" in other["problems"][0]
        assert "could not be had from the hub" in nobody["problems"][0]
        url = hub.url
    again = located([(NAME, "DIT", ""), (NAME, "DIT", COMMIT)], tmp_path / "home", url, offline=True)
    assert again == [first, first]
    assert located([(NAME, "DIT", "")], tmp_path / "home", url) == [first]  # the hub is gone
    copy(Path(first["folder"]), tmp_path / "copy", DIT)
    assert listing(tmp_path / "copy") == listing(plain)


@pytest.mark.timeout(400)
def test_what_the_configurations_rule_out_costs_no_weights(tmp_path):
    """A model of another kind is refused after kilobytes, and a variant is fetched where there is nothing else."""
    folder = miniatures.sd15(tmp_path / "inpainting", unet={"in_channels": 9})
    with serving(NAME, folder) as hub:
        (answer,) = located([(NAME, "UNET", "")], tmp_path / "home", hub.url)
        assert "in_channels is 9 (inpainting models have 9)" in answer["problems"][0]
        assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    half = miniatures.sd15(tmp_path / "half", variant="fp16", sharded=True)
    with serving(NAME, half) as hub:
        (answer,) = located([(NAME, "UNET", "")], tmp_path / "other", hub.url)
        assert answer["commit"] == COMMIT
        assert sorted(hub.fetched) == listing(half)
