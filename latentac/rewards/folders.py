"""Where the network of a reward comes from: a folder, a store, or a hub id, fetched, and judged before anything is
loaded.

Of a repository only the files that are used are downloaded, what says most first: what it rules out is not worth
gigabytes. No pickle, no code, no link that leads out of the folder.
"""

import glob
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError

from latentac.backbones.source import not_had, repository_files
from latentac.rewards.conversion import command
from latentac.store import sources
from latentac.system.errors import ConfigError, Problem
from latentac.system.hub import offline, snapshot
from latentac.system.modelfiles import check, plain, read_json
from latentac.worlds.builtin import builtin_clip, is_builtin

_AS_THEY_ARE = ("tokenizer.json", "vocab.json")  # long, and nothing in them names code
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Format:
    """files: those of a folder's file names that are used; problems: what is wrong with a folder, and the remedy, and
    with `weights=False` while only descriptions were fetched; remedy: for a source that is no such folder; saved: the
    remedy for one with pickles alone; conversion: the kind of `latentac convert-weights` that makes such a folder."""

    files: Callable[[Collection[str]], set[str]]
    problems: Callable[..., Iterator[tuple[str, str]]]
    remedy: str
    saved: str = ""
    conversion: str = ""

    def converted(self, file: str) -> str:
        """The remedy for the pickle `file`."""
        return f"Convert what you trust: {command(self.conversion, file)}" if self.conversion else self.saved


@dataclass(frozen=True)
class Checkpoint:
    """What a reward reads. setting: that names it; revision: the setting that pins it, "" for none; path: the folder or
    file on this machine; names: the files of the folder that are used, by relative name."""

    setting: str
    revision: str
    path: Path
    names: frozenset[str] = frozenset()


def is_local(source: str) -> bool:
    """Whether `source` means a folder of this machine or of a store, there or not."""
    given = source.startswith(("/", "./", "../", "~")) or source.count("/") > 1  # a hub id is owner/name
    return is_builtin(source) or sources.is_address(source) or given or os.path.exists(os.path.expanduser(source))


def locate(source: str, revision: str, form: Format) -> Path:
    """The folder on this machine that `source` names, fetched if need be, and inspected.

    source: a folder, the address of a source in a store, a hub id, or the name of a built-in CLIP; revision: a commit,
    tag or branch of a hub id. Raises ConfigError with all that is wrong.
    """
    if is_local(source):
        if revision:
            problem = f"{source} is not a hub id and has no revision"
            raise ConfigError([Problem("revision", revision, problem, "Leave it out")])
        named = str(builtin_clip(source)) if is_builtin(source) else sources.or_local(source, "source")
        path = Path(os.path.expanduser(named))
        if path.is_dir():
            _refuse(source, form.problems(path))
            return path
        if form.conversion and path.suffix in PICKLES:
            problem = "is a pickle: pickles can run code and are never loaded"
            raise bad(source, problem, form.converted(source))
        raise bad(source, "is a file" if path.exists() else "is not a folder here", form.remedy)
    try:
        folder = snapshot(source, revision or None, ["config.json"])
        names = [name for name in repository_files(source, folder, folder.name) if "/" not in name]
        used = form.files(names)
        small = {name for name in used if not name.endswith(".safetensors")}
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        if small == used and pickles:
            problem = "has no safetensors weights: pickles can run code and are never loaded"
            raise bad(source, problem, form.converted(pickles[-1]))
        for wanted in (small, used):
            snapshot(source, folder.name, [glob.escape(name) for name in sorted(wanted)])
            _refuse(source, form.problems(folder, weights=wanted is used or offline()))
        return folder
    except (OSError, HFValidationError) as error:
        raise bad(source, *not_had(revision, error, form.remedy)) from error


@contextmanager
def view(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder with those of the files `names` that are there, as links, and descriptions without what names code or
    other places: the libraries look for more in a folder than is read here. Raises Damaged."""
    there = [name for name in names if (folder / name).exists()]
    check(folder, *there)
    with tempfile.TemporaryDirectory(prefix="latentac-part-") as temporary:
        for name in there:
            if name.endswith(".json") and name not in _AS_THEY_ARE:
                text = json.dumps(plain(name, read_json(folder / name)), ensure_ascii=False)
                (Path(temporary) / name).write_text(text, encoding="utf-8")
            else:
                (Path(temporary) / name).symlink_to((folder / name).resolve())
        yield Path(temporary)


def bad(source: str, problem: str, remedy: str) -> ConfigError:
    """An error of the setting `source`."""
    return ConfigError([Problem("source", source, problem, remedy)])


def as_source(source: str, error: ConfigError) -> ConfigError:
    """The same error, which was told as a backbone's, of the setting `source`."""
    return ConfigError([Problem("source", source, one.problem, one.remedy) for one in error.problems])


def _refuse(source: str, problems: Iterator[tuple[str, str]]) -> None:
    """Raises ConfigError with all of `problems` if there are any."""
    found = [Problem("source", source, problem, remedy) for problem, remedy in problems]
    if found:
        raise ConfigError(found)
