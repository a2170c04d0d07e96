"""A hub of models that takes what is pushed: the few HTTP calls of `huggingface_hub`, on a free port."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class CannedHub:
    """What it was sent; with a status other than 200 it refuses everything."""

    status: int = 200
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """To one POST."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/ada/moods", "name": "ada/moods"}
        if re.fullmatch(r"/api/models/ada/moods/preupload/main", path):
            # Small enough for a plain commit; large files would go to a store of their own.
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return {"files": files}
        if re.fullmatch(r"/api/models/ada/moods/commit/main", path):
            for line in body.splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    self.files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            return {"commitUrl": f"{self.address}/ada/moods/commit/1", "commitOid": "1" * 40, "success": True}
        return {}


@contextmanager
def serving_hub(hub: CannedHub) -> Iterator[str]:
    """Its address, as long as it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._send(json.dumps(hub.answer(self.path, body)).encode())

        def do_GET(self) -> None:
            self._send(b"{}")

        def _send(self, content: bytes) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization") or "")
            self.send_response(hub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
