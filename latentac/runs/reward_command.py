"""The command `latentac reward-server`: its options, and the reward that they name."""

import argparse
from collections.abc import Callable
from pathlib import Path

from latentac.serving.access import add_access
from latentac.system.reading import PORTS, whole

HOST, PORT = "127.0.0.1", 8090


def add_reward_server(
    make: Callable[..., argparse.ArgumentParser], add: Callable[..., argparse.ArgumentParser]
) -> None:
    """make: gives a parser its help, as `latentac.runs.cli` does for all commands; add: makes one of a name."""
    command = make(
        add,
        "reward-server",
        "serve a reward over HTTP, for runs elsewhere that use the reward `remote`",
        "latentac reward-server --reward jpeg_compressibility --port 8090\n"
        "  latentac reward-server --reward my_package.rewards:Sharpness --set radius=3 --token-file token",
    )
    text = "a reward of the table, or module:Class of your own"
    command.add_argument("--reward", required=True, metavar="NAME", help=text)
    text = "a setting of the reward, or timeout_seconds; may be repeated"
    command.add_argument("--set", action="append", default=[], metavar="field=value", help=text)
    command.add_argument("--package", default="", metavar="DIR", help="folder of your own code, used in place")
    command.add_argument("--host", default=HOST, help="address to listen on (default: %(default)s, this machine only)")
    command.add_argument("--port", type=whole(*PORTS), default=PORT, help="0 for a free one (default: %(default)s)")
    add_access(command)
    command.set_defaults(command=_serve)


def _serve(options: argparse.Namespace) -> None:
    from latentac.config.fields import read_overrides
    from latentac.config.schema import Reward
    from latentac.runs.package import use_in_place
    from latentac.system.errors import require

    require("kserve")  # the extra `serve` brings the server's packages with it
    from latentac.serving.request import validated
    from latentac.serving.reward_server import serve_reward

    if options.package:
        use_in_place(Path(options.package))
    settings = validated(Reward, {**read_overrides(options.set), "use": options.reward})
    who = {"hosts": options.allow_host, "origins": options.allow_origin, "token_file": options.token_file}
    serve_reward(settings, options.port, host=options.host, **who)
