"""The programs of the test node, of pinned versions: `python -m tools.binaries` builds them into the cache.

The modules of Kubernetes, etcd, Volcano and KServe have replace lines, which `go install` refuses: a small module of
ours requires them and says the same replacements. CoreDNS gets the few plugins that a node of tests needs.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tools import manifests, minio
from tools.golang import Unavailable, build, cached, module_files
from tools.manifests import KSERVE, VOLCANO, VOLCANO_APIS

KUBERNETES = "v1.34.4"
ETCD = "v3.6.16"
HELM_3 = "v3.19.5"
HELM_4 = "v4.3.1"
COREDNS = "v1.14.3"
PAUSE = "v1"
PROBE = "v2"
REGISTRY = "v3.1.2"
COSIGN = "v3.1.3"
KYVERNO = "v1.19.1"
KYVERNO_POD_SECURITY = "v0.0.0-20251031094455-46f20778634f"

_KUBERNETES_PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
_VOLCANO_PROGRAMS = {f"vc-{name}": name for name in ("scheduler", "controller-manager", "webhook-manager")}
_STAGING = """
    api apiextensions-apiserver apimachinery apiserver cli-runtime client-go cloud-provider
    cluster-bootstrap code-generator component-base component-helpers controller-manager cri-api
    cri-client csi-translation-lib dynamic-resource-allocation endpointslice externaljwt kms
    kube-aggregator kube-controller-manager kube-proxy kube-scheduler kubectl kubelet metrics
    mount-utils pod-security-admission sample-apiserver sample-cli-plugin sample-controller
""".split()
_TRACES = "go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
_VOLCANO_REPLACES = {
    "cloud.google.com/go": "cloud.google.com/go v0.100.2",
    _TRACES: f"{_TRACES} v1.19.0",
    "google.golang.org/grpc": "google.golang.org/grpc v1.64.0",
}
_KSERVE_REPLACES = {
    "sigs.k8s.io/controller-runtime": "sigs.k8s.io/controller-runtime v0.19.7",
    "github.com/expr-lang/expr": "github.com/expr-lang/expr v1.17.7",
    "github.com/lyft/protoc-gen-validate": "github.com/envoyproxy/protoc-gen-validate v1.0.4",
}
_PLUGINS = ("errors", "hosts", "kubernetes", "ready")

_SLEEP = """\
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	<-ended
}
"""

# For tests of the node itself: `probe serve :8080 TEXT` answers TEXT until it is told to end, then takes its time;
# `probe get URL` prints what is answered; names and addresses of a new Service take a moment, so it asks for a while;
# `probe file PATH` prints a file.
_PROBE = """\
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	if os.Args[1] == "file" {
		content, _ := os.ReadFile(os.Args[2])
		os.Stdout.Write(content)
		return
	}
	if os.Args[1] == "get" {
		for tried := 0; tried < 60; tried++ {
			answer, err := (&http.Client{Timeout: 5 * time.Second}).Get(os.Args[2])
			if err == nil {
				io.Copy(os.Stdout, answer.Body)
				return
			}
			fmt.Fprintln(os.Stderr, err)
			time.Sleep(500 * time.Millisecond)
		}
		os.Exit(1)
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	http.HandleFunc("/", func(to http.ResponseWriter, _ *http.Request) { fmt.Fprintln(to, os.Args[3]) })
	go http.ListenAndServe(os.Args[2], nil)
	fmt.Println("serving")
	<-ended
	fmt.Println("told to end")
	time.Sleep(2 * time.Second)
	fmt.Println("ended in order")
}
"""

_DNS = """\
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
{imports}
)

func main() {{
	dnsserver.Directives = []string{{{directives}}}
	coremain.Run()
}}
"""

_NODE = {
    **dict.fromkeys(_KUBERNETES_PROGRAMS, KUBERNETES),
    "etcd": ETCD,
    "helm": HELM_4,
    "helm3": HELM_3,
    "coredns": COREDNS,
    "pause": PAUSE,
    "probe": PROBE,
    **dict.fromkeys(_VOLCANO_PROGRAMS, VOLCANO),
    "kserve-manager": KSERVE,
}
# What the tests of signed images need, and the node does not.
_VERSIONS = {**_NODE, "registry": REGISTRY, "cosign": COSIGN, "kyverno": KYVERNO}


def program(name: str) -> Path:
    """Path of a program in the cache. Raises Unavailable if it is not built; no test builds one, that takes minutes."""
    path = cached(name, _VERSIONS[name])
    if not path.exists():
        raise Unavailable(f"{path} is not there: `make node-build` builds it")
    return path


def missing() -> list[str]:
    """Names of the node's programs that are not in the cache."""
    return [name for name, version in _NODE.items() if not cached(name, version).exists()]


def kyverno_crd() -> Path | None:
    """The CRD of Kyverno's policy on images of one namespace; None if it was not fetched."""
    path = cached("kyverno-crd", KYVERNO)
    return path if path.exists() else None


def build_all(*, node: bool = True) -> None:
    """Build what is missing. node: without, only what tests use that start a control plane alone. Raises
    Unavailable."""
    build({"pause": "."}, PAUSE, module="module latentac/pause\n\ngo 1.24\n", files={"main.go": _SLEEP})
    build({"probe": "."}, PROBE, module="module latentac/probe\n\ngo 1.24\n", files={"main.go": _PROBE})
    build(
        {name: f"k8s.io/kubernetes/cmd/{name}" for name in _KUBERNETES_PROGRAMS},
        KUBERNETES,
        module=_kubernetes_module(),
        flags=["-ldflags", _stamp(KUBERNETES)],
    )
    build({"etcd": "go.etcd.io/etcd/server/v3"}, ETCD, module=_module("etcd", {"go.etcd.io/etcd/server/v3": ETCD}))
    build({"helm": "helm.sh/helm/v4/cmd/helm"}, HELM_4)
    build({"helm3": "helm.sh/helm/v3/cmd/helm"}, HELM_3)
    build({"registry": "github.com/distribution/distribution/v3/cmd/registry"}, REGISTRY)
    build({"cosign": "github.com/sigstore/cosign/v3/cmd/cosign"}, COSIGN)
    manifests.fetch()
    _fetch_kyverno_crd()
    minio.binary()
    if node:
        _build_dns()
        _build_controllers()


def _build_dns() -> None:
    imports = "\n".join(f'\t_ "github.com/coredns/coredns/plugin/{name}"' for name in _PLUGINS)
    directives = ", ".join(f'"{name}"' for name in _PLUGINS)
    build(
        {"coredns": "."},
        COREDNS,
        module=_module("coredns", {"github.com/coredns/coredns": COREDNS}),
        files={"main.go": _DNS.format(imports=imports, directives=directives)},
    )


def _build_controllers() -> None:
    """Volcano and KServe, with the replace lines of their own modules. Volcano's Kubernetes is the node's."""
    small = ["-ldflags", "-s -w"]
    programs = {name: f"volcano.sh/volcano/cmd/{folder}" for name, folder in _VOLCANO_PROGRAMS.items()}
    build(programs, VOLCANO, module=_volcano_module(), flags=small)
    module = _module("kserve", {"github.com/kserve/kserve": KSERVE}, _KSERVE_REPLACES)
    build({"kserve-manager": "github.com/kserve/kserve/cmd/manager"}, KSERVE, module=module, flags=small)


def build_kyverno() -> None:
    """Kyverno's command: `python -m tools.binaries --kyverno`. Not part of the others, for it takes as long as
    they do. Raises Unavailable."""
    replaces = {
        "k8s.io/pod-security-admission": f"github.com/kyverno/pod-security-admission {KYVERNO_POD_SECURITY}",
    }
    module = _module("kyverno", {"github.com/kyverno/kyverno": KYVERNO}, replaces)
    build({"kyverno": "github.com/kyverno/kyverno/cmd/cli/kubectl-kyverno"}, KYVERNO, module=module)


def _fetch_kyverno_crd() -> None:
    path = cached("kyverno-crd", KYVERNO)
    if not path.exists():
        group = "policies.kyverno.io"
        folder = module_files("github.com/kyverno/kyverno", KYVERNO) / "config" / "crds" / group
        shutil.copyfile(folder / f"{group}_namespacedimagevalidatingpolicies.yaml", path)


def _module(name: str, requirements: Mapping[str, str], replaces: Mapping[str, str] | None = None) -> str:
    """go.mod of a module that requires `requirements` (path -> version); replaces: path -> "path version"."""
    lines = [f"require {path} {version}" for path, version in requirements.items()]
    lines += [f"replace {path} => {other}" for path, other in (replaces or {}).items()]
    return "\n".join([f"module latentac/{name}", "", "go 1.25.0", "", *lines, ""])


def _kubernetes_replaces() -> dict[str, str]:
    """What Kubernetes' own go.mod replaces by folders of its repository, replaced by the published modules."""
    published = KUBERNETES.replace("v1.", "v0.")
    return {f"k8s.io/{name}": f"k8s.io/{name} {published}" for name in _STAGING}


def _kubernetes_module() -> str:
    return _module("kubernetes", {"k8s.io/kubernetes": KUBERNETES}, _kubernetes_replaces())


def _volcano_module() -> str:
    requirements = {"volcano.sh/volcano": VOLCANO, "k8s.io/kubernetes": KUBERNETES}
    own = {"volcano.sh/apis": f"volcano.sh/apis {VOLCANO_APIS}"}
    return _module("volcano", requirements, {**_VOLCANO_REPLACES, **_kubernetes_replaces(), **own})


def _stamp(version: str) -> str:
    """Linker flags: without a version in them, clients stumble over v0.0.0-master."""
    major, minor, _ = version.removeprefix("v").split(".")
    fields = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    places = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    settings = [f"-X {place}.{field}={value}" for place in places for field, value in fields.items()]
    return " ".join(["-s -w", *settings])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.binaries", description=__doc__.partition("\n")[0])
    parser.add_argument("--kyverno", action="store_true", help="build Kyverno's command alone, for tests/images")
    text = "leave out what only a whole node needs: its DNS, Volcano and KServe"
    parser.add_argument("--without-node", action="store_true", help=text)
    options = parser.parse_args()
    try:
        build_kyverno() if options.kyverno else build_all(node=not options.without_node)
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
