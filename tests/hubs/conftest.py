"""Two small hubs on this machine that speak as much of each hub's HTTP as its library asks for, with faults to order."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
CUT = 11_000_000
"""Bytes after which a connection breaks: huggingface_hub writes pieces of 10 MiB."""
PICKLED = {
    "config.json": b'{"model_type": "transnormer"}',
    "tokenizer.model": b"pieces",
    "pytorch_model-00001-of-00001.bin": b"w" * 5000,
    "pytorch_model.bin.index.json": b"{}",
    "modeling_transnormer.py": b"raise SystemExit('this must never be fetched')",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "sub/model.safetensors": b"another model",
}
BOTH = {"config.json": b"{}", "model.safetensors": b"s" * 100, "pytorch_model.bin": b"w" * 100}
LARGE = {"config.json": b"{}", "model.safetensors": b"s" * 12_000_000}
REPOSITORIES = {"owner/large": LARGE, "owner/pickled": PICKLED, "owner/both": BOTH, "owner/empty": {"README.md": b"nothing here"}}


@dataclass
class Served:
    """What a small hub has, and what goes wrong there."""

    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: {repo: dict(held) for repo, held in REPOSITORIES.items()})
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of every request."""
    drop: list[str] = field(default_factory=list)
    """Files whose connection breaks once, in the middle."""
    spoilt: set[str] = field(default_factory=set)
    """Files that come with other contents than are listed."""
    status: dict[str, int] = field(default_factory=dict)
    """A part of a path -> the status that it is answered with."""
    once: dict[str, int] = field(default_factory=dict)
    """The same, but for one request."""
    hang: list[str] = field(default_factory=list)
    """Files of which the first bytes come, and then nothing, until the process that asks is gone."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Path -> what the request said of who asks."""
    public: set[str] = field(default_factory=set)
    """Repositories that everybody sees."""
    links: list[int] | None = None
    """Where it is a list, large files lie on another host, at a new signed address each time: how often each was asked for."""
    sha: str = SHA
    answer: bytes | None = None
    """What every request is answered with, as a login page between would."""

    def asked(self, part: str, method: str = "GET") -> list[tuple[str, str | None]]:
        """Path and range of the requests whose path holds a part."""
        return [(path, wanted) for verb, path, wanted in self.log if verb == method and part in path]


class SmallHub(BaseHTTPRequestHandler):
    """What both hubs have in common."""

    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def served(self) -> Served:
        return self.server.served

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def begin(self) -> bool:
        """Note the request; whether it has been answered with an ordered fault."""
        self.served.log.append((self.command, self.path, self.headers.get("Range")))
        self.served.tokens[self.path] = self.headers.get("Authorization", "")
        once = next((part for part in self.served.once if part in self.path and self.command == "GET"), None)
        if self.served.answer is not None:
            self.body()
            self.reply(200, self.served.answer)
            return True
        status = next((status for part, status in self.served.status.items() if part in self.path), self.served.once.pop(once or "", None))
        if status is not None:
            self.body()
            self.reply(status, b'{"error": "ordered", "Message": "ordered", "Code": 0}', {"Retry-After": "0"})
        return status is not None

    def contents(self, repo: str, name: str, headers: dict[str, str]) -> None:
        """Send a file, or what is left of it."""
        body = self.served.files[repo][name]
        if name in self.served.spoilt:
            body = b"x" * len(body)
        if self.command == "GET" and name in self.served.drop:
            self.served.drop.remove(name)
            self.reply(200, body[:CUT], {**headers, "Content-Length": str(len(body))})
            self.close_connection = True
            return
        if self.command == "GET" and name in self.served.hang:
            self.served.hang.remove(name)
            self.reply(200, body[:CUT], {**headers, "Content-Length": str(len(body))})
            self.connection.recv(1)  # returns when the other side is gone
            self.close_connection = True
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if start else 200, body[start:], headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode())

    def log_message(self, *arguments: object) -> None:
        pass


class SmallHuggingFace(SmallHub):
    """huggingface.co: the list of a model, its files, and what an upload asks."""

    def do_GET(self) -> None:
        if self.begin():
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "link":
            return self.linked(int(parts[1]), "/".join(parts[2:4]), parts[4])
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        files = self.served.files.get(repo)
        revision = parts[5] if api and len(parts) > 5 else parts[3] if not api and len(parts) > 3 else "main"
        if files is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", self.served.sha):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not api:
            name = "/".join(parts[4:])
            etag = hashlib.sha256(files[name]).hexdigest()
            about = {"X-Repo-Commit": self.served.sha, "Accept-Ranges": "bytes"}
            if self.served.links is not None and name.endswith(".safetensors"):
                self.served.links.append(0)
                link = f"http://localhost:{self.server.server_port}/link/{len(self.served.links)}/{repo}/{name}?Signature=hf_secret"
                linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(files[name])), "Location": link}
                return self.reply(302, b"", {**about, **linked})
            return self.contents(repo, name, {"ETag": f'"{etag}"', **about})
        entries = [self.entry(name, body) for name, body in files.items()]
        if "tree" in parts:
            return self.json([{"type": "file", "path": one["rfilename"], "oid": one["blobId"], **one} for one in entries])
        self.json({"id": repo, "sha": self.served.sha, "siblings": entries, "private": repo not in self.served.public})

    do_HEAD = do_GET

    def linked(self, number: int, repo: str, name: str) -> None:
        """Contents at a signed address. The first one breaks in the middle, and is too old when it is asked again."""
        assert self.served.links is not None
        self.served.links[number - 1] += 1
        if number == 1 and self.served.links[0] > 1:
            return self.reply(403, b"")
        if number == 1:
            self.served.drop.append(name)
        self.contents(repo, name, {"Accept-Ranges": "bytes"})

    def entry(self, name: str, body: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        lfs = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "oid": hashlib.sha256(body).hexdigest(), "pointerSize": 134}
        large = name.endswith((".safetensors", ".bin", ".model"))
        return {"rfilename": name, "size": len(body), "blobId": git, **({"lfs": lfs} if large else {})}

    def do_POST(self) -> None:
        if self.begin():
            return
        path, body = urlsplit(self.path).path, self.body()
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            self.served.files.setdefault(repo, {})
            self.server.private = asked.get("private", asked.get("visibility") == "private")
            return self.json({"url": f"http://127.0.0.1:{self.server.server_port}/{repo}", "id": repo})
        repo = "/".join(path.strip("/").split("/")[2:4])
        if "/preupload/" in path:
            modes = ["lfs" if one["path"].endswith(".safetensors") else "regular" for one in json.loads(body)["files"]]
            wanted = [{"path": one["path"], "uploadMode": mode} for one, mode in zip(json.loads(body)["files"], modes)]
            return self.json({"files": [{**one, "shouldIgnore": False} for one in wanted]})
        if path.endswith("/info/lfs/objects/batch"):
            upload = {"href": f"http://127.0.0.1:{self.server.server_port}/lfs"}
            objects = [{**one, "actions": {"upload": upload}} for one in json.loads(body)["objects"]]
            return self.json({"transfer": "basic", "objects": objects})
        for line in body.splitlines():
            asked = json.loads(line)
            value = asked.get("value", {})
            if asked["key"] == "file":
                self.served.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif asked["key"] == "lfsFile":
                self.served.files[repo][value["path"]] = self.server.blobs[value["oid"]]
        self.json({"commitUrl": f"http://127.0.0.1/{repo}/commit/{SHA}", "commitOid": SHA, "success": True})

    def do_PUT(self) -> None:
        if not self.begin():
            body = self.body()
            self.server.blobs[hashlib.sha256(body).hexdigest()] = body
            self.reply(200, b"", {"ETag": '"x"'})


class SmallModelScope(SmallHub):
    """modelscope.cn: the list of a model, its files, and what an upload asks."""

    def do_GET(self) -> None:
        if self.begin():
            return
        url = urlsplit(self.path)
        parts, query = unquote(url.path).strip("/").split("/"), {name: value[0] for name, value in parse_qs(url.query).items()}
        if parts[:3] == ["openapi", "v1", "models"]:
            return self.json(
                {"success": True, "data": {"id": "/".join(parts[3:]), "private": "/".join(parts[3:]) not in self.served.public}}
            )
        if parts[:3] != ["api", "v1", "models"]:
            return self.json({"Code": 404, "Message": "no such page"}, 404)
        repo = "/".join(parts[3:5])
        files = self.served.files.get(repo)
        if files is None:
            return self.json({"Code": 10010205001, "Message": "the model does not exist"}, 404)
        if query.get("Revision", "master") not in ("master", "v1"):
            return self.json({"Code": 404, "Message": "the revision does not exist"}, 404)
        if parts[5:] == ["repo", "files"]:
            return self.json({"Code": 200, "Data": {"Files": [self.entry(name, body) for name, body in files.items()]}})
        if parts[5:] == ["repo"]:
            return self.contents(repo, query["FilePath"], {"Accept-Ranges": "bytes"})
        self.json({"Code": 200, "Data": {"Path": "owner", "Name": repo.split("/")[1]}})

    do_HEAD = do_GET

    def entry(self, name: str, body: bytes) -> dict[str, Any]:
        return {"Path": name, "Name": name, "Type": "blob", "Size": len(body), "Sha256": hashlib.sha256(body).hexdigest()}

    def do_POST(self) -> None:
        if self.begin():
            return
        path, asked = urlsplit(self.path).path.strip("/").split("/"), json.loads(self.body() or b"{}")
        if path == ["api", "v1", "models"]:
            repo = f"{asked['Path']}/{asked['Name']}"
            if repo in self.served.files:
                return self.json({"Code": 10010205002, "Message": "the name already exists"}, 400)
            self.served.files[repo] = {}
            self.server.private = asked["Visibility"] == 1
            return self.json({"Code": 200, "Data": {"Path": asked["Path"], "Name": asked["Name"]}})
        repo = "/".join(path[4:6])
        if path[-1] == "batch":
            href = f"http://127.0.0.1:{self.server.server_port}/lfs"
            objects = [{"oid": one["oid"], "actions": {"upload": {"href": href}}} for one in asked["objects"]]
            return self.json({"Code": 200, "Data": {"objects": objects}})
        for one in asked["actions"]:
            known = self.server.blobs.get(one.get("sha256"))
            self.served.files[repo][one["path"]] = known if one["type"] == "lfs" else base64.b64decode(one["content"])
        self.json({"Code": 200, "Success": True, "Data": {"oid": SHA}})

    def do_PUT(self) -> None:
        if not self.begin():
            body = self.body()
            self.server.blobs[hashlib.sha256(body).hexdigest()] = body
            self.json({"Code": 200})


@dataclass
class Hub:
    """A running small hub and what a process must know to ask it."""

    served: Served
    server: ThreadingHTTPServer
    environment: dict[str, str]

    @property
    def all_environment(self) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return {**found, **self.environment, "PYTHONPATH": os.pathsep.join(sys.path)}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Server(ThreadingHTTPServer):
    """One that says nothing of clients that leave in the middle, which they do here."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def start(kind: type[SmallHub], environment: Callable[[int], dict[str, str]]) -> Iterator[Hub]:
    server = Server(("127.0.0.1", 0), kind)
    server.served, server.blobs, server.private = Served(), {}, None  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub = Hub(server.served, server, environment(server.server_port))  # type: ignore[attr-defined]
    yield hub
    hub.close()


@pytest.fixture
def huggingface(tmp_path: Path) -> Iterator[Hub]:
    def environment(port: int) -> dict[str, str]:
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "hf_secret"}
        return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", **home}

    yield from start(SmallHuggingFace, environment)


@pytest.fixture
def modelscope(tmp_path: Path) -> Iterator[Hub]:
    def environment(port: int) -> dict[str, str]:
        folders = {"MODELSCOPE_CACHE": str(tmp_path / "ms"), "MODELSCOPE_HOME": str(tmp_path / "ms-home")}
        retries = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "2", "MODELSCOPE_API_MAX_RETRIES": "1", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
        return {"MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{port}", "MODELSCOPE_API_TOKEN": "ms_secret", **folders, **retries}

    yield from start(SmallModelScope, environment)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tnl(tmp_path: Path) -> Command:
    """tnl in a process of its own, in an empty folder; after="CODE" is run before it, code="CODE" instead of it."""

    def call(hub: Hub, *arguments: str, after: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
        run = f"import sys; sys.argv = ['tnl', *{list(arguments)!r}]; from tnl.cli import main; main()"
        command, environment = [sys.executable, "-c", code or f"{after}\n{run}"], hub.all_environment
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=120)

    return call
