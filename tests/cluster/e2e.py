"""The whole of it on any cluster that has Kubeflow Pipelines, Volcano and KServe: `make e2e`, with its KUBECONFIG.

Installs the chart, submits the smoke pipeline through the KFP API and follows it, asks the InferenceService for a
image, fetches the report, takes all of it away. Every wait has a bound; a failure is told with the events of the
namespaces and the last logs of their pods. It needs the rights of an administrator of the namespaces and none on the
cluster, and knows of no image registry, cloud, GPU or node: names and sizes are values of the chart.

    KUBECONFIG          of the cluster
    NAMESPACE           of the release (default: that of the kubeconfig's context); it must exist
    VALUES              files of values, separated by spaces (default: the chart's evaluation values)
    RELEASE             name of the release (default: latentac)
    KFP_HOST            address of the KFP API (default: a port-forward to service/ml-pipeline in KFP_NAMESPACE)
    KFP_NAMESPACE       default: kubeflow
    KFP_USER_NAMESPACE  where KFP serves many users: yours (default: NAMESPACE)
    PIPELINE_ROOT       of KFP's own artifacts (default: as KFP is set)
    S3_ENDPOINT         the store as it is reached from here (default: a port-forward where it is in the cluster)
    RECIPE, SET         default: shapes-unet-smoke, nothing
    MINUTES             bound of the run (default: 60)
    KEEP=1              take nothing away
"""

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentac.components.cluster.settings import KEY, Cluster, resolve
from latentac.serving.client import Client
from latentac.system.errors import LatentacError
from tools.binaries import program
from tools.golang import Unavailable

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "latentac"
EVALUATION = CHART / "ci" / "evaluation-values.yaml"
NEEDED = ("jobs.batch.volcano.sh", "inferenceservices.serving.kserve.io", "servingruntimes.serving.kserve.io")
OF_A_RUN = ("inferenceservices.serving.kserve.io", "servingruntimes.serving.kserve.io", "jobs.batch.volcano.sh")
MADE_BY_STEPS = "app.kubernetes.io/managed-by=latentac"
IN_CLUSTER = re.compile(r"(https?)://([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.[a-z0-9.-]+)?(?::(\d+))?")
SECONDS = 120.0
INSTALL_SECONDS = 600.0


class Failed(Exception):
    """What went wrong, in one message."""


@dataclass(frozen=True)
class Tools:
    """kubectl and helm against one namespace of one cluster."""

    kubectl: str
    helm: str
    namespace: str

    def ask(self, *arguments: str, namespace: str = "", seconds: float = SECONDS) -> str:
        return run([self.kubectl, "-n", namespace or self.namespace, *arguments], seconds)

    def get(self, *arguments: str, namespace: str = "") -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.ask("get", *arguments, "-o", "json", namespace=namespace))
        return content


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began, release = time.monotonic(), os.environ.get("RELEASE") or "latentac"
    try:
        tools = find_tools()
        preflight(tools)
    except (Failed, Unavailable) as error:
        print(f"e2e: {error}", file=sys.stderr)
        return 1
    namespaces = [tools.namespace]
    code = 1
    try:
        with kfp_address() as host:
            many_users = serves_many_users(host)
        install(tools, release, many_users)
        settings = read_settings(tools, release)
        namespaces = sorted({tools.namespace, settings.namespace, settings.steps.namespace})
        with kfp_address() as host:
            run_id = submit(tools, release, host, many_users)
            draw(tools, settings)
            fetch_report(tools, settings, host, run_id)
        say(f"passed in {time.monotonic() - began:.0f} s")
        code = 0
    except (Failed, LatentacError) as error:
        print(f"e2e: {error}", file=sys.stderr, flush=True)
        for namespace in namespaces:
            explain(tools, namespace)
    except KeyboardInterrupt:
        print("e2e: interrupted", file=sys.stderr)
        code = 130
    finally:
        if os.environ.get("KEEP") == "1":
            say(f"kept: release {release} in {tools.namespace}")
        else:
            code = take_away(tools, release) or code
    return code


# Before


def find_tools() -> Tools:
    """kubectl and helm from PATH, else those that `make node-build` built. Raises Unavailable."""
    kubectl = shutil.which("kubectl") or str(program("kubectl"))
    helm = shutil.which("helm") or str(program("helm"))
    current = run([kubectl, "config", "view", "--minify", "-o", "jsonpath={..namespace}"], SECONDS).strip()
    return Tools(kubectl, helm, os.environ.get("NAMESPACE") or current or "default")


def preflight(tools: Tools) -> None:
    """The cluster answers, the namespace is there, and so are the kinds that the pipeline uses."""
    say(f"cluster {run([tools.kubectl, 'config', 'current-context'], SECONDS).strip()}, namespace {tools.namespace}")
    kinds = set(tools.ask("api-resources", "--namespaced", "-o", "name").split())
    missing = [kind for kind in NEEDED if kind not in kinds]
    if missing:
        raise Failed(
            f"the cluster has no {', '.join(missing)}: install Volcano and KServe first (helm/latentac/README.md)"
        )
    tools.ask("get", "pods", "-o", "name")  # the namespace may be read


# The steps


def serves_many_users(host: str) -> bool:
    """Whether this KFP runs the steps in their users' namespaces; alone, it runs them in its own."""
    with (
        contextlib.suppress(OSError, ValueError),
        urllib.request.urlopen(f"{host}/apis/v2beta1/healthz", timeout=30) as answer,
    ):
        return bool(json.load(answer).get("multi_user"))
    return bool(os.environ.get("KFP_USER_NAMESPACE"))


def install(tools: Tools, release: str, many_users: bool) -> None:
    files = os.environ.get("VALUES", "").split() or [str(EVALUATION)]
    values = [argument for file in files for argument in ("--values", file)]
    steps = os.environ.get("KFP_NAMESPACE") or "kubeflow"
    if not many_users and steps != tools.namespace:  # before the files, which may say otherwise
        place = results() / "kfp-values.yaml"
        place.write_text(yaml.safe_dump({"pipeline": {"namespace": steps, "kfpNamespace": steps}}))
        values = ["--values", str(place), *values]
    say(f"helm upgrade --install {release} with {' '.join(files)}")
    bound = f"{INSTALL_SECONDS:.0f}s"
    command = [tools.helm, "upgrade", "--install", release, str(CHART), "-n", tools.namespace, *values, "--wait"]
    run([*command, "--timeout", bound], INSTALL_SECONDS + 60)


def read_settings(tools: Tools, release: str) -> Cluster:
    found = tools.get("configmap", f"{release}-cluster")
    return resolve(yaml.safe_load(found["data"][KEY]), f"{release}-cluster")


@contextlib.contextmanager
def kfp_address() -> Iterator[str]:
    """The KFP API, as it is reached from here."""
    named = os.environ.get("KFP_HOST")
    if named:
        yield named
        return
    namespace = os.environ.get("KFP_NAMESPACE") or "kubeflow"
    with forwarded("service/ml-pipeline", 8888, namespace) as port:
        yield f"http://127.0.0.1:{port}"


def submit(tools: Tools, release: str, host: str, many_users: bool) -> str:
    """The command that a person types, its output shown as it comes; the run's id."""
    minutes = float(os.environ.get("MINUTES") or 60)
    command = [sys.executable, "-m", "latentac.runs.cli", "pipeline", "submit", "--host", host, "--release", release]
    command += ["--kube-namespace", tools.namespace, "--recipe", os.environ.get("RECIPE") or "shapes-unet-smoke"]
    command += ["--follow", "--pending-seconds", "600", "--total-seconds", str(minutes * 60)]
    for assignment in shlex.split(os.environ.get("SET", "")):
        command += ["--set", assignment]
    if many_users:
        command += ["--namespace", os.environ.get("KFP_USER_NAMESPACE") or tools.namespace]
    if root := os.environ.get("PIPELINE_ROOT"):
        command += ["--pipeline-root", root]
    say(shlex.join(["latentac", *command[3:]]))
    lines: list[str] = []
    try:
        code = shown(command, lines)
        if code or not started(lines):
            raise Failed(f"the run did not succeed; it said last:\n{chr(10).join(lines[-10:])}")
    except BaseException:
        if started(lines):  # nothing may go on that is taken away in a moment
            cancel(tools, release, host, started(lines))
        raise
    return started(lines)


def shown(command: list[str], lines: list[str]) -> int:
    """The exit code of a command, whose output goes to `lines` and is shown as it comes."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                print(f"      {lines[-1]}", flush=True)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def started(lines: list[str]) -> str:
    """The id of the run that `submit` said to have started; empty if it started none."""
    return next((match[1] for line in lines if (match := re.match(r"run (\S+), ", line))), "")


def cancel(tools: Tools, release: str, host: str, run_id: str) -> None:
    """Stop a run that did not succeed, and its training job. What cannot be stopped is said, and hides no failure."""
    command = [sys.executable, "-m", "latentac.runs.cli", "pipeline", "cancel", run_id, "--host", host]
    command += ["--release", release, "--kube-namespace", tools.namespace]
    say(shlex.join(["latentac", *command[3:]]))
    try:
        print(run(command, SECONDS), end="", flush=True)
    except Failed as error:
        print(f"e2e: {error}", file=sys.stderr, flush=True)


def draw(tools: Tools, settings: Cluster) -> None:
    """Ask the service that KServe made for one image, through the cluster's API."""
    name = settings.deploy.name
    with forwarded(f"service/{name}-predictor", 80, settings.namespace) as port:
        client = Client(f"http://127.0.0.1:{port}", name, seconds=SECONDS)
        wait(f"the model {name} is ready", lambda: client.ready(10.0))
        answer = client.predict({"prompt": "two red squares", "seed": 1})
    image = base64.b64decode(answer["images"][0])
    if not image.startswith(b"\x89PNG"):
        raise Failed(f"the endpoint's image is no PNG: {image[:16]!r}")
    place = results() / "image.png"
    place.write_bytes(image)
    say(f"an image of version {answer['version']}, {answer['nfe']} evaluations: {place}")


def fetch_report(tools: Tools, settings: Cluster, host: str, run_id: str) -> None:
    place = results() / "report.html"
    with store_environment(tools, settings) as environment:
        command = [
            sys.executable,
            "-m",
            "latentac.runs.cli",
            "pipeline",
            "report",
            run_id,
            "--host",
            host,
            "--to",
            str(place),
        ]
        run(command, SECONDS, environment)
    if b"<html" not in place.read_bytes()[:200]:
        raise Failed(f"{place} is not a page")
    say(f"report: {place}, {place.stat().st_size / 1e6:.1f} MB")


@contextlib.contextmanager
def store_environment(tools: Tools, settings: Cluster) -> Iterator[dict[str, str]]:
    """Endpoint and credentials of the release's store; secrets go through the environment alone."""
    data = tools.get("secret", settings.store.secret, namespace=settings.namespace)["data"]
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {name: base64.b64decode(data[name]).decode() for name in names}
    environment["AWS_REGION"] = settings.store.region
    with contextlib.ExitStack() as stack:
        endpoint = os.environ.get("S3_ENDPOINT") or settings.store.endpoint
        inside = IN_CLUSTER.fullmatch(endpoint)
        if inside and inside[1] == "http" and not os.environ.get("S3_ENDPOINT"):
            port = int(inside[4] or 80)
            local = stack.enter_context(forwarded(f"service/{inside[2]}", port, inside[3]))
            endpoint = f"http://127.0.0.1:{local}"
        yield {**environment, "LATENTAC_S3_ENDPOINT": endpoint}


# After


def explain(tools: Tools, namespace: str) -> None:
    """The state of the namespace's objects, its last events, and the end of each log of ours, on stderr."""
    kinds = ",".join(["pods", "jobs.batch", *OF_A_RUN])
    sections: list[tuple[str, list[str]]] = [
        ("objects", ["get", kinds, "-o", "wide", "--ignore-not-found"]),
        ("events", ["get", "events", "--sort-by=.lastTimestamp"]),
    ]
    for title, arguments in sections:
        tell(f"{namespace}: {title}", tools, namespace, arguments, lines=40)
    with contextlib.suppress(Failed):
        pods = tools.get("pods", namespace=namespace)["items"]
        ours = [pod for pod in pods if pod["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") == "latentac"]
        for pod in ours:
            if pod.get("status", {}).get("phase") != "Succeeded":
                name = pod["metadata"]["name"]
                arguments = ["logs", name, "--all-containers", "--prefix", "--tail=20", "--ignore-errors"]
                tell(f"{namespace}: log of {name}", tools, namespace, arguments, lines=60)


def tell(title: str, tools: Tools, namespace: str, arguments: list[str], lines: int) -> None:
    try:
        text = tools.ask(*arguments, namespace=namespace, seconds=30)
    except Failed as error:
        text = str(error)
    print(f"--- {title}", *text.strip().splitlines()[-lines:], sep="\n", file=sys.stderr, flush=True)


def take_away(tools: Tools, release: str) -> int:
    """What the run made, then the release, then its volumes. Returns 1 where something could not be taken away."""
    say(f"helm uninstall {release}")
    code = 0
    of_the_release = f"app.kubernetes.io/instance={release}"
    bound = ["--ignore-not-found", "--timeout=180s"]
    kubectl = [tools.kubectl, "-n", tools.namespace]
    for command in (
        [*kubectl, "delete", ",".join(OF_A_RUN), "-l", MADE_BY_STEPS, *bound],
        # Without --wait, which Helm 4 can end too early, with an error: it counts what it has not seen yet as deleted.
        [tools.helm, "-n", tools.namespace, "uninstall", release, *bound],
        [*kubectl, "wait", "--for=delete", "pods", "-l", of_the_release, "--timeout=180s"],
        [*kubectl, "delete", "pvc", "-l", of_the_release, *bound],
    ):
        try:
            run(command, 240)
        except Failed as error:
            print(f"e2e: {error}", file=sys.stderr)
            code = 1
    return code


# Tools


@contextlib.contextmanager
def forwarded(target: str, port: int, namespace: str) -> Iterator[int]:
    """A free local port that leads to `port` of a service or pod."""
    kubectl = shutil.which("kubectl") or str(program("kubectl"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        local = int(free.getsockname()[1])
    command = [kubectl, "-n", namespace, "port-forward", "--address=127.0.0.1", target, f"{local}:{port}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:

            def open_now() -> bool:
                if process.poll() is not None:
                    log.seek(0)
                    raise Failed(f"port-forward to {target} in {namespace}: {log.read().strip()}")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", local), 1):
                    return True
                return False

            wait(f"port-forward to {target} in {namespace}", open_now, 60.0)
            yield local
        finally:
            process.terminate()
            process.wait()


def wait(what: str, ready: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(1.0)


def run(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """stdout of a command. Raises Failed with its last words, also where it takes longer than `seconds`."""
    shown = " ".join(command[:6])
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{shown}: not within {seconds:.0f} s") from None
    if done.returncode:
        raise Failed(f"{shown}: ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def results() -> Path:
    folder = ROOT / "build" / "e2e"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(line: str) -> None:
    print(f"e2e: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
