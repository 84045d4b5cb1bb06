"""`python -m latentac.serving`: the model server as a process. Torch is not imported before the arguments are right."""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from latentac.serving.access import add_access
from latentac.serving.server import HOST, NAME, PORT, serve, serve_on
from latentac.system.errors import LatentacError, expected
from latentac.system.reading import PORTS, whole
from latentac.system.terminal import escape_streams

EXAMPLE = """example:
  python -m latentac.serving --model runs/<run>/model --port 8080

exit codes: 0 stopped by SIGTERM or Ctrl-C, 2 wrong arguments, 6 port taken, 8 the folder cannot be served
"""


def main(arguments: Sequence[str]) -> int:
    """The exit code. One message on stderr where it is not 0."""
    options = _parser().parse_args(arguments)
    try:
        if options.die_with_parent:
            from latentac.system.lifetime import die_with_parent

            die_with_parent()
        if options.socket is None:
            address = {"host": options.host, "name": options.name, "device": options.device, "base": options.base}
            who = {"hosts": options.allow_host, "origins": options.allow_origin, "token_file": options.token_file}
            serve(options.model, options.port, **address, log_prompts=options.log_prompts, **who)
        else:
            with socket.socket(fileno=options.socket) as listener:
                where = options.model, options.name, options.device
                serve_on(listener, *where, base=options.base, log_prompts=options.log_prompts)
    except (LatentacError, OSError, ImportError) as error:
        meant = expected(error)
        if meant is None:
            raise
        print(f"serving: {meant}", file=sys.stderr, flush=True)
        return meant.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.serving",
        description="Serve an exported model: a page, KServe's and OpenAI's protocols, probes and metrics on one port.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="what deploy exported")
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="the base of an exported adapter (base/ in the model's folder)"
    )
    parser.add_argument("--name", default=NAME, help=f"name in the address /v1/models/<name>:predict ({NAME})")
    parser.add_argument("--host", default=HOST, help=f"address to listen on ({HOST}: this machine only)")
    parser.add_argument(
        "--port", type=whole(*PORTS), default=PORT, help=f"port to listen on, 0 for a free one ({PORT})"
    )
    add_access(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")
    parser.add_argument("--log-prompts", action="store_true", help="prompts stand in the request log (left out)")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the process that started this ends")
    parser.add_argument(
        "--socket", type=whole(0, 2**31 - 1), metavar="FD", help="a bound socket to inherit, instead of host and port"
    )
    return parser


if __name__ == "__main__":
    escape_streams()
    raise SystemExit(main(sys.argv[1:]))
