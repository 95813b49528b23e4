# SPDX-License-Identifier: MIT
"""A stand-in for the Hugging Face Hub: repositories of models in memory, as far as huggingface_hub asks for them.

Small files arrive in the commit, safetensors by Git LFS with the transfer "basic". Private repositories need TOKEN, and
so does every change. The protocol xet, which huggingface_hub prefers, is not spoken: set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files of each commit, the last one is main
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> str | None:
        """The commit of a revision."""
        return list(self.commits)[-1] if revision == "main" and self.commits else (self.commits and revision) or None


class Hub(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.get()

    def do_GET(self) -> None:
        self.get()

    def get(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        name, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.may_write()):
            self.answer({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
            return
        commit = repository.find(revision) or ""
        content = repository.commits.get(commit, {}).get(file)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            digest = hashlib.sha256(content).hexdigest()
            self.answer(content, headers={"X-Repo-Commit": commit, "ETag": f'"{digest}"'})

    def do_PUT(self) -> None:
        data = self.body()
        assert self.path == f"/large/{hashlib.sha256(data).hexdigest()}"
        self.server.large[self.path.rpartition("/")[2]] = data
        self.answer({})

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        data = self.body()
        if not self.may_write():
            self.answer({"error": "Invalid username or password."}, 401)
            return
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            fields = json.loads(data)
            name = f"{fields['organization']}/{fields['name']}" if fields.get("organization") else fields["name"]
            private = bool(fields.get("private")) or fields.get("visibility") == "private"
            self.server.repositories.setdefault(name, Repository(private))
            self.answer({"url": f"{self.server.url}/{name}"})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False}
                for path in (one["path"] for one in json.loads(data)["files"])
            ]
            self.answer({"files": files})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            self.commit(name, [json.loads(line) for line in data.splitlines()])

    def commit(self, name: str, lines: list[dict]) -> None:
        repository = self.server.repositories[name]
        before = repository.find("main")
        files = dict(repository.commits.get(before or "", {}))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        oid = hashlib.sha1(repr((before, sorted(files.items()))).encode()).hexdigest()
        repository.commits[oid] = files
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, content: bytes | dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Hub]:
    """A server on a free port of this machine."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
