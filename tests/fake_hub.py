"""A hub of data sets on loopback: as much of the Hugging Face hub's HTTP interface as `datasets` asks for to stream.

`Hub(repositories)` serves {owner/name: {path: bytes}} at one commit; names in `gated` are refused as a hub does. With
`writers`, the tokens that may write, it takes new repositories and commits: `created` has what was asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(
        self,
        repositories: Mapping[str, Mapping[str, bytes]],
        gated: frozenset[str] = frozenset(),
        writers: frozenset[str] = frozenset(),
    ) -> None:
        self.repositories, self.gated, self.writers = dict(repositories), gated, writers
        self.created: list[dict[str, Any]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _listing(files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What a folder holds itself."""
    start = f"{folder}/" if folder else ""
    inside = {path.removeprefix(start): data for path, data in files.items() if path.startswith(start)}
    folders = sorted({path.partition("/")[0] for path in inside if "/" in path})
    entries = [{"type": "directory", "path": start + name, "oid": "0", "size": 0} for name in folders]
    return entries + [_entry(start + path, data) for path, data in inside.items() if "/" not in path]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                self.api("/".join(parts[2:4]), parts[4:])
            elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
                self.file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            else:
                self.answer(404)

        def do_POST(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if not hub.writers or parts[-2] == "paths-info":
                self.do_GET()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization", "").removeprefix("Bearer ") not in hub.writers:
                self.answer(401, X_Error_Message="Invalid username or password.")
            elif parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                hub.created.append(asked)
                name = f"{asked.get('organization', 'me')}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                self.tell({"url": f"{hub.url}/{name}", "id": name})
            elif parts == ["api", "validate-yaml"]:
                header = json.loads(body)["content"].split("---")[1]
                self.tell({"errors": [], "warnings": [] if yaml.safe_load(header) else [{"message": "empty"}]})
            elif parts[4] == "preupload":
                files = json.loads(body)["files"]
                self.tell(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            elif parts[4] == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")
                }
                name = "/".join(parts[2:4])
                hub.repositories[name] = {**hub.repositories[name], **files}
                self.tell({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def tell(self, found: Any) -> None:
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def repository(self, name: str, revision: str | None) -> Mapping[str, bytes] | None:
            if name in hub.gated:
                self.answer(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to dataset {name} is restricted.")
            elif name not in hub.repositories:
                self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif revision not in (None, "main", COMMIT):
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            else:
                return hub.repositories[name]
            return None

        def api(self, name: str, rest: list[str]) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            files = self.repository(name, rest[1] if len(rest) > 1 else None)
            if files is None:
                return
            what, below = rest[0] if rest else "revision", "/".join(rest[2:])
            found: Any = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            if what == "tree":
                found = _listing(files, below)
            if what == "paths-info":
                wanted = json.loads(asked)["paths"]
                found = [_entry(path, data) for path, data in files.items() if path in wanted]
            if found:
                self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
            else:
                self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")

        def file(self, name: str, revision: str, path: str) -> None:
            files = self.repository(name, revision)
            if files is None:
                return
            if path not in files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=COMMIT)
                return
            data, status = files[path], 200
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if first:
                data, status = data[int(first) : int(last or len(data)) + 1], 206
            tag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(status, data, ETag=tag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    return Handler
