"""A stand-in for a Kubernetes API server, for tests of whole programs where the real one is not built.

It keeps objects of any kind in memory and speaks plain REST over real HTTP: get, list with equality selectors, create,
replace, merge or apply, delete, the subresource `status`, logs. It checks no schema and no right:
`tests.cluster.control_plane` does. `JobRunner` is a Volcano of one replica: it runs the command of a job's first task
as processes of this machine, which nothing but the test and the job itself ends.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

ENDED = ("Completed", "Failed", "Aborted", "Terminated")
_POLL_SECONDS = 0.1


@dataclass
class Kubernetes:
    """The server's memory: a test reads and changes it. objects: by path; logs: by pod."""

    url: str = ""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, collection: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object in a collection, `/api/v1/namespaces/n/pods`."""
        with self.lock:
            path = f"{collection}/{body['metadata']['name']}"
            if path in self.objects:
                raise Refusal(409, "Conflict", body["metadata"]["name"])
            namespace = collection.split("/namespaces/")[1].split("/")[0]
            metadata = {**body["metadata"], "namespace": namespace, "uid": uuid.uuid4().hex}
            self.objects[path] = {**body, "metadata": metadata}
            return self._changed(path)

    def below(self, collection: str) -> list[dict[str, Any]]:
        with self.lock:
            return [body for path, body in self.objects.items() if path.rpartition("/")[0] == collection]

    def change(self, path: str, **fields: Any) -> dict[str, Any]:
        """Replace fields of an object."""
        with self.lock:
            if path not in self.objects:
                raise Refusal(404, "NotFound", path)
            self.objects[path] = {**self.objects[path], **fields}
            return self._changed(path)

    def kubeconfig(self, file: Path) -> Path:
        """One for this server, written to `file`."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "clusters": [{"name": "x", "cluster": {"server": self.url}}],
            "users": [{"name": "x", "user": {}}],
        }
        file.write_text(yaml.safe_dump(content))
        return file

    def _changed(self, path: str) -> dict[str, Any]:
        body = self.objects[path]
        body["metadata"]["resourceVersion"] = uuid.uuid4().hex
        return body


class Refusal(Exception):
    def __init__(self, status: int, reason: str, name: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.status, self.reason, self.name = status, reason, name


@contextmanager
def kubernetes() -> Iterator[Kubernetes]:
    """The server on a free port of loopback."""
    memory = Kubernetes()

    class Handler(_Handler):
        server_memory = memory

    server = _Server(("127.0.0.1", 0), Handler)
    memory.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_memory: Kubernetes
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address, memory = urlsplit(self.path), self.server_memory
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        memory.requests.append(f"{self.command} {address.path}")
        try:
            if address.path.endswith("/log"):
                self._log(address.path.split("/")[-2], query)
                return
            with memory.lock:
                status, content = 200, self._do(address.path, query, json.loads(body) if body else {})
                data = json.dumps(content).encode()
        except Refusal as refusal:
            status, kind = refusal.status, {"kind": "Status", "details": {"name": refusal.name}}
            data = json.dumps({**kind, "message": str(refusal), "reason": refusal.reason}).encode()
        self.send_response(status, "Conflict" if status == 409 else None)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _do(self, path: str, query: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        memory, collection = self.server_memory, len(path.split("/namespaces/")[-1].split("/")) == 2
        if self.command == "POST":
            return memory.add(path, body)
        if self.command == "GET" and collection:
            labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
            return {"items": [each for each in memory.below(path) if _fits(each, labels, fields)]}
        path, status = path.removesuffix("/status"), path.endswith("/status")
        if self.command == "PATCH" and path not in memory.objects:
            return memory.add(path.rpartition("/")[0], body)
        if path not in memory.objects:
            raise Refusal(404, "NotFound", path.rpartition("/")[2])
        if self.command in ("PUT", "PATCH"):
            version = body["metadata"].get("resourceVersion")
            if version not in (None, memory.objects[path]["metadata"]["resourceVersion"]):
                raise Refusal(409, "Conflict", path.rpartition("/")[2])
            own = memory.objects[path]["metadata"]
            new = {"status": body["status"]} if status else {**body, "metadata": {**own, **body["metadata"]}}
            return memory.change(path, **new)
        if self.command == "DELETE":
            return memory.objects.pop(path)
        return memory.objects[path]

    def _log(self, pod: str, query: Mapping[str, str]) -> None:
        """What is there now; whoever follows the log asks again."""
        file = self.server_memory.logs.get(pod)
        lines = file.read_text(errors="replace").splitlines() if file and file.exists() else []
        if "timestamps" in query:
            lines = [f"2026-01-01T00:00:00.{number:09}Z {line}" for number, line in enumerate(lines, start=1)]
        lines = lines[-int(query["tailLines"]) :] if "tailLines" in query else lines
        data = "".join(f"{line}\n" for line in lines).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _fits(body: Mapping[str, Any], labels: str, fields: str) -> bool:
    own = body["metadata"].get("labels") or {}
    for term in filter(None, labels.split(",")):
        name, _, value = term.partition("=")
        if own.get(name) != value:
            return False
    for term in filter(None, fields.split(",")):
        name, _, value = term.partition("=")
        found: Any = body
        for part in name.split("."):
            found = (found or {}).get(part)
        if found != value:
            return False
    return True


class JobRunner:
    """Runs the jobs of `namespace` as processes, between `__enter__` and `__exit__`.

    folder: for logs, and in place of the pods' /work; environment: what a container has of its own beside the job's.
    ended: exit code of each job's command by the job's uid.
    """

    def __init__(
        self, memory: Kubernetes, namespace: str, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._memory, self._folder, self._environment = memory, folder, dict(environment or {})
        self._jobs = f"/apis/batch.volcano.sh/v1alpha1/namespaces/{namespace}/jobs"
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ended: dict[str, int] = {}

    def __enter__(self) -> "JobRunner":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(10)
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return self._memory.below(self._jobs)

    def log(self, uid: str) -> str:
        file = self._folder / f"{uid}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def _run(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            with self._memory.lock:
                known = {job["metadata"]["uid"] for job in self.jobs}
                for job in self.jobs:
                    self._sync(job)
                for pod in self._memory.below(self._pods):
                    owner = pod["metadata"].get("job-uid")
                    if owner and owner not in known:
                        self._end(owner, pod)

    def _sync(self, job: dict[str, Any]) -> None:
        uid, phase = job["metadata"]["uid"], ((job.get("status") or {}).get("state") or {}).get("phase", "")
        process = self.processes.get(uid)
        if process is None and not phase:
            self._start(job)
            self._write(job, "Running")
            return
        code = process.poll() if process else None
        if code is not None:
            self.ended.setdefault(uid, code)
        for pod in self._memory.below(self._pods):
            if pod["metadata"].get("job-uid") == uid:
                if phase in ENDED:
                    self._end(uid, pod)
                elif code is not None:
                    phase = "Failed" if code else "Completed"
                    path = f"{self._pods}/{pod['metadata']['name']}"
                    self._memory.change(path, status={"phase": "Failed" if code else "Succeeded"})
                    self._write(job, phase)

    def _start(self, job: dict[str, Any]) -> None:
        uid, task = job["metadata"]["uid"], job["spec"]["tasks"][0]
        name, container = f"{job['metadata']['name']}-{task['name']}-0", task["template"]["spec"]["containers"][0]
        work = self._folder / uid
        work.mkdir()
        command = [part.replace(" /work", f" {work}") for part in container["command"]]
        given = {each["name"]: each["value"] for each in container["env"]}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        local = {"PATH": path, "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        with (self._folder / f"{uid}.log").open("wb") as log:
            self.processes[uid] = subprocess.Popen(
                command,
                env={**os.environ, **given, **local, **self._environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        labels = {**task["template"]["metadata"]["labels"], "volcano.sh/job-name": job["metadata"]["name"]}
        pod = {"metadata": {"name": name, "labels": labels, "job-uid": uid}, "spec": task["template"]["spec"]}
        self._memory.add(self._pods, {**pod, "status": {"phase": "Running"}})
        self._memory.logs[name] = self._folder / f"{uid}.log"

    def _end(self, uid: str, pod: dict[str, Any]) -> None:
        """SIGTERM, as a pod that is deleted gets it; the pod is gone when its processes are."""
        process = self.processes[uid]
        if process.poll() is None:
            if not pod["metadata"].get("deletionTimestamp"):
                pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                os.killpg(process.pid, signal.SIGTERM)
        else:
            self.ended.setdefault(uid, process.returncode)
            self._memory.objects.pop(f"{self._pods}/{pod['metadata']['name']}")

    def _write(self, job: dict[str, Any], phase: str) -> None:
        self._memory.change(f"{self._jobs}/{job['metadata']['name']}", status={"state": {"phase": phase}})
