"""Prompts: every format, what is refused and where, the split, and sets of many thousands."""

import csv
import io
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentac.config.schema import Prompts
from latentac.runs.steps import prepare
from latentac.runs.workspace import open_run
from latentac.system.errors import ConfigError, IntegrityError
from latentac.worlds.prompts import Prompt, balanced, load_prompts
from latentac.worlds.prompttext import PATTERN, text_problem

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a photo of three clocks",
    },
]
OCR = ['A bus stop sign that reads "Line 7 Delayed", at night', 'A café menu with "Crème Brûlée" in chalk']


def written(folder: Path, content: dict[str, str | bytes]) -> Path:
    for name, text in content.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def refused(source: Path, **settings: Any) -> list[str]:
    """What is told of it, a line a problem."""
    with pytest.raises(ConfigError) as caught:
        load_prompts(Prompts(source=str(source), **settings))
    return str(caught.value).splitlines()


ENTRIES = {
    "json": json.dumps(["a cat", {"text": "a dog", "category": "pets", "colour": "brown"}]),
    "jsonl": '"a cat"\r\n{"prompt": "a dog", "tag": "pets", "metadata": {"colour": "brown"}}\r\n\r\n',
    "ndjson": '"a cat"\n{"text": "a dog", "category": "pets", "colour": "brown"}',
    "csv": "Prompt,Tag,colour\r\na cat,,\r\na dog,pets,brown\r\n",
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", list(ENTRIES))
def test_a_list_is_read_in_every_format_with_or_without_a_byte_order_mark(
    tmp_path: Path, ending: str, mark: str
) -> None:
    """The same two prompts, one with a category and metadata, whatever ends the lines."""
    found = load_prompts(str(written(tmp_path, {f"p.{ending}": mark + ENTRIES[ending]}) / f"p.{ending}"))
    assert {*found.train, *found.held_out} == {Prompt("a cat"), Prompt("a dog", "pets", {"colour": "brown"})}


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    """White space around it is none of it, and empty lines at the end are not prompts."""
    found = load_prompts(str(written(tmp_path, {"p.TXT": "\ufeff a cat \r\na dog, and a cat\r\n\r\n"}) / "p.TXT"))
    assert {prompt.text for prompt in found.train + found.held_out} == {"a cat", "a dog, and a cat"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_read_as_spreadsheets_write_it(tmp_path: Path, separator: str) -> None:
    """Commas, semicolons or tabs; quoted separators, quotes and line breaks; a column of JSON metadata."""
    rows = [
        ["text", "category", "metadata", "target"],
        [f'a "{separator}" sign', "ocr", '{"n": [1]}', "x"],
        ["a\r\ncat", "", "", ""],
    ]
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator).writerows(rows)
    found = load_prompts(str(written(tmp_path, {"p.csv": buffer.getvalue()}) / "p.csv"))
    expected = {Prompt(f'a "{separator}" sign', "ocr", {"n": [1], "target": "x"}), Prompt("a\r\ncat")}
    assert {*found.train, *found.held_out} == expected


def test_genevals_and_ocrs_public_formats_load_unchanged(tmp_path: Path) -> None:
    """GenEval's tag is the category and the rest is metadata; OCR's quoted text stays in the prompt."""
    found = load_prompts(
        str(written(tmp_path, {"train_metadata.jsonl": lines(GENEVAL[0]), "test_metadata.jsonl": lines(GENEVAL[1])}))
    )
    assert found.train == (
        Prompt("a photo of a bench", "single_object", {"include": [{"class": "bench", "count": 1}]}),
    )
    (second,) = found.held_out
    assert (second.category, set(second.metadata)) == ("counting", {"include", "exclude"})
    (tmp_path / "ocr").mkdir()
    ocr = load_prompts(str(written(tmp_path / "ocr", {"train.txt": OCR[0] + "\n", "test.txt": OCR[1] + "\n"})))
    assert (ocr.train, ocr.held_out) == ((Prompt(OCR[0]),), (Prompt(OCR[1]),))


def test_metadata_survives_what_prepare_publishes(tmp_path: Path) -> None:
    """Whatever its keys are called; and a set without any is written as it always was."""
    entry = {"prompt": "a cat", "text": "a word", "category": "c", "tag": "t", "metadata": {"metadata": {"x": 1.5}}}
    found = load_prompts(str(written(tmp_path, {"p.jsonl": lines(entry, "a dog")}) / "p.jsonl"))
    cat = Prompt("a cat", "c", {"text": "a word", "tag": "t", "metadata": {"x": 1.5}})
    assert cat in found.train + found.held_out
    again = load_prompts(str(written(tmp_path, {"prompts.json": found.to_json()}) / "prompts.json"))
    assert (again, again.to_json()) == (found, found.to_json())
    assert '"metadata"' not in load_prompts("builtin:shapes").to_json()


def test_a_prompt_is_a_key(tmp_path: Path) -> None:
    """It is frozen and hashable, metadata and all; another metadata makes another prompt."""
    assert len({Prompt("a", "b", {"x": [1]}), Prompt("a", "b", {"x": [1]}), Prompt("a", "b", {"x": [2]})}) == 2
    with pytest.raises(AttributeError):
        Prompt("a").text = "b"  # type: ignore[misc]


NESTED = '{"text": "a", "x": ' + "[" * 40 + "]" * 40 + "}\n"
BOTTOMLESS = "[" * 200_000 + "]" * 200_000 + "\n"
WRONG_LINES = [
    ('""\n', "is empty"),
    ("\n", "is empty"),
    ('{"prompt": ""}\n', "is empty"),
    ("null\n", "is null"),
    ('{"text": null}\n', "is null"),
    ("3\n", "is a number"),
    ('{"text": 3}\n', "is a number and no text"),
    ('{"text": ["a"]}\n', "is a list and no text"),
    ('{"text": true}\n', "is a truth value and no text"),
    ('" \\t\\u00a0\\u200b"\n', "is nothing but white space"),
    ('{"txt": "a"}\n', "has neither `prompt` nor `text`"),
    ('"a \\ud83d"\n', "has a lone surrogate (U+D83D) at character 3"),
    ('"a\\u0000b"\n', "has a control character (U+0000)"),
    ('"a\\u001bb"\n', "has a control character (U+001B)"),
    ('"a\\u0085b"\n', "has a control character (U+0085)"),
    ('"a\\rb"\n', "has a control character (U+000D)"),
    ('"a\\ufeffb"\n', "has a byte order mark"),
    (json.dumps("a" * 10_001) + "\n", "has 10001 characters"),
    ('{"text": "a", "text": "b"}\n', "has `text` twice"),
    ('{"text": "a", "x": {"y": 1, "y": 2}}\n', "has `y` twice"),
    ('{"text": "a", "x": 1, "metadata": {"x": 2}}\n', "has `x` twice"),
    ('{"text": "a", "metadata": "x"}\n', "is text and no object"),
    ('{"text": "a", "category": null}\n', "is null"),
    ('{"text": "a", "tag": 3}\n', "is a number and no text"),
    ('{"text": "a", "tag": "x\\ny"}\n', "has a control character"),
    ('{"text": "a", "x": NaN}\n', "holds nan"),
    ('{"text": "a", "x": [1e999]}\n', "holds inf"),
    ('{"text": "a", "x": "\\udc00"}\n', "has a lone surrogate"),
    ('{"text": "a", "x": ' + "9" * 5000 + "}\n", "cannot be read as JSON"),
    (NESTED, "is nested more than 32 deep"),
    (BOTTOMLESS, "is nested more than 32 deep"),
    ("{\n", "is not JSON"),
    ("a cat\n", "is not JSON"),
]


@pytest.mark.parametrize(("line", "expected"), WRONG_LINES, ids=[line[:30] for line, _ in WRONG_LINES])
def test_what_is_no_prompt_is_refused_at_its_line(tmp_path: Path, line: str, expected: str) -> None:
    """And in a JSON file, where it is JSON, at its line and index."""
    content = '"a cat"\n' + line + '"a dog"\n'
    (problem,) = refused(written(tmp_path, {"p.jsonl": content}) / "p.jsonl")
    assert "'p.jsonl, line 2" in problem
    assert expected in problem
    if expected not in ("is not JSON", "cannot be read as JSON") and line not in ("\n", BOTTOMLESS):
        source = written(tmp_path, {"p.json": f'{{"train": ["a cat",\n{line}], "held_out": ["a dog"]}}'}) / "p.json"
        (problem,) = refused(source)
        assert "'p.json, line 2, train[1]" in problem
        assert expected in problem


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\t \x00\x1f\u200b\ufeffa")))
def test_the_pattern_is_the_rule(text: str) -> None:
    """What other programs are told about prompts is what is accepted."""
    assert bool(re.search(PATTERN, text)) == (text_problem(text, 10**6) == "")


WRONG_FILES = {
    "p.json": [
        (b'{"train": ["a"], "held_out": ["b"], "val": ["c"]}', "`val`': is not a key of a prompt file"),
        (b'{"train": ["a"]}', "held_out': is missing"),
        (b'{"train": ["a"], "held_out": null}', "held_out': is null and no list"),
        (b'{"train": ["a"], "held_out": {"0": "b"}}', "held_out': is an object and no list"),
        (b'{"train": ["a"], "held_out": []}', "held_out': holds no prompts"),
        (b'{"train": ["a"], "train": ["c"], "held_out": ["b"]}', "has `train` twice"),
        (b'{"train": ["a red  Cat"], "held_out": ["b", "a red cat"]}', "held_out[1]': 'a red cat' is in both splits"),
        (b'"a cat"', "holds text, and no prompts"),
        (b"[]", "holds no prompts"),
        (b'["a"]', "holds one prompt"),
        (b"", "line 1': is not JSON"),
        (b'["a",\n"b"', "line 2': is not JSON"),
        (b'"a"\n"b"\n', "name it .jsonl"),
        (BOTTOMLESS.encode(), "is nested more than 32 deep"),
        ('["a", "b"]'.encode("utf-16"), "is UTF-16, and only UTF-8 is read"),
        ('["a", "b"]'.encode("utf-16-le"), "iconv -f UTF-16LE"),
        ('["a", "b"]'.encode("utf-16-be"), "iconv -f UTF-16BE"),
        ('["a", "b"]'.encode("utf-32"), "is UTF-32, and only UTF-8 is read"),
        ('["a", "b"]'.encode("utf-32-be"), "iconv -f UTF-32BE"),
        (b'\n["a",\n\n {"text": [1, {"]": 2}]}]', "'p.json, line 4, [1]': is a list and no text"),
        (b'{ "held_out" : ["b"] ,\n"train":[ "]",\r\n""]}', "'p.json, line 3, train[1]': is empty"),
        (b'["a", "\xed\xa0\x80"]', "line 1': is not UTF-8"),
    ],
    "p.txt": [
        (b"a\n\nb\n", "line 2': is empty"),
        (b"a\n \t\nb\n", "line 2': is empty"),
        (b"a\nb\0c\n", "line 2': has a control character (U+0000) at character 2"),
        (b"a\rb\rc\n", "line 1': has a control character (U+000D)"),
        (b"a\nb" + b"b" * 20_000, "line 2': has 20001 characters"),
        (b"a\n" + b"b" * 1_000_001, "line 2': has 1000001 characters"),
        (b"a\ncaf\xe9\n", "line 2': is not UTF-8 (byte 0xe9): perhaps Latin-1 or Windows-1252. Save it as UTF-8"),
        (b"a\n\xef\xbb\xbfb\n", "line 2': has a byte order mark"),
        (b"\n", "holds no prompts"),
    ],
    "p.csv": [
        (b"a cat\na dog\n", "line 1': has no column `prompt` or `text`"),
        (b"prompt,prompt\na,b\n", "line 1': names a column twice"),
        (b"prompt,tag\na cat\nb,c\n", "line 2': has 1 cells, and the header 2"),
        (b"prompt\na cat, a dog\nb\n", "line 2': has 2 cells, and the header 1"),
        (b"prompt\na\n\nb\n", "line 3': is empty. Take the line out."),
        (b"prompt\n" + b"a" * 200_000, "line 2': is not CSV: field larger than field limit (131072). Shorten it"),
        (b'prompt,tag\n"a\nb",c\n,d\n', "line 4, prompt': is empty"),
        (b'prompt,tag\na,b\n"c,d\n', "line 3': is not CSV"),
        (b"prompt,metadata\na,b\n", "line 2, metadata': is text and no object"),
        (b'prompt,metadata\na,"' + b"[" * 100_000 + b'"\n', "line 2, metadata': is text and no object"),
        (b"prompt\n", "holds no prompts"),
    ],
    "many.txt": [(b"a\n" * 1_000_001, "has more than 1,000,000 lines. Train on a part of them")],
    "many.jsonl": [(b'"a"\n' * 1_000_001, "has more than 1,000,000 lines")],
    "many.json": [(b"[" + b"[]," * 4_000_001 + b"1]", "has more than 8,000,000 values")],
    "wide.csv": [
        (b"prompt" + b"".join(b",c%d" % i for i in range(30_000)) + b"\na\n" * 300, "has more than 8,000,000 cells")
    ],
    "p.parquet": [(b"PAR1", "is not a supported format: .parquet. Use a file that ends in .json")],
    "prompts": [(b"a", "is not a supported format: no ending")],
}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [(name, content, problem) for name, cases in WRONG_FILES.items() for content, problem in cases],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_file_that_is_none_of_prompts_is_refused_with_the_remedy(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    """Its form, its encoding, its splits."""
    assert any(expected in problem for problem in refused(written(tmp_path, {name: content}) / name))


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.csv", "p.txt"])
def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    """This one has no bytes on the disk, and would fill the memory."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**38)
    (problem,) = refused(tmp_path / name)
    assert "is larger than 256 MiB" in problem


def test_all_problems_of_all_files_are_reported_together(tmp_path: Path) -> None:
    """The first twenty, and how many more there are."""
    folder = written(tmp_path, {"train.jsonl": lines("a", None, 3), "test.txt": "a\n\nb\n"})
    found = refused(folder)
    assert [problem.split(": ")[0] for problem in found] == [
        "prompts.source = 'train.jsonl, line 2'",
        "prompts.source = 'train.jsonl, line 3'",
        "prompts.source = 'test.txt, line 2'",
        "prompts.source = 'test.txt, line 1'",
    ]
    assert "is in both splits: train.jsonl, line 1" in found[-1]
    found = refused(written(tmp_path, {"many.jsonl": "null\n" * 70}) / "many.jsonl")
    assert len(found) == 21
    assert "has 50 more problems" in found[-1]


def test_a_source_that_is_not_there_is_reported(tmp_path: Path) -> None:
    """Also one that no file could be called, one that is not a file, and a built-in set that does not exist."""
    assert "does not exist" in refused(tmp_path / "p.jsonl")[0]
    assert "cannot be read" in refused(tmp_path / ("p" * 5000 + ".txt"))[0]
    (tmp_path / "p.txt").mkdir()
    assert "has no train.*" in refused(tmp_path / "p.txt")[0]
    with pytest.raises(ConfigError, match="builtin:shapes"):
        load_prompts("builtin:shape")


def test_two_files_may_be_named_instead_of_a_source(tmp_path: Path) -> None:
    """They are taken before the source, which a recipe has set; each holds one list; one alone is divided."""
    written(tmp_path, {"a.txt": "a\nb\n", "b.jsonl": lines("c"), "both.json": '{"train": ["a"], "held_out": ["b"]}'})
    train, held_out = str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")
    found = load_prompts(Prompts(source="builtin:shapes", train=train, held_out=held_out))
    assert ([p.text for p in found.train], [p.text for p in found.held_out]) == (["a", "b"], ["c"])
    alone = load_prompts(Prompts(source="builtin:shapes", train=train))
    assert (len(alone.train), len(alone.held_out)) == (1, 1)
    assert "nothing is left to train on" in refused(tmp_path, held_out=held_out)[0]
    assert "holds two lists" in refused(tmp_path, train=str(tmp_path / "both.json"), held_out=held_out)[0]


def test_a_folder_holds_the_two_lists(tmp_path: Path) -> None:
    """By their names, in any format; two that could be meant are not chosen between."""
    for name in ("held_out.txt", "test.jsonl", "val.csv", "validation.ndjson"):
        folder = tmp_path / name
        folder.mkdir()
        content = {"held_out.txt": "c", "val.csv": "text\nc\n"}.get(name, '"c"\n')
        written(folder, {"train.json": '["a", "b"]', name: content, "notes.md": "x", "dev.txt": "y"})
        found = load_prompts(str(folder))
        assert [[p.text for p in split] for split in (found.train, found.held_out)] == [["a", "b"], ["c"]]
    written(tmp_path / "val.csv", {"test.txt": "d"})
    assert "more than one file for held_out: test.txt, val.csv" in refused(tmp_path / "val.csv")[0]


def test_one_list_is_divided_by_its_texts_alone(tmp_path: Path) -> None:
    """The share that was asked for, whatever the order; what differs in case or spaces only stays on one side."""
    texts = [f"prompt number {number}" for number in range(200)]
    variants = [text.upper().replace(" ", "  ") for text in texts]
    written(tmp_path, {"p.txt": "\n".join(texts + variants), "q.txt": "\n".join(reversed(texts))})

    def held_out(name: str, **settings: Any) -> set[str]:
        found = load_prompts(Prompts(source=str(tmp_path / name), **settings))
        assert not {p.text.lower().split()[-1] for p in found.train} & {p.text.split()[-1] for p in found.held_out}
        return {" ".join(p.text.lower().split()) for p in found.held_out}

    chosen = held_out("p.txt", held_out_fraction=0.25)
    assert len(chosen) == 50
    assert chosen == held_out("q.txt", held_out_fraction=0.25)
    assert "prompt number 101" in chosen  # as on every machine
    assert held_out("p.txt", held_out_fraction=0.25, split_seed=1) != chosen
    assert len(held_out("q.txt")) == 20


def test_a_repeated_prompt_counts_once_and_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first of equal ones stays, in its place; other metadata or another category make another prompt."""
    entry = {"text": "a", "category": "x", "n": 1}
    content = lines("b", entry, "b", entry, {**entry, "n": 2}, {**entry, "category": "y"})
    written(tmp_path, {"train.jsonl": content, "test.txt": "c"})
    with caplog.at_level(logging.INFO, "latentac"):
        found = load_prompts(str(tmp_path))
    assert [(p.text, p.category, p.metadata.get("n")) for p in found.train] == [
        ("b", "all", None),
        ("a", "x", 1),
        ("a", "x", 2),
        ("a", "y", 1),
    ]
    assert "prompts (train): 2 are repeated and count once" in caplog.text


def test_twenty_thousand_prompts_are_read_and_drawn_in_seconds(tmp_path: Path) -> None:
    """Also where each is a category of its own: nothing looks at every prompt for each."""
    entries = ({"prompt": f"a photo of {n} things", "tag": f"kind {n}", "n": [n]} for n in range(20_000))
    source = written(tmp_path, {"p.jsonl": lines(*entries)}) / "p.jsonl"
    started = time.process_time()
    found = load_prompts(str(source))
    drawn = balanced(found.train, 256, 0, "train", 0)
    seconds = time.process_time() - started
    assert (len(found.train), len(found.held_out), len(set(drawn))) == (18_000, 2_000, 256)
    assert seconds < 5, f"{seconds:.1f} s"


LONG = "a red circle left of a blue square above a green triangle and four yellow squares"
"""18 tokens, and the UNet of the embedded world reads 16."""


def test_prepare_refuses_what_the_text_encoder_would_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the prompt's line, its tokens and the bound, before anything is published; a setting makes it a warning, and
    then the prompts that the endpoint is shown are those that it takes."""
    folder = tmp_path / "own"
    folder.mkdir()
    written(folder, {"train.txt": f"a red circle\n{LONG}\n", "test.txt": f"{LONG} and more\na blue square\n"})
    rewards = ["rewards=[{use: jpeg_compressibility}]", "gate.reward=jpeg_compressibility"]
    settings = [f"prompts.source={folder}", *rewards]
    with pytest.raises(ConfigError) as caught:
        prepare("r", "", str(tmp_path), "shapes-unet-smoke", overrides=settings)
    first, second = str(caught.value).splitlines()
    assert first.startswith(
        f"prompts = 'train.txt, line 2: {LONG[:80]}...': has 18 tokens, and the text encoder reads 16"
    )
    assert "test.txt, line 1" in second
    assert "has 22 tokens" in second
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("manifest.json"))
    prepare("r", "", str(tmp_path), "shapes-unet-smoke", overrides=[*settings, "prompts.on_truncation=warn"])
    warned = [message for message in caplog.messages if message.endswith("the rest is cut off")]
    assert [("18 tokens" in message, "22 tokens" in message) for message in warned] == [(True, False), (False, True)]
    space = open_run("r", "", str(tmp_path))
    assert [prompt.text for prompt in space.presentable] == ["a blue square"]
    assert len(space.prompts.held_out) == 2


def test_prepare_refuses_prompts_none_of_which_the_endpoint_would_draw(tmp_path: Path) -> None:
    """`deploy` proves that the model serves with one of them: it would fail at the end of the run."""
    source = written(tmp_path, {"p.json": json.dumps({"train": ["a cat"], "held_out": [LONG]})}) / "p.json"
    rewards = ["rewards=[{use: jpeg_compressibility}]", "gate.reward=jpeg_compressibility"]
    settings = [f"prompts.source={source}", *rewards, "prompts.on_truncation=warn"]
    with pytest.raises(ConfigError, match=r"raise the limit, or set serving.allow_truncation=true"):
        prepare("r", "", str(tmp_path), "shapes-unet-smoke", overrides=settings)
    prepare("r", "", str(tmp_path), "shapes-unet-smoke", overrides=[*settings, "serving.allow_truncation=true"])
    assert [prompt.text for prompt in open_run("r", "", str(tmp_path)).presentable] == [LONG]


def test_a_run_is_opened_without_its_backbone(tmp_path: Path) -> None:
    """What many GB hold is fetched by the steps that need it."""
    prepare("r", "", str(tmp_path), "shapes-unet-smoke")
    for path in (tmp_path / "store").rglob("*.safetensors"):
        path.unlink()
    space = open_run("r", "", str(tmp_path))
    assert space.config.recipe == "shapes-unet-smoke"
    with pytest.raises(IntegrityError):
        space.artifact("prepare")
