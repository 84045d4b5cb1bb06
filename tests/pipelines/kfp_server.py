"""A stand-in for the API server of Kubeflow Pipelines, which is in no registry that the tests can reach.

It speaks the part of the REST API (v2beta1, and the one v1beta1 call) that `latentac pipeline` uses, over real HTTP, in
the names of the SDK's own models. A run goes through the frames of a script: each look at it gives the next one, and
the last one stays. What a real server does beyond that was seen on one: errors are empty in v2beta1, a cancelled run
ends as FAILED with CANCELING in its history, and the reason of a failure is in the workflow's nodes.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

BEGAN = datetime(2026, 1, 31, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Frame:
    """What one look at a run shows: its state, and the state of each task by display name."""

    state: str
    tasks: dict[str, str] = field(default_factory=dict)
    history: Sequence[str] = ()


@dataclass
class Kfp:
    """The server's memory, and what it was asked: a test reads and changes both."""

    url: str = ""
    token: str = ""
    script: list[Frame] = field(default_factory=lambda: [Frame("RUNNING"), Frame("SUCCEEDED")])
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    fail_next: list[int] = field(default_factory=list)
    """Statuses to answer the next requests with."""
    pipelines: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    uploads: list[bytes] = field(default_factory=list)
    experiments: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    lists_history: bool = True
    """Whether a list of runs has the history of each."""
    schedules: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def add_run(self, run_id: str, **fields: Any) -> None:
        self.runs[run_id] = {"run_id": run_id, "created_at": _time(0), "frames": list(self.script), **fields}


@contextmanager
def serving() -> Iterator[Kfp]:
    """The server on a free port of loopback."""
    memory = Kfp()

    class Handler(_Handler):
        kfp = memory

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    memory.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    kfp: Kfp
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        self.kfp.requests.append(f"{method} {address.path}")
        try:
            if self.kfp.fail_next:
                raise Refusal(self.kfp.fail_next.pop(0), "told to")
            if self.kfp.token and self.headers.get("Authorization") != f"Bearer {self.kfp.token}":
                raise Refusal(401, "Request not authenticated")
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            status, content = 200, self._do(method, address.path, query, body)
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal), "code": 5, "message": str(refusal)}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _do(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        kfp, root = self.kfp, "/apis/v2beta1"
        if match := re.fullmatch(rf"{root}/pipelines/names/([^/]+)", path):
            return _pipeline(match[1], _known(kfp.pipelines, match[1]))
        if (method, path) == ("POST", f"{root}/pipelines"):
            name = json.loads(body)["name"]
            return _pipeline(name, kfp.pipelines.setdefault(name, f"pipeline-{len(kfp.pipelines)}"))
        if (method, path) == ("POST", f"{root}/pipelines/upload_version"):
            if query["name"] in kfp.versions:
                raise Refusal(409, f"version {query['name']} exists")
            kfp.uploads.append(body)
            kfp.versions[query["name"]] = f"version-{len(kfp.versions)}"
            return _version(query["name"], kfp.versions[query["name"]])
        if re.fullmatch(rf"{root}/pipelines/[^/]+/versions", path):
            return {"pipeline_versions": [_version(name, own) for name, own in kfp.versions.items()]}
        if path == f"{root}/experiments":
            if method == "POST":
                name = json.loads(body)["display_name"]
                kfp.experiments[name] = f"experiment-{len(kfp.experiments)}"
                return {"experiment_id": kfp.experiments[name], "display_name": name}
            return {
                "experiments": [{"experiment_id": own, "display_name": name} for name, own in kfp.experiments.items()]
            }
        if (method, path) == ("POST", f"{root}/recurringruns"):
            kfp.schedules.append(json.loads(body))
            return {"recurring_run_id": f"schedule-{len(kfp.schedules)}"}
        return self._runs(method, path.removeprefix(root), path, body)

    def _runs(self, method: str, below: str, path: str, body: bytes) -> dict[str, Any]:
        kfp = self.kfp
        if (method, below) == ("POST", "/runs"):
            run_id = f"run-{len(kfp.runs) + 1}"
            kfp.add_run(run_id, **json.loads(body))
            return _shown(kfp.runs[run_id])
        if (method, below) == ("GET", "/runs"):
            listed = [_shown(run) for run in reversed(kfp.runs.values())]
            return {"runs": listed if kfp.lists_history else [{**run, "state_history": []} for run in listed]}
        if match := re.fullmatch(r"/runs/([^/:]+):terminate", below):
            run = _known(kfp.runs, match[1])
            tasks = run["frames"][0].tasks
            run["frames"] = [
                Frame("CANCELING", tasks, ("RUNNING", "CANCELING")),
                Frame("FAILED", {**tasks, "finish": "SUCCEEDED"}, ("RUNNING", "CANCELING", "FAILED")),
            ]
            return {}
        if match := re.fullmatch(r"/runs/([^/:]+)", below):
            run = _known(kfp.runs, match[1])
            shown = _shown(run)
            if len(run["frames"]) > 1:
                run["frames"].pop(0)
            return shown
        if match := re.fullmatch(r"/apis/v1beta1/runs/([^/:]+)", path):
            _known(kfp.runs, match[1])
            manifest = json.dumps({"status": {"nodes": kfp.nodes}})
            return {"run": {"id": match[1]}, "pipeline_runtime": {"workflow_manifest": manifest}}
        raise Refusal(404, f"no route {method} {path}")


def _known(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise Refusal(404, f"{name} not found")
    return table[name]


def _pipeline(name: str, own: str) -> dict[str, Any]:
    return {"pipeline_id": own, "name": name, "display_name": name}


def _version(name: str, own: str) -> dict[str, Any]:
    return {"pipeline_version_id": own, "display_name": name, "name": name}


def _shown(run: dict[str, Any]) -> dict[str, Any]:
    """The run as its present frame has it. Each step has a pod that is called `executor` too."""
    frame: Frame = run["frames"][0]
    details = []
    for number, (name, state) in enumerate(frame.tasks.items()):
        over = state in ("SUCCEEDED", "FAILED")
        times = {"start_time": _time(10 * number), **({"end_time": _time(10 * number + 7)} if over else {})}
        details.append({"task_id": f"{number}", "display_name": name, "state": state, "error": None, **times})
        details.append({"task_id": f"{number}e", "display_name": "executor", "state": state, **times})
    return {
        **{name: value for name, value in run.items() if name != "frames"},
        "state": frame.state,
        "state_history": [{"state": state} for state in frame.history],
        "run_details": {"task_details": details},
    }


def _time(seconds: int) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")
