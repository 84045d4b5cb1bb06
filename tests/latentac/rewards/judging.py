"""A model behind OpenAI's protocol as a process, which scores brightness: `python judging.py PORT SECONDS`."""

import base64
import io
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


def image_of(question: dict[str, Any]) -> np.ndarray:
    """uint8 [H, W, 3], from the data URL of a question."""
    parts = {part["type"]: part for part in question["messages"][0]["content"]}
    kind, _, content = parts["image_url"]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))


def text_of(question: dict[str, Any]) -> str:
    text: str = question["messages"][0]["content"][0]["text"]
    return text


def brightness(question: dict[str, Any]) -> float:
    """0 to 10."""
    return float(image_of(question).mean() / 25.5)


def completion(content: str | None) -> bytes:
    """The answer of a server that says `content`."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]}).encode()


def serve(port: int, seconds: float) -> None:
    """Until it is ended; each answer takes some seconds."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(seconds)
            body = completion(json.dumps({"score": brightness(question)}))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
