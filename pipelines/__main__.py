"""`python -m latentac.pipelines compile`, and `run` as `latentac run`. Imports are lazy: the help must come at once."""

import argparse
import sys
from pathlib import Path

from latentac.pipelines.starting import add_options, flush, start

_HERE = Path(__file__).parent / "compiled"
GOLDEN, MANIFESTS, SETTINGS = (_HERE / name for name in ("latentac.yaml", "latentac.kubernetes.yaml", "cluster.yaml"))

_EXAMPLES = """\
examples:
  python -m latentac.pipelines run
  python -m latentac.pipelines run --recipe shapes-unet-smoke --seed 1 --set train.num_iterations=8
  python -m latentac.pipelines run --resume shapes-unet-20260131-120000
  python -m latentac.pipelines run-containers --recipe shapes-unet-smoke
  python -m latentac.pipelines compile
"""


def main(arguments: list[str] | None = None) -> int:
    from latentac.system.errors import LatentacError, expected
    from latentac.system.terminal import escape_streams

    if arguments is None:
        escape_streams()
    options = _parser().parse_args(arguments)
    try:
        if options.command == "compile":
            return _compile(options.to, options.manifests)
        return start(options, containers=options.command == "run-containers")
    except (LatentacError, OSError, ImportError) as error:
        meant = expected(error)
        if meant is None:
            raise
        print(meant, file=sys.stderr)
        return meant.exit_code
    except KeyboardInterrupt:  # before the run began; afterwards run_pipeline says how to go on
        return 130
    finally:
        flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.pipelines", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The pipeline prepare, pretrain-value, train, evaluate, steer, gate, deploy.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_options(commands.add_parser(
        "run", help="run the pipeline on this machine (the same as `latentac run`)", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every step on this machine, then write runs/<id>/report.html and summary.json.",
    ))  # fmt: skip
    add_options(commands.add_parser(
        "run-containers", help="run the pipeline on this machine, each step in a container", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every step in a container. Artifacts are in the S3 store of --store and the environment, "
        "or in its own MinIO in <output>/.minio.",
    ))  # fmt: skip
    write = commands.add_parser("compile", help=f"write the pipeline's YAML ({GOLDEN.name}, {MANIFESTS.name})")
    write.add_argument(
        "--to", type=Path, default=GOLDEN, metavar="FILE", help="the file to write (default: the committed one)"
    )
    write.add_argument(
        "--manifests", type=Path, default=MANIFESTS, metavar="FILE", help="file for the Kubernetes objects"
    )
    return parser


def _compile(target: Path, manifests: Path) -> int:
    from latentac.components.cluster.settings import read
    from latentac.pipelines.cluster import compile_manifests, compile_pipeline

    settings = read(SETTINGS)
    compile_pipeline(settings, target)
    compile_manifests(settings, manifests)
    print(target, manifests, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
