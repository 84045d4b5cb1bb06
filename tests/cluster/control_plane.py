"""A Kubernetes control plane of the tests' own: etcd, API server, controller manager, scheduler. No root, no node.

Everything lies in one folder and ends with the process that started it. Pods are accepted, admitted and scheduled
(when a node is made by hand), but nothing runs them: that is `tests.cluster.node`.
"""

import contextlib
import json
import os
import secrets
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.pki import Authority
from tests.cluster.processes import Program, free_ports
from tools import manifests
from tools.binaries import program

_QUIET_USERS = ["apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy"]
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "users": [f"system:{name}" for name in _QUIET_USERS]},
        {"level": "None", "userGroups": ["system:nodes", "system:serviceaccounts:kube-system"]},
        {"level": "Metadata"},
    ],
}


class KubectlError(RuntimeError):
    """kubectl ended with an error; the message holds its arguments and stderr."""


class Cluster:
    """What a test does with a cluster: the part that needs to know only its folder.

    kubeconfig: of an administrator; server: `https://...` of the API server; crds: names of the CRDs that were applied.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.server = ""
        self.crds: frozenset[str] = frozenset()
        self._namespaces: list[str] = []

    @property
    def has_gateway(self) -> bool:
        """True if the Gateway API's standard CRDs are there (HTTPRoute, Gateway)."""
        return "httproutes.gateway.networking.k8s.io" in self.crds

    @property
    def audit_log(self) -> Path:
        return self.folder / "audit.log"

    @property
    def environment(self) -> dict[str, str]:
        """For kubectl, helm and the Kubernetes client: this cluster, and a home of its own."""
        return {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(self.folder / "kube-cache")}

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 120.0) -> str:
        """stdout of kubectl as administrator. Raises KubectlError."""
        done = subprocess.run(
            [str(program("kubectl")), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **self.environment},
            timeout=seconds,
        )
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def namespace(self, prefix: str, restricted: bool = False) -> str:
        """Name of a fresh namespace, with its default service account; restricted: PodSecurity enforces that level."""
        name = f"{prefix}-{secrets.token_hex(3)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"} if restricted else {}
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        self.kubectl("create", "-f", "-", stdin=json.dumps(body))
        self._namespaces.append(name)
        self.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=30s")
        self.kubectl("wait", "--for=create", "configmap/kube-root-ca.crt", "-n", name, "--timeout=30s")
        return name

    def delete_namespace(self, name: str, wait: bool = True) -> None:
        """With all that is in it; nothing if it is gone. What still runs there keeps the machine busy: delete early."""
        self.kubectl("delete", "namespace", name, "--ignore-not-found", f"--wait={str(wait).lower()}")
        if name in self._namespaces:
            self._namespaces.remove(name)

    def delete_namespaces(self) -> None:
        """Those that `namespace` made and that nobody deleted; does not wait."""
        for name in list(self._namespaces):
            self.delete_namespace(name, wait=False)

    def kubeconfig_of(self, namespace: str, service_account: str) -> Path:
        """A kubeconfig with a real token (8 hours) of that account, whose default namespace is `namespace`."""
        token = self.kubectl("create", "token", service_account, "-n", namespace, "--duration=8h").strip()
        path = self.folder / f"{namespace}-{service_account}.kubeconfig"
        ca = self.folder / "pki" / "ca.crt"
        return write_kubeconfig(path, self.server, ca, {"token": token}, namespace=namespace)

    def calls(self, user: str) -> set[tuple[str, str]]:
        """(verb, `group/resource[/subresource]`) of each call that `user` made, refused ones too, from the audit log.

        The core group is written `core`: ("get", "core/pods/log"). A service account's user is
        `system:serviceaccount:<namespace>:<name>`. Calls with `--as` count for the user that was taken on.
        """
        found = set()
        for line in self.audit_log.read_text().splitlines():
            event = json.loads(line)
            who = event.get("impersonatedUser") or event["user"]
            place = event.get("objectRef") or {}
            if who["username"] == user and "resource" in place:
                parts = [place.get("apiGroup") or "core", place["resource"], place.get("subresource")]
                found.add((str(event["verb"]), "/".join(filter(None, parts))))
        return found

    def apply_crds(self) -> None:
        """Those of `tools.manifests`; returns when all of them are established."""
        files = [word for folder in manifests.crds() for word in ("-f", str(folder))]
        if not files:
            return
        self.kubectl("apply", "--server-side", "--recursive", *files)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
                break
            except KubectlError:  # it stumbles over a CRD that has no conditions yet
                if time.monotonic() >= deadline:
                    raise
        names = self.kubectl("get", "crd", "-o", "name").split()
        self.crds = frozenset(name.partition("/")[2] for name in names)


class ControlPlane(Cluster):
    """Starts and stops the four programs. address: where the API server listens; pods must reach it on a node."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", services: str = "10.96.0.0/16") -> None:
        super().__init__(folder)
        self.address, self.services, self.with_node = address, services, address != "127.0.0.1"
        self.programs: list[Program] = []

    def start(self) -> "ControlPlane":
        """Ready for objects within seconds. Raises Unavailable with the remedy or the end of the log."""
        programs = {name: program(name) for name in ("etcd", "kube-apiserver", "kubectl")}  # all missing ones at once
        self.folder.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(self.folder / "pki")
        public, private = self.authority.signing_key("service-accounts")
        try:
            etcd = self._start_etcd(programs["etcd"])
            self._start_api_server(programs["kube-apiserver"], etcd, public, private)
            self.serve()
            # The garbage collector looks for new kinds only every 30 seconds: it starts when they are there.
            self.apply_crds()
            self._start_controllers(private)
            self.kubectl("wait", "--for=create", "serviceaccount/default", "-n", "default", "--timeout=30s")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """In reverse order: an API server whose etcd is gone hangs and keeps its port."""
        while self.programs:
            self.programs.pop().stop()

    def serve(self) -> None:
        """What a node adds, once the API server answers."""

    def component_kubeconfig(self, user: str, group: str = "", hosts: tuple[str, ...] = ()) -> Path:
        """A kubeconfig with a certificate of a cluster component, for instance `system:kube-scheduler`."""
        name = user.replace(":", "-")
        certificate, key = self.authority.issue(name, user, group, hosts)
        credentials = {"client-certificate": str(certificate), "client-key": str(key)}
        return write_kubeconfig(
            self.folder / f"{name}.kubeconfig", self.server, self.authority.certificate, credentials
        )

    def launch(self, name: str, command: Sequence[str | Path]) -> Program:
        """Start a program that `stop` ends, before those that were started earlier."""
        self.programs.append(Program(name, command, self.folder))
        return self.programs[-1]

    def _start_etcd(self, path: Path) -> list[str]:
        """Returns the API server's flags for it. TLS on loopback too: other users of the machine stay out."""
        client, peer = free_ports(2)
        certificate, key = self.authority.issue("etcd", "etcd", hosts=["127.0.0.1"])
        address, ca = f"https://127.0.0.1:{client}", self.authority.certificate
        own = f"http://127.0.0.1:{peer}"
        command: list[str | Path] = [
            *(path, f"--data-dir={self.folder / 'etcd'}", "--name=tests", "--unsafe-no-fsync", "--log-level=warn"),
            *(f"--listen-client-urls={address}", f"--advertise-client-urls={address}", "--client-cert-auth"),
            *(f"--listen-peer-urls={own}", f"--initial-advertise-peer-urls={own}", f"--initial-cluster=tests={own}"),
            *(f"--trusted-ca-file={ca}", f"--cert-file={certificate}", f"--key-file={key}"),
        ]
        etcd = self.launch("etcd", command)
        context = ssl.create_default_context(cafile=str(ca))
        context.load_cert_chain(certificate, key)
        etcd.wait(lambda: answers(f"{address}/health", context))
        pair = [f"--etcd-certfile={certificate}", f"--etcd-keyfile={key}"]
        return [f"--etcd-servers={address}", f"--etcd-cafile={ca}", *pair]

    def _start_api_server(self, path: Path, etcd: list[str], public: Path, private: Path) -> None:
        (port,) = free_ports(1, self.address)
        self.server = f"https://{self.address}:{port}"
        first = self.services.rpartition(".")[0] + ".1"
        names = [f"kubernetes{end}" for end in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
        certificate, key = self.authority.issue(
            "api", "kube-apiserver", hosts=["127.0.0.1", self.address, first, *names]
        )
        admin_certificate, admin_key = self.authority.issue("admin", "latentac-admin", "system:masters")
        credentials = {"client-certificate": str(admin_certificate), "client-key": str(admin_key)}
        write_kubeconfig(self.kubeconfig, self.server, self.authority.certificate, credentials)
        policy = self.folder / "audit-policy.json"
        policy.write_text(json.dumps(_AUDIT))
        reach = [f"--advertise-address={self.address}"] if self.with_node else ["--endpoint-reconciler-type=none"]
        command = [
            *(str(path), *etcd, *reach, f"--bind-address={self.address}", f"--secure-port={port}"),
            *(f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}"),
            *(f"--client-ca-file={self.authority.certificate}", f"--service-cluster-ip-range={self.services}"),
            *(f"--kubelet-client-certificate={admin_certificate}", f"--kubelet-client-key={admin_key}"),
            *(f"--kubelet-certificate-authority={self.authority.certificate}",),
            "--kubelet-preferred-address-types=InternalIP",  # no DNS of this machine knows a node of tests
            *("--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={public}"),
            *(f"--service-account-signing-key-file={private}", "--authorization-mode=Node,RBAC"),
            *("--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--profiling=false"),
            *(f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}", "--audit-log-maxsize=1000"),
            f"--cert-dir={self.folder / 'pki'}",
        ]
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(admin_certificate, admin_key)
        self.launch("kube-apiserver", command).wait(lambda: answers(f"{self.server}/readyz", context), 60)

    def _start_controllers(self, private: Path) -> None:
        quiet = ["--leader-elect=false", "--secure-port=0", "--profiling=false"]
        quiet += ["--kube-api-qps=500", "--kube-api-burst=1000"]  # their default holds the start up for seconds
        manager = self.component_kubeconfig("system:kube-controller-manager")
        own = [f"--service-account-private-key-file={private}", f"--root-ca-file={self.authority.certificate}"]
        command: list[str | Path] = [
            program("kube-controller-manager"),
            f"--kubeconfig={manager}",
            "--use-service-account-credentials",
        ]
        self.launch("kube-controller-manager", [*command, *quiet, *own])
        scheduler = self.component_kubeconfig("system:kube-scheduler")
        self.launch("kube-scheduler", [program("kube-scheduler"), f"--kubeconfig={scheduler}", *quiet])


def write_kubeconfig(
    path: Path, server: str, ca: Path, credentials: Mapping[str, str], namespace: str = "default"
) -> Path:
    """A kubeconfig of one user that only we can read; JSON, which is YAML too."""
    context = {"cluster": "tests", "user": "tests", "namespace": namespace}
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": {"server": server, "certificate-authority": str(ca)}}],
        "users": [{"name": "tests", "user": dict(credentials)}],
        "contexts": [{"name": "tests", "context": context}],
        "current-context": "tests",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(body, indent=1))
    return path


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """True if a GET ends well."""
    with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, context=context, timeout=5):
        return True
    return False
