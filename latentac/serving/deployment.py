"""The proof that an exported model serves: a real server, a steered image from a fixed seed, checked."""

import base64
import binascii
import hashlib
import io
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from latentac.serving.exported import image_size, read
from latentac.serving.process import ServerProcess
from latentac.system.errors import ServingError


@dataclass(frozen=True)
class Deployment:
    """What a real server answered to `request`.

    endpoint: the address that answered; image: PNG bytes; values: reward name -> the critic's value at each step
    ready_seconds: from the server's start until it was ready; seconds: until the last check passed
    shadow: what a rollout measured of this version and of the one before it; None where nothing was compared
    """

    endpoint: str
    version: str
    request: dict[str, Any]
    image: bytes
    image_sha256: str
    values: dict[str, list[float]]
    nfe: int
    ready_seconds: float
    seconds: float
    shadow: dict[str, Any] | None = None


class Asked(Protocol):
    """A model server, wherever it runs."""

    @property
    def endpoint(self) -> str: ...

    def predict(self, request: Mapping[str, Any]) -> dict[str, Any]: ...


def serve_and_check(
    folder: Path,
    request: Mapping[str, Any],
    ready_seconds: float,
    port: int = 0,
    *,
    device: str = "auto",
    allowed: Collection[str] = (),
) -> Deployment:
    """Start a real server for an exported folder, ask it for `request`, check the answers, stop it.

    `request` names a fixed seed and steers by the model's default method. Checked: the image is a PNG of the model's
    size, the same request gives the same bytes, and without steering it is another image, unless the method only
    chooses among particles. allowed: addresses of the user's own classes that the folder may name.
    Raises ResourceError if the port is taken, ServingError for everything else.
    """
    read(folder)  # a folder that is not an exported model is reported as one, before its size is looked up
    size, started = image_size(folder), time.monotonic()
    with ServerProcess(folder, ready_seconds=ready_seconds, port=port, device=device, allowed=allowed) as server:
        ready = time.monotonic() - started
        steered, image = check(server, request, size)
    return proof(server.endpoint, request, steered, image, ready, time.monotonic() - started)


def check(server: Asked, request: Mapping[str, Any], size: tuple[int, int]) -> tuple[dict[str, Any], bytes]:
    """The prediction for `request` and its image as PNG, if the answers are right; see `serve_and_check`.

    size: (height, width) that the image must have, in pixels. Raises ServingError.
    """
    steered, again = server.predict(request), server.predict(request)
    plain = server.predict({**request, "method": "none", "steering": None})
    image = decode(server.endpoint, steered, size)
    if again != steered:
        remedy = "Serve on one device, with deterministic operations."
        raise ServingError(server.endpoint, "the same request gave two answers", remedy)
    if decode(server.endpoint, plain, size) == image and not _may_choose_the_plain_one(steered):
        remedy = "Check the critic, and the weights in the request."
        raise ServingError(server.endpoint, "the steered image is the unsteered one", remedy)
    return steered, image


def _may_choose_the_plain_one(prediction: Mapping[str, Any]) -> bool:
    """Whether a steered image may be the plain one: where a critic with an opinion chooses among particles, one of
    which is the plain rollout. A gradient, which costs evaluations of its own, always moves the image."""
    forwards = prediction["particles"] * prediction["num_steps"] * (2 if prediction["guidance_scale"] != 1 else 1)
    values = {value for images in prediction["values"].values() for steps in images for value in steps}
    return prediction["nfe"] <= forwards and len(values) > len(prediction["values"])


def proof(
    endpoint: str,
    request: Mapping[str, Any],
    steered: Mapping[str, Any],
    image: bytes,
    ready_seconds: float,
    seconds: float,
) -> Deployment:
    """What `check` gave, as a record."""
    return Deployment(
        endpoint=endpoint,
        version=steered["version"],
        request=dict(request),
        image=image,
        image_sha256=hashlib.sha256(image).hexdigest(),
        values={name: values[0] for name, values in steered["values"].items()},
        nfe=steered["nfe"],
        ready_seconds=ready_seconds,
        seconds=seconds,
    )


def decode(endpoint: str, prediction: Mapping[str, Any], size: tuple[int, int]) -> bytes:
    """The first image's PNG bytes, if they are a PNG of `size` (height, width)."""
    from PIL import Image

    try:
        content = base64.b64decode(prediction["images"][0], validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            found = (image.height, image.width)
    except (LookupError, binascii.Error, OSError) as error:
        raise ServingError(endpoint, f"answered no PNG ({error})", "Look at the server's version.") from error
    if found != size:
        raise ServingError(endpoint, f"answered an image of {found}, not {size}", "Deploy the run again.")
    return content
