"""The fixtures of clusters, for every folder of tests (tests/conftest.py imports them).

`control_plane`: an API server with its controllers, on loopback, without root: mark such tests `slow`.
`node`: the same and a node that runs pods, as root: mark such tests `cluster`.
`crds`: asked for besides one of them by a test that needs the CRDs of KServe, Volcano and Argo.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.node import Node, Record, lacking
from tools import manifests
from tools.golang import Unavailable


@pytest.fixture(scope="session")
def crds() -> list[Path]:
    """The folders with the CRDs, those that count more last; skips where they are missing, with the remedy."""
    if manifests.missing() and not os.environ.get(manifests.NAMED):
        pytest.skip(f"{', '.join(manifests.missing())} not fetched: `make crds` does that once")
    return manifests.crds()


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One control plane for all tests of this process; a test takes a namespace of its own."""
    try:
        plane = ControlPlane(tmp_path_factory.mktemp("control-plane")).start()
    except Unavailable as error:
        if "make node-build" in str(error):
            pytest.skip(str(error))
        raise
    yield plane
    plane.stop()


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node for all tests of this process: the one of `make node-up` if it is up, else one that ends with them."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    record = Record.read()
    if record:
        running = record.attach()
        yield running
        running.delete_namespaces()
        return
    own = Node(tmp_path_factory.mktemp("node")).start()
    yield own
    own.stop()
