"""`python -m pipelines run` and `python -m pipelines compile`. Imports are lazy: the help must come at once."""

import argparse
import os
import sys
from pathlib import Path

_HERE = Path(__file__).parent / "compiled"
GOLDEN, MANIFESTS, SETTINGS = (_HERE / name for name in ("latentac.yaml", "latentac.kubernetes.yaml", "cluster.yaml"))

_EXAMPLES = """\
examples:
  python -m pipelines run
  python -m pipelines run --recipe shapes-unet-smoke --seed 1 --set train.num_iterations=8
  python -m pipelines run --resume shapes-unet-20260131-120000
  python -m pipelines run-containers --recipe shapes-unet-smoke
  python -m pipelines compile
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _compile(options.to, options.manifests) if options.command == "compile" else _run(options)
    except KeyboardInterrupt:  # before the run began; afterwards run_pipeline says how to go on
        return 130
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the interpreter would complain about it when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The pipeline prepare, pretrain-value, train, evaluate, steer, gate, deploy.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands.add_parser(
        "run", help="run it on this machine", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every step on this machine, then write runs/<id>/report.html and summary.json.",
    ))  # fmt: skip
    _add_run(commands.add_parser(
        "run-containers", help="run it on this machine, each step in its image", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every step in a container, artifacts in an S3 store: the one of --store and the environment, "
        "else a MinIO of its own, in <output>/.minio.",
    ))  # fmt: skip
    write = commands.add_parser("compile", help=f"write the pipeline's YAML ({GOLDEN.name}, {MANIFESTS.name})")
    write.add_argument("--to", type=Path, default=GOLDEN, metavar="FILE", help="where to (default: the golden file)")
    write.add_argument("--manifests", type=Path, default=MANIFESTS, metavar="FILE", help="the Kubernetes objects")
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("--recipe", help="named configuration (default: shapes-unet)")
    run.add_argument("--config", metavar="FILE", help="YAML file laid over the recipe")
    run.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="one field; may be repeated")
    run.add_argument("--seed", type=int, metavar="N", help="the same as --set seed=N")
    run.add_argument("--project", metavar="NAME", help="the same as --set project=NAME")
    run.add_argument("--output", default="runs", metavar="FOLDER", help="working files (default: runs)")
    run.add_argument("--store", metavar="URL", help="file:// or s3:// (default: file://<output>/store)")
    run.add_argument("--resume", metavar="ID", help="go on with a run: finished steps are not run again")


def _run(options: argparse.Namespace) -> int:
    from latentac.errors import LatentacError, expected
    from latentac.run import resolve_recipe
    from pipelines.request import CONTAINERS, PROCESSES, Request, create_run, load_run

    output = Path(options.output)
    way = CONTAINERS if options.command == "run-containers" else PROCESSES
    overrides = (*options.set, *(() if options.seed is None else (f"seed={options.seed}",)))
    overrides += (f'project="{options.project}"',) if options.project else ()
    try:
        if options.resume:
            given = {"recipe": options.recipe, "config": options.config, "overrides": overrides, "store": options.store}
            given["way"] = way
            run = options.resume
            request = load_run(run, output, {name: value for name, value in given.items() if value})
        else:
            recipe, config = options.recipe or "shapes-unet", options.config or ""
            resolve_recipe(recipe, config, overrides)  # a typing error is told before anything starts
            run, request = create_run(Request(recipe, config, overrides, options.store or "", way), output)
        from pipelines.driver import run_pipeline

        return run_pipeline(run, request, output, fresh=not options.resume)
    except (LatentacError, OSError, ImportError) as error:
        meant = expected(error)
        if meant is None:
            raise
        print(meant, file=sys.stderr)
        return meant.exit_code


def _compile(target: Path, manifests: Path) -> int:
    from components.cluster.settings import read
    from pipelines.cluster import compile_manifests, compile_pipeline

    settings = read(SETTINGS)
    compile_pipeline(settings, target)
    compile_manifests(settings, manifests)
    print(target, manifests, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
