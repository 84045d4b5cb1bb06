"""The network policies as one table of flows, worked out by the rules of Kubernetes from what the chart renders."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from latentac.components.cluster.objects import labels
from tests.helm.chart import BUNDLED_EVERYTHING, EVERYTHING, NAMESPACE, Object, find, of_kind, pods, render

KFP, WEB, PROMETHEUS, GATEWAYS, ELSEWHERE = "kubeflow", "web", "monitoring", "gateways", "elsewhere"
IN = "kubernetes.io/metadata.name"


class End(NamedTuple):
    """One side of a flow: a pod, or with `address` something that is none."""

    namespace: str
    labels: Mapping[str, str]
    address: str = ""


def ends(objects: list[Object]) -> dict[str, End]:
    """Who there is: the chart's pods, those that the steps make, and others."""
    found = {
        str(pod["metadata"]["labels"]["app.kubernetes.io/component"]): End(NAMESPACE, pod["metadata"]["labels"])
        for where, pod in pods(objects)
    }
    return {
        **found,
        "step": End(KFP, labels("pipeline", "run-1")),
        "worker": End(NAMESPACE, labels("train", "run-1")),
        "serve": End(NAMESPACE, {**find(objects, "ServingRuntime", "rel")["spec"]["labels"], **labels("serve", "")}),
        "kfp": End(KFP, {"app": "ml-pipeline"}),
        "neighbour": End(NAMESPACE, {"app": "something"}),
        "web": End(WEB, {}),
        "prometheus": End(PROMETHEUS, {}),
        "gateway": End(GATEWAYS, {}),
        "stranger": End(ELSEWHERE, {}),
        "internet": End("", {}, "192.0.2.1"),
    }


def selects(selector: Mapping[str, Any], found: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return all(found.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def matches(peer: Mapping[str, Any], end: End, namespace: str) -> bool:
    """Whether one entry of `from` or `to` of a policy in `namespace` names that end."""
    if "ipBlock" in peer:
        return bool(end.address) and peer["ipBlock"]["cidr"] == "0.0.0.0/0"
    if end.address:
        return False
    at = selects(peer["namespaceSelector"], {IN: end.namespace}) if "namespaceSelector" in peer else None
    return (end.namespace == namespace if at is None else at) and selects(peer.get("podSelector", {}), end.labels)


def permits(policies: list[Object], way: str, of: End, other: End, port: int) -> bool:
    """Whether the pod `of` may have that traffic: policies that select it each allow, and with none all is allowed."""
    if of.address:
        return True
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == of.namespace and selects(policy["spec"]["podSelector"], of.labels)
    ]
    if not selecting:
        return True
    peers = {"ingress": "from", "egress": "to"}[way]
    return any(
        ("ports" not in rule or port in {each["port"] for each in rule["ports"]})
        and (peers not in rule or any(matches(peer, other, policy["metadata"]["namespace"]) for peer in rule[peers]))
        for policy in selecting
        for rule in policy["spec"].get(way, [])
    )


def flows(objects: list[Object], ports: Mapping[str, int]) -> set[tuple[str, str]]:
    """(from, to) of all that can talk, to each one's own port; what stands outside of the chart among itself aside."""
    policies, found = of_kind(objects, "NetworkPolicy"), ends(objects)
    ours = [name for name, end in found.items() if "latentac" in end.labels.values()]
    return {
        (source, target)
        for source in found
        for target in found
        if (source in ours or target in ours)
        and permits(policies, "egress", found[source], found[target], ports.get(target, 1234))
        and permits(policies, "ingress", found[target], found[source], ports.get(target, 1234))
    }


def test_flows_are_the_named_ones() -> None:
    """Who can reach whom, with the bundled store: the flows of the README and none besides."""
    objects = render({**BUNDLED_EVERYTHING, "networkPolicy": {"clients": [WEB]}})
    ports = {"serve": 8080, "store": 9000, "tensorboard": 6006, "reward-server": 8090, "internet": 6443}
    inside = {"bootstrap", "test", "upload", "tensorboard", "serve", "worker", "store", "reward-server"}
    assert flows(objects, ports) == {
        # to the store: all of ours, the steps, and KFP, whose artifacts are to go there in these values
        *(
            (source, "store")
            for source in ("bootstrap", "test", "tensorboard", "serve", "reward-server", "worker", "step", "kfp")
        ),
        *((source, "reward-server") for source in ("worker", "step")),
        ("worker", "worker"),
        *((source, "serve") for source in ("step", "web", "prometheus", "gateway", "neighbour")),
        *((source, "tensorboard") for source in ("test", "web", "neighbour")),
        ("step", "internet"),  # the API server has no selector
        ("step", "kfp"),
        ("upload", "kfp"),
        ("step", "gateway"),
    }
    assert inside <= ends(objects).keys()


def test_workers_reach_each_other_on_any_port_and_nobody_else_does() -> None:
    """Gloo and NCCL take ports as they come; a stranger and even a neighbour in the namespace reaches none of them."""
    objects = render(BUNDLED_EVERYTHING)
    policies, found = of_kind(objects, "NetworkPolicy"), ends(objects)
    for port in (29500, 41234):
        assert permits(policies, "ingress", found["worker"], found["worker"], port)
        assert permits(policies, "egress", found["worker"], found["worker"], port)
    for other in ("step", "neighbour", "stranger", "serve"):
        assert not permits(policies, "ingress", found["worker"], found[other], 29500)


def test_a_store_outside_is_reached_on_its_port() -> None:
    """With an endpoint of one's own only its port is open, for those who need the store."""
    objects = render({**EVERYTHING, "networkPolicy": {}})
    policies, found = of_kind(objects, "NetworkPolicy"), ends(objects)
    for name in ("worker", "serve", "tensorboard", "bootstrap", "step", "reward-server"):
        assert permits(policies, "egress", found[name], found["internet"], 8443), name
        assert not permits(policies, "egress", found[name], found["internet"], 9000), name
    assert not permits(policies, "egress", found["upload"], found["internet"], 8443)


def test_everyone_can_ask_for_names() -> None:
    """Each of our pods reaches DNS, on the port that OpenShift has for it as well; the bundled store needs none."""
    objects = render(BUNDLED_EVERYTHING)
    policies, found = of_kind(objects, "NetworkPolicy"), ends(objects)
    for name, end in found.items():
        if "latentac" in end.labels.values():
            assert permits(policies, "egress", end, found["stranger"], 53), name
            assert permits(policies, "egress", end, found["stranger"], 5353), name


def test_policies_select_what_they_name() -> None:
    """Each policy selects the pods of the component that it is called after, and the default all of ours."""
    objects = render(BUNDLED_EVERYTHING)
    found = ends(objects)
    for policy in of_kind(objects, "NetworkPolicy"):
        name = policy["metadata"]["name"].removeprefix("rel-")
        selected = {
            each
            for each, end in found.items()
            if end.namespace == policy["metadata"]["namespace"] and selects(policy["spec"]["podSelector"], end.labels)
        }
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        if name == "default-deny":
            ours = {each for each, end in found.items() if "latentac" in end.labels.values()}
            assert selected == {each for each in ours if found[each].namespace == NAMESPACE}
        else:
            assert selected == {{"steps": "step", "train": "worker"}.get(name, name)}


def test_services_and_budget_select_their_pods() -> None:
    """Each Service and the disruption budget finds pods by labels that they have."""
    objects = render(BUNDLED_EVERYTHING)
    found = ends(objects)
    for name, component in (
        *(("minio", "store"), ("tensorboard", "tensorboard"), ("serve", "serve"), ("reward-jpeg", "reward-server")),
    ):
        selector = {"matchLabels": find(objects, "Service", f"rel-{name}")["spec"]["selector"]}
        assert [each for each, end in found.items() if selects(selector, end.labels)] == [component]
    budget = find(objects, "PodDisruptionBudget", "rel-serve")["spec"]["selector"]
    assert [each for each, end in found.items() if selects(budget, end.labels)] == ["serve"]


def test_policies_can_be_left_to_the_cluster() -> None:
    """With networkPolicy.enabled=false there is none."""
    assert not of_kind(render({**EVERYTHING, "networkPolicy": {"enabled": False}}), "NetworkPolicy")
