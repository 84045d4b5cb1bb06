"""`latentac run`: the whole pipeline on this machine, from any folder. `python -m latentac.pipelines run` is the same.

Imports are lazy: the help must come at once.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from latentac.runs.gpus import GPUS
from latentac.system.reading import SEEDS, whole

PROGRAM = "latentac run"

_EXAMPLES = """\
examples:
  latentac run
  latentac run --recipe shapes-unet-smoke --seed 1 --set train.num_iterations=8
  latentac run --config mine.yaml --dry-run --gpu h100 --gpu-price 2.50
  latentac run --resume shapes-unet-20260131-120000 --output runs
  latentac run --containers --store s3://bucket/prefix
"""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, or that of the step that failed. Raises LatentacError for errors before the first step."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every step on this machine: prepare, pretrain-value, train, evaluate, steer, gate, deploy.\n"
        "The report and the summary are written to OUTPUT/ID/. Use --resume to continue a stopped run.",
        epilog=_EXAMPLES,
    )
    add_options(parser)
    parser.add_argument(
        "--containers", action="store_true",
        help="run each step in a container, with artifacts in the S3 store of --store, or in MinIO (OUTPUT/.minio)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        return start(options, containers=options.containers)
    except KeyboardInterrupt:  # before the run began; afterwards run_pipeline says how to go on
        return 130
    finally:
        flush()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="named configuration (default: shapes-unet)")
    parser.add_argument("--config", metavar="FILE", help="YAML file that overrides the recipe")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="one field; may be repeated")
    parser.add_argument("--seed", type=whole(*SEEDS), metavar="N", help="the same as --set seed=N")
    parser.add_argument("--project", metavar="NAME", help="the same as --set project=NAME")
    parser.add_argument(
        "--package", metavar="DIR", help="folder of your own code, kept with the run and importable in each step"
    )
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="working files (default: runs)")
    parser.add_argument("--store", metavar="URL", help="file:// or s3:// (default: file://OUTPUT/store)")
    parser.add_argument(
        "--resume", metavar="ID", help="continue a run, by its id or folder; finished steps are not repeated"
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="write nothing; print settings, steps, requirements, and what would be refused (exit code 2)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu",
        choices=sorted(GPUS),
        default="",
        help="with --dry-run: estimate the hours of computation on one such GPU",
    )
    parser.add_argument(
        "--gpu-price", type=_price, default=0.0, metavar="PRICE", help="with --gpu: of a GPU-hour, to estimate the cost"
    )


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a price: a number of at least 0")
    return price


def start(options: argparse.Namespace, *, containers: bool) -> int:
    """Start or resume the run that the options describe, to its end."""
    from latentac.pipelines.request import CONTAINERS, PROCESSES, Request, Ways, absolute, create_run, load_run
    from latentac.runs.configuration import resolve_recipe
    from latentac.runs.package import make_importable, use_in_place

    output, run = Path(options.output), options.resume
    overrides = (*options.set, *(() if options.seed is None else (f"seed={options.seed}",)))
    overrides += () if options.project is None else (f"project={json.dumps(options.project)}",)
    if run is not None:
        if run and os.path.isfile(f"{run}/request.json"):  # False for a name that cannot be one, too
            output, run = Path(run).absolute().parent, Path(run).absolute().name
        given = {"recipe": options.recipe, "config": options.config, "overrides": overrides, "store": options.store}
        given |= {"package": options.package, "way": CONTAINERS if containers else ""}
        request = load_run(run, output, {name: value for name, value in given.items() if value})
    else:
        way: Ways = CONTAINERS if containers else PROCESSES
        recipe, config = "shapes-unet" if options.recipe is None else options.recipe, options.config or ""
        request = Request(recipe, config, overrides, options.store or "", way, package=options.package or "")
    make_importable(Path(request.folder or Path.cwd()))
    if options.dry_run:
        from latentac.pipelines.dryrun import print_plan

        return print_plan(absolute(request), output, run or "", options.gpu, options.gpu_price)
    if run is None:
        if request.package:
            use_in_place(Path(request.package))
        resolve_recipe(request.recipe, request.config, request.overrides)  # a typing error: before anything starts
        run, request = create_run(request, output)
    from latentac.pipelines.driver import run_pipeline

    return run_pipeline(run, request, output, fresh=options.resume is None)


def flush() -> None:
    """Write out what was printed; a reader that is gone (`... | head`) is not an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the interpreter would complain about it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
