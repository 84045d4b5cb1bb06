"""The steps as containers of a docker daemon: kfp.local's DockerRunner, and what a real run needs around it.

Every container is a numeric user with a read-only root, no capability and the host's network; it writes to the run's
folder and to tmpfs, and reads the model and the prompts that the configuration names. Artifacts go to S3: the server of
the environment, else a MinIO that the driver runs beside the steps. All containers of a driver carry its label, and a
keeper process removes them when it ends, however it ends.
"""

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, ImageNotFound
from docker.types import Mount

from latentac.pipelines.request import Request, local_sources
from latentac.pipelines.ways import Way
from latentac.runs.task import EVENTS
from latentac.store import access
from latentac.system.calls import CALLS
from latentac.system.calls import FOLDER as REWARD_CALLS
from latentac.system.errors import ConfigError, Problem, ResourceError
from latentac.system.lifetime import run_lock
from latentac.system.scratch import empty_folder
from latentac.system.waiting import TimeUp, within

RUN_LABEL, DRIVER_LABEL = "latentac.run", "latentac.driver"
USER = 65532
BUCKET = "latentac"

_LOCAL = {name: f"latentac/{name}:dev" for name in ("pipeline", "train", "serve", "minio")}
_SERVED = "serve"
_DECIDING = ("gate", "finish")
_START_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
"""For the daemon to answer a ping, before and while a run goes on."""

_LOOK_SECONDS = 10.0
_MOST_MISSED = 2
_CALL_SECONDS = 600
"""For one other call of the daemon: to make a container may take minutes, where its driver copies the image."""

_REMOVAL_SECONDS = 60
_AS_THEY_ARE = ("HF_HUB_OFFLINE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy")


_log = logging.getLogger("latentac.pipeline")


def image(name: str) -> str:
    """The reference of the image `name`: LATENTAC_IMAGE_<NAME>, else what `make images` builds."""
    return os.environ.get(f"LATENTAC_IMAGE_{name.upper()}", "").strip() or _LOCAL[name]


def image_of(step: str) -> str:
    """Here train runs its workers and deploy its server itself, so both need torch, which they do not on a cluster."""
    if step in _DECIDING:
        return image("pipeline")
    return image(_SERVED) if step == "deploy" else image("train")


@contextlib.contextmanager
def containers(run: str, request: Request, output: Path) -> Iterator[Way]:
    """The way to run the steps in containers. Raises ResourceError (no daemon, no image), ConfigError (the store)."""
    from kfp import local

    if request.store and not request.store.startswith("s3://"):
        remedy = "Name an s3:// store and export its endpoint and credentials, or leave it out for a MinIO of its own."
        raise ConfigError([Problem("--store", request.store, "containers share no folder but the run's", remedy)])
    output = output.resolve()
    folder, driver = output / run, uuid.uuid4().hex
    empty_folder(folder / "kfp")  # of copies of manifests of earlier starts: the store has the originals
    (folder / "kfp" / "workspace").mkdir()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(_client()))
        stack.enter_context(_answering())
        _check_images(client, own_store=not request.store)
        _remove(client, {RUN_LABEL: run})  # of a driver and a keeper that were killed together
        stack.enter_context(_keeper(driver))
        if request.store:
            environment, store = _environment_of_the_store(), request.store
        else:
            environment, store = stack.enter_context(_minio(client, output / ".minio", driver)), f"s3://{BUCKET}/store"
        _read_from(environment)
        _hand_over(folder)
        labels = {RUN_LABEL: run, DRIVER_LABEL: driver}
        yield Way(
            runner=local.DockerRunner(**_arguments(folder, local_sources(request), environment, labels)),
            store=store,
            output=output,
            config=str(Path(request.config).resolve()) if request.config else "",
            place=lambda task: task.set_container_image(image_of(task.name)),
            keep=bool(request.store),
            errors=(DockerException,),  # kfp looks at every image before each step, and stumbles if one is removed then
        )


def _client() -> docker.DockerClient:
    _leave_out_proxies()
    try:
        return within(_ANSWER_SECONDS, _pinged)
    except (DockerException, ValueError, TimeUp) as error:
        remedy = "Start one, or export DOCKER_HOST"
        raise ResourceError(_host(), f"no docker daemon answers ({_short(error)})", remedy) from None


def _pinged() -> docker.DockerClient:
    client = docker.from_env(timeout=_CALL_SECONDS)
    client.ping()
    return client


def _host() -> str:
    return os.environ.get("DOCKER_HOST") or "docker"


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Ends the body, in the main thread, when the daemon answers no longer. A container may be silent for hours, and
    from a daemon that hangs nothing comes either: so it is asked beside that. Raises ResourceError."""
    ended, lost = threading.Event(), threading.Event()

    def look() -> None:
        missed = 0
        while not ended.wait(_LOOK_SECONDS):
            try:
                within(_ANSWER_SECONDS, lambda: _pinged().close())
                missed = 0
            except TimeUp:
                missed += 1
                if missed == _MOST_MISSED:
                    lost.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
            except (DockerException, OSError):  # it is gone, and so are the connections that the body waits on
                missed = 0

    threading.Thread(target=look, name="latentac-docker", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        problem = f"the docker daemon has not answered {_MOST_MISSED} pings within {_ANSWER_SECONDS:g} s each"
        raise ResourceError(_host(), problem, "Look at it, start it again, and resume the run") from None
    finally:
        ended.set()


def _leave_out_proxies() -> None:
    """No proxy for this machine, where the daemon and the MinIO are; the docker SDK would ask one for 127.0.0.1."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in given.split(",") if name.strip()]
    joined = ",".join(dict.fromkeys([*names, "localhost", "127.0.0.1", "::1"]))
    os.environ |= {"NO_PROXY": joined, "no_proxy": joined}


def _check_images(client: docker.DockerClient, own_store: bool) -> None:
    for name in ("pipeline", "train", "serve", *(["minio"] if own_store else [])):
        try:
            client.images.get(image(name))
        except ImageNotFound:
            remedy = f"Build them with `make images`, or name one in LATENTAC_IMAGE_{name.upper()}"
            raise ResourceError(f"image {image(name)}", "the docker daemon does not have it", remedy) from None


def _arguments(
    folder: Path, sources: Sequence[str], environment: Mapping[str, str], labels: Mapping[str, str]
) -> dict[str, Any]:
    """What every step's container is started with; secrets travel in the daemon's API, on no command line."""
    mounts = [Mount(str(folder), str(folder), type="bind")]
    read = dict.fromkeys([*sources, *filter(None, [environment.get("LATENTAC_S3_CA")])])
    mounts += [Mount(place, place, type="bind", read_only=True) for place in read]
    return {
        **_confined(),
        "entrypoint": ["/usr/bin/tini", "--"],  # the server's image would start the server
        "tmpfs": {"/tmp": "rw,nosuid,nodev,exec,mode=1777", "/work": "rw,nosuid,nodev,mode=1777"},  # noqa: S108 - theirs
        "shm_size": "1g",
        "mounts": mounts,
        "labels": dict(labels),
        # Not the owners of our processes: their numbers mean nothing in there.
        "environment": {
            **environment,
            **{name: os.environ[name] for name in _AS_THEY_ARE if name in os.environ},
            EVENTS: "1",
            REWARD_CALLS: str(folder / CALLS),
            "PYTHONUNBUFFERED": "1",
        },
    }


def _confined() -> dict[str, Any]:
    user, group = _user()
    return {
        "user": f"{user}:{group}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "network_mode": "host",
    }


def _user() -> tuple[int, int]:
    """Who owns the files: whoever calls, and for root the images' own user."""
    return (os.getuid(), os.getgid()) if os.getuid() else (USER, USER)


def _hand_over(folder: Path) -> None:
    """Give what is in `folder` to the containers' user, where they are not the same."""
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, *_user(), follow_symlinks=False)


def _environment_of_the_store() -> dict[str, str]:
    """Raises ConfigError."""
    found = access.read()
    authorities = str(Path(found.authorities).resolve()) if found.authorities else ""
    return dataclasses.replace(found, authorities=authorities).environment()


def _read_from(environment: Mapping[str, str]) -> None:
    """Make the store of `environment` this process's own: of another one nothing stays, such as a session token."""
    for name in access.VARIABLES:
        os.environ.pop(name, None)
    os.environ |= environment


@contextlib.contextmanager
def _minio(client: docker.DockerClient, folder: Path, driver: str) -> Iterator[dict[str, str]]:
    """A MinIO on loopback over `folder`; yields what its users need in their environment. New credentials each time."""
    from minio import Minio
    from minio.error import MinioException
    from urllib3 import PoolManager
    from urllib3.exceptions import HTTPError

    (folder / "data").mkdir(parents=True, exist_ok=True)
    with run_lock(folder / "minio.lock"):
        _remove(client, {"latentac.minio": str(folder)})
        _hand_over(folder / "data")
        port, console = _free_port(), _free_port()
        access, secret = f"key{secrets.token_hex(6)}", secrets.token_urlsafe(24)
        command = ["server", "/data", "--quiet", "--certs-dir=/tmp/certs"]
        container = client.containers.run(
            image("minio"),
            [*command, f"--address=127.0.0.1:{port}", f"--console-address=127.0.0.1:{console}"],
            detach=True,
            **_confined(),
            tmpfs={"/tmp": "rw,nosuid,nodev,mode=1777"},  # noqa: S108 - the container's
            mounts=[Mount("/data", str(folder / "data"), type="bind")],
            labels={"latentac.minio": str(folder), DRIVER_LABEL: driver},
            environment={"MINIO_ROOT_USER": access, "MINIO_ROOT_PASSWORD": secret, "MINIO_BROWSER": "off"},
        )
        try:
            # The loop below asks again; urllib3 would, too, with a warning for each time.
            http = PoolManager(timeout=5, retries=False)
            address = f"127.0.0.1:{port}"
            server = Minio(address, access, secret, secure=False, region="us-east-1", http_client=http)
            deadline = time.monotonic() + _START_SECONDS
            while True:
                try:
                    if not server.bucket_exists(BUCKET):
                        server.make_bucket(BUCKET)
                    break
                except (MinioException, HTTPError) as error:
                    container.reload()
                    if container.status not in ("created", "running") or time.monotonic() > deadline:
                        words = container.logs(tail=20).decode(errors="replace").strip()
                        problem = f"MinIO did not come up: {words or error}"
                        raise ResourceError(str(folder), problem, "Look at the image and the folder") from None
                    time.sleep(0.1)
            yield {
                "LATENTAC_S3_ENDPOINT": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": access,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_REGION": "us-east-1",
            }
        finally:
            with contextlib.suppress(DockerException, OSError):
                within(_REMOVAL_SECONDS, lambda: container.stop(timeout=10))
                within(_REMOVAL_SECONDS, lambda: container.remove(force=True))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _keeper(driver: str) -> Iterator[None]:
    """A process that removes the containers of `driver` when this one ends, killed or not: it reads from a pipe."""
    command = [sys.executable, "-m", "latentac.pipelines.containers", driver]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)
    try:
        yield
    finally:
        try:
            process.communicate(timeout=2 * _REMOVAL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            _log.warning("%s: the daemon does not remove the containers of this run", _host())


def _remove(client: docker.DockerClient, labels: Mapping[str, str]) -> None:
    filters: dict[str, Any] = {"label": [f"{name}={value}" for name, value in labels.items()]}
    for container in client.containers.list(all=True, filters=filters, ignore_removed=True):
        with contextlib.suppress(DockerException):  # it is on its way out already
            container.remove(force=True)


def keep(driver: str) -> None:
    """Wait until stdin ends, then remove what is labelled with `driver`, and what it had asked for just then."""
    sys.stdin.read()
    with contextlib.closing(docker.from_env(timeout=_REMOVAL_SECONDS)) as client:
        for _ in range(3):
            _remove(client, {DRIVER_LABEL: driver})
            time.sleep(0.3)


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


if __name__ == "__main__":
    keep(sys.argv[1])
