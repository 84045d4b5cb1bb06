"""Weights that are published as pickles, made safetensors by `latentac convert-weights`: the part that opens none.

A pickle is opened when somebody asks for it, in a process of its own without a network (`checkpoints.py`), by the
loader of torch that knows tensors and no other objects. What is written is checked before it gets its name. Everywhere
else a pickle is refused, with the command that converts it.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentac.system.commands import program
from latentac.system.errors import ConfigError, Problem, ResourceError, restore
from latentac.system.reading import record

KINDS: Mapping[str, tuple[str, str]] = {
    "hpsv2": ("HPS_v2.1_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "image_reward": ("ImageReward.pt", "google-bert/bert-base-uncased"),
    "aesthetic": ("sac+logos+ava1-l14-linearMSE.pth", ""),
}
"""Kind -> the published file, and the model whose descriptions and tokenizer stand beside it, "" for none."""
_TAKEN = "is there, and nothing is overwritten"


def command(kind: str, file: str) -> str:
    """What converts the pickle `file`, as a person can type it."""
    stem = Path(file).stem
    words = ["--kind", kind, "--from", file, "--to", f"{stem}.safetensors" if kind == "aesthetic" else stem.lower()]
    like = KINDS[kind][1]
    words += ["--like", like.rpartition("/")[2]] if like else []
    return " ".join([program(), "convert-weights", *map(shlex.quote, words)])


def convert(kind: str, file: Path, to: Path, like: Path | None = None) -> dict[str, Any]:
    """Write what the pickle `file` holds to `to`: a folder, or for `aesthetic` a file. What was read and written, with
    sha256, and what kept the process from the network.

    kind: of KINDS; like: a folder with the descriptions and the tokenizer of the model in KINDS. Raises ConfigError for
    what cannot be converted, ResourceError where the process was ended or the disk refused.
    """
    if kind not in KINDS:
        raise ConfigError([Problem("kind", kind, "is not known", f"Use one of {', '.join(KINDS)}")])
    wanted = KINDS[kind][1]
    problems = [Problem("from", str(file), "is not a file here", "Correct the path")] if not file.is_file() else []
    if os.path.lexists(to):
        problems.append(Problem("to", str(to), _TAKEN, "Name a new place"))
    if wanted and (like is None or not like.is_dir()):
        remedy = f"Name the folder of {wanted}: its weights are not needed"
        problems.append(Problem("like", str(like or ""), "is not a folder here", remedy))
    if not wanted and like is not None:
        problems.append(Problem("like", str(like), f"is not used by {kind}", "Leave it out"))
    if problems:
        raise ConfigError(problems)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".latentac-convert-", dir=to.parent) as temporary:
        made = Path(temporary) / to.name
        asked = {"kind": kind, "file": str(file), "to": str(made), "like": str(like) if wanted else ""}
        answer = _child(asked)
        _place(made, to)
    return answer | {"to": str(to)}


def _child(asked: Mapping[str, str]) -> dict[str, Any]:
    """The answer of the process that converts. Raises what it tells, and ResourceError where it tells nothing."""
    module = ["latentac.system.isolation", "latentac.rewards.checkpoints"]
    words = [sys.executable, "-m", *module, json.dumps(asked)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        problem = f"the process that converts it ended with {done.returncode}"
        remedy = "Look at what it said above. Where it was killed (-9), use a machine with more memory"
        raise ResourceError(asked["file"], problem, remedy)
    answer: dict[str, Any] = record(done.stdout, "the process that converts")
    if "error" in answer:
        raise restore(answer["error"])
    return answer


def _place(made: Path, to: Path) -> None:
    """Give what was made its name. Raises ConfigError where that was taken meanwhile."""
    try:  # the name is taken first, so that two of these never meet
        if made.is_dir():
            to.mkdir()
        else:
            to.open("xb").close()
    except FileExistsError:
        raise ConfigError([Problem("to", str(to), _TAKEN, "Name a new place")]) from None
    os.replace(made, to)
