"""A server of a reward, seen from a client: one question is one HTTP request, repeated where that may help.

Each wait has a bound as a whole: connecting, an answer, the attempts together. No redirect is followed, no proxy
settings are read, and the token stands in no message.
"""

import logging
import random
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import certifi
from urllib3 import Retry, Timeout
from urllib3.exceptions import HTTPError, InvalidHeader, NewConnectionError, ReadTimeoutError, SSLError

from latentac.store.transport import Pools
from latentac.system.errors import RewardError, describe
from latentac.system.reading import parse_json
from latentac.system.waiting import TimeUp, within

SCORE, HEALTH = "/v1/score", "/v1/health"
MOST_ANSWER_BYTES = 2**20
LONGEST_WAIT_SECONDS = 30.0
"""Between two attempts, also where the server's Retry-After asks for more."""
_FIRST_WAIT_SECONDS = 0.5
_HEALTH_SECONDS = 10.0
_REPEATED = (429, 502, 503, 504)
_MOST_SHOWN = 300
_REMEDIES = {
    401: "Set token_file to a file with the token of this server",
    403: "Set token_file to a file with the token of this server, or let the server allow this host name",
    404: "Correct url: it is the address without {path}",
    413: "Send less at once: lower batch_size where the reward has it",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """connect_seconds, answer_seconds: of one attempt. No attempt begins later than `retry_seconds` after the first
    one, and there are at most `attempts`."""

    connect_seconds: float
    answer_seconds: float
    attempts: int
    retry_seconds: float


class Unavailable(Exception):
    """Another attempt may help. after: seconds that the server asks to wait."""

    def __init__(self, problem: str, after: float = 0.0) -> None:
        super().__init__(problem)
        self.after = after


class Hung(Unavailable):
    """There was no whole answer in time."""


class Service:
    """`url` without a slash at its end. At most `connections` questions are on their way at once; others wait.

    authorities: file of certificate authorities, "" for certifi's. Calls may come from any thread.
    """

    def __init__(self, url: str, patience: Patience, connections: int, *, token: str, authorities: str) -> None:
        self.url, self._patience, self._token = url, patience, token
        self._slots, self._here = threading.BoundedSemaphore(connections), threading.local()
        trusted = authorities or certifi.where()
        self._pools = Pools(self._in_time, patience.connect_seconds, maxsize=connections, ca_certs=trusted)
        # It logs a warning for each broken connection; the attempts are logged here.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

    def ask(self, path: str, body: bytes) -> Any:
        """The JSON that the server answers to a question in JSON at `path`. Raises RewardError."""
        began = time.monotonic()
        with self._slots:
            for attempt in range(1, self._patience.attempts + 1):
                try:
                    return self._attempt("POST", path, body, self._patience.answer_seconds)
                except Hung as error:
                    raise self.failed(path, str(error), "Look at the server's log, or raise answer_seconds") from None
                except Unavailable as error:
                    wait, problem = max(error.after, _backoff(attempt)), str(error)
                    late = time.monotonic() + wait > began + self._patience.retry_seconds
                    if late or attempt == self._patience.attempts:
                        spent = f"{problem} (attempt {attempt}, {time.monotonic() - began:.0f} s after the first)"
                        remedy = "Start the server again, or raise attempts and retry_seconds"
                        raise self.failed(path, spent, remedy) from None
                    _log.warning("%s%s: %s; next attempt in %.1f s", self.url, path, problem, wait)
                    time.sleep(wait)
        raise AssertionError("the loop returns or raises")

    def ready(self, seconds: float) -> Mapping[str, Any]:
        """What the server says of itself once it is ready. Raises RewardError where it is not within `seconds`."""
        until, attempt = time.monotonic() + seconds, 1
        while True:
            try:
                found = self._attempt("GET", HEALTH, None, min(_HEALTH_SECONDS, self._patience.answer_seconds))
                if not isinstance(found, dict) or not isinstance(found.get("ready"), bool):
                    remedy = "Correct url: this is not the server of a reward"
                    raise self.failed(HEALTH, "answered no object with `ready`", remedy)
                if found["ready"]:
                    return found
                problem, wait = "says that it is not ready", _backoff(attempt)
            except Unavailable as error:
                problem, wait = str(error), max(error.after, _backoff(attempt))
            if time.monotonic() + wait > until:
                spent = f"{problem}; it was not ready within {seconds:g} s (ready_seconds)"
                remedy = "Start it (latentac reward-server --reward NAME), correct url, or raise ready_seconds"
                raise self.failed(HEALTH, spent, remedy)
            time.sleep(wait)
            attempt += 1

    def _attempt(self, method: str, path: str, body: bytes | None, seconds: float) -> Any:
        """The JSON of one answer. Raises Unavailable, and RewardError for what another attempt does not mend."""
        total = self._patience.connect_seconds + seconds
        try:
            status, headers, content = within(total, lambda: self._exchange(method, path, body, seconds))
        except (TimeUp, ReadTimeoutError):
            raise Hung(f"gave no whole answer within {seconds:g} s") from None
        except SSLError as error:
            if any(isinstance(each, ssl.SSLCertVerificationError) for each in error.args):
                remedy = "Set ca_file to a file with the authority of its certificate"
                raise self.failed(path, f"has no trusted certificate: {self.shown(describe(error))}", remedy) from None
            raise Unavailable(self.shown(describe(error))) from None
        except NewConnectionError as error:  # it begins with the address, which the message has already
            raise Unavailable(f"cannot be reached: {self.shown(str(error).partition(': ')[2])}") from None
        except HTTPError as error:
            raise Unavailable(self.shown(describe(error))) from None
        if status in _REPEATED:
            raise Unavailable(f"answered {status}{self._reason(content)}", _retry_after(headers.get("retry-after")))
        if status != 200:
            remedy = _REMEDIES.get(status, "Look at the server's log").format(path=path)
            raise self.failed(path, f"answered {status}{self._reason(content)}", remedy)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        remedy = "Correct url, or the server: see docs/remote-rewards.md"
        if kind != "application/json":
            raise self.failed(path, f"answered with content type {self.shown(kind)!r}, not application/json", remedy)
        if len(content) > MOST_ANSWER_BYTES:
            raise self.failed(path, f"answered more than {MOST_ANSWER_BYTES >> 20} MiB", remedy)
        try:
            return parse_json(content)
        except ValueError as error:
            raise self.failed(path, f"answered no JSON ({self.shown(str(error))})", remedy) from None

    def _exchange(
        self, method: str, path: str, body: bytes | None, seconds: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers, and at most one byte more of the body than an answer may have."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._here.until = time.monotonic() + self._patience.connect_seconds + seconds
        # A body is sent under the timeout for connecting, which Pools bounds by itself.
        timeout = Timeout(connect=seconds, read=seconds)
        options: dict[str, Any] = {"retries": False, "preload_content": False, "timeout": timeout}
        answer = self._pools.urlopen(method, self.url + path, body=body, headers=headers, **options)
        try:
            content = b""
            while part := answer.read(MOST_ANSWER_BYTES + 1 - len(content), decode_content=False):
                content += part  # to its end, where urllib3 raises for an answer that is shorter than it says
        finally:
            if not answer.closed and answer.length_remaining != 0:  # the rest is not wanted
                answer.close()
            answer.release_conn()
        return answer.status, answer.headers, content

    def _in_time(self) -> None:
        """Before each read of an answer: whoever sends single bytes never exceeds the timeout of a socket."""
        if time.monotonic() > self._here.until:
            raise TimeoutError

    def _reason(self, content: bytes) -> str:
        """The server's own words, if it has any in the form of an error."""
        try:
            error = parse_json(content[:MOST_ANSWER_BYTES])["error"]
            words = error["message"] if isinstance(error, dict) else error
        except (ValueError, LookupError, TypeError):
            return ""
        return f": {self.shown(str(words))}"

    def shown(self, text: str) -> str:
        """One line without control characters, and without the token, which a server may repeat."""
        plain = " ".join("".join(each if each.isprintable() else " " for each in text).split())
        return (plain.replace(self._token, "<token>") if self._token else plain)[:_MOST_SHOWN]

    def failed(self, path: str, problem: str, remedy: str) -> RewardError:
        """With the address of `path`."""
        return RewardError(self.url + path, problem, remedy)


def _backoff(attempt: int) -> float:
    return min(LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)


def _retry_after(header: str | None) -> float:
    try:
        return 0.0 if header is None else min(Retry().parse_retry_after(header), LONGEST_WAIT_SECONDS)
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0
