"""A small Hub: the part of its HTTP API that creating, uploading, committing and downloading models needs.

Speaks to the real huggingface_hub client. Failures can be asked for: `fail(path_part, statuses)` answers the
next requests whose path holds that part with these statuses; 0 cuts the connection in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
LARGE = (".safetensors", ".parquet")


class Hub:
    """Repositories in memory."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[tuple[str, list[int]]] = []
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, part: str, statuses: list[int]) -> None:
        self.failures.append((part, list(statuses)))

    def failure(self, path: str) -> int | None:
        for part, statuses in self.failures:
            if part in path and statuses:
                return statuses.pop(0)
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        status = self.hub.failure(path)
        if status == 0:
            self.connection.close()
            return
        if status is not None:
            return self.answer(status, {"error": f"status {status} on purpose"})
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not allowed and not path.startswith("/upload/"):
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return getattr(self, method)(*found.groups(), body)
        self.answer(404, {"error": f"no such place: {path}"})

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'ann'}/{wanted['name'].rpartition('/')[2]}"
        if name in self.hub.repos:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}
            )
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repos[name] = {"private": private, "commits": [("0" * 40, {})]}
        self.answer(200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def who(self, body: bytes) -> None:
        self.answer(200, {"name": "ann", "type": "user", "orgs": []})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        if repo not in self.hub.repos:
            return self.missing(repo)
        files = [
            {"path": entry["path"], "uploadMode": "lfs" if entry["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False}
            for entry in json.loads(body)["files"]
        ]  # fmt: skip
        self.answer(200, {"files": files, "commitOid": self.hub.repos[repo]["commits"][-1][0]})

    def batch(self, repo: str, body: bytes) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            found: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                found["actions"] = {
                    "upload": {"href": f"{self.hub.address}/upload/{entry['oid']}", "header": {}}
                }
            objects.append(found)
        self.answer(
            200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
        )

    def upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "content differs from its hash"})
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        self.answer(200, {})

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines() if line.strip()]
        repository = self.hub.repos[repo]
        files = dict(repository["commits"][-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"object {value['oid']} was never uploaded"})
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        repository["commits"].append((oid, files))
        url = f"{self.hub.address}/{repo}/commit/{oid}"
        said = {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}
        self.answer(200, said)

    def info(self, repo: str, revision: str | None, body: bytes) -> None:
        found = self.at(repo, revision or "main")
        if found is None:
            return self.missing(repo)
        oid, files = found
        self.answer(200, {"_id": "1", "id": repo, "modelId": repo, "sha": oid, "private": True, "tags": [],
                          "downloads": 0, "siblings": [{"rfilename": name} for name in files]})  # fmt: skip

    def tree(self, repo: str, revision: str, body: bytes) -> None:
        found = self.at(repo, revision)
        if found is None:
            return self.missing(repo)
        self.answer(200, [
            {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
            for name, content in found[1].items()
        ])  # fmt: skip

    def resolve(self, repo: str, revision: str, name: str, body: bytes) -> None:
        found = self.at(repo, revision)
        if found is None or name not in found[1]:
            return self.missing(repo, "EntryNotFound" if found else "RepoNotFound")
        content = found[1][name]
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self.answer(200, content, headers)

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.hub.repos.get(repo, {}).get("commits", [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit[0] == revision), None)

    def missing(self, repo: str, code: str = "RepoNotFound") -> None:
        self.answer(404, {"error": f"{repo}: not found"}, {"X-Error-Code": code})


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES = [
    ("/api/repos/create", "create"),
    ("/api/whoami-v2", "who"),
    ("/api/validate-yaml", "validate"),
    (f"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    (f"/{REPO}.git/info/lfs/objects/batch", "batch"),
    ("/upload/([0-9a-f]+)", "upload"),
    (f"/api/models/{REPO}/commit/{REVISION}", "commit"),
    (f"/api/models/{REPO}/revision/{REVISION}", "info"),
    (f"/api/models/{REPO}/tree/{REVISION}", "tree"),
    (f"/api/models/{REPO}()", "info"),
    (f"/{REPO}/resolve/{REVISION}/(.+)", "resolve"),
]


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub at a free port of this machine."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
