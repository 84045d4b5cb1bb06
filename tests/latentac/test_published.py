"""What steps have published is read only in the shape that they give it: all else is one error that says where."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentac.runs.release.deploy import check_agreement
from latentac.runs.reporting.card import model_card
from latentac.runs.reporting.compare import write_comparison
from latentac.runs.reporting.report import write_report
from latentac.runs.steps import finish
from latentac.store import published
from latentac.system.errors import IntegrityError, LatentacError, ResourceError
from latentac.system.reading import MOST_BYTES, MOST_DEPTH, MOST_VALUES, parse_json, read_bytes
from tests.latentac.published import PROMPTS, contents, make, publish_until

Files = dict[str, dict[str, Any]]


def put(step: str, file: str, path: str, value: object) -> Callable[[Files], None]:
    """Another value in a file; a path is joined by slashes, "" for the whole."""

    def change(files: Files) -> None:
        files[step][file] = json.loads(json.dumps(files[step][file]))
        *within, last = path.split("/")
        place = files[step][file]
        for name in within:
            place = place[int(name) if isinstance(place, list) else name]
        if not path:
            files[step][file] = value
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


WRONG = {
    "a list for an object": ("evaluate", "evaluation.json", "", [], "its content is [], and must be"),
    "a text for an interval": (
        "evaluate", "evaluation.json", "base/shapes_verifier", "x", "base.shapes_verifier is 'x'"),
    "a text for a number": ("evaluate", "evaluation.json", "trained/shapes_verifier/low", "x", "low is 'x', and must"),
    "an object for an end": ("evaluate", "evaluation.json", "difference/shapes_verifier/high", {}, "high is {}"),
    "true for a number": ("evaluate", "evaluation.json", "base/shapes_verifier/mean", True, "mean is True"),
    "a number of 400 digits": ("evaluate", "evaluation.json", "base/shapes_verifier/mean", 10**400, "mean is 1000"),
    "a number whose square is infinite": (
        "evaluate", "evaluation.json", "base/shapes_verifier/mean", 1e200, "mean is 1e+200, and must be at most"),
    "a list for units": ("evaluate", "evaluation.json", "units", [], "units is []"),
    "a number for a category": ("evaluate", "evaluation.json", "categories/counting", 5, "categories.counting is 5"),
    "an incumbent without a reward": (
        "evaluate", "evaluation.json", "incumbent", {}, "incumbent lacks the reward 'jpeg_compressibility'"),
    "no arm": ("evaluate", "evaluation.json", "difference", None, "difference is None"),
    "diversity of a list": ("evaluate", "evaluation.json", "diversity/kept", [1], "diversity.kept is [1]"),
    "fewer scores than images": (
        "evaluate", "scores.json", "rewards/base/shapes_verifier", [1.0], "has 1 scores for 128 images"),
    "a score that is not a number": (
        "evaluate", "scores.json", "rewards/base/shapes_verifier/3", float("nan"), "shapes_verifier.3 is nan"),
    "no columns": ("evaluate", "gallery/gallery.json", "columns", 0, "columns is 0"),
    "a huge image": ("evaluate", "gallery/gallery.json", "image_size", [32, 2**40], "image_size.1 is 1099511627776"),
    "a size of three sides": ("evaluate", "gallery/gallery.json", "image_size", [1, 2, 3], "image_size"),
    "a seed too few": ("evaluate", "gallery/gallery.json", "seeds", ["7/0"], "it has 1 seeds for 8 prompts"),
    "a prompt that is none": ("evaluate", "gallery/gallery.json", "prompts/2", None, "prompts.2 is None"),
    "no settings of the gate": ("prepare", "config.json", "gate", None, "gate is None"),
    "a reward that is a text": ("prepare", "config.json", "rewards", ["x"], "rewards.0 is 'x'"),
    "a weight that is a text": ("prepare", "config.json", "rewards/0/weight", "1", "rewards.0.weight is '1'"),
    "a card of a number": ("prepare", "config.json", "card", {"data": 5}, "card.data is 5"),
    "a machine that is a text": ("prepare", "environment.json", "machine", "x", "machine is 'x'"),
    "an iteration that is a text": ("train", "history.json", "0", "x", "0 is 'x'"),
    "images of a fraction": ("train", "history.json", "3/images", 1.5, "3.images is 1.5"),
    "an explained variance of texts": (
        "pretrain-value", "metrics.json", "explained_variance", ["x"], "explained_variance.0 is 'x'"),
    "a reward's name of 100,000 characters": (
        "train", "history.json", "0/rewards", {"x" * 100_000: 1.0}, "should have at most 500 characters"),
    "a method's name of 100,000 characters": (
        "steer", "steering.json", "0/method", "x" * 100_000, "should have at most 500 characters"),
    "a method without evaluations": ("steer", "steering.json", "0/nfe", None, "0.nfe is None"),
    "a negative number of evaluations": ("steer", "steering.json", "0/nfe", -1, "0.nfe is -1"),
    "another decision": ("gate", "gate.json", "decision", "maybe", "decision is 'maybe'"),
    "reasons of a text": ("gate", "gate.json", "reasons", "because", "reasons is 'because'"),
    "a check that is none": ("gate", "gate.json", "checks/0", 5, "checks.0 is 5"),
    "forced by nobody": ("deploy", "deployment.json", "forced", {"reasons": []}, "it has no field forced.by"),
    "a version that is a number": ("deploy", "deployment.json", "version", 5, "version is 5"),
}  # fmt: skip


@pytest.mark.parametrize(("step", "file", "path", "value", "expected"), WRONG.values(), ids=WRONG)
def test_json_of_another_shape_is_one_error(
    tmp_path: Path, step: str, file: str, path: str, value: object, expected: str
) -> None:
    """It names the artifact's file, the field and its value, in the report and in a comparison."""
    url = publish_until(tmp_path, change=put(step, file, path, value))
    publish_until(tmp_path, run="sound")
    for act in (
        lambda: write_report("run-1", url, str(tmp_path / "runs")),
        lambda: write_comparison(["sound", "run-1"], url, str(tmp_path / "runs")),
    ):
        with pytest.raises(IntegrityError) as caught:
            act()
        assert caught.value.where == f"run-1/{step}/{file}"
        assert expected in caught.value.problem
        assert len(str(caught.value)) < 500


def test_every_file_that_steps_publish_has_its_shape() -> None:
    """And what they do publish, has it."""
    for files in contents(PROMPTS).values():
        for name, content in files.items():
            if name.endswith(".json"):
                published.parse(json.dumps(content), f"some/{name}")


def test_fields_of_other_versions_are_no_error() -> None:
    """Further ones are ignored, and what is given back is the file's own content."""
    content = {"key": "a", "later": {"x": [1]}}
    assert published.parse(json.dumps(content), "checkpoints/a/LATEST") == content


def test_numbers_that_are_not_finite_are_reported_as_before(tmp_path: Path) -> None:
    """They are the report's affair: null, and a note."""
    _, summary = make(tmp_path, change=put("evaluate", "evaluation.json", "base/shapes_verifier/high", float("inf")))
    assert summary["evaluation"]["base"]["shapes_verifier"]["high"] is None
    assert model_card(summary)


LARGE = {
    "bytes": '"' + "x" * MOST_BYTES + '"',
    "values": "[" + "[]," * MOST_VALUES + "1]",
    "numbers": "[" + "1," * MOST_VALUES + "1]",
    "levels": "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_json_beyond_its_bounds_is_refused(text: str) -> None:
    """Before its values take a hundred times its size, and before anything recurses through it."""
    with pytest.raises(ValueError, match=r"larger|values|nested too deep"):
        parse_json(text)


def test_commas_of_a_text_are_no_values() -> None:
    """Nor are its brackets; a text that never ends is found out in linear time."""
    reported = json.dumps([',[{"\\' * 800_000])
    assert parse_json(reported) == [',[{"\\' * 800_000]
    for text in ('["' + '\\",' * 4_000_000, '["' + '\\",' * 4_000_000 + "\\"):
        with pytest.raises(ValueError, match="Unterminated"):
            parse_json(text)


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    """A pipe, a device, and a file of 100 GB without a byte on the disk."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(100 * 2**30)
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "large"):
        with pytest.raises(ValueError, match=r"not a regular file|larger than"):
            read_bytes(place)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one colour, a few kB whatever its size is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezed, row = zlib.compressobj(9), b"\0" * (1 + 3 * width)
    body = b"".join(squeezed.compress(row) for _ in range(height)) + squeezed.flush()
    header = struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def drawn(form: str, mode: str) -> bytes:
    """A small sound image of another kind than steps write."""
    buffer = io.BytesIO()
    Image.new(mode, (32, 32)).save(buffer, form)
    return buffer.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
IMAGES = {
    "no image": b"x",
    "nothing": b"",
    "cut off": png(32, 32)[:60],
    "PostScript, which a program would read": POSTSCRIPT,
    "another format": drawn("JPEG", "RGB"),
    "a palette": drawn("PNG", "P"),
    "140 million pixels": png(20_000, 7_000),
    "a text of 100 MB": png(32, 32, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 100 * 2**20))),
}


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("step", ["evaluate", "deploy"])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_an_image_that_is_none_is_one_error(tmp_path: Path, image: bytes, step: str) -> None:
    """Whatever a decoder makes of it; no other format than PNG is opened."""

    def change(files: Files) -> None:
        files[step]["gallery/base.png" if step == "evaluate" else "image.png"] = image

    url = publish_until(tmp_path, change=change)
    with pytest.raises(IntegrityError, match="is not an image that can be shown"):
        write_report("run-1", url, str(tmp_path / "runs"))


def test_words_cannot_turn_a_page_around(tmp_path: Path) -> None:
    """Characters that change the direction of what follows, or that no terminal shows, stand in it escaped."""
    name = "safe\u202egnp.exe\u2066\x1b[2J"

    def change(files: Files) -> None:
        files["gate"]["gate.json"]["reasons"] = [name]
        files["gate"]["gate.json"]["decision"] = "hold"
        files["train"]["history.json"][0]["rewards"][name] = 1.0
        files["steer"]["steering.json"][0]["method"] = name

    page, _ = make(tmp_path, "gate", change)
    assert page.count("safe\\u202egnp.exe\\u2066\\x1b[2J") >= 3
    assert not set("\u202e\u2066\x1b") & set(page)


TIMINGS = ["[]", '{"steps": 5}', '{"total": null}', '{"steps": {"train": "x"}}', '{"total": 1e400}', "{", "[" * 9999]


@pytest.mark.parametrize("text", TIMINGS)
def test_timings_of_another_shape_are_one_error(tmp_path: Path, text: str) -> None:
    """The file lies in the run's folder, which may be somebody else's."""
    url = publish_until(tmp_path)
    (tmp_path / "runs" / "run-1" / "timings.json").write_text(text)
    with pytest.raises(LatentacError, match=r"timings\.json: "):
        write_report("run-1", url, str(tmp_path / "runs"))


@pytest.mark.parametrize("link", ["the folder", "summary.json", "report.html"])
def test_a_report_is_written_through_no_link(tmp_path: Path, link: str) -> None:
    """Links of a run's folder, and a folder that is one, are refused; so is what waits for a temporary name."""
    url = publish_until(tmp_path, "prepare")
    folder, outside = tmp_path / "runs" / "run-1", tmp_path / "outside"
    outside.mkdir()
    if link == "the folder":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(outside)
    else:
        for name in (link, f".{link}.{os.getpid()}"):
            (folder / name).symlink_to(outside / "new")
    with pytest.raises(ResourceError, match="is a link to"):
        write_report("run-1", url, str(tmp_path / "runs"))
    with pytest.raises(ResourceError, match="is a link to"):
        finish("run-1", url, str(tmp_path / "runs"))
    assert not any(outside.iterdir())


@pytest.mark.parametrize(
    ("units", "methods", "best", "expected"),
    [
        ({}, {"best_of_n": {}}, None, r"prepare/extensions.json: .*'shapes_verifier'"),
        ({"shapes_verifier": ""}, {}, None, r"prepare/extensions.json: .*'best_of_n'"),
        ({"shapes_verifier": ""}, {"best_of_n": {}}, {"method": "x"}, r"steer/steering.json: .*'x'"),
    ],
)
def test_artifacts_that_do_not_fit_their_configuration_are_one_error(
    units: dict[str, str], methods: dict[str, Any], best: dict[str, Any] | None, expected: str
) -> None:
    """Before a model is exported by them."""
    configured = (["shapes_verifier"], ["best_of_n"])
    with pytest.raises(IntegrityError, match=expected):
        check_agreement("r", *configured, {"units": units, "methods": methods}, best)
    check_agreement("r", *configured, {"units": {"shapes_verifier": ""}, "methods": {"best_of_n": {}}}, None)


@pytest.mark.parametrize("link", ["the folder", "summary.json"])
def test_a_report_that_is_there_is_written_through_no_link_either(tmp_path: Path, link: str) -> None:
    """`finish` has nothing to make anew then, and fetches what it has published."""
    url = publish_until(tmp_path, "prepare")
    folder, outside = tmp_path / "runs" / "run-1", tmp_path / "outside"
    finish("run-1", url, str(tmp_path / "runs"))
    outside.mkdir()
    if link == "the folder":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(outside)
    else:
        (folder / link).unlink()
        (folder / link).symlink_to(outside / "new")
    with pytest.raises(ResourceError, match="is a link to"):
        finish("run-1", url, str(tmp_path / "runs"))
    assert not any(outside.iterdir())
