"""Fixtures that more than one folder of tests needs."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fixtures import control_plane, crds, node  # noqa: F401  # for every folder of tests
from tools.docker import Docker, daemon
from tools.golang import Unavailable
from tools.minio import Server, find


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "minio: needs a real MinIO server")
    # A shell's background jobs ignore Ctrl-C, and hand that down to every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # what is not selected is gone by then
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest time limits first: of several workers none is left with a long file at the end."""
    limits: Counter[Path] = Counter()
    for item in items:
        marker = item.get_closest_marker("timeout")
        limits[item.path] += int(marker.args[0]) if marker else 0
    items.sort(key=lambda item: -limits[item.path])


@pytest.fixture(scope="session")
def minio_binary() -> Path:
    """The server's program. `make test` builds it first; a build takes minutes, so no test starts one."""
    found = find()
    if found is None:
        pytest.skip("there is no MinIO server here: `make minio` builds one")
    return found


@pytest.fixture(scope="session")
def minio_server(minio_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One running MinIO for tests that leave it running; a test that kills its server starts its own."""
    server = Server(tmp_path_factory.mktemp("minio") / "data").start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def docker_daemon() -> Iterator[Docker]:
    """A docker daemon with the images of `make images`; ours ends with its last user."""
    try:
        with daemon() as found:
            yield found
    except Unavailable as error:
        pytest.skip(str(error))
