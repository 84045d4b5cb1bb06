"""What `latentac mirror` does: everything that a run would fetch from elsewhere goes into a store, and the resulting
configuration names the store alone.

Found are the backbone, what each reward reads (trained on, watched, or of the gate: they all stand in `rewards`), and
files of prompts. Tokenizers are parts of these. What comes with latentac or with a package needs no copy.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentac.backbones import layout_of
from latentac.backbones.layout import used
from latentac.backbones.source import locate
from latentac.config.schema import Config, Reward
from latentac.config.validation import resolve
from latentac.rewards import REWARDS
from latentac.rewards.configured import build_reward
from latentac.rewards.folders import Checkpoint, is_local
from latentac.runs.licences import NOT_STATED, PATTERNS, is_about, licence_of
from latentac.runs.resolution import resolve_all
from latentac.store import Manifest, sources
from latentac.store.blobs import Patience
from latentac.system.errors import ConfigError, Problem
from latentac.system.hub import offline, snapshot
from latentac.system.modelfiles import check
from latentac.worlds.builtin import is_builtin
from latentac.worlds.prompts import load_prompts


@dataclass(frozen=True)
class Found:
    """One thing that a run reads. path: of the setting that names it; revision: of the setting that pins it, () for
    none; source: as the setting has it; given: the revision; place: a folder or file here; names: of the folder's files
    that are used; commit: that a hub id was resolved to."""

    path: tuple[str | int, ...]
    revision: tuple[str | int, ...]
    source: str
    given: str
    place: Path
    names: frozenset[str]
    commit: str | None

    @property
    def name(self) -> str:
        """The beginning of its address."""
        address = sources.parse_address(self.source)
        if address is not None:
            return address.name
        if self.commit is not None:
            return self.source.replace("/", "--")
        return Path(os.path.expanduser(self.source)).resolve().name


@dataclass(frozen=True)
class Mirrored:
    """setting: for messages; source: as it was named; address: where it is now; copied: how many of its files were not
    in the store before; about: see `SourceStore.put`."""

    setting: str
    source: str
    address: str
    manifest: Manifest
    copied: int
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.manifest.files)


def mirror(fields: Mapping[str, Any], url: str, *, verify: bool = False) -> tuple[list[Mirrored], Config, list[str]]:
    """Copy what the configuration `fields` reads into the store at `url`. What was copied, the configuration with the
    addresses, and the rewards that need a service, which cannot be copied.

    verify: compare the sha256 of files that are in the store. Everything is located and inspected before the first
    copy. Raises ConfigError with all that is wrong, StoreError.
    """
    config = resolve_all(fields, build_rewards=False).config
    store = sources.SourceStore(_absolute(url), Patience())
    store.probe()  # before gigabytes are fetched
    found, services = collect(config)
    content, done = config.model_dump(), list[Mirrored]()
    by_place: dict[tuple[str, frozenset[str]], Mirrored] = {}
    for one in found:
        key = str(one.place), one.names
        before = by_place.get(key)
        copy = _copied(one, store, verify) if before is None else before
        by_place[key] = copy
        path = f"{copy.address}/{one.place.name}" if one.place.is_file() else copy.address
        _set(content, one.path, path)
        if one.revision:
            _set(content, one.revision, "")
        done.append(Mirrored(_shown(one.path, config), one.source, path, copy.manifest, copy.copied, copy.about))
    if (base := config.backbone.source) and _is_hub_id(base) and not config.card.base_model:
        content["card"]["base_model"] = base
    return done, resolve(content), services


def collect(config: Config) -> tuple[list[Found], list[str]]:
    """Everything that a run of `config` reads from elsewhere, fetched and inspected, and the rewards that a service
    computes. Raises ConfigError with all that is wrong."""
    found, services, problems = list[Found](), list[str](), list[Problem]()

    def attempt(part: Iterator[Found], prefix: str = "") -> None:
        try:
            found.extend(part)
        except ConfigError as error:
            problems.extend(
                Problem(f"{prefix}{one.path}", one.value, one.problem, one.remedy) for one in error.problems
            )

    attempt(_backbone(config))
    attempt(_prompts(config))
    for index, settings in enumerate(config.rewards):
        if getattr(REWARDS.load(settings.use), "outside", False):
            services.append(settings.name)  # not built: the service may be within reach of the run alone
        else:
            attempt(_reward(settings, index), f"rewards.{settings.name}.")
    if problems:
        raise ConfigError(problems)
    return found, services


def _backbone(config: Config) -> Iterator[Found]:
    settings = config.backbone
    if is_builtin(settings.source):
        return
    layout = layout_of(settings)
    folder, commit = locate(settings.source, layout, settings.revision)
    names = frozenset(used(folder, layout))
    hub = _is_hub_id(settings.source)
    if hub:
        _fetch_about(settings.source, commit)
    path, pin = ("backbone", "source"), ("backbone", "revision")
    yield Found(path, pin, settings.source, settings.revision, folder, names, commit if hub else None)


def _reward(settings: Reward, index: int) -> Iterator[Found]:
    reward, own = build_reward(settings, index), settings.own
    checkpoints: list[Checkpoint] = reward.checkpoints() if hasattr(reward, "checkpoints") else []
    for one in checkpoints:
        source, given = str(own[one.setting]), str(own.get(one.revision) or "")
        if is_builtin(source):
            continue
        commit = one.path.name if one.revision and _is_hub_id(source) else None
        if commit:
            _fetch_about(source, commit)
        path = ("rewards", index, one.setting)
        pin = ("rewards", index, one.revision) if one.revision else ()
        yield Found(path, pin, source, given, one.path, one.names, commit)


def _prompts(config: Config) -> Iterator[Found]:
    prompts = sources.with_local_files(config.prompts)
    load_prompts(prompts)  # what is not used by a run is not worth a place
    named = ("train", "held_out") if prompts.train or prompts.held_out else ("source",)
    for name in named:
        given, place = getattr(config.prompts, name), Path(os.path.expanduser(getattr(prompts, name)))
        if not given or is_builtin(given):
            continue
        names = {path.name for path in place.iterdir() if path.is_file()} if place.is_dir() else set[str]()
        yield Found(("prompts", name), (), given, "", place, frozenset(names), None)


def _copied(one: Found, store: sources.SourceStore, verify: bool) -> Mirrored:
    """Put it into the store, with what its folder says about it."""
    folder = one.place if one.place.is_dir() else one.place.parent
    names = set(one.names) if one.place.is_dir() else {one.place.name}
    if one.place.is_dir():
        names |= {path.name for path in folder.iterdir() if path.is_file() and is_about(path.name)}
    check(folder, *names)
    known = sources.about(one.source) or {
        "source": one.source,
        "revision": one.given,
        "commit": one.commit,
        "licence": licence_of(folder) if one.place.is_dir() else NOT_STATED,
    }
    with tempfile.TemporaryDirectory(prefix="latentac-mirror-") as temporary:
        for name in names:
            link = Path(temporary) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        address, manifest, copied = store.put(one.name, Path(temporary), known, verify=verify)
    return Mirrored("", one.source, str(address), manifest, len(copied), known)


def _absolute(url: str) -> str:
    """A store in a folder by its absolute path: the configuration may be read in another working folder."""
    scheme, _, rest = url.partition("://")
    return f"file://{Path(rest).absolute()}" if scheme == "file" and rest else url


def _fetch_about(source: str, commit: str | None) -> None:
    """Have the model card and the licence in the hub's cache, too, where the hub can be reached."""
    if not offline():
        snapshot(source, commit, PATTERNS)


def _is_hub_id(source: str) -> bool:
    return not is_local(source)


def _set(content: Any, path: tuple[str | int, ...], value: str) -> None:
    for name in path[:-1]:
        content = content[name]
    content[path[-1]] = value


def _shown(path: tuple[str | int, ...], config: Config) -> str:
    """A setting's path with the name of a reward in place of its number."""
    return ".".join(config.rewards[part].name if isinstance(part, int) else part for part in path)
