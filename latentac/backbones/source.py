"""Where a backbone comes from: the embedded models, a folder, a store, or the hub and its cache.

Only files that are used are fetched.
"""

import glob
import logging
import os
from pathlib import Path

from latentac.backbones.inspection import SUPPORTED, conversion, inspect
from latentac.backbones.layout import INDEX, Layout, listing
from latentac.store import sources
from latentac.system.errors import ConfigError, Problem
from latentac.system.hub import names as hub_names
from latentac.system.hub import offline, snapshot
from latentac.system.modelfiles import faults

_log = logging.getLogger(__name__)

_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_REMEDY = "Use builtin:shapes-unet, a diffusers folder with safetensors weights, or a hub id"


def locate(source: str, layout: Layout | None, revision: str = "") -> tuple[Path, str | None]:
    """The folder on this machine of the pipeline that `source` names, fetched if need be and inspected, and the commit
    that a hub id was resolved to. Raises ConfigError with all that is wrong.

    source: `builtin:<name>`, a folder, the address of a source in a store, or a hub id; revision: a commit, tag or
    branch of a hub id, "" for its main branch. layout: None for a backbone that has none: its folder is not inspected.
    """
    found, commit = _found(source, layout, revision)
    if layout is not None:
        problems = inspect(source, found, layout)
        if problems:
            raise ConfigError(problems)
    elif not any(found.rglob("*.safetensors")):
        raise _bad(source, "has no safetensors weights, and no other format is loaded")
    elif refused := [
        _bad(source, f"{name}: {fault}", to).problems[0] for name, fault, to in faults(found, listing(found))
    ]:
        raise ConfigError(refused)
    return found, commit


def _found(source: str, layout: Layout | None, revision: str) -> tuple[Path, str | None]:
    """The folder of `source` on this machine, and its commit."""
    path = Path(os.path.expanduser(source))  # not pathlib: it raises where a name is too long, or no home
    in_store = sources.is_address(source)
    local = in_store or source.startswith("builtin:") or os.path.exists(path)
    if local and revision:
        remedy = "Leave backbone.revision out"
        raise ConfigError(
            [Problem("backbone.revision", revision, f"{source} is not a hub id and has no revision", remedy)]
        )
    if in_store:
        return sources.local(source, "backbone.source"), sources.about(source).get("commit")
    if source.startswith("builtin:"):
        from latentac.worlds.builtin import builtin_pipeline

        return builtin_pipeline(source), None
    if os.path.isfile(path):
        if path.suffix in _FILES:
            raise _bad(source, "is a single-file checkpoint, and only diffusers folders are loaded", conversion(source))
        raise _bad(source, "is a file, and only diffusers folders are loaded")
    if os.path.isdir(path):
        return path, None
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        if source.startswith(("http:", "https:")):
            remedy = "Use its hub id (owner/name), with backbone.revision for a commit"
            raise _bad(source, "is an address, and only folders and hub ids are fetched", remedy)
        raise _bad(source, "is not a folder here", "Correct the path; a hub id has the form owner/name")
    return _from_hub(source, layout, revision or None)


def _from_hub(source: str, layout: Layout | None, revision: str | None) -> tuple[Path, str]:
    """The snapshot in the hub's cache, with what is used of it downloaded where the hub can be reached."""
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot(source, revision, [INDEX])
        commit = folder.name
        if layout is None:
            patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
            return snapshot(source, commit, patterns), commit
        names = repository_files(source, folder, commit)
        used = layout.files(names)
        if INDEX not in used:
            single = [name for name in names if "/" not in name and name.endswith(_FILES)]
            remedy = conversion(single[0]) if single else SUPPORTED
            raise _bad(source, f"{INDEX}: is missing, so this is not a diffusers pipeline", remedy)
        # What says most is read first: what it rules out is not worth gigabytes.
        small = [name for name in used if not name.endswith(".safetensors")]
        for wanted in (small, used):
            snapshot(source, commit, [glob.escape(name) for name in wanted])
            problems = inspect(source, folder, layout, weights=offline()) if wanted is small else []
            if problems:
                raise ConfigError(problems)
        return folder, commit
    except (OSError, HFValidationError) as error:
        raise _bad(source, *not_had(revision, error, _REMEDY)) from error


def not_had(revision: str | None, error: Exception, remedy: str) -> tuple[str, str]:
    """What is wrong, and the remedy, where a source is no folder and the hub did not give it."""
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    which = f" at revision {revision}" if revision else ""
    hint = "HF_HUB_OFFLINE is set, and the cache does not hold it: fetch it once without. " if offline() else ""
    problem = f"is not a folder here and could not be had from the hub{which} ({reason})"
    return problem, f"{hint}{remedy}; a gated one needs HF_TOKEN"


def repository_files(source: str, folder: Path, commit: str) -> list[str]:
    """Names of the repository's files, or, where the hub cannot be reached, of those that the cache holds."""
    if not offline():
        try:
            return hub_names(source, commit)
        except OSError as error:  # unreachable in any way: what the cache holds may do
            _log.info("the hub did not answer (%s): its cache is used", error)
    return listing(folder)


def _bad(source: str, problem: str, remedy: str = _REMEDY) -> ConfigError:
    return ConfigError([Problem("backbone.source", source, problem, remedy)])
