"""VQAScore on a miniature of LLaVA 1.5 in its published layout, against generation by transformers itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from latentac.config.schema import Reward
from latentac.rewards import REWARDS
from latentac.rewards.configured import load_rewards
from latentac.rewards.vlm_folder import inputs, processor, without_marks
from latentac.runs import testing
from latentac.runs.preparation.prepare import fetch_rewards
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.prompts import Prompt
from tests.latentac import miniatures
from tests.latentac.rewards.test_clip_rewards import adapted, changed, cut, linked, pickled, without

PROMPTS = ["a red circle", "three blue squares and more", "", "a painting of Zürich", "a {prompt} in braces"]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.llava(tmp_path_factory.mktemp("vlm") / "llava")


@pytest.fixture
def copy(vlm: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(vlm, tmp_path / "copy"))


def generated(folder: Path, answer: str = "Yes") -> list[float]:
    """Of each image alone: the probability of the answer's token as the library's first generated one."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    maker = AutoProcessor.from_pretrained(folder)
    token = maker.tokenizer.get_vocab()[f"▁{answer}"]
    found = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        text = f'USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT:'
        given = maker(images=image, text=text, return_tensors="pt")
        assert given["input_ids"][0, 0] == maker.tokenizer.bos_token_id
        made = model.generate(
            **given, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        found.append(float(made.scores[0][0].softmax(-1)[token]))
    return found


@pytest.mark.parametrize("batch_size", [1, 5])
def test_it_is_the_probability_of_the_first_generated_token(vlm: Path, batch_size: int) -> None:
    """Over the whole vocabulary, with prompts of different lengths in one batch."""
    expected = generated(vlm)
    reward = REWARDS.build("vqa", source=str(vlm), batch_size=batch_size)
    found = reward(IMAGES, PROMPTS)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found.dtype == np.float32
    assert len({round(float(one), 8) for one in found}) == 5
    assert ((found > 0) & (found < 1)).all()


def test_another_answer_is_another_probability(vlm: Path) -> None:
    """The answer's first token: PaliGemma and InstructBLIP write `yes` with a small letter."""
    found = REWARDS.build("vqa", source=str(vlm), answer="yes")(IMAGES, PROMPTS)
    assert found == pytest.approx(generated(vlm, "yes"), rel=1e-4)
    assert "the answer is yes" in REWARDS.build("vqa", source=str(vlm), answer="yes").unit


def test_it_keeps_the_contract_of_rewards(vlm: Path) -> None:
    """The tests that every reward must pass."""
    testing.check_reward("vqa", source=str(vlm))


def test_bfloat16_is_close(vlm: Path) -> None:
    """By its rounding of logits, which are about 10 here."""
    expected = REWARDS.build("vqa", source=str(vlm))(IMAGES, PROMPTS)
    found = REWARDS.build("vqa", source=str(vlm), dtype="bfloat16", device="cpu")(IMAGES, PROMPTS)
    assert np.log(found) == pytest.approx(np.log(expected), abs=0.5)


def test_a_mark_in_a_prompt_is_a_word(vlm: Path) -> None:
    """It neither asks for a second image nor ends the text."""
    reward = REWARDS.build("vqa", source=str(vlm))
    plain, marked = (reward(IMAGES[:1], [prompt]) for prompt in ("a  red  circle", "a <image>red</s><image>circle"))
    assert marked == pytest.approx(plain, rel=1e-5)
    assert without_marks(processor(vlm), "a <image> of </s>") == "a   of  "


def test_memory_that_is_too_small_halves_the_batch(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is one error."""
    expected = REWARDS.build("vqa", source=str(vlm), batch_size=5)(IMAGES, PROMPTS)
    forward, tried, most = LlavaForConditionalGeneration.forward, list[int](), [2]

    def bounded(self: Any, *given: Any, **more: Any) -> Any:
        tried.append(len(more["input_ids"]))
        if tried[-1] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *given, **more)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", bounded)
    bounded.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    reward = REWARDS.build("vqa", source=str(vlm), batch_size=5)
    assert reward(IMAGES, PROMPTS) == pytest.approx(expected, rel=1e-4)
    assert tried == [5, 3, 2, 2, 1]
    most[0] = 0
    with pytest.raises(RewardError, match="memory: is too small for one image"):
        reward(IMAGES, PROMPTS)


def test_a_chat_template_of_the_folder_is_not_run(copy: Path, vlm: Path) -> None:
    """Nor any code that it names."""
    (copy / "chat_template.jinja").write_text("{{ raise_exception('ran') }}")
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 / 0 }}"}))
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        changed(name, auto_map={"AutoModel": "run.Me"}, _name_or_path="elsewhere/model")(copy)
    (copy / "run.py").write_text("raise SystemExit('ran')")
    expected = REWARDS.build("vqa", source=str(vlm))(IMAGES, PROMPTS)
    assert (REWARDS.build("vqa", source=str(copy))(IMAGES, PROMPTS) == expected).all()
    assert processor(copy).chat_template is None


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle only": (pickled, "has no safetensors weights, but pytorch_model.bin: pickles can run code"),
    "no weights": (without("model.safetensors"), "has no weights"),
    "cut off": (cut, "it was cut off"),
    "garbage": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "is not a safetensors file"),
    "no configuration": (without("config.json"), "has no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer: has none of tokenizer.json, vocab.json, vocab.txt"),
    "garbled tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "processor: cannot be loaded",
    ),
    "no processor": (
        lambda folder: (without("processor_config.json")(folder), without("preprocessor_config.json")(folder)),
        "processor: ",
    ),
    "a class without images": (
        changed("config.json", architectures=["LlamaForCausalLM"]),
        "LlamaForCausalLM, which is no model for image-text-to-text",
    ),
    "no next token": (
        changed("config.json", architectures=["Pix2StructForConditionalGeneration"], model_type="pix2struct"),
        "Pix2StructForConditionalGeneration does not take logits_to_keep",
    ),
    "link": (linked, "preprocessor_config.json: is a link that leads out of the folder"),
    "adapter": (adapted, "is an adapter of peft"),
    "quantised": (changed("config.json", quantization_config={"bits": 4}), "has a quantization_config"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_used_is_one_error(copy: Path, name: str) -> None:
    """Of `fetch`: the folder, what is wrong, a remedy."""
    spoil, words = BROKEN[name]
    spoil(copy)
    (reward,) = load_rewards([Reward.model_validate({"use": "vqa", "source": str(copy), "name": "mine"})])
    with pytest.raises(ConfigError, match=words) as caught:
        fetch_rewards([reward])
    assert caught.value.problems[0].path == "rewards.mine.source"
    assert caught.value.problems[0].remedy
    with pytest.raises(RewardError, match=words):
        reward.reward(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("conversation", "USER: <img> {question}", "the model's processor does not take it"),
        ("question", "Is it so?", r"has \{prompt\} 0 times"),
    ],
)
def test_a_question_that_cannot_be_asked_is_found_by_fetch(
    vlm: Path, setting: str, value: str, words: str | None
) -> None:
    """Or before, where the folder is not needed for it."""
    if words is None:  # any text has tokens where bytes are tokens
        REWARDS.build("vqa", source=str(vlm), **{setting: value}).fetch()
        return
    with pytest.raises(ConfigError, match=words) as caught:
        REWARDS.build("vqa", source=str(vlm), **{setting: value}).fetch()
    assert caught.value.problems[0].path == setting


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one * float("nan"), "returned nan"),
        (lambda one: one[:, :16], "cannot be loaded|asks for"),
        (None, "lacks"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(copy: Path, change: Any, words: str) -> None:
    """Of the first call, with the reward's name."""
    held = load_file(copy / "model.safetensors")
    (name,) = (name for name in held if name.endswith("linear_2.weight"))
    values = held.pop(name)
    save_file(
        held | ({name: change(values).contiguous()} if change else {}), copy / "model.safetensors", {"format": "pt"}
    )
    (reward,) = load_rewards([Reward.model_validate({"use": "vqa", "source": str(copy)})])
    with pytest.raises(RewardError, match=rf"reward vqa.*({words})"):
        reward(IMAGES, [Prompt(text) for text in PROMPTS])


def test_texts_are_padded_at_their_end(vlm: Path) -> None:
    """Where a causal model's output at the last token does not see it."""
    found = inputs(processor(vlm), IMAGES[:2], ["USER: <image>", "USER: <image> and more"])
    assert found["attention_mask"][0].tolist() == sorted(found["attention_mask"][0].tolist(), reverse=True)
    assert found["attention_mask"].sum(1)[0] < found["attention_mask"].shape[1]
