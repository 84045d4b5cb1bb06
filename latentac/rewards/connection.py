"""What the rewards behind HTTP have in common: address, bounds, token, and the images that they send."""

import base64
import io
import os
import ssl
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from latentac.config import extensions
from latentac.config.sections import NonNegative, Seconds
from latentac.rewards.service import Patience, Service
from latentac.system.errors import ConfigError, Problem, describe
from latentac.system.reading import read_given

_RUN_LENGTHS = 3  # zlib's Z_RLE: of images faster than the others, and smaller than its own lowest level


class ServerSettings(extensions.Settings):
    """Where a server is, and how long it may take. A failed request is repeated here, not by `retries`."""

    url: str
    """Address of the server. It has no user and no password: see `token_file`."""
    connections: Annotated[int, Field(gt=0, le=64)] = 4
    """Most requests at the same time, in each process."""
    connect_seconds: Seconds = 10.0
    """Time limit of one connection, name lookup and TLS included."""
    answer_seconds: Seconds = 120.0
    """Time limit of one answer. A server that takes longer ends the run, without a further attempt."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """Most attempts per request. Broken connections and the status 429, 502, 503 and 504 are tried again."""
    retry_seconds: NonNegative = 120.0
    """No attempt begins later than this after the first one."""
    token_file: str = ""
    """File with the token for `Authorization: Bearer`, where the steps run. Default: no token."""
    ca_file: str = ""
    """File with the certificate authorities of an https server. Default: those of certifi."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not url.isprintable() or " " in url:
            raise ValueError("is no address like http://host:port")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("has more than an address: a user, a query, or a fragment. A token is in token_file")
        return url.rstrip("/")


def connect(settings: ServerSettings, variable: str = "") -> Service:
    """The server, which is not asked yet. variable: of the environment, with the token where there is no file of it.

    Raises ConfigError for a token or authorities that cannot be used.
    """
    token = ""
    if settings.token_file:
        token = _token_in(settings.token_file)
    elif variable:
        token = _checked(os.environ.get(variable, "").strip(), "token_variable", variable, "Set this variable to it")
    if settings.ca_file:
        _check_authorities(settings.ca_file)
    times = settings.connect_seconds, settings.answer_seconds
    patience = Patience(*times, settings.attempts, settings.retry_seconds)
    return Service(settings.url, patience, settings.connections, token=token, authorities=settings.ca_file)


def png(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 3], as a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1, compress_type=_RUN_LENGTHS)
    return base64.b64encode(file.getvalue()).decode()


def _check_authorities(name: str) -> None:
    """Raises ConfigError."""
    try:
        ssl.create_default_context(cafile=name)
    except OSError as error:  # SSLError is one
        problem = f"holds no certificates: {error.strerror or describe(error)}"
        raise ConfigError([Problem("ca_file", name, problem, "Name a PEM file with the authorities")]) from None


def _token_in(name: str) -> str:
    """Raises ConfigError."""
    remedy = "Name a file that holds the token alone"
    try:
        token = read_given(Path(name), encoding="ascii").strip()
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigError([Problem("token_file", name, f"cannot be read: {reason}", remedy)]) from None
    return _checked(token, "token_file", name, remedy)


def _checked(token: str, field: str, name: str, remedy: str) -> str:
    """A token that can stand in a header. Raises ConfigError, without it."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError([Problem(field, name, "holds no token: characters without spaces", remedy)])
    return token
