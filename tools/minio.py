"""A real MinIO server for the tests of the S3 path, and for a person who wants one at a desk.

    python -m tools.minio build     make the pinned server and print where it is
    python -m tools.minio serve     run it on loopback with a bucket, print what to export, stop with Ctrl-C

The binary is `MINIO_BIN`, else `minio` on PATH, else it is built once into the cache of `tools.golang`: upstream
publishes no images any more, so the last release is built from the Go module proxy. A build takes minutes, later
calls nothing.
"""

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException
from urllib3.exceptions import HTTPError

from tools.golang import Unavailable, build, cached

# RELEASE.2025-09-07T16-13-09Z. Go accepts no tag of that form as a module version, so the commit names it.
RELEASE = "v0.0.0-20250907161309-07c3a429bfed"
START_SECONDS = 30.0


def find() -> Path | None:
    """The server's binary if it is here already. Raises Unavailable if MINIO_BIN names no program."""
    named = os.environ.get("MINIO_BIN")
    if named and not os.access(named, os.X_OK):
        raise Unavailable(f"MINIO_BIN = {named!r} is not an executable file. Correct or unset it.")
    built = cached("minio", RELEASE)
    found = named or shutil.which("minio") or (built if built.exists() else None)
    return Path(found) if found else None


def binary() -> Path:
    """Path of the server's binary, built first if need be. Raises Unavailable."""
    found = find()
    if found is None:
        build({"minio": "github.com/minio/minio"}, RELEASE)
    return found or cached("minio", RELEASE)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """One MinIO over `folder`, on loopback or at `address`, with random credentials that only its environment carries.

    It keeps port, credentials and data through `kill` and `start`, as a server that comes back would.
    `certificates`: a folder with public.crt and private.key makes it speak TLS.
    """

    bucket = "latentac"

    def __init__(
        self, folder: Path, port: int | None = None, certificates: Path | None = None, address: str = "127.0.0.1"
    ) -> None:
        self.folder, self.port, self.certificates, self.address = folder, port or free_port(), certificates, address
        self.endpoint = f"{'https' if certificates else 'http'}://{address}:{self.port}"
        self.access_key, self.secret_key = f"key{secrets.token_hex(6)}", secrets.token_urlsafe(24)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process that uses this server must have in its environment."""
        return {
            "LATENTAC_S3_ENDPOINT": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            **({"LATENTAC_S3_CA": str(self.certificates / "public.crt")} if self.certificates else {}),
        }

    def client(self) -> Minio:
        """A plain client with this server's credentials, for what a test does behind the store's back."""
        authorities = str(self.certificates / "public.crt") if self.certificates else None
        pool = urllib3.PoolManager(timeout=5, retries=3, ca_certs=authorities)
        host = self.endpoint.partition("://")[2]
        secure = self.certificates is not None
        return Minio(host, self.access_key, self.secret_key, secure=secure, region="us-east-1", http_client=pool)

    def start(self) -> "Server":
        """Starts it, waits until it answers, makes the bucket. Raises Unavailable with the end of its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        certificates = self.certificates or self.folder.parent / f"{self.folder.name}.certificates"
        command = [str(binary()), "server", str(self.folder), "--quiet", f"--address={self.address}:{self.port}"]
        command += [f"--console-address=127.0.0.1:{free_port()}", f"--certs-dir={certificates}"]
        secret = {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}
        quiet = {"MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}
        log = self.folder.parent / f"{self.folder.name}.log"
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, env={**os.environ, **secret, **quiet}, stdout=sink, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if not self.client().bucket_exists(self.bucket):
                    self.client().make_bucket(self.bucket)
                return self
            except (MinioException, HTTPError):  # it refuses, resets, answers 503 while it starts: the deadline counts
                time.sleep(0.05)
        self.kill()
        raise Unavailable(f"MinIO did not come up at {self.endpoint}:\n{log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power: nothing is flushed, no connection is closed politely."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None


def serve(folder: Path, port: int) -> None:
    """Runs a server in the foreground; its credentials go to a file that only the caller can read."""
    server = Server(folder, port).start()
    exports = folder.parent / f"{folder.name}.env"
    exports.touch(mode=0o600)
    exports.write_text("".join(f"export {name}='{value}'\n" for name, value in server.environment.items()))
    print(f"MinIO at {server.endpoint}, data in {folder}. In another terminal:")
    print(f"  . {exports} && make run STORE=s3://{server.bucket}/demo", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while server.process and server.process.poll() is None:
            time.sleep(0.5)
        sys.exit(f"MinIO ended by itself: see {folder.parent / f'{folder.name}.log'}")
    except KeyboardInterrupt:
        server.stop()
    finally:
        exports.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.minio", description="MinIO for tests and for trying s3://")
    parser.add_argument("command", choices=["build", "serve"])
    parser.add_argument("--folder", type=Path, default=Path("runs/minio"), help="data of serve (default runs/minio)")
    parser.add_argument("--port", type=int, default=9000, help="port of serve (default 9000)")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            print(binary())
        else:
            serve(arguments.folder.absolute(), arguments.port)
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
