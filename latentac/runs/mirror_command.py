"""The command `latentac mirror`: its options, the table that it prints, and the configuration that it writes."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentac.config.schema import Config
    from latentac.runs.mirroring import Mirrored

_FIRST_LINE = "# Written by `latentac mirror`: a run of it reads models and prompts from the store alone.\n"
Make = Callable[..., argparse.ArgumentParser]


def add_mirror(make: Make, add: Make, add_settings: Callable[[argparse.ArgumentParser], None]) -> None:
    """make: gives a parser its help, as `latentac.runs.cli` does for all commands; add: makes one of a name;
    add_settings: gives it the options of a configuration."""
    command = make(
        add,
        "mirror",
        "copy what a run reads from a hub or from folders into a store, for machines without a network",
        "latentac mirror --config mine.yaml --to s3://models/mirror\n"
        "  latentac mirror --recipe sd35-lora --set backbone.source=/models/sd35 --to file:///mnt/disk/mirror\n"
        "  latentac run --run first --config mirrored.yaml",
    )
    add_settings(command)
    command.add_argument("--to", required=True, metavar="URL", help="store: file://folder or s3://bucket/prefix")
    text = "configuration to write, with the addresses in the store (default: %(default)s)"
    command.add_argument("--write", type=Path, default=Path("mirrored.yaml"), metavar="FILE", help=text)
    text = "read files that are in the store, and replace those whose sha256 differs"
    command.add_argument("--verify", action="store_true", help=text)
    command.set_defaults(command=_mirror)


def _mirror(options: argparse.Namespace) -> None:
    from latentac.runs.configuration import recipe_fields
    from latentac.runs.mirroring import mirror
    from latentac.runs.package import use_in_place
    from latentac.system.commands import program

    if options.package:
        use_in_place(Path(options.package))
    fields = recipe_fields(options.recipe, options.config, options.set)
    _check_target(options.write)
    done, config, services = mirror(fields, options.to, verify=options.verify)
    _write(options.write, config)
    words = ["run", "--run", "first", "--config", str(options.write)]
    words += ["--package", options.package] if options.package else []
    lines = [*table(done, services), "", f"{options.write} names these places:"]
    for line in [*lines, f"  {program()} {shlex.join(words)}"]:
        print(line, file=sys.stdout)


def table(done: "Sequence[Mirrored]", services: Sequence[str] = ()) -> Iterator[str]:
    """What was copied, in lines for a person. services: the rewards that a service computes."""
    from latentac.runs.housekeeping.table import size

    if not done:
        yield "Nothing is read from elsewhere: all models and prompts come with latentac."
    for one in done:
        files = len(one.manifest.files)
        state = f"copied {one.copied}" if one.copied else "all there"
        commit, revision = one.about.get("commit"), one.about.get("revision")
        pinned = f", revision {revision}" if revision else ", not pinned" if commit else ""
        yield f"{one.setting:<40}{files:>4} files{size(one.size):>10}   {state}"
        yield f"  source   {one.about.get('source')}{pinned}{f', commit {commit}' if commit else ''}"
        yield f"  licence  {one.about.get('licence')}"
        yield f"  address  {one.address}"
    for name in services:
        yield f"rewards.{name}: a service computes it, which must be within reach of the run. Nothing is copied."


def _check_target(path: Path) -> None:
    """Raises ConfigError where the file is somebody's own, before anything is copied."""
    from latentac.system.errors import ConfigError, Problem
    from latentac.system.reading import read_given

    if not path.exists():
        return
    try:
        ours = read_given(path, 2**20).startswith(_FIRST_LINE)
    except (OSError, ValueError):
        ours = False
    if not ours:
        problem = "is there, and was not written by `latentac mirror`"
        raise ConfigError([Problem("--write", str(path), problem, "Name another file")])


def _write(path: Path, config: "Config") -> None:
    from latentac.runs.reference import commented_yaml
    from latentac.system.scratch import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _FIRST_LINE + commented_yaml(config))
