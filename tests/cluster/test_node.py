"""The test node is a real one: what a cluster does with pods, it does; and it leaves nothing behind."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.containerd import full_name
from tests.cluster.control_plane import ControlPlane, KubectlError
from tests.cluster.layers import Layers
from tests.cluster.node import Node, lacking
from tools.binaries import program
from tools.docker import Docker

PROBE = "latentac/probe:v2"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


def probe(name: str, *arguments: str, **fields: Any) -> dict[str, Any]:
    """A pod of the probe program, as `restricted` wants it."""
    container: dict[str, Any] = {"name": "probe", "image": PROBE, "args": list(arguments)}
    container["securityContext"] = RESTRICTED
    if arguments[0] == "serve":
        container["readinessProbe"] = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [container], "restartPolicy": "Never", **fields},
    }


def create(node: ControlPlane, namespace: str, *objects: dict[str, Any]) -> None:
    listing = {"apiVersion": "v1", "kind": "List", "items": objects}
    node.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(listing))


@pytest.fixture(scope="module")
def probes(node: Node) -> Node:
    """The node, with the image that these tests run."""
    node.containerd.add(PROBE, program("probe"))
    return node


@pytest.fixture
def namespace(probes: Node) -> Iterator[str]:
    """A namespace that enforces `restricted`, gone when the test is over."""
    name = probes.namespace("node", restricted=True)
    yield name
    probes.delete_namespace(name, wait=False)


@pytest.mark.cluster
def test_a_pod_is_reached_by_its_services_name(probes: Node, namespace: str) -> None:
    """A restricted pod runs; another one reaches it through DNS and the Service; logs, exec and the machine do too."""
    ports = [{"port": 80, "targetPort": 8080}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "greeter"}}
    create(
        probes,
        namespace,
        probe("server", "serve", ":8080", "hello"),
        {**service, "spec": {"selector": {"app": "server"}, "ports": ports}},
    )
    probes.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/server", "--timeout=60s")
    create(probes, namespace, probe("client", "get", f"http://greeter.{namespace}.svc.cluster.local/"))
    probes.kubectl("wait", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "pod/client", "--timeout=60s")
    assert probes.kubectl("logs", "-n", namespace, "client") == "hello\n"
    inside = ["exec", "-n", namespace, "server", "--", "/program", "get", "http://greeter/"]
    assert probes.kubectl(*inside) == "hello\n", "a pod reaches itself through its Service"
    address = probes.kubectl("get", "-n", namespace, "service/greeter", "-o", "jsonpath={.spec.clusterIP}")
    from_here = subprocess.run([str(program("probe")), "get", f"http://{address}/"], capture_output=True, text=True)
    assert from_here.stdout == "hello\n"


@pytest.mark.cluster
def test_a_port_is_forwarded(probes: Node, namespace: str) -> None:
    """kubectl port-forward carries a request from this machine's loopback into a pod."""
    create(probes, namespace, probe("server", "serve", ":8080", "hello"))
    probes.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/server", "--timeout=60s")
    command = [str(program("kubectl")), "port-forward", "-n", namespace, "pod/server", ":8080"]
    environment = {**os.environ, **probes.environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as forward:
        try:
            assert forward.stdout is not None
            address = forward.stdout.readline().split()[2]
            done = subprocess.run([str(program("probe")), "get", f"http://{address}/"], capture_output=True, text=True)
        finally:
            forward.kill()
    assert done.stdout == "hello\n"


@pytest.mark.cluster
def test_a_pod_ends_with_grace(probes: Node, namespace: str) -> None:
    """A deleted pod is told by SIGTERM and has its time: it says so, and its last words are still read."""
    create(probes, namespace, probe("server", "serve", ":8080", "hello", terminationGracePeriodSeconds=20))
    probes.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/server", "--timeout=60s")
    follow = [str(program("kubectl")), "logs", "--follow", "-n", namespace, "server"]
    environment = {**os.environ, **probes.environment}
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True, env=environment) as logs:
        began = time.monotonic()
        probes.kubectl("delete", "-n", namespace, "pod/server", "--timeout=60s")
        seconds = time.monotonic() - began
        assert logs.stdout is not None
        assert logs.stdout.read().split("\n")[1:] == ["told to end", "ended in order", ""]
    assert 2.0 <= seconds < 18.0, "neither killed at once nor after the whole grace period"


@pytest.mark.cluster
def test_restricted_is_enforced(probes: Node, namespace: str) -> None:
    """A pod that may be root is refused at admission, and told why."""
    pod = probe("careless", "serve", ":8080", "hello")
    del pod["spec"]["containers"][0]["securityContext"]
    with pytest.raises(KubectlError, match=r"violates PodSecurity.*runAsNonRoot"):
        create(probes, namespace, pod)


@pytest.mark.cluster
def test_a_job_completes(probes: Node, namespace: str) -> None:
    """A Job's pod asks the API server's own Service for its health, from inside, and the Job is complete."""
    pod = probe("asks", "get", "http://kubernetes.default.svc.cluster.local:443/")
    template = {"metadata": {}, "spec": pod["spec"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "asks"}, "spec": {"template": template}}
    create(probes, namespace, job)
    probes.kubectl("wait", "-n", namespace, "--for=condition=Complete", "job/asks", "--timeout=60s")
    assert "HTTP request to an HTTPS server" in probes.kubectl("logs", "-n", namespace, "job/asks")


@pytest.mark.cluster
def test_a_pod_reaches_a_server_of_the_machine(probes: Node, namespace: str) -> None:
    """What a test serves at `node.ip`, pods reach: a MinIO, for instance."""
    with subprocess.Popen(
        [str(program("probe")), "serve", f"{probes.ip}:18080", "machine"], stdout=subprocess.PIPE
    ) as server:
        try:
            create(probes, namespace, probe("client", "get", f"http://{probes.ip}:18080/"))
            done = "--for=jsonpath={.status.phase}=Succeeded"
            probes.kubectl("wait", "-n", namespace, done, "pod/client", "--timeout=60s")
        finally:
            server.kill()
    assert probes.kubectl("logs", "-n", namespace, "client") == "machine\n"


@pytest.mark.cluster
@pytest.mark.parametrize("helm", ["helm", "helm3"])
def test_helm_talks_to_it(probes: Node, namespace: str, helm: str, tmp_path: Path) -> None:
    """Both majors install a chart, wait until its pod is ready, and take it away."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: probe\nversion: 0.1.0\n")
    (tmp_path / "templates" / "pod.yaml").write_text(json.dumps(probe("server", "serve", ":8080", "hello")))
    environment = {**os.environ, **probes.environment, "HELM_CACHE_HOME": str(tmp_path / "cache")}
    for words in (["install", "probe", str(tmp_path), "--wait"], ["list", "--short"], ["uninstall", "probe"]):
        command = [str(program(helm)), *words, "--namespace", namespace]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        if words[0] == "list":
            assert done.stdout.split() == ["probe"]


@pytest.mark.cluster
@pytest.mark.parametrize("way", ["files", "save"])
def test_an_image_of_the_docker_daemon_runs(
    probes: Node, namespace: str, docker_daemon: Docker, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is imported once; when a layer is put on top, only that one moves; pods run the newer one.

    Both ways from the daemon lead there: its files on this machine, and what `docker save` sends.
    """
    if way == "save":
        monkeypatch.setattr(Layers, "of", lambda docker: None)
    name = f"latentac/loaded-{way}:{namespace}"
    with contextlib.closing(docker_daemon.client()) as client:
        try:
            build(docker_daemon, "scratch", name, program("probe"), f"first {way}")
            assert probes.load([name], docker_daemon) == [name]
            assert probes.load([name], docker_daemon) == []
            build(docker_daemon, name, name, None, f"second {way}")
            assert probes.load([name], docker_daemon) == [name]
            pod = probe("loaded", "get", f"http://{namespace}.invalid/")
            pod["spec"]["containers"][0] |= {"image": name, "args": ["file", "/told"]}
            create(probes, namespace, pod)
            done = "--for=jsonpath={.status.phase}=Succeeded"
            probes.kubectl("wait", "-n", namespace, done, "pod/loaded", "--timeout=60s")
            assert probes.kubectl("logs", "-n", namespace, "loaded") == f"second {way}"
        finally:
            client.images.remove(name, force=True)
            probes.kubectl("delete", "pod", "loaded", "-n", namespace, "--ignore-not-found", "--now")
            probes.containerd.ctr("images", "delete", full_name(name))


def build(docker: Docker, base: str, name: str, binary: Path | None, text: str) -> None:
    """An image on `base` with the file /told and, if given, the program, which becomes its entry point."""
    files = {"told": text.encode(), "Dockerfile": f"FROM {base}\nCOPY told /told\n".encode()}
    if binary:
        files |= {"program": binary.read_bytes()}
        files["Dockerfile"] += b'COPY program /program\nUSER 65532:65532\nENTRYPOINT ["/program"]\n'
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    archive.seek(0)
    with contextlib.closing(docker.client()) as client:
        client.images.build(fileobj=archive, custom_context=True, tag=name, network_mode="none")


@pytest.mark.slow
def test_rights_are_asked_and_calls_are_seen(control_plane: ControlPlane) -> None:
    """`auth can-i --as` answers by the Role; a token of the account may just that; the audit log tells what it did."""
    namespace = control_plane.namespace("rights")
    user = f"system:serviceaccount:{namespace}:default"
    role = ["create", "role", "reader", "--verb=get,list", "--resource=pods", "-n", namespace]
    control_plane.kubectl(*role)
    bind = ["create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:default"]
    control_plane.kubectl(*bind, "-n", namespace)
    assert control_plane.kubectl("auth", "can-i", "list", "pods", f"--as={user}", "-n", namespace) == "yes\n"
    with pytest.raises(KubectlError):
        control_plane.kubectl("auth", "can-i", "delete", "pods", f"--as={user}", "-n", namespace)
    own = ["--kubeconfig", str(control_plane.kubeconfig_of(namespace, "default"))]
    assert control_plane.kubectl(*own, "get", "pods", "-o", "name") == ""
    with pytest.raises(KubectlError, match="forbidden"):
        control_plane.kubectl(*own, "delete", "configmap", "kube-root-ca.crt")
    assert control_plane.calls(user) >= {("list", "core/pods"), ("delete", "core/configmaps")}
    assert control_plane.calls("system:serviceaccount:nowhere:default") == set()


@pytest.mark.slow
def test_custom_kinds_are_collected_with_their_owner(control_plane: ControlPlane, crds: list[Path]) -> None:
    """The CRDs are served when the fixture returns, and the garbage collector knows their kinds."""
    assert {
        "jobs.batch.volcano.sh",
        "inferenceservices.serving.kserve.io",
        "workflows.argoproj.io",
    } <= control_plane.crds
    namespace = control_plane.namespace("owned")
    control_plane.kubectl("create", "configmap", "owner", "-n", namespace)
    uid = control_plane.kubectl("get", "configmap", "owner", "-n", namespace, "-o", "jsonpath={.metadata.uid}")
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    metadata = {"name": "owned", "ownerReferences": [owner]}
    kind = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    create(control_plane, namespace, {**kind, "metadata": metadata, "spec": {}})
    control_plane.kubectl("delete", "configmap", "owner", "-n", namespace)
    wait = ["wait", "--for=delete", "workflows.argoproj.io/owned", "-n", namespace, "--timeout=60s"]
    control_plane.kubectl(*wait)


def traces() -> dict[str, set[str]]:
    """What a node could leave on a machine. Docker's own, which others may use meanwhile, is not counted."""
    mounts = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()}
    links = json.loads(output("ip", "-json", "link"))
    spaces = json.loads(output("lsns", "--json", "--type", "net", "--output", "NS,COMMAND"))["namespaces"]
    found = {
        "mounts": mounts,
        "links": {link["ifname"] for link in links},
        "routes": set(output("ip", "route").splitlines()),
        "iptables": {rule for rule in output("iptables-save").splitlines() if rule.startswith(("-A", ":KUBE", ":CNI"))},
        "namespaces": {f"{space['ns']} {space['command']}" for space in spaces},
        "cgroups": {str(folder) for folder in Path("/sys/fs/cgroup").glob("**/latentac-node-*")},
        "settings": {output("sysctl", "vm.overcommit_memory", "kernel.panic", "net.ipv4.ip_forward")},
        "folders": {
            str(path) for path in map(Path, ("/var/lib/cni", "/var/lib/kubelet", "/run/netns")) if path.exists()
        },
    }
    return {
        kind: {thing for thing in things if "docker" not in thing and not thing.startswith("veth")}
        for kind, things in found.items()
    }


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def left(before: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is there that was not there `before`."""
    return {kind: things - before[kind] for kind, things in traces().items() if things - before[kind]}


def settled(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.cluster
def test_a_node_comes_up_soon_and_leaves_no_trace(tmp_path: Path) -> None:
    """Processes, mounts, devices, routes, iptables rules, namespaces, control groups: after it as before it."""
    if lacking():
        pytest.skip(lacking())
    before = traces()
    began = time.monotonic()
    node = Node(tmp_path / "node").start()
    seconds = time.monotonic() - began
    try:
        print(f"the node was up after {seconds:.1f} s")
        assert seconds < 150.0, "under 20 s on an idle machine of two cores; a busy one gets more"
        node.containerd.add(PROBE, program("probe"))
        namespace = node.namespace("trace")
        create(node, namespace, probe("server", "serve", ":8080", "hello"))
        node.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/server", "--timeout=60s")
        assert left(before), "the comparison sees a node that is up"
        processes = [part.process for part in node.programs]
    finally:
        node.stop()
    assert all(process.poll() is not None for process in processes)
    assert settled(lambda: not left(before)), left(before)


@pytest.mark.cluster
def test_a_node_whose_tests_are_killed_goes_too(tmp_path: Path) -> None:
    """After kill -9 of the process that holds it, no process, mount, device or rule of it stays."""
    if lacking():
        pytest.skip(lacking())
    before = traces()
    script = (
        "import sys, time; from pathlib import Path; from tests.cluster.node import Node\n"
        "node = Node(Path(sys.argv[1])).start(); print(node.sandbox.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "node")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        first = int(holder.stdout.readline())
        holder.send_signal(signal.SIGKILL)
    assert settled(lambda: not Path(f"/proc/{first}").exists())
    # Its empty control groups are taken away by the next node.
    assert settled(lambda: not set(left(before)) - {"cgroups"}), left(before)
    again = Node(tmp_path / "again")
    again.sandbox.start()
    again.stop()
    assert settled(lambda: not left(before)), left(before)
