"""The command line: parse, call a step, map errors to exit codes. Nothing heavy is imported before a command runs."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac import __version__
from latentac.runs.convert_command import add_convert_weights
from latentac.runs.housekeeping.commands import add_commands
from latentac.runs.mirror_command import add_mirror
from latentac.runs.reward_command import add_reward_server
from latentac.runs.running import run_step
from latentac.system.errors import ConfigError, LatentacError, Problem, ResourceError, expected
from latentac.system.reading import PORTS, SEEDS, whole
from latentac.system.steps import STEPS
from latentac.system.terminal import escape_streams

if TYPE_CHECKING:
    pass

_FURTHER = {
    "run": "run the whole pipeline on this machine, or show what it would do (--dry-run)",
    "sweep": "run a grid of settings and seeds here or on a cluster, and compare the runs on one page",
    "pipeline": "use the pipeline on a cluster: compile, upload, submit, follow, report, cancel, schedule",
}
"""Commands of packages above this one, found by entry points of the group `latentac.commands`."""

_EXIT_CODES = """exit codes:
  0 done   1 unexpected   2 configuration   3 store   4 damaged artifact   5 reward
  6 resource (disk, port, device)   7 training   8 serving   9 cluster   75 unavailable, try again   130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is the error's (see `latentac.system.errors`)."""
    if arguments is None:  # else the caller is a program, whose streams, signals and import path are its own
        escape_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in _FURTHER:
        options = argparse.Namespace(command=_run_further, words=words)
    else:
        options = _parser().parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("latentac").setLevel(logging.INFO)
    try:
        if arguments is None:
            from latentac.runs.package import make_importable
            from latentac.system.lifetime import stop_on_sigterm

            stop_on_sigterm()
            make_importable(_working_folder())  # as `python -m` does
        options.program = arguments is None
        command: Callable[[argparse.Namespace], int | None] = options.command
        return command(options) or 0
    except (LatentacError, OSError, ImportError) as error:
        meant = expected(error)
        if meant is None:
            raise
        print(f"latentac: {meant}", file=sys.stderr)
        return meant.exit_code
    except KeyboardInterrupt:
        print("latentac: interrupted; the same command continues", file=sys.stderr)
        return 130


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ResourceError("the working folder", "does not exist any more", "Change to a folder that exists") from None


def _parser() -> argparse.ArgumentParser:
    parser = _make(
        argparse.ArgumentParser,
        "latentac",
        "Align diffusion models with rewards by actor-critic reinforcement learning in latent space.",
        "latentac prepare --run first --recipe shapes-unet --set seed=1\n  latentac pretrain-value --run first",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="command", required=True)
    for step in STEPS:
        name, example = step.name, f"latentac {step.name} --run first"
        if name == "prepare":
            example += " --recipe shapes-unet --set policy.learning_rate=3e-5 --set seed=1"
        command = _make(commands.add_parser, name, step.summary, example)
        _add_place(command)
        if name == "gate":
            _add_gate(command)
        if name == "deploy":
            command.add_argument(
                "--force", action="store_true", help="deploy also a held run, or one that was deployed before"
            )
        if name == "prepare":
            _add_settings(command)
            command.add_argument("--project", default="", metavar="NAME", help="the same as --set project=NAME")
        command.set_defaults(command=run_step, step=name)

    for name, summary in _FURTHER.items():  # only for the list: they are called before anything is parsed
        commands.add_parser(name, help=summary, add_help=False)

    add_commands(_make, commands.add_parser)
    _add_config(commands)

    report = _make(commands.add_parser, "report", "write report.html and summary.json", "latentac report --run first")
    _add_place(report)
    report.set_defaults(command=_report)

    _add_compare(commands)

    _add_serve(commands)
    add_reward_server(_make, commands.add_parser)
    add_convert_weights(_make, commands.add_parser)
    add_mirror(_make, commands.add_parser, _add_settings)

    fetch = _make(
        commands.add_parser,
        "fetch-model",
        "copy a published model into an empty folder or mount, and verify it",
        "latentac fetch-model --version first-0a1b2c3d --store s3://models/demo --to model",
    )
    fetch.add_argument(
        "--version", required=True, metavar="V", help="the model's version, as in registry/*/production.json"
    )
    fetch.add_argument("--store", required=True, metavar="URL", help="file:// or s3://bucket/prefix")
    fetch.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="target folder, empty or not yet there")
    fetch.set_defaults(command=_fetch)

    generate = _make(
        commands.add_parser,
        "generate",
        "make images with a model: the last one deployed, or that of a run",
        'latentac generate --run first --prompt "a red circle" --seed 7 --steer shapes_verifier=2 --image out.png',
    )
    _add_model(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--seed", type=whole(*SEEDS), default=0)
    generate.add_argument(
        "--count", type=whole(1, 1000), default=1, help="number of images, side by side (default: %(default)s)"
    )
    generate.add_argument(
        "--steer", action="append", default=[], metavar="reward=weight", help="a steering weight; may be repeated"
    )
    generate.add_argument("--image", default="image.png", metavar="FILE", help="PNG to write (default: %(default)s)")
    generate.set_defaults(command=_generate)
    return parser


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "show the resolved settings, or explain the fields"
    example = "latentac config show --recipe shapes-unet > mine.yaml\n  latentac config fields train"
    commands = _make(commands.add_parser, "config", summary, example).add_subparsers(metavar="command", required=True)
    example = "latentac config show --recipe shapes-unet --set algorithm.use=grpo"
    show = _make(commands.add_parser, "show", "print the resolved settings as commented YAML", example)
    _add_settings(show)
    show.set_defaults(command=_show_config)
    example = "latentac config fields rewards.weight\n  latentac config fields algorithm.grpo"
    fields = _make(
        commands.add_parser, "fields", "explain a section, a field, a row of a table, or all of them", example
    )
    fields.add_argument("path", nargs="?", default="", metavar="PATH", help="for example train, or algorithm.grpo")
    fields.set_defaults(command=_explain_fields)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", default="shapes-unet", help="named configuration (default: %(default)s)")
    command.add_argument("--config", default="", metavar="FILE", help="YAML file that overrides the recipe")
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="a field that overrides both; may be repeated"
    )
    command.add_argument(
        "--package",
        default="",
        metavar="DIR",
        help="folder of your own code, kept with the run and importable in each step",
    )


def _make(
    factory: Callable[..., argparse.ArgumentParser], name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    return factory(
        name,
        description=summary[0].upper() + summary[1:],
        epilog=f"example:\n  {example}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **({} if factory is argparse.ArgumentParser else {"help": summary}),
    )


def _add_compare(commands: Any) -> None:
    compare = _make(
        commands.add_parser,
        "compare",
        "compare several runs: write a page and print a table",
        "latentac compare first second --to compare.html",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="two or more; all are compared with the first")
    _add_folders(compare)
    compare.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="the page (default: OUTPUT/compare.html); a JSON file is written beside it",
    )
    compare.set_defaults(command=_compare)


def _add_serve(commands: Any) -> None:
    from latentac.serving.access import add_access

    serve = _make(
        commands.add_parser,
        "serve",
        "serve a model with KServe: the last one deployed, or that of a run",
        "latentac serve --run first\n  latentac serve --project shapes-unet --port 8081",
    )
    _add_model(serve)
    serve.add_argument("--port", type=whole(*PORTS), default=8080, help="port on loopback (default: %(default)s)")
    add_access(serve)
    serve.set_defaults(command=_serve)


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", required=True, metavar="ID", help="the run's id")
    _add_folders(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", default="", metavar="ID", help="a trained run, held or deployed")
    command.add_argument(
        "--project", default="", metavar="NAME", help="or the project whose model is in production (default: the last)"
    )
    _add_folders(command)


def _add_gate(command: argparse.ArgumentParser) -> None:
    text = "decide again with another bound, for example gate.min_gain=0.02; may be repeated"
    command.add_argument("--set", action="append", default=[], metavar="gate.b=c", help=text)
    command.add_argument("--dry-run", action="store_true", help="print the decision, but publish nothing")


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--store", default="", metavar="URL", help="file:// or s3://bucket/prefix (default: OUTPUT/store)"
    )
    command.add_argument("--output", default="runs", metavar="FOLDER", help="working folders (default: %(default)s)")


def _run_further(options: argparse.Namespace) -> int | None:
    from importlib.metadata import entry_points

    name, *arguments = options.words
    for found in entry_points(group="latentac.commands", name=name):
        code: int | None = found.load()(arguments)
        return code
    remedy = "Install the whole package again: `make install`, or pip install."
    raise ConfigError([Problem(name, arguments, "this installation has no such command", remedy)])


def _show_config(options: argparse.Namespace) -> None:
    from latentac.runs.configuration import recipe_fields
    from latentac.runs.package import use_in_place
    from latentac.runs.reference import commented_yaml
    from latentac.runs.resolution import resolve_all

    if options.package:
        use_in_place(Path(options.package))
    sys.stdout.write(commented_yaml(resolve_all(recipe_fields(options.recipe, options.config, options.set)).config))


def _explain_fields(options: argparse.Namespace) -> None:
    from latentac.runs.reference import fields_text

    sys.stdout.write(fields_text(options.path))


def _report(options: argparse.Namespace) -> None:
    from latentac.runs.reporting.report import write_report
    from latentac.runs.workspace import default_store
    from latentac.system.names import working_folder

    working_folder(options.run, options.output)
    for path in write_report(options.run, options.store or default_store(options.output), options.output):
        print(path)


def _compare(options: argparse.Namespace) -> None:
    from latentac.runs.reporting.compare import table, write_comparison
    from latentac.runs.workspace import default_store

    store = options.store or default_store(options.output)
    made = write_comparison(options.runs, store, options.output, options.to)
    for line in [*table(made.content), str(made.page), str(made.numbers)]:
        print(line)


def _serve(options: argparse.Namespace) -> None:
    from latentac.runs.release.deploy import model_to_use
    from latentac.serving.server import serve

    with model_to_use(options.run, options.project, options.store, options.output) as (folder, announcement):
        print(announcement, flush=True)
        who = {"hosts": options.allow_host, "origins": options.allow_origin, "token_file": options.token_file}
        serve(folder, options.port, **who)


def _fetch(options: argparse.Namespace) -> None:
    from latentac.runs.release.deploy import fetch_version

    manifest = fetch_version(options.version, options.store, options.to)
    size = sum(file.size for file in manifest.files)
    print(json.dumps({"key": manifest.key, "files": len(manifest.files), "bytes": size, "folder": str(options.to)}))


def _generate(options: argparse.Namespace) -> None:
    from latentac.runs.release.deploy import generate_image, model_to_use

    image = Path(options.image)
    with model_to_use(options.run, options.project, options.store, options.output) as (folder, announcement):
        print(announcement, file=sys.stderr, flush=True)
        used = generate_image(folder, options.prompt, options.seed, options.count, options.steer, image)
    print(json.dumps({"image": str(image), **used}))


if __name__ == "__main__":
    sys.exit(main())
