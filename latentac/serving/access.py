"""Who may ask a server: the hosts and origins that the operator allows, and whoever knows its token."""

import argparse
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from latentac.system.errors import ConfigError, Problem
from latentac.system.reading import read_given

ANY = "*"
_LEAST_CHARACTERS = 16


@dataclass(frozen=True)
class Access:
    """hosts, origins: those allowed, ANY for all; loopback names are always allowed as hosts, and an origin that is
    the host itself is always allowed. token: what `Authorization: Bearer` must have, "" for no token."""

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    token: str = field(default="", repr=False)


def access(host: str, hosts: Collection[str], origins: Collection[str], token_file: Path | None) -> Access:
    """host: the address that the server listens on; one that other machines reach allows any host, if none is named.

    Raises ConfigError for an origin that is none, and for a token that cannot be read or is short.
    """
    for origin in origins:
        scheme, _, rest = origin.partition("://")
        if origin != ANY and (scheme not in ("http", "https") or not rest or "/" in rest):
            remedy = "Write scheme, name and port: https://app.example.com"
            raise ConfigError([Problem("--allow-origin", origin, "is not an origin", remedy)])
    chosen = {name.lower() for name in hosts} or (set() if is_loopback(host) else {ANY})
    return Access(frozenset(chosen), frozenset(map(str.lower, origins)), _token(token_file) if token_file else "")


def add_access(parser: argparse.ArgumentParser) -> None:
    """The arguments that say who may ask."""
    text = "a name of this server in requests, * for any; repeat it (on loopback its names, elsewhere any)"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "a website whose pages may use this server, such as https://app.example.com; repeat it (none)"
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL", help=text)
    text = "file with a token that each request must have as `Authorization: Bearer <token>` (none)"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=text)


def is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _token(file: Path) -> str:
    try:
        token = read_given(file, encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not ASCII"
        remedy = "Name a file that holds the token alone"
        raise ConfigError([Problem("--token-file", str(file), f"cannot be read: {reason}", remedy)]) from None
    if len(token) < _LEAST_CHARACTERS or not token.isprintable() or " " in token:
        problem = f"holds no token of at least {_LEAST_CHARACTERS} characters without spaces"
        remedy = "Make one: openssl rand -hex 32 > token"
        raise ConfigError([Problem("--token-file", str(file), problem, remedy)])
    return token
