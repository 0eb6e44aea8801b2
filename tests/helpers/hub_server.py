"""A stand-in for the Hugging Face hub: makes repositories, takes commits with small and large files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the server was given.

    Attributes:
        url: address of the server.
        token: the only one that may write.
        repositories: name -> path -> content.
        private: name -> whether it was made private.
        failing: answer every commit with this status.
    """

    def __init__(self) -> None:
        self.url, self.token = "", "hf_right"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.failing: int | None = None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply({})

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        if name in self.hub.private:
            self.reply({"id": name, "private": self.hub.private[name], "tags": [], "siblings": []})
        else:
            self.reply({"error": "not found"}, 404)

    def do_POST(self) -> None:
        content = self.body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.reply({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.create(json.loads(content))
        elif self.path == "/api/validate-yaml":
            self.reply({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 10_000 else "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            self.reply({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/put/{o['oid']}"}}}
                for o in json.loads(content)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            self.commit(content)
        else:
            self.reply({"error": self.path}, 404)

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        self.hub.repositories.setdefault(name, {})
        private = bool(request.get("private") or request.get("visibility") == "private")
        self.hub.private.setdefault(name, private)  # the hub leaves a repository as it is
        self.reply({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def commit(self, content: bytes) -> None:
        if self.hub.failing is not None:
            self.reply({"error": "storage is full"}, self.hub.failing)
            return
        name = "/".join(self.path.split("/")[3:5])
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.objects[value["oid"]]
        self.reply({"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a Hub on a free port of this machine."""
    hub = Hub()

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
