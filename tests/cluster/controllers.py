"""The real controllers of Volcano and KServe, as processes of a node.

They are clients of the API server like any other. It reaches their webhooks at the node's address: a webhook may be
named by an address instead of a Service. Configuration and webhooks come from the projects' own files (the cache of
`make crds`). They act as administrators: what they may do on a real cluster is their installation's business.
"""

import base64
import json
import socket
import subprocess
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from tests.cluster.control_plane import answers
from tests.cluster.processes import Program
from tools.binaries import program
from tools.golang import Unavailable
from tools.manifests import install

if TYPE_CHECKING:
    from tests.cluster.node import Node

_VOLCANO, _KSERVE = "volcano-system", "kserve"
_VOLCANO_PORT, _KSERVE_PORT, _KSERVE_HEALTH = 8443, 9443, 9440
_ADMINISTRATORS = "system:masters"


def start(node: "Node") -> None:
    """Returns when jobs and InferenceServices are admitted and worked on. Raises Unavailable."""
    _start_kserve(node)
    _start_volcano(node)


def _start_volcano(node: "Node") -> None:
    chart = install("volcano-chart")
    enabled = yaml.safe_load((chart / "values.yaml").read_text())["custom"]["enabled_admissions"]
    command = [str(program("helm")), "template", "volcano", str(chart), "--namespace", _VOLCANO]
    rendered = subprocess.run([*command, "--show-only", "templates/webhooks.yaml"], capture_output=True, text=True)
    if rendered.returncode:
        raise Unavailable(f"Volcano's chart does not render: {rendered.stderr.strip()}")
    hooks = [each for each in yaml.safe_load_all(rendered.stdout) if each]
    _apply(node, [_namespace(_VOLCANO), *_reachable(node, hooks, _VOLCANO_PORT)])
    certificate, key = node.authority.issue("volcano-webhooks", "volcano-webhooks", hosts=[node.sandbox.address])
    account = f"--kubeconfig={node.component_kubeconfig('volcano', _ADMINISTRATORS)}"
    options = [
        *(account, f"--listen-address={node.sandbox.address}", f"--port={_VOLCANO_PORT}"),
        *(f"--enabled-admission={enabled}", f"--webhook-url=https://{node.sandbox.address}:{_VOLCANO_PORT}"),
        *(f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}"),
        f"--ca-cert-file={node.authority.certificate}",
    ]
    _launch(node, "vc-webhook-manager", *options).wait(lambda: _listens(node.sandbox.address, _VOLCANO_PORT))
    alone = "--leader-elect=false"
    _launch(node, "vc-controller-manager", account, alone)
    configuration = chart / "config" / "volcano-scheduler.conf"
    _launch(node, "vc-scheduler", account, alone, f"--scheduler-conf={configuration}", "--cache-dumper=false")
    # The scheduler makes this queue, the manager opens it; until then the webhook refuses jobs.
    queue = "queues.scheduling.volcano.sh/default"
    node.kubectl("wait", "--for=create", queue, "--timeout=60s")
    node.kubectl("wait", "--for=jsonpath={.status.state}=Open", queue, "--timeout=60s")


def _start_kserve(node: "Node") -> None:
    folder = install("kserve-config")
    settings = yaml.safe_load((folder / "configmap" / "inferenceservice.yaml").read_text())
    settings["metadata"] = {"name": "inferenceservice-config", "namespace": _KSERVE}
    settings["data"].pop("_example")
    _change(settings["data"], "deploy", defaultDeploymentMode="Standard")
    # There is neither Istio nor a controller of Ingresses: Services are reached by their addresses.
    _change(settings["data"], "ingress", disableIngressCreation=True, disableIstioVirtualHost=True)
    hooks = [each for each in yaml.safe_load_all((folder / "webhook" / "manifests.yaml").read_text()) if each]
    _apply(node, [_namespace(_KSERVE), settings])
    certificate, key = node.authority.issue("kserve-webhooks", "kserve-webhooks", hosts=[node.sandbox.address])
    temporary = node.folder / "kserve"  # its webhook looks for the certificate in the folder for temporary files
    place = temporary / "k8s-webhook-server" / "serving-certs"
    place.mkdir(parents=True)
    (place / "tls.crt").write_bytes(certificate.read_bytes())
    (place / "tls.key").touch(mode=0o600)
    (place / "tls.key").write_bytes(key.read_bytes())
    variables = {
        "KUBECONFIG": str(node.component_kubeconfig("kserve", _ADMINISTRATORS)),
        "POD_NAMESPACE": _KSERVE,
        "TMPDIR": str(temporary),
    }
    health = f"{node.sandbox.address}:{_KSERVE_HEALTH}"
    options = [f"--webhook-port={_KSERVE_PORT}", f"--health-probe-addr={health}", "--metrics-addr=0"]
    manager = _launch(node, "kserve-manager", *options, variables=variables)
    manager.wait(lambda: answers(f"http://{health}/readyz"))
    _apply(node, _reachable(node, hooks, _KSERVE_PORT))


def _launch(node: "Node", name: str, *options: str, variables: Mapping[str, str] | None = None) -> Program:
    """Start a program of the cache in the node, with further environment variables."""
    environment = ["env", *(f"{key}={value}" for key, value in (variables or {}).items())]
    return node.launch(name, node.sandbox.inside(*environment, program(name), *options))


def _reachable(node: "Node", hooks: Iterable[dict[str, Any]], port: int) -> list[dict[str, Any]]:
    """Webhook configurations that name the node's address instead of a Service."""
    authority = base64.b64encode(node.authority.certificate.read_bytes()).decode()
    changed = []
    for each in hooks:
        each["metadata"] = {"name": each["metadata"]["name"]}
        for hook in each["webhooks"]:
            url = f"https://{node.sandbox.address}:{port}{hook['clientConfig']['service']['path']}"
            hook["clientConfig"] = {"url": url, "caBundle": authority}
        changed.append(each)
    return changed


def _change(data: dict[str, str], name: str, **values: object) -> None:
    """Set fields of one of the JSON documents of KServe's configuration."""
    data[name] = json.dumps({**json.loads(data[name]), **values})


def _namespace(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _apply(node: "Node", objects: list[dict[str, Any]]) -> None:
    listing = {"apiVersion": "v1", "kind": "List", "items": objects}
    node.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(listing))


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False
