"""The model card: what it says is so, it can be told apart, and it leads nowhere that is gone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentac.config.recipes import RECIPES
from latentac.config.schema import Card, Config
from latentac.runs.release.gate import markdown
from latentac.runs.reporting.card import base_model, folder_card, model_card, sections, use_section
from latentac.runs.resolution import resolve_all
from tests.latentac.published import PROMPTS, STEPS, contents, publish

TEXTS = {"data": "the embedded world's captions", "intended_use": "to try *things*", "limits": "32 pixels"}


def facts(**changed: Any) -> dict[str, Any]:
    """Of a run of 30 iterations with 256 images each: 7,680."""
    interval = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 8}
    return {
        "run": "run-1",
        "recipe": "shapes-unet",
        "seed": 0,
        "commit": "3f1c2a9d",
        "settings": resolve_all(RECIPES["shapes-unet"]).config.model_dump(),
        "evaluation": {
            **{arm: {"shapes_verifier": interval, "gone": None} for arm in ("base", "trained", "difference")},
            "units": {"shapes_verifier": "share that is right", "gone": None},
        },
        "training": [
            {"iteration": step, "images": 256 * step, "reward_mean": step / 60, "seconds": 5.0} for step in range(1, 31)
        ],
        "steering": [
            {"method": "value_gradient", "strength": strength, "particles": 1, "nfe": 24, "reward": "shapes_verifier"}
            | interval
            for strength in (10.0, 20.0, 30.0)
        ],
        "gate": {"decision": "promote", "reasons": ["it gained"]},
        "serving": {"version": "run-1-3f1c2a9d", "endpoint": "http://127.0.0.1:43817"},
        **changed,
    }


def readme(**changed: Any) -> str:
    return folder_card(facts(**changed), "StableDiffusionPipeline", use_section("draw()"), "")


def front_matter(text: str) -> Any:
    return yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0])


def test_images_are_counted_once() -> None:
    """An iteration's `images` counts those before it too: 30 of 256 are 7,680 and not their sum, 119,040."""
    card = model_card(facts())
    assert "| images scored in training | 7680 |" in card
    assert "119040" not in card


def test_arms_of_one_method_are_distinguished() -> None:
    """Value gradients of three strengths are three different rows."""
    rows = [line for line in model_card(facts()).splitlines() if line.startswith("| `value_gradient`")]
    assert len(set(rows)) == 3


def test_no_address_of_a_server_that_is_gone() -> None:
    """The endpoint that proved the model ended with the proof."""
    for text in (model_card(facts()), readme()):
        assert "43817" not in text
        assert "Served as version `run-1-3f1c2a9d`" in text


def test_rewards_have_unit_weight_and_both_means() -> None:
    """Before, after, and the difference, each with its interval; what was not measured is not a number."""
    card = model_card(facts())
    row = "| `shapes_verifier` | share that is right | 1 |" + " 0.400 [0.300, 0.500] |" * 3
    assert row in card
    assert "| `gone` |  |  | – | – | – |" in card


def test_an_address_from_outside_becomes_no_link() -> None:
    """What renders Markdown makes links of bare addresses too."""
    found = "see https://evil.example, www.evil.example or me@evil.example"
    decision = {"decision": "hold", "reasons": [found], "checks": []}
    for text in (model_card(facts(gate=decision)), markdown(decision | {"former": [decision | {"by": found}]}, "r")):
        assert "https\\://evil.example, www\\.evil.example or me\\@evil.example" in text
        assert found not in text


def test_what_comes_from_outside_is_neither_html_nor_markdown() -> None:
    """Units, names, prompts' sources and the gate's reasons are text, on one line, in their cell."""
    evil = 'a|b <img src=x onerror="alert(1)">\n\n# [big](javascript:alert(1)) *bold* _it_ ![](http://x) \x1b[2J\u202e'
    changed = facts(gate={"decision": "hold", "reasons": [evil]}, run=evil, commit=evil)
    changed["evaluation"]["units"]["shapes_verifier"] = evil
    for arm in ("base", "trained", "difference"):
        changed["evaluation"][arm]["<b>`|na\x1bme"] = None
    changed["evaluation"]["units"]["<b>`|na\x1bme"] = None
    changed["settings"]["prompts"]["source"] = "folder/<i>" + evil
    changed["settings"]["policy"]["learning_rate"] = changed["seed"] = evil
    changed["steering"][0] |= {"nfe": evil, "particles": evil}
    changed["training"][-1]["iteration"] = evil
    for text in (model_card(changed), folder_card(changed, "StableDiffusionPipeline", "", "")):
        assert "| `<b>'\\|na\\x1bme` |" in text
        without_code = re.sub(r"`[^`\n]*`", "", text)
        assert not re.search(r"<(?!/?!--)\w", without_code)
        assert not re.search(r"(?<!\\)\[big", text)
        assert len([line for line in text.splitlines() if line.startswith("# ")]) == 1
        assert "\\*bold\\* \\_it\\_" in text
        assert not re.search("[\x1b\u202e]", text)
        for line in text.splitlines():
            if line.startswith("| `shapes_verifier` | a"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 7


@pytest.mark.parametrize(
    ("prose", "written"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;"),
        ("[x](javascript:alert(1))", "[x](javascript%3Aalert"),
        ("[x]( JavaScript\\:alert(1))", "[x]( JavaScript%3Aalert"),
        ("[x]\n\n[x]: data:text/html,hello", "[x]: data%3Atext"),
        ("data: the captions", "data: the captions"),
        ("# Limits\n\n ## More\n\n#", "\\# Limits\n\n \\## More\n\n\\#"),
        ("Limits\n===\n\nMore\n---", "Limits\n\\===\n\nMore\n\\---"),
        ("a \x1b[2J \u202e b", "a \\x1b[2J \\u202e b"),
        ("- one\n- *two*\n\n[ours](https://x)", "- one\n- *two*\n\n[ours](https://x)"),
    ],
)
def test_prose_is_markdown_that_stays_in_its_section(prose: str, written: str) -> None:
    """No HTML, no link that runs code, no heading; the rest is as it was written."""
    settings = resolve_all({**RECIPES["shapes-unet"], "card": {"data": prose}}).config.model_dump()
    section = model_card(facts(settings=settings)).split("## Data\n")[1].split("\n## ")[0]
    assert written in section
    assert "<script" not in section


@pytest.mark.parametrize(
    "licence", ["a: b", "---", "x\n---\n# y", "`|[x](y)", "\x1b\x7f\x85\u2028\u202e", "'\"\\", "é😀"]
)
def test_the_front_matter_survives_every_licence(licence: str) -> None:
    """It reads back as it was given, and no character in it steers a terminal."""
    settings = {**facts()["settings"], "card": {"licence": licence}}
    text = readme(settings=settings)
    assert front_matter(text)["license"] == licence
    assert not re.search("[\x1b\x7f\x85\u2028\u202e]", text)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    """YAML with licence, base, task, library, tags and data; of an adapter it says so."""
    settings = resolve_all(
        {**RECIPES["shapes-unet"], "card": {"licence": "openrail: +", "datasets": ["a/b"], "base_model": "c/d"}}
    ).config.model_dump()
    found = front_matter(readme(settings=settings))
    assert found == {
        "license": "openrail: +",
        "base_model": "c/d",
        "base_model_relation": "finetune",
        "datasets": ["a/b"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "latentac", "reinforcement-learning", "stable-diffusion"],
    }
    found = front_matter(folder_card(facts(), "StableDiffusion3Pipeline", "", use_section("draw()", adapter=True)))
    assert found["license"] == "unknown"
    assert "base_model" not in found
    assert {"stable-diffusion-3", "lora"} < set(found["tags"])


def test_what_nobody_has_said_is_called_unknown() -> None:
    """The section `card` says what a run cannot know; without it the card says where to."""
    card = readme()
    assert "`card.data`" in card
    assert "unknown: `card.licence`" in card
    assert "not checked by a safety filter" in card
    settings = resolve_all({**RECIPES["shapes-unet"], "card": TEXTS}).config.model_dump()
    found = readme(settings=settings)
    for heading, text in (("Data", "data"), ("Intended use", "intended_use"), ("Limits", "limits")):
        assert f"## {heading}\n\n{TEXTS[text]}" in found
    assert Config.model_fields["card"].default == Card()


def test_a_folder_of_this_machine_is_named_without_its_place() -> None:
    """The card goes where that folder is not."""
    settings = facts()["settings"]
    settings["backbone"]["source"] = "/data/someone/tiny-sd"
    settings["prompts"]["source"] = "/data/someone/prompts.jsonl"
    text = readme(settings=settings)
    assert "/data" not in text
    assert "tiny-sd" in text
    assert "prompts.jsonl" in text
    assert base_model({"backbone": {"source": "org/model"}}) == "org/model"


def test_the_call_stands_first_and_is_taken_over() -> None:
    """How to draw comes before all else; a release takes those sections from the card that training wrote."""
    use, adapter = use_section("# a comment\ndraw()"), use_section("load()", adapter=True)
    text = folder_card(facts(), "StableDiffusionPipeline", use, adapter)
    assert text.split("---\n")[2].startswith("\n# run-1\n\n## Use with diffusers")
    assert sections(text) == (use, adapter)
    assert sections(readme()) == (use_section("draw()"), "")
    former = text.replace("## Use with diffusers", "## Draw with diffusers")
    assert sections(former)[0].startswith("## Draw with diffusers"), "the card of an earlier version"
    assert "latentac generate" in use_section("")


def test_a_runs_card_and_its_folders_say_the_same(tmp_path: Path) -> None:
    """One text for both, from the summary that the report writes too."""
    from latentac.runs.steps import finish

    files = contents(PROMPTS)
    _, url = publish(tmp_path, {step: files[step] for step in STEPS}, PROMPTS)
    finish("run-1", url, str(tmp_path / "runs"))
    card = (tmp_path / "runs" / "run-1" / "card.md").read_text()
    summary = json.loads((tmp_path / "runs" / "run-1" / "summary.json").read_text())
    assert card.split("\n", 1)[1].strip() in folder_card(summary, "StableDiffusionPipeline", "", "")
