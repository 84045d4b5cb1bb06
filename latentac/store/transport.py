"""How the minio client speaks HTTP: every wait ends, every answer has a bound, and no redirect is followed."""

import http.client
import io
import time
from collections.abc import Callable
from typing import Any, Self, cast

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError

from latentac.store.blobs import Patience
from latentac.system.waiting import TimeUp, within

MOST_ANSWER_BYTES = 8 * 2**20
"""Of an answer that is kept in memory. A page of a listing has up to 1,000 objects, and less than 4 MiB."""


class Unbounded(HTTPError):
    """An answer or a listing is longer than any that an S3 server gives."""


class TooSlow(HTTPError):
    """Bytes arrive, but too few."""


class Pace:
    """Raises TooSlow for a download that is slower than the patience allows, measured over its window."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._began, self._bytes = patience, time.monotonic(), 0

    def moved(self, count: int) -> None:
        self._bytes += count
        passed = time.monotonic() - self._began
        if passed >= self._patience.idle_seconds:
            if self._bytes < passed * self._patience.bytes_per_second:
                raise TooSlow(f"only {self._bytes} bytes came within {passed:.0f} s")
            self._began, self._bytes = time.monotonic(), 0


class _Timely(io.RawIOBase):
    """Bytes of a socket. Before each read, `check` may raise TimeoutError.

    A socket's own timeout bounds the time between two bytes, so a server that sends single bytes never exceeds it.
    """

    def __init__(self, raw: io.RawIOBase, check: Callable[[], None]) -> None:
        self._raw, self._check = raw, check

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        self._check()
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that is read at once has a bound; objects are read in pieces, whose sum is the reader's to bound."""

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None or (self.length is not None and self.length <= MOST_ANSWER_BYTES):
            return super().read(amt)
        data = b"" if self.length is not None else super().read(MOST_ANSWER_BYTES + 1)
        if self.length is not None or len(data) > MOST_ANSWER_BYTES:
            raise Unbounded(f"an answer has more than {MOST_ANSWER_BYTES >> 20} MiB")
        return data


class Pools(PoolManager):
    """Follows no redirect and decompresses nothing.

    check: called before each read of an answer; raises TimeoutError to end it. connect_seconds: bound of one
    connection as a whole. A name's lookup has no other bound. Each of its addresses may take `timeout`, and so may the
    TLS handshake, however many bytes it comes in.
    """

    def __init__(self, check: Callable[[], None], connect_seconds: float, **options: Any) -> None:
        super().__init__(**options)

        class Answer(_Answer):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.fp = io.BufferedReader(_Timely(self.fp.detach(), check))

        def connect(connection: HTTPConnection, action: Callable[[], None]) -> None:
            try:
                within(connect_seconds, action)
            except TimeUp as error:
                raise ConnectTimeoutError(connection, f"no connection to {connection.host}: {error}") from error

        class Connection(HTTPConnection):
            response_class = Answer

            def connect(self) -> None:
                connect(self, super().connect)

        class TLSConnection(HTTPSConnection):
            response_class = Answer

            def connect(self) -> None:
                connect(self, super().connect)

        class Pool(HTTPConnectionPool):
            ConnectionCls = Connection

        class TLSPool(HTTPSConnectionPool):
            ConnectionCls = TLSConnection

        self.pool_classes_by_scheme = {"http": Pool, "https": TLSPool}

    def urlopen(self, method: str, url: str, redirect: bool = False, **options: Any) -> Any:  # type: ignore[override]
        return super().urlopen(method, url, redirect=False, decode_content=False, **options)


class Bounded(Retry):
    """No attempt begins later than `idle_seconds` after the last byte. moved_at: when that was."""

    idle_seconds = 0.0
    moved_at: Callable[[], float] = time.monotonic
    _since: float | None = None

    def new(self, **changes: Any) -> Self:
        made = super().new(**changes)
        made.idle_seconds, made.moved_at = self.idle_seconds, self.moved_at
        made._since = self.moved_at() if self._since is None else self._since  # asked for the first time at a failure
        return made

    def is_exhausted(self) -> bool:
        end = (self._since or 0.0) + self.idle_seconds
        return super().is_exhausted() or time.monotonic() + self.get_backoff_time() > end
