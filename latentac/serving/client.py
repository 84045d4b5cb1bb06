"""A model server seen from outside, by its address alone: is it ready, and what does it draw for a request."""

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from latentac.serving.server import NAME
from latentac.system.errors import ServingError
from latentac.system.reading import parse_json
from latentac.system.waiting import within

ANSWER_SECONDS = 300.0
"""As long as a model's `request_seconds` is by default."""

TOKEN = "LATENTAC_TOKEN"  # noqa: S105 - a name
"""Environment variable of the token that an endpoint asks for, for steps that ask one."""


class Client:
    """`name`: of the model. `seconds`: bound of a whole answer. `host`: the Host header where it
    is not the address's own, as behind a gateway. `token`: what the server asks for, if it does. Each question has a
    connection of its own, and no proxy settings are read."""

    def __init__(
        self, address: str, name: str = NAME, *, seconds: float = ANSWER_SECONDS, host: str = "", token: str = ""
    ) -> None:
        self.address, self.name, self._seconds = address.rstrip("/"), name, seconds
        self._headers = {**({"Host": host} if host else {}), **({"Authorization": f"Bearer {token}"} if token else {})}

    @property
    def endpoint(self) -> str:
        return f"{self.address}/v1/models/{self.name}:predict"

    def predict(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The prediction for one request (`serving/README.md`). Raises ServingError if there is none."""
        try:
            return self.answer(request)
        except (OSError, http.client.HTTPException) as error:
            problem = f"did not answer ({type(error).__name__}: {error})"
            remedy = f"Look at the server's log; an answer may take {self._seconds:g} s"
            raise ServingError(self.endpoint, problem, remedy) from error

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """As `predict`, but what breaks the connection is raised as it is: OSError or HTTPException."""
        body = json.dumps({"instances": [request]})
        status, content = self.ask("POST", f"/v1/models/{self.name}:predict", body, self._seconds)
        if status != 200:
            message = content.get("error", content) if isinstance(content, dict) else content
            raise ServingError(self.endpoint, f"answered {status}: {str(message)[:300]}", "Correct the request.")
        try:
            prediction: dict[str, Any] = content["predictions"][0]
        except (LookupError, TypeError):
            problem = f"answered no prediction: {str(content)[:300]}"
            raise ServingError(self.endpoint, problem, "Check what listens there.") from None
        return prediction

    def ready(self, seconds: float) -> bool:
        """Whether the model says that it is ready, within `seconds`."""
        try:
            return self.ask("GET", f"/v2/models/{self.name}/ready", None, seconds)[0] == 200
        except (OSError, http.client.HTTPException):  # it does not listen before it has loaded
            return False

    def ask(self, method: str, path: str, body: str | None, seconds: float) -> tuple[int, Any]:
        """Status and body, decoded if it is JSON. Raises OSError, also where there is no whole answer in `seconds`, and
        HTTPException."""
        return within(seconds, lambda: self._ask(method, path, body, seconds))

    def _ask(self, method: str, path: str, body: str | None, seconds: float) -> tuple[int, Any]:
        place = urlsplit(self.address)
        secure = place.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        # `within` gives the answer up. This only ends its thread, and later, so that the message is always the same.
        connection = kind(place.hostname or "", place.port, timeout=2 * seconds)
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            connection.request(method, path, body, {**headers, **self._headers})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        try:
            return response.status, parse_json(content)
        except ValueError:
            return response.status, content.decode(errors="replace")
