"""The rewards whose weights are published as pickles: their conversion, and what they compute with what it wrote."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTokenizer

from latentac.config.schema import Reward
from latentac.rewards import REWARDS, blip_folder, checkpoints
from latentac.rewards.checkpoints import clip_tensors, make
from latentac.rewards.configured import load_rewards
from latentac.rewards.conversion import KINDS, command, convert
from latentac.rewards.hpsv2 import fitted
from latentac.runs import testing
from latentac.runs.cli import main
from latentac.runs.preparation.prepare import fetch_rewards
from latentac.system import isolation
from latentac.system.errors import ConfigError, ResourceError, RewardError
from latentac.worlds.prompts import Prompt
from tests.latentac import miniatures
from tests.latentac.rewards import published
from tests.latentac.rewards.test_clip_rewards import IMAGES, PROMPTS, changed, without

END = 578  # of the miniature's vocabulary


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def like(place: Path) -> Path:
    """What is left of the CLIP that was finetuned when its weights are not fetched: no weights."""
    folder = miniatures.clip(place / "CLIP-ViT-H-14")
    for half in ("text_config", "vision_config"):
        changed("config.json", **{half: {"hidden_act": "gelu"}})(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def hps(place: Path, like: Path) -> Path:
    file = published.pickled(
        published.open_clip(), place / "HPS_v2.1_compressed.pt", "{'state_dict': state, 'epoch': 3}"
    )
    make("hpsv2", file, place / "hpsv2", like)  # here in this process, to be quick
    return place / "hpsv2"


@pytest.fixture(scope="module")
def image_reward(place: Path) -> Path:
    file = published.pickled(published.image_reward(), place / "ImageReward.pt")
    make("image_reward", file, place / "image_reward", published.bert(place / "bert-base-uncased"))
    return place / "image_reward"


def pixels(folder: Path, images: Sequence[np.ndarray] = tuple(IMAGES)) -> torch.Tensor:
    """As the library prepares them."""
    pictures = [Image.fromarray(image) for image in images]
    found: torch.Tensor = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    return found


def striped(image: np.ndarray) -> np.ndarray:
    """An image of 40 x 56 pixels as HPSv2 sees it in 32: 23 rows, with 4 black ones above and 5 below."""
    smaller = np.asarray(Image.fromarray(image).resize((32, 23), Image.Resampling.BICUBIC))
    return np.pad(smaller, ((4, 5), (0, 0), (0, 0)))


def test_hpsv2_sees_the_whole_image() -> None:
    """A square one is only made smaller; a high one has its stripes at the sides."""
    square = IMAGES[:, :, :40]
    expected = [np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC)) for one in square]
    assert (fitted(square, 32) == np.stack(expected)).all()
    assert (fitted(IMAGES, 32) == np.stack([striped(one) for one in IMAGES])).all()
    high = fitted(IMAGES.transpose(0, 2, 1, 3).copy(), 32)
    assert (high[:, :, :4] == 0).all()
    assert (high[:, :, 27:] == 0).all()
    assert high[:, :, 4:27].std() > 10
    assert fitted(IMAGES[:0], 32).shape == (0, 32, 32, 3)


def test_hpsv2_is_the_published_cosine(hps: Path) -> None:
    """By hand with the weights as open_clip names them. `scale` multiplies it."""
    tokenizer = CLIPTokenizer.from_pretrained(hps)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    seen = pixels(hps, [striped(image) for image in IMAGES])
    expected = published.open_clip_cosines(published.open_clip(), seen, tokens, END).detach().numpy()
    reward = REWARDS.build("hpsv2", source=str(hps), batch_size=2)
    found = reward(IMAGES, PROMPTS)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.std() > 0.01
    assert "100 times HPS v2.1" in (scaled := REWARDS.build("hpsv2", source=str(hps), scale=100)).unit
    assert scaled(IMAGES, PROMPTS) == pytest.approx(100 * expected, abs=1e-4)
    testing.check_reward("hpsv2", source=str(hps))


def test_image_reward_is_the_published_number(image_reward: Path) -> None:
    """By hand with the weights as published. One prompt is longer than what is read, one empty, one upper case."""
    prompts = [
        "a red circle",
        "three BLUE squares",
        "",
        "a green triangle above a red square " * 9,
        "a painting of Zürich",
    ]
    scorer = blip_folder.Scorer("", image_reward, torch.float32)
    tokens, mask = scorer.tokenize(prompts)
    assert tokens.shape == (5, 35)
    assert [published.WORDS[number] for number in tokens[1][:5]] == ["[CLS]", "three", "blue", "squares", "[SEP]"]
    assert [int(each.sum()) for each in mask] == [5, 5, 2, 35, 9]
    expected = published.image_rewards(published.image_reward(), pixels(image_reward), tokens, mask).numpy()
    reward = REWARDS.build("image_reward", source=str(image_reward))
    found = reward(IMAGES, prompts)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found.std() > 0.01
    assert reward(IMAGES[:1].repeat(5, 0), prompts).std() > 0.01
    testing.check_reward("image_reward", source=str(image_reward))


@pytest.mark.parametrize(("dtype", "tolerance"), [("auto", 1e-5), ("bfloat16", 0.1), ("float16", 1e-5)])
def test_image_reward_in_a_lower_precision_is_close(image_reward: Path, dtype: str, tolerance: float) -> None:
    """bfloat16 by its rounding; the head stays in float32."""
    expected = REWARDS.build("image_reward", source=str(image_reward))(IMAGES, PROMPTS)
    found = REWARDS.build("image_reward", source=str(image_reward), dtype=dtype, device="cpu")(IMAGES, PROMPTS)
    assert found == pytest.approx(expected, abs=tolerance)


def test_image_reward_halves_a_batch_that_does_not_fit(image_reward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all rewards with a network do; memory for no image is one error."""
    expected = REWARDS.build("image_reward", source=str(image_reward))(IMAGES, PROMPTS)
    forward, tried, most = blip_folder.ImageRewardModel.forward, list[int](), [2]

    def bounded(self: Any, images: torch.Tensor, *more: Any) -> torch.Tensor:
        tried.append(len(images))
        if len(images) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, *more)

    monkeypatch.setattr(blip_folder.ImageRewardModel, "forward", bounded)
    reward = REWARDS.build("image_reward", source=str(image_reward))
    assert reward(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert tried == [5, 3, 2, 2, 1]
    most[0] = 0
    with pytest.raises(RewardError, match="memory: is too small for one image"):
        reward(IMAGES, PROMPTS)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_makes_the_same_folders(place: Path, hps: Path, image_reward: Path, like: Path) -> None:
    """Byte for byte, in its process. Nothing else is left beside them."""
    for kind, made, given in (("hpsv2", hps, like), ("image_reward", image_reward, place / "bert-base-uncased")):
        file, again = place / KINDS[kind][0], place / f"{kind}-again"
        answer = convert(kind, file, again, given)
        assert answer["network_refused_by"] in {isolation.NAMESPACE, isolation.HOOK}
        names = sorted(path.name for path in made.iterdir())
        assert sorted(path.name for path in again.iterdir()) == names
        assert all((again / name).read_bytes() == (made / name).read_bytes() for name in names)
    assert not list(place.glob(".latentac-convert-*"))


def test_the_record_of_a_conversion_says_what_was_read(place: Path, hps: Path) -> None:
    """sha256 of what was read and of what was written, in the folder too."""
    record = json.loads((hps / "conversion.json").read_text())
    assert record["from"] == "HPS_v2.1_compressed.pt"
    for name, file in (("sha256_from", place / record["from"]), ("sha256_weights", hps / "model.safetensors")):
        digest = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True).stdout.split()[0]
        assert record[name] == digest
    assert not list(hps.glob("*.pt"))


def test_names_of_open_clip_become_those_of_the_library() -> None:
    """The projections transposed, and query, key and value apart."""
    state = published.open_clip()
    found = clip_tensors(state)
    assert torch.equal(found["visual_projection.weight"], state["visual.proj"].T)
    fused = state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    begin = "vision_model.encoder.layers.1.self_attn."
    assert torch.equal(torch.cat([found[f"{begin}{part}_proj.weight"] for part in "qkv"]), fused)
    assert found["text_model.encoder.layers.0.mlp.fc2.bias"] is state["transformer.resblocks.0.mlp.c_proj.bias"]


# The command


@pytest.mark.slow
def test_the_command_of_the_message_converts_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """As the error message has it, from the working folder. It prints what it did, and overwrites nothing."""
    from tests.latentac.rewards.test_clip_rewards import published_head

    monkeypatch.chdir(tmp_path)
    state = {f"layers.{name}": tensor for name, tensor in published_head(24).state_dict().items()}
    published.pickled(state, tmp_path / "sac+logos.pth")
    clip = miniatures.clip(tmp_path / "clip")
    with pytest.raises(ConfigError) as caught:
        REWARDS.build("aesthetic", source=str(clip), head="sac+logos.pth").fetch()
    words = caught.value.problems[0].remedy.partition("convert-weights")[2].split()
    assert main(["convert-weights", *words]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["to"] == "sac+logos.safetensors"
    assert answer["network_refused_by"] in {isolation.NAMESPACE, isolation.HOOK}
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file("sac+logos.safetensors").items())
    assert REWARDS.build("aesthetic", source=str(clip), head="sac+logos.safetensors")(IMAGES, PROMPTS).std() > 0
    assert main(["convert-weights", *words]) == 2
    assert "is there, and nothing is overwritten" in capfd.readouterr().err


def test_what_is_missing_is_told_together(tmp_path: Path) -> None:
    """Before a process is started."""
    with pytest.raises(ConfigError) as caught:
        convert("hpsv2", tmp_path / "none.pt", tmp_path)
    assert [problem.path for problem in caught.value.problems] == ["from", "to", "like"]
    assert "laion/CLIP-ViT-H-14" in caught.value.problems[2].remedy
    with pytest.raises(ConfigError, match="is not used by aesthetic"):
        convert("aesthetic", tmp_path / "none.pt", tmp_path / "new", tmp_path)
    with pytest.raises(ConfigError, match="Use one of hpsv2, image_reward, aesthetic"):
        convert("clip", tmp_path / "none.pt", tmp_path / "new")


CODE = "type('Evil', (), {'__reduce__': lambda self: (__import__('os').system, ('touch %s',))})()"
PICKLES: dict[str, tuple[str, str, str]] = {
    "code": ("hpsv2", f"{{'state_dict': {CODE}}}", "can be read without running code"),
    "other tensors": ("hpsv2", "{'state_dict': {'lm_head': torch.zeros(2)}}", "'lm_head', which the published file"),
    "no key": ("hpsv2", "state", "holds no tensors where the published file has them"),
    "a list": ("image_reward", "[torch.zeros(2)]", "holds a list, not tensors by name"),
    "no tensor": ("image_reward", "{'mlp.layers.0.weight': 3}", "'mlp.layers.0.weight', which is no tensor"),
    "half": ("image_reward", "{'mlp.layers.0.bias': torch.zeros(1024)}", "lacks tensors of ImageReward"),
    "nan": ("hpsv2", "{'state_dict': {**state, 'ln_final.bias': torch.full((32,), float('nan'))}}", "is not finite"),
    "a shape": (
        "hpsv2",
        "{'state_dict': {**state, 'visual.proj': torch.zeros(32, 25)}}",
        r"visual_projection.weight is \[25, 32\] in it, and \[24, 32\] in the model",
    ),
    "a layer": (
        "hpsv2",
        "{'state_dict': {name: one for name, one in state.items() if 'resblocks.1.ln_2' not in name}}",
        "layer_norm2.bias is missing in it",
    ),
    "a head": ("aesthetic", "{'layers.0.weight': torch.zeros(1024, 24)}", "layers.0.bias is missing in it"),
}


@pytest.fixture(scope="module")
def pickles(place: Path) -> Path:
    """Each of PICKLES, all written by one process."""
    (place / "bad").mkdir()
    wraps = {name: wrap.replace("%s", str(place / "touched")) for name, (_, wrap, _) in PICKLES.items()}
    body = ", ".join(f"{name!r}: {wrap}" for name, wrap in wraps.items())
    each = f"[torch.save(one, {str(place / 'bad')!r} + '/' + name) for name, one in {{{body}}}.items()]"
    published.pickled(published.open_clip(), place / "all.pt", f"len({each})")
    return place / "bad"


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_another_kind_is_one_error(pickles: Path, like: Path, tmp_path: Path, name: str) -> None:
    """Nothing that a pickle asks for is called. Here in this process, to be quick."""
    kind, _, words = PICKLES[name]
    with pytest.raises(ConfigError, match=words) as caught:
        make(kind, pickles / name, tmp_path / "made", like)
    assert caught.value.problems[0].path == "from"
    assert not (pickles.parent / "touched").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_pickle_with_code_leaves_nothing(pickles: Path, like: Path, tmp_path: Path) -> None:
    """By the command, whose process tells the same error. Its module refuses to run where there is a network."""
    with pytest.raises(ConfigError, match="can be read without running code"):
        convert("hpsv2", pickles / "code", tmp_path / "made", like)
    assert not (pickles.parent / "touched").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError, match="without a network alone"):
        checkpoints.main(["{}"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(100), b"\x80\x04\x95\x05\x00\x00\x00"])
def test_a_file_of_garbage_is_one_error(tmp_path: Path, content: bytes) -> None:
    """As a download that was cut off, or an error page."""
    (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(ConfigError, match="is no checkpoint that can be read"):
        make("aesthetic", tmp_path / "head.pth", tmp_path / "head.safetensors", tmp_path)


def test_a_process_that_is_ended_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel where memory is too small: here by a Python that has none."""
    (tmp_path / "head.pth").write_bytes(b"x")
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ResourceError, match=r"ended with -9"):
        convert("aesthetic", tmp_path / "head.pth", tmp_path / "head.safetensors")


def test_the_help_names_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """The kinds and the models beside them, which are listed where no torch is imported."""
    with pytest.raises(SystemExit):
        main(["convert-weights", "--help"])
    text = "".join(capsys.readouterr().out.split())
    for kind, (file, model) in KINDS.items():
        assert {part in text for part in (kind, file, model)} == {True}
    assert "--like bert-base-uncased" in command("image_reward", "ImageReward.pt")


# Folders

BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no tokenizer": ("image_reward", without("vocab.txt"), "tokenizer: has no vocab.txt, which is that of google-bert"),
    "garbled tokenizer": (
        "image_reward",
        lambda folder: (folder / "vocab.txt").write_bytes(b"\xff\xfe\x00"),
        "vocab.txt is no text",
    ),
    "another tokenizer": (
        "image_reward",
        lambda folder: (folder / "vocab.txt").write_text("a\nb\n"),
        r"vocab.txt has no token \[PAD\]",
    ),
    "large tokenizer": (
        "image_reward",
        lambda folder: (folder / "vocab.txt").write_text("\n".join([*published.WORDS, "one", "two", "three"])),
        "has 27 tokens, and text_config.vocab_size is 26",
    ),
    "no image settings": ("image_reward", without("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "other images": ("image_reward", changed("preprocessor_config.json", crop_size=24), "make 24 x 24 pixels"),
    "no weights": ("image_reward", without("model.safetensors"), "has no weights"),
    "another class": ("image_reward", changed("config.json", architectures=["BlipModel"]), "says BlipModel, and only"),
    "clip without tokenizer": ("hpsv2", without("vocab.json"), "has neither tokenizer.json nor vocab.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_used_is_one_error(hps: Path, image_reward: Path, tmp_path: Path, name: str) -> None:
    """Of `fetch`, before anything is loaded."""
    use, spoil, words = BROKEN[name]
    folder = Path(shutil.copytree(hps if use == "hpsv2" else image_reward, tmp_path / "copy"))
    spoil(folder)
    (reward,) = load_rewards([Reward.model_validate({"use": use, "source": str(folder), "name": "mine"})])
    with pytest.raises(ConfigError, match=words) as caught:
        fetch_rewards([reward])
    assert caught.value.problems[0].path == "rewards.mine.source"
    assert caught.value.problems[0].remedy


@pytest.mark.parametrize(("use", "name"), [("hpsv2", "HPS_v2.1_compressed.pt"), ("image_reward", "ImageReward.pt")])
def test_a_pickle_is_refused_with_the_command(tmp_path: Path, use: str, name: str) -> None:
    """As a file, there or not, and as a folder with it alone."""
    for source in (tmp_path / name, tmp_path / "absent.pt"):
        with pytest.raises(ConfigError, match=f"pickles can run code and are never loaded.*--kind {use} --from"):
            REWARDS.build(use, source=str(source)).fetch()
    with pytest.raises(RewardError, match=f"convert-weights --kind {use}"):
        REWARDS.build(use, source=str(tmp_path / name))(IMAGES, PROMPTS)
    with pytest.raises(ConfigError, match=f"is not a folder here.*convert-weights --kind {use}"):
        REWARDS.build(use, source=str(tmp_path / "absent")).fetch()


@pytest.mark.parametrize(
    ("use", "tensor", "change", "words"),
    [
        ("image_reward", "head.7.bias", lambda one: one * float("nan"), "returned nan"),
        ("hpsv2", "visual_projection.weight", lambda one: one * float("nan"), "returned nan"),
        ("image_reward", "head.0.weight", lambda one: one[:, :32], "ImageRewardModel: cannot be loaded"),
        ("image_reward", "text.encoder.layer.1.crossattention.self.key.bias", None, "lacks text.encoder"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    hps: Path, image_reward: Path, tmp_path: Path, use: str, tensor: str, change: Any, words: str
) -> None:
    """Of the first call, with the reward's name."""
    folder = Path(shutil.copytree(hps if use == "hpsv2" else image_reward, tmp_path / "copy"))
    held = load_file(folder / "model.safetensors")
    values = held.pop(tensor)
    save_file(held | ({} if change is None else {tensor: change(values).contiguous()}), folder / "model.safetensors")
    (reward,) = load_rewards([Reward.model_validate({"use": use, "source": str(folder)})])
    with pytest.raises(RewardError, match=rf"reward {use}.*{words}"):
        reward(IMAGES, [Prompt(text) for text in PROMPTS])


# The process without a network

PROBE = """
import socket, subprocess, sys
from latentac.system import isolation
if sys.argv[1] == "hook":
    isolation._separated = lambda: False
print(isolation.leave_network())
for work in (lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 5), lambda: subprocess.run(["true"])):
    try:
        work()
    except PermissionError as error:
        print("refused")
libc = __import__("ctypes").CDLL(None)
address = (2).to_bytes(2, "little") + int(sys.argv[2]).to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
print(libc.connect(libc.socket(2, 1, 0), address, 16))
"""


@pytest.mark.parametrize("held", ["kernel", "hook"])
def test_the_process_has_no_network(held: str) -> None:
    """With a namespace not even a call of the kernel reaches a server that listens; the hook holds Python alone, and
    says so."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        words = [sys.executable, "-c", PROBE, held, str(server.getsockname()[1])]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=os.getcwd())
    first, *refused, direct = done.stdout.splitlines()
    assert refused == ["refused", "refused"]
    if held == "hook":
        assert (first, direct) == (isolation.HOOK, "0")
    elif first == isolation.NAMESPACE:  # else the kernel does not let this user make one
        assert direct == "-1"
