"""A model hub on loopback that speaks as much of the hub's protocol as its own client needs to list and download."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1f6e0c3b9a7d4e5f8091a2b3c4d5e6f708192a3b"


class Hub(ThreadingHTTPServer):
    """Serves `folder` as the repository `name` at COMMIT; `fetched`: the files that were downloaded, in order.

    seconds: what the body of an answer of more than 1 MiB takes.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.fetched, self.seconds = name, folder, list[str](), 0.0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        info, resolve = f"/api/models/{hub.name}", f"/{hub.name}/resolve/"
        if path.startswith(f"{info}/revision/"):
            self._listing(path.removeprefix(f"{info}/revision/"), self._info())
        elif path.startswith(f"{info}/tree/"):
            self._listing(path.removeprefix(f"{info}/tree/").split("/")[0], self._tree())
        elif path == info:
            self._listing("main", self._info())
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            self._file(revision, name, body)
        else:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> object:
        siblings = [{"rfilename": name} for name in self.server.files()]
        return {"id": self.server.name, "modelId": self.server.name, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _tree(self) -> object:
        files = [(name, self.server.folder / name) for name in self.server.files()]
        return [{"type": "file", "path": name, "size": f.stat().st_size, "oid": _sha(f)[:40]} for name, f in files]

    def _listing(self, revision: str, answer: object) -> None:
        if revision in {"main", COMMIT, "v1.0"}:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        else:
            self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})

    def _file(self, revision: str, name: str, body: bool) -> None:
        file = self.server.folder / name
        if revision not in {"main", COMMIT, "v1.0"} or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if body:
            self.server.fetched.append(name)
        self._send(200, file.read_bytes(), {"ETag": f'"{_sha(file)}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.server.seconds and len(content) > 2**20:
            size = len(content) // 40 + 1
            for start in range(0, len(content), size):
                time.sleep(self.server.seconds / 40)
                self.wfile.write(content[start : start + size])
        elif body:
            self.wfile.write(content)


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serving(name: str, folder: Path) -> Iterator[Hub]:
    """A hub for as long as the body runs."""
    with Hub(name, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def cached(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """`folder` in a hub's cache as its client lays it out: blobs, links to them in a snapshot, and a ref."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / _sha(path)
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(path.relative_to(folder).parts) + 1), "blobs", blob.name))
    return snapshot
