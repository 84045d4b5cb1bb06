"""What the machine lacks is one message with a remedy, at every door of the project; a bug keeps its traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentac.system.errors import ConfigError, LatentacError, Problem, ResourceError, expected, require, restore


def without(module: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`latentac <arguments>` in an environment that has no such module."""
    hidden = "import runpy, sys; sys.modules[sys.argv[1]] = None; del sys.argv[:2]; "
    code = hidden + "runpy.run_module('latentac.runs.cli', {}, '__main__')"
    s3 = {"LATENTAC_S3_ENDPOINT": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    return subprocess.run(
        [sys.executable, "-c", code, module, "latentac", *arguments],
        env={**os.environ, **s3}, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "package", "install", "arguments"),
    [
        ("docker", "docker", "'latentac[pipeline]'", ["run", "--containers"]),
        ("kfp", "kfp", "'latentac[pipeline]'", ["run"]),
        ("torchx", "torchx-nightly", "'torchx-nightly>=", ["run"]),
        ("kserve", "kserve", "'latentac[serve]'", ["run"]),
        ("tensorboard", "tensorboard", "'tensorboard>=", ["run"]),
        ("minio", "minio", "'minio<8,>=", ["prepare", "--run", "a", "--store", "s3://bucket/x"]),
        ("kfp_server_api", "kfp-server-api", "kfp-server-api", ["pipeline", "runs", "--host", "http://127.0.0.1:1"]),
        (
            "kubernetes",
            "kubernetes",
            "'latentac[cluster]'",
            ["pipeline", "compile", "--release", "a", "--to", "a.yaml"],
        ),
        ("jinja2", "jinja2", "'jinja2>=", ["run", "--containers"]),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, module: str, package: str, install: str, arguments: list[str]
) -> None:
    """Before a run has a folder; with the extra that has it, or the versions that are allowed; exit code 6, no
    traceback."""
    failed = without(module, tmp_path, *arguments)

    assert failed.returncode == 6, failed.stderr
    assert f"package {package}: is not installed" in failed.stderr
    assert f" -m pip install {install}" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert not list((tmp_path / "runs").glob("shapes*"))


def test_what_is_there_is_not_missed() -> None:
    """Nothing is imported to find that out."""
    require("json", "kfp", "docker")
    with pytest.raises(ResourceError, match="package no-such-thing"):
        require("json", "no-such-thing")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_what_the_system_refuses_is_reported_with_the_place(number: int, words: str) -> None:
    """No room, no right, no descriptor left: the machine's, so no bug."""
    message = expected(OSError(number, os.strerror(number), "/some/place"))

    assert isinstance(message, ResourceError)
    assert words in str(message)
    assert message.where == "/some/place"


def test_a_bug_is_none_of_them() -> None:
    """Its traceback is wanted."""
    for error in (
        KeyError("x"),
        OSError(errno.ENOENT, "No such file or directory", "x"),
        ImportError("cannot import name 'x' from 'latentac'", name="latentac"),
        ModuleNotFoundError("No module named 'latentac.nothing'", name="latentac.nothing"),
    ):
        assert expected(error) is None
    ours = LatentacError("here", "was found", "Do that")
    assert expected(ours) is ours


PASSWORD = "open-sesame"


@pytest.mark.parametrize(
    "value",
    [
        f"http://user:{PASSWORD}@host/path",
        f"http://user:{PASSWORD}@x@host",
        f"http://user:{PASSWORD}/y@host",
        f"http://{PASSWORD}@host",
        f"postgresql+driver://u:{PASSWORD}@h/db",
        f"a: {{b: 'https://u:{PASSWORD}@h'}} and more",
        f"https:/u:{PASSWORD}@h/p.json",
        [{"use": "mlflow", "tracking_uri": f"http://u:{PASSWORD}@h"}],
        {"deep": [[f"//u:{PASSWORD}@h"]]},
    ],
)
def test_a_problem_says_no_password_of_an_address(value: object) -> None:
    """Whatever characters it has and however deep it stands, in the value or in what is said of it."""
    reported = ConfigError([Problem("a", value, f"is wrong ({value})", "Correct it.")])
    for text in (str(reported), str(reported.args), repr(reported.problems), str(reported.to_dict())):
        assert PASSWORD not in text
    assert "h" in str(reported)


def test_a_path_is_reported_as_it_is() -> None:
    """Also with an `@` in it."""
    for value in ("file:///data/me@work/store", "/models/a@b", "someone@example.com"):
        assert value in str(ConfigError([Problem("a", value, "is wrong", "Correct it.")]))


@pytest.mark.parametrize("text", ["a:/" * 300_000, "//" * 300_000, "a:/b@" * 100_000, "@" * 500_000])
def test_a_long_text_costs_time_in_proportion(text: str) -> None:
    """Names and values of a file may be long, and may look like the beginning of an address at each character."""
    assert len(str(Problem("field", text, text, "Correct it"))) < 4_000


@pytest.mark.parametrize("fields", [{"path": 5}, {"path": None}, {"value": {}}, {"problem": 7}, {"remedy": []}])
def test_an_error_of_wrong_types_is_reported_all_the_same(fields: dict[str, object]) -> None:
    """What workers left in a store may have been written by anybody."""
    whole = {"path": "field", "value": 1, "problem": "is wrong", "remedy": "Correct it", **fields}
    for problem in (whole, {name: whole[name] for name in ("value", "remedy")}, 5, None):
        assert str(restore({"kind": "ConfigError", "problems": [problem]}))
