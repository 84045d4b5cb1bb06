"""Blobs in an S3 bucket, through the minio client.

The server is retried in two places. Each request is repeated by urllib3, so that one lost part does not send a large
file again; where the connection breaks within an answer, or an upload was forgotten by a restarted server, the whole
operation is repeated. Whatever the server does, an operation in which nothing moves ends (`Patience.bound_seconds`).
The parts of an upload that was given up are the server's to clean away (MinIO: after a day).

What the server says is not trusted. A redirect is not followed: it would carry the session token, and what is uploaded,
to a host that nobody named. An answer and a listing have bounds. Nothing is decompressed, for nothing compressed was
asked for. What the client cannot read of an answer is an error of ours.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import certifi
from minio import Minio
from minio.commonconfig import CopySource
from minio.error import MinioException, S3Error, ServerError
from urllib3 import Timeout
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from latentac.store.access import ENDPOINT, Kind, kind_of, read
from latentac.store.blobs import CHUNK_BYTES, Entry, Patience, Stream
from latentac.store.transport import Bounded, Pace, Pools, TooSlow, Unbounded
from latentac.system.errors import ConfigError, Problem, StoreAccessError, StoreError, StoreUnavailable

T = TypeVar("T")
ENDPOINT_REMEDY = f"Check {ENDPOINT}, http or https, and that an S3 server runs there, then run again"
MOST_OBJECTS = 1_000_000
"""Of a listing."""
_REPEATED = (429, 500, 502, 503, 504)
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, ParseError, TypeError, ValueError)
"""What the minio client raises for an answer with other contents than it expects."""


@dataclass(eq=False)
class _Operation:
    """One that is being attempted. stream: what it moves, if anything; listed_at: when a list's last name came."""

    started: float
    stream: Stream | None
    listed_at: float = 0.0

    @property
    def moved_at(self) -> float:
        return max(self.started, self.listed_at, self.stream.moved_at if self.stream else 0.0)


class Bucket:
    """Blobs as objects of `bucket` whose names begin with `prefix`; endpoint and credentials from the environment."""

    def __init__(self, bucket: str, prefix: str, patience: Patience) -> None:
        access = read()
        # It logs a line for each repetition; the one error at the end says how many there were.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._bucket, self._prefix, self._patience = bucket, prefix, patience
        self._where = f"{access.endpoint}, bucket {bucket}"
        retry = Bounded(
            total=patience.retries,
            other=0,  # a certificate that is not trusted will not be trusted in a second either
            allowed_methods=None,  # the POSTs here start or complete an upload, and may be repeated too
            status_forcelist=_REPEATED,
            raise_on_status=False,  # so that the server's own error code is what gets reported
            backoff_factor=patience.back_off_seconds,
            backoff_jitter=patience.back_off_seconds,
            backoff_max=patience.back_off_max_seconds,
            retry_after_max=int(patience.back_off_max_seconds),
        )
        retry.idle_seconds, retry.moved_at = patience.idle_seconds, self._moved_at
        self._operations: set[_Operation] = set()
        self._here = threading.local()
        # urllib3 sends a body under the timeout for connecting, and one part of an upload has 5 MiB.
        timeout = Timeout(connect=patience.timeout_seconds, read=patience.timeout_seconds)
        trusted = access.authorities or certifi.where()
        pool = Pools(
            self._check, 2 * patience.timeout_seconds, maxsize=10, timeout=timeout, retries=retry, ca_certs=trusted
        )
        try:
            self._client = Minio(
                urlsplit(access.endpoint).netloc,
                access.key_id,
                access.secret,
                access.token or None,
                secure=access.endpoint.startswith("https://"),
                region=access.region,
                http_client=pool,
            )
        except ValueError as error:
            raise ConfigError([Problem(ENDPOINT, access.endpoint, str(error), "Correct it")]) from None

    def put(self, name: str, source: Stream, size: int) -> None:
        def send() -> None:
            source.rewind()
            self._client.put_object(self._bucket, self._prefix + name, cast(BinaryIO, source), size)

        self._attempt(send, name, _Operation(time.monotonic(), source))

    def get(self, name: str, sink: Stream) -> None:
        def receive() -> None:
            sink.rewind()
            response = self._client.get_object(self._bucket, self._prefix + name)
            pace = Pace(self._patience)
            try:
                while data := response.read1(CHUNK_BYTES):  # what has arrived: a slow server would never fill a chunk
                    sink.write(data)
                    pace.moved(len(data))
            finally:
                response.close()
                response.release_conn()

        self._attempt(receive, name, _Operation(time.monotonic(), sink))

    def keep(self, name: str, path: Path, sha256: str, size: int, moved: Callable[[int], None], owned: bool) -> str:
        with path.open("rb") as stream:
            source = Stream(stream, moved)
            self.put(name, source, size)
        return source.sha256

    def copy(self, source: str, name: str) -> bool:
        def send() -> None:
            if source == name:
                self._client.stat_object(self._bucket, self._prefix + name)
            else:
                origin = CopySource(self._bucket, self._prefix + source)
                self._client.copy_object(self._bucket, self._prefix + name, origin)

        try:
            self._attempt(send, name)
        except (FileNotFoundError, StoreError):  # gone, or a server or a user without this right: it is sent, then
            return False
        return True

    def share(self, name: str, target: Path) -> bool:
        return False

    def reclaim(self, digests: Collection[str] | None) -> int:
        return 0

    def names(self, prefix: str) -> list[str]:
        return list(self.entries(prefix))

    def entries(self, prefix: str) -> dict[str, Entry]:
        operation = _Operation(time.monotonic(), None)

        def enumerate_objects() -> dict[str, Entry]:
            entries: dict[str, Entry] = {}
            for item in self._client.list_objects(self._bucket, self._prefix + prefix, recursive=True):
                name = (item.object_name or "").removeprefix(self._prefix)
                if name in entries or len(entries) == MOST_OBJECTS:
                    again = f"{name[:200]!r} comes twice" if name in entries else f"over {MOST_OBJECTS} objects"
                    raise Unbounded(f"its list has no end: {again}")
                changed = item.last_modified.timestamp() if item.last_modified else 0.0
                entries[name] = Entry(item.size or 0, changed, item.etag or "", moved=changed)
                operation.listed_at = time.monotonic()
            return entries

        return self._attempt(enumerate_objects, prefix, operation)

    def make(self) -> bool:
        """Makes the bucket unless it is there; True where it was made now. The user needs s3:CreateBucket for it."""

        def make_bucket() -> bool:
            if self._client.bucket_exists(self._bucket):
                return False
            try:
                self._client.make_bucket(self._bucket)
            except S3Error as error:
                if error.code != "BucketAlreadyOwnedByYou":  # somebody else was faster
                    raise
                return False
            return True

        return self._attempt(make_bucket, "")

    def remove(self, name: str) -> None:
        self._attempt(lambda: self._client.remove_object(self._bucket, self._prefix + name), name)

    def _attempt(self, action: Callable[[], T], name: str, operation: _Operation | None = None) -> T:
        """Runs `action`, again where its answer broke off; what goes wrong comes out as this project's errors.
        operation: says when something last moved, which starts the time that may pass until the next."""
        operation = operation or _Operation(time.monotonic(), None)
        self._operations.add(operation)
        self._here.operation = operation
        try:
            return self._tried(action, name, operation)
        finally:
            self._here.operation = None
            self._operations.discard(operation)

    def _moved_at(self) -> float:
        """When the operation of this thread moved its last byte, or began. A thread of the minio client, which sends a
        part of an upload, has none: there it is the last byte of any operation."""
        operation: _Operation | None = getattr(self._here, "operation", None)
        if operation:
            return operation.moved_at
        return max((each.moved_at for each in list(self._operations)), default=time.monotonic())

    def _check(self) -> None:
        """Raises TimeoutError before a read that could end after `bound_seconds`: the server sends single bytes of an
        answer's head, or empty pages, again and again. An answer that begins late may be read to its end."""
        seconds = self._patience.bound_seconds - self._patience.timeout_seconds
        if time.monotonic() > self._moved_at() + seconds:
            raise TimeoutError(f"nothing moved for {seconds:g} s")

    def _tried(self, action: Callable[[], T], name: str, operation: _Operation) -> T:
        patience = self._patience
        for attempt in range(patience.retries + 1):
            try:
                return action()
            except MaxRetryError as error:
                cause: Exception = error.reason or error
                break  # all the waiting was done below, by urllib3
            except Unbounded as error:
                raise self._refused(str(error), ENDPOINT_REMEDY) from error
            except HTTPError as error:
                cause = error
            except _UNREADABLE as error:
                raise self._refused(f"it gives no S3 answers ({str(error)[:200]})", ENDPOINT_REMEDY) from error
            except MinioException as error:
                cause = error
                # What urllib3 has repeated already, or what a repetition cannot mend.
                if not isinstance(error, S3Error) or error.response.status in _REPEATED or _kind(error) != Kind.LATER:
                    raise self._translated(error, name) from error
            wait = min(patience.back_off_seconds * 2**attempt, patience.back_off_max_seconds) * random.uniform(0.5, 1.5)
            if isinstance(cause, TooSlow) or time.monotonic() + wait > operation.moved_at + patience.idle_seconds:
                break
            time.sleep(wait)
        if isinstance(cause, S3Error):
            raise self._translated(cause, name) from cause
        if isinstance(cause, SSLError):
            remedy = "Name the file of its certificate authority in LATENTAC_S3_CA, and check https against http"
            raise self._refused(f"there is no trusted TLS connection to it ({cause})", remedy) from cause
        problem = str(cause) if isinstance(cause, TooSlow) else f"no answer ({type(cause).__name__})"
        raise self._silent(name, problem, operation) from cause

    def _silent(self, name: str, problem: str, operation: _Operation) -> StoreUnavailable:
        waited = f"given up after {time.monotonic() - operation.started:.1f} s"
        where = f"{self._where}, object {self._prefix}{name}" if name else self._where
        return StoreUnavailable(where, f"{problem}, {waited}", ENDPOINT_REMEDY)

    def _translated(self, error: MinioException, name: str) -> Exception:
        """The error to raise for an answer of the server."""
        if not isinstance(error, S3Error):
            # What is not XML comes from a proxy, or from a server of another kind; the client keeps its status private.
            status = error.status_code if isinstance(error, ServerError) else getattr(error, "_code", 0)
            problem = f"it answers with HTTP status {status} and no S3 error"
            kind = kind_of("", status)
            if kind in (Kind.LACKS, Kind.FULL):
                return kind.error(self._where, f"{kind.problem}: {problem}", kind.remedy)
            return (StoreUnavailable if kind == Kind.LATER else StoreAccessError)(self._where, problem, ENDPOINT_REMEDY)
        kind = _kind(error)
        if error.code == "NoSuchKey":
            return FileNotFoundError(name)
        where = f"{self._where}, object {self._prefix}{name}" if kind == Kind.OTHER else self._where
        message = f"the server says {error.code or '':.80} ({(error.message or 'no reason given')[:500].rstrip('.')})"
        return kind.error(where, f"{kind.problem}: {message}", kind.remedy)

    def _refused(self, problem: str, remedy: str) -> StoreAccessError:
        return StoreAccessError(self._where, problem, remedy)


def _kind(error: S3Error) -> Kind:
    return kind_of(error.code or "", error.response.status)
