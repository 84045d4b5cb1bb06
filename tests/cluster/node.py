"""A one-node Kubernetes of the tests' own, for tests and for a person.

    python -m tests.cluster.node up                         in the background; prints what to export
    python -m tests.cluster.node load latentac/train:dev    images of the docker daemon into it
    python -m tests.cluster.node shell                      a shell with KUBECONFIG, kubectl and helm (4; helm3 is 3)
    python -m tests.cluster.node down                       and nothing of it is left
    python -m tests.cluster.node run                        in the foreground, until Ctrl-C

The control plane runs on the machine, the node in namespaces of its own (tests/cluster/sandbox.py). Needs root.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import controllers
from tests.cluster.containerd import SOCKET, Containerd
from tests.cluster.control_plane import ControlPlane, answers
from tests.cluster.sandbox import Sandbox
from tools import manifests
from tools.binaries import missing, program
from tools.docker import Docker, daemon
from tools.golang import Unavailable, cache_folder

NAME = "latentac-node"
_TOOLS = "containerd ctr runc iptables iptables-restore conntrack ip unshare nsenter".split()
_PLUGIN_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_REMEDY = "apt-get install containerd runc containernetworking-plugins iproute2 iptables conntrack util-linux"
_READ = ["get", "list", "watch"]
UP_SECONDS = 180.0


def lacking() -> str:
    """Why no node can run on this machine, with the remedy; empty where one can."""
    if not sys.platform.startswith("linux"):
        return "a node needs Linux: the control plane alone runs here"
    if os.geteuid() != 0:
        return "a node needs root (containers, devices, mounts): run `sudo make test-cluster`"
    tools = [tool for tool in _TOOLS if not shutil.which(tool)]
    if not any((folder / "ptp").exists() for folder in _PLUGIN_FOLDERS):
        tools.append("CNI plugins")
    if tools:
        return f"a node needs {', '.join(tools)}: `{_REMEDY}`"
    unbuilt = [*missing(), *manifests.missing()]
    return f"{', '.join(unbuilt)} not built: `make node-build` does that once" if unbuilt else ""


class Node(ControlPlane):
    """A control plane and a node that runs pods. ip: the machine as pods reach it, for servers that a test starts."""

    def __init__(self, folder: Path, sandbox: Sandbox | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        cache = cache_folder().parent
        self.sandbox = sandbox or Sandbox(folder, keep=cache)
        images = cache / "node" / str(self.sandbox.place)
        images.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, self.sandbox.host, self.sandbox.services)
        plugins = next((folder for folder in _PLUGIN_FOLDERS if (folder / "ptp").exists()), _PLUGIN_FOLDERS[0])
        self.containerd = Containerd(self.sandbox, images / "containerd", folder / "cni", plugins)

    @property
    def ip(self) -> str:
        return self.sandbox.host

    def load(self, names: Iterable[str], docker: Docker | None = None) -> list[str]:
        """Images of a docker daemon, for instance ["latentac/train:dev"]; returns those that were not there yet.

        Several at once share the way of their common layers. Raises Unavailable if the daemon lacks one.
        """
        with contextlib.nullcontext(docker) if docker else daemon() as running:
            return self.containerd.load(names, running)

    def start(self) -> "Node":
        """Ready for pods. Raises Unavailable."""
        reason = lacking()
        if reason:
            raise Unavailable(reason)
        try:
            self.sandbox.start()
            self._write_network()
            self.containerd.root.mkdir(exist_ok=True)
            self.containerd.start()
            super().start()
            self.kubectl("wait", "--for=create", f"node/{NAME}", "--timeout=30s")
            self.kubectl("wait", "--for=condition=Ready", f"node/{NAME}", "--timeout=60s")
            self._dns.wait(lambda: answers(f"http://{self.sandbox.address}:8181/ready"))
            controllers.start(self)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Everything in the node at once, then the control plane; what pods wrote goes with it."""
        self.sandbox.stop()  # first: an API server waits for those who watch it
        super().stop()
        for name in ("kubelet", "pod-logs", "cni-state", "etcd", "kserve"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def serve(self) -> None:
        self._start_kubelet()
        self._start_services()

    def _write_network(self) -> None:
        """Each pod on a link of its own, routed: a Service's answer cannot take a shorter way past the translation."""
        addresses = {
            "type": "host-local",
            "dataDir": "/var/lib/cni/networks",
            "ranges": [[{"subnet": self.sandbox.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        plugins = [{"type": "ptp", "ipam": addresses}, {"type": "portmap", "capabilities": {"portMappings": True}}]
        self.containerd.network.mkdir()
        network = {"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}
        (self.containerd.network / "pods.conflist").write_text(json.dumps(network))

    def _start_kubelet(self) -> None:
        user, group, ca = f"system:node:{NAME}", "system:nodes", str(self.authority.certificate)
        certificate, key = self.authority.issue("kubelet", user, group, [self.sandbox.address])
        (self.folder / "resolv.conf").write_text("")
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.sandbox.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": ca},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "clusterDomain": "cluster.local",
            "clusterDNS": [self._dns_address],
            "resolvConf": str(self.folder / "resolv.conf"),
            "failCgroupV1": False,
            "failSwapOn": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.sandbox.cgroup}",
            "enforceNodeAllocatable": [],
            "oomScoreAdj": 0,
            "imageGCHighThresholdPercent": 100,  # what was imported cannot be pulled again
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "volumePluginDir": "/run/volume-plugins",
            "serializeImagePulls": False,
        }
        path = self.folder / "kubelet.json"
        path.write_text(json.dumps(settings))
        credentials = self.component_kubeconfig(user, group)
        command: list[str | Path] = [
            program("kubelet"),
            f"--config={path}",
            f"--kubeconfig={credentials}",
            f"--hostname-override={NAME}",
        ]
        self.launch("kubelet", self.sandbox.inside(*command, f"--node-ip={self.sandbox.address}"))

    @property
    def _dns_address(self) -> str:
        return self.sandbox.services.rpartition(".")[0] + ".10"

    def _start_services(self) -> None:
        credentials = self.component_kubeconfig("system:kube-proxy")
        options = [f"--kubeconfig={credentials}", f"--hostname-override={NAME}", f"--cluster-cidr={self.sandbox.pods}"]
        options += ["--proxy-mode=iptables", "--conntrack-max-per-core=0", "--oom-score-adj=0"]  # the machine's own
        self.launch("kube-proxy", self.sandbox.inside(program("kube-proxy"), *options))
        reader = self.component_kubeconfig("system:dns")
        corefile = self.folder / "Corefile"
        zone = f"kubernetes cluster.local in-addr.arpa {{\n  kubeconfig {reader}\n  pods insecure\n }}"
        corefile.write_text(f".:53 {{\n errors\n ready :8181\n {zone}\n}}\n")
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(self._dns_objects()))
        self._dns = self.launch("coredns", self.sandbox.inside(program("coredns"), "-conf", corefile))

    def _dns_objects(self) -> dict[str, object]:
        """The DNS is a process of the node: a Service without selector and its addresses written by hand."""
        place = {"name": "kube-dns", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"}}
        ports = [{"name": kind.lower(), "port": 53, "protocol": kind} for kind in ("UDP", "TCP")]
        service = {"clusterIP": self._dns_address, "ports": ports}
        api = "rbac.authorization.k8s.io"
        binding = {
            "apiVersion": f"{api}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "latentac-dns"},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": "latentac-dns"},
            "subjects": [{"apiGroup": api, "kind": "User", "name": "system:dns"}],
        }
        reads = {"": ["services", "pods", "namespaces"], "discovery.k8s.io": ["endpointslices"]}
        role = {
            "apiVersion": f"{api}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "latentac-dns"},
            "rules": [{"apiGroups": [group], "resources": kinds, "verbs": _READ} for group, kinds in reads.items()],
        }
        addresses = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": place,
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [{"addresses": [self.sandbox.address]}],
        }
        asked = {"apiVersion": "v1", "kind": "Service", "metadata": place, "spec": service}
        return {"apiVersion": "v1", "kind": "List", "items": [asked, addresses, role, binding]}


@dataclass(frozen=True)
class Record:
    """What another process must know of a node that is up: it lies in the cache while `run` lives."""

    owner: str
    folder: str
    place: int
    pid: int
    server: str
    crds: list[str]

    @staticmethod
    def path() -> Path:
        return cache_folder().parent / "node" / "up.json"

    @classmethod
    def read(cls) -> "Record | None":
        """None if no node is up that `make node-up` started."""
        with contextlib.suppress(FileNotFoundError):
            record = cls(**json.loads(cls.path().read_text()))
            if identity(int(record.owner.partition(":")[0])) == record.owner:
                return record
        return None

    def attach(self) -> Node:
        """The running node, to be used and not to be stopped."""
        folder = Path(self.folder)
        sandbox = Sandbox(folder, place=self.place)
        sandbox.pid = self.pid
        node = Node(folder, sandbox)
        node.server, node.crds = self.server, frozenset(self.crds)
        return node


def identity(pid: int) -> str:
    """`pid:start` of a process that lives, so that a number given away again is not taken for it; else empty."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{pid}:{fields[19]}"


def run() -> None:
    """In the foreground until SIGTERM or Ctrl-C."""
    if Record.read():
        sys.exit("a node is up already: `make node-down` ends it")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="latentac-node-") as folder:
        node = Node(Path(folder))
        try:
            began = time.monotonic()
            node.start()
            place = Record.path()
            record = Record(
                *(identity(os.getpid()), folder, node.sandbox.place, node.sandbox.pid, node.server, sorted(node.crds))
            )
            place.with_suffix(".partial").write_text(json.dumps(asdict(record)))
            place.with_suffix(".partial").rename(place)
            print(f"up after {time.monotonic() - began:.1f} s, {len(node.crds)} CRDs", flush=True)
            while all(part.process.poll() is None for part in node.programs):
                time.sleep(0.5)
            ended = [part for part in node.programs if part.process.poll() is not None]
            sys.exit("\n".join(f"{part.name} ended by itself:\n{part.tail()}" for part in ended))
        except KeyboardInterrupt:
            pass
        finally:
            Record.path().unlink(missing_ok=True)
            node.stop()


def up() -> None:
    """Start `run` in the background and return when it is ready."""
    if not Record.read():
        log = cache_folder().parent / "node" / "up.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            started = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.node", "run"],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + UP_SECONDS
        while not Record.read():
            if started.poll() is not None or time.monotonic() > deadline:
                started.terminate()
                sys.exit(f"the node did not come up ({log}):\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        print(f"# {log.read_text().strip()}")
    _report()


def down() -> None:
    """End the node that `up` started; returns when nothing of it is left."""
    record = Record.read()
    if not record:
        print("no node is up")
        return
    pid = int(record.owner.partition(":")[0])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while identity(pid) == record.owner:
        if time.monotonic() > deadline:
            sys.exit(f"the node (pid {pid}) does not end: see {cache_folder().parent / 'node' / 'up.log'}")
        time.sleep(0.1)
    print("down, nothing is left but the images in the cache")


def shell() -> None:
    """The user's shell with this cluster and its programs."""
    node = _attached()
    with tempfile.TemporaryDirectory(prefix="latentac-shell-") as folder:
        for name in ("kubectl", "helm", "helm3"):
            (Path(folder) / name).symlink_to(program(name))
        environment = {**os.environ, **node.environment, "PATH": f"{folder}:{os.environ['PATH']}"}
        print("kubectl, helm (4) and helm3 talk to the test node; leave with Ctrl-D", flush=True)
        subprocess.run([os.environ.get("SHELL", "bash")], env=environment)


def load(names: list[str]) -> None:
    node = _attached()
    moved = node.load(names)
    for name in names:
        print(f"{name}: {'imported' if name in moved else 'was there already'}")


def _attached() -> Node:
    record = Record.read()
    if not record:
        sys.exit("no node is up: `make node-up` starts one")
    return record.attach()


def _report() -> None:
    node = _attached()
    print(f"# The API server is {node.server}; pods reach this machine at {node.ip}.")
    print("# Next: `make node-shell` for kubectl and helm, `python -m tests.cluster.node load IMAGE ...` for images,")
    print("# `make test-cluster` (its tests use this node), `make node-down` at the end. For this shell:")
    print(f"export KUBECONFIG={node.kubeconfig}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.node", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{up,down,shell,load,run}")
    for command in (up, down, shell, run):
        commands.add_parser(command.__name__, help=(command.__doc__ or "").partition("\n")[0]).set_defaults(act=command)
    loading = commands.add_parser("load", help="images of the docker daemon into the node")
    loading.add_argument("images", nargs="+", metavar="IMAGE")
    arguments = parser.parse_args()
    try:
        if arguments.command == "load":
            load(arguments.images)
        else:
            arguments.act()
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
