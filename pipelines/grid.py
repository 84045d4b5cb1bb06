"""What a sweep is asked to do and how far it is: its members, in `<output>/<sweep>/sweep.json`."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from latentac.config.fields import read_overrides
from latentac.pipelines.request import Request, located, relative
from latentac.store.published import problem_of
from latentac.system.errors import ConfigError, IntegrityError, Problem
from latentac.system.names import is_name
from latentac.system.reading import read_json
from latentac.system.scratch import write_whole

_FILE = "sweep.json"
MAX_MEMBERS = 10_000
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass
class Member:
    """One run of a sweep. point: what the grid says, in words; overrides: the same as `path=value`, with the seed."""

    point: str
    seed: int
    overrides: list[str]
    run: str = ""
    state: str = "waiting"
    """waiting, running, done or failed."""
    exit_code: int | None = None


@dataclass
class Sweep:
    """What was asked for. request: of every member; cluster: the options of `latentac pipeline submit`, or none."""

    name: str
    request: Request
    cluster: list[str]
    members: list[Member] = field(default_factory=list)

    def save(self, output: Path) -> None:
        """Write it into `<output>/<name>`, which may be moved afterwards."""
        folder = output / self.name
        folder.mkdir(parents=True, exist_ok=True)
        kept = dataclasses.replace(self, request=relative(self.request, folder))
        write_whole(folder / _FILE, json.dumps(dataclasses.asdict(kept), indent=2) + "\n")

    def exists(self, output: Path) -> bool:
        """Whether it was begun there."""
        return (output / self.name / _FILE).is_file()

    def check(self) -> None:
        """Raises ConfigError with what is wrong with any point, before a member is started."""
        from latentac.runs.configuration import recipe_fields
        from latentac.runs.package import make_importable, use_in_place
        from latentac.runs.resolution import resolve_all

        asked = self.request
        if asked.folder and Path(asked.folder) != Path.cwd():  # gone on with from elsewhere
            make_importable(Path(asked.folder))
        if asked.package:
            use_in_place(Path(asked.package))
        problems: dict[tuple[str, str], Problem] = {}
        for member in {member.point: member for member in self.members}.values():
            try:
                resolve_all(recipe_fields(asked.recipe, asked.config, [*asked.overrides, *member.overrides]))
            except ConfigError as error:
                problems |= {(problem.path, str(problem.value)): problem for problem in error.problems}
        if problems:
            raise ConfigError(list(problems.values()))


_SWEEP = TypeAdapter(Sweep)


def load(name: str, output: Path) -> Sweep:
    """The sweep `name`. Raises ConfigError where there is none, IntegrityError where its file is not a sweep's."""
    path = output / name / _FILE
    if not is_name(name) or not path.is_file():
        known = sorted((each.parent.name for each in output.glob(f"*/{_FILE}")), reverse=True)
        remedy = f"Known: {', '.join(known[:10])}." if known else "There is none: leave it out."
        raise ConfigError([Problem("--resume", name, f"no such sweep in {output}", remedy)])
    try:
        found = _SWEEP.validate_json(json.dumps(read_json(path)), strict=True)
        if found.name != name or not all(member.run == "" or is_name(member.run) for member in found.members):
            raise ValueError("it names other places than its own")
        return dataclasses.replace(found, request=located(found.request, path.parent))
    except ValueError as error:
        text = problem_of(error) if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(str(path), f"is not a sweep's JSON ({text})", "Start another sweep") from None


def members(grid: Sequence[str], seeds: Sequence[int]) -> list[Member]:
    """Every point of the grid with every seed; the seeds of one point follow each other."""
    axes = [read_axis(text) for text in grid]
    paths = [path for path, _ in axes]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice or "seed" in paths:
        problem = "is swept twice" if twice else "is swept by --seeds"
        raise ConfigError(
            [Problem("--grid", (twice or ["seed"])[0], problem, "Name each path once; seeds by --seeds.")]
        )
    count = math.prod((len(seeds), *(len(axis) for _, axis in axes)))
    if count > MAX_MEMBERS:
        problem = f"gives {count} members, and {MAX_MEMBERS} are the most"
        raise ConfigError([Problem("--grid", list(grid), problem, "Sweep fewer values or seeds.")])
    found = []
    for values in itertools.product(*(axis for _, axis in axes)):
        chosen = list(zip(paths, values, strict=True))
        point = ", ".join(f"{path}={_words(value)}" for path, value in chosen) or "as configured"
        overrides = [f"{path}={json.dumps(value)}" for path, value in chosen]
        found += [Member(point, seed, [*overrides, f"seed={seed}"]) for seed in seeds]
    return found


def read_axis(text: str) -> tuple[str, list[Any]]:
    """`path=v1,v2` or `path=[v1, v2]`: the path and its values, which are YAML. Of a field that is a list itself, a
    list of lists: `steering.methods=[[{use: svdd}], [{use: twisted}]]`. Raises ConfigError."""
    path, equals, given = text.partition("=")
    example = "Write for example --grid policy.learning_rate=1e-4,2e-4; of a field that is a list, a list of lists."
    if not equals or not _PATH.fullmatch(path):
        raise ConfigError([Problem("--grid", text, "is not path=values", example)])
    for attempt in (given, f"[{given}]"):
        try:
            values = read_overrides([f"values={attempt}"])["values"]
        except ConfigError:
            continue
        if isinstance(values, list):
            if not values:
                break
            return path, values
    raise ConfigError([Problem("--grid", text, "names no values", example)])


def read_seeds(text: str) -> list[int]:
    """`0,1,2` or `0-4`. Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MAX_MEMBERS or len(seeds) > MAX_MEMBERS:
            raise ConfigError([Problem("--seeds", text, "are not seeds", "Write for example --seeds 0,1,2 or 0-4.")])
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def tally(sweep: Sweep) -> dict[str, int]:
    """How many members are in each state."""
    states = [member.state for member in sweep.members]
    return {state: states.count(state) for state in ("done", "failed", "running", "waiting") if state in states}


def left(sweep: Sweep) -> Iterator[tuple[int, Member]]:
    """The members that are not done, with their numbers from 1; those that failed are tried again."""
    yield from ((number, member) for number, member in enumerate(sweep.members, 1) if member.state != "done")


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
