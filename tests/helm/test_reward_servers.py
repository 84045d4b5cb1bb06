"""Reward servers of the chart: what their pods run is the command, and answers their probes."""

import json
import time
import urllib.request
from typing import Any

import pytest

from latentac.components.cluster.objects import labels
from tests.helm.chart import BUNDLED, Refused, find, render
from tests.latentac.rewards.servers import READY_SECONDS, RewardServer

SERVERS: dict[str, dict[str, Any]] = {
    "jpeg": {"reward": "jpeg_compressibility", "settings": {"timeout_seconds": 60.5, "retries": 0}},
    "clip": {"reward": "clip_score", "settings": {"source": "s3://models/clip", "device": "cuda"}, "replicas": 3},
}


@pytest.mark.slow
def test_the_command_of_a_pod_serves_and_answers_its_probes() -> None:
    """The container's own arguments, on a free port, start the server, and each probe's path answers 200."""
    deployment = find(render({**BUNDLED, "rewardServers": SERVERS}), "Deployment", "rel-reward-jpeg")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/usr/bin/tini", "--", "latentac", "reward-server"]
    reward, *words = container["args"]
    assert "--port=8090" in words
    given = [word for word in words if word not in ("--port=8090", "--host=0.0.0.0")]
    with RewardServer(reward.removeprefix("--reward="), *given) as server:
        until = time.monotonic() + READY_SECONDS
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            address = server.url + container[probe]["httpGet"]["path"]
            with urllib.request.urlopen(address, timeout=max(1.0, until - time.monotonic())) as answer:
                assert json.load(answer)["ready"] is True


def test_each_server_has_its_own_pods() -> None:
    """Two servers share nothing: a Service selects the pods of its own Deployment alone."""
    objects = render({**BUNDLED, "rewardServers": SERVERS})
    for name, server in SERVERS.items():
        deployment = find(objects, "Deployment", f"rel-reward-{name}")
        selector = find(objects, "Service", f"rel-reward-{name}")["spec"]["selector"]
        assert deployment["spec"]["replicas"] == server.get("replicas", 1)
        for other in SERVERS:
            found = find(objects, "Deployment", f"rel-reward-{other}")["spec"]["template"]["metadata"]["labels"]
            assert (selector.items() <= found.items()) == (other == name)
    assert not selector.items() <= labels("train", "run-1").items()


def test_settings_arrive_with_their_types() -> None:
    """Numbers stay numbers and text stays text on the way through the command line."""
    [container] = find(render({**BUNDLED, "rewardServers": SERVERS}), "Deployment", "rel-reward-clip")["spec"][
        "template"
    ]["spec"]["containers"]
    given = dict(word.removeprefix("--set=").split("=", 1) for word in container["args"] if word.startswith("--set="))
    assert {field: json.loads(value) for field, value in given.items()} == SERVERS["clip"]["settings"]


@pytest.mark.parametrize("name", ["Upper", "a_b", "-a", "fifteen-letters"])
def test_a_name_that_makes_no_dns_name_is_refused(name: str) -> None:
    """Names of Deployments and Services are made of it."""
    with pytest.raises(Refused, match=f"propertyName .{name}"):
        render({**BUNDLED, "rewardServers": {name: {"reward": "jpeg_compressibility"}}})


def test_a_server_needs_a_reward() -> None:
    """Left out, it is named."""
    with pytest.raises(Refused, match="reward"):
        render({**BUNDLED, "rewardServers": {"clip": {}}})
