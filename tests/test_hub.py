"""The hub's door, against a small hub on this machine: the real huggingface_hub in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tnl import hub
from tnl.errors import ModelError, RecipeError, StorageError

SHA = "0123456789abcdef0123456789abcdef01234567"
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
LARGE = {"model.safetensors": b"s" * 12_000_000}
REPOSITORIES = {"owner/large": LARGE, "owner/pickled": PICKLED, "owner/both": BOTH, "owner/empty": {"README.md": b"nothing here"}}


class SmallHub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as snapshot_download asks for."""

    def do_GET(self) -> None:
        self.server.log.append((self.command, self.path, self.headers.get("Range")))  # type: ignore[attr-defined]
        parts = self.path.partition("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = REPOSITORIES.get(repo)
        revision = parts[5] if len(parts) > 5 and parts[0] == "api" else parts[3] if parts[0] != "api" and len(parts) > 3 else "main"
        if files is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", SHA):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if parts[0] != "api":
            return self.file(files["/".join(parts[4:])], "/".join(parts[4:]))
        if "tree" in parts:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()} for name, body in files.items()
            ]
            return self.reply(200, json.dumps(tree).encode())
        siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
        return self.reply(200, json.dumps({"id": repo, "sha": SHA, "siblings": siblings, "private": False}).encode())

    do_HEAD = do_GET

    def file(self, body: bytes, name: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        drop = self.server.drop  # type: ignore[attr-defined]
        if self.command == "GET" and name in drop:
            drop.remove(name)
            return self.reply(200, body[:11_000_000], {**headers, "Content-Length": str(len(body))})
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if start else 200, body[start:], headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def small_hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    server.log, server.drop = [], []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tnl_download(arguments: list[str], home: Path, port: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "tnl.cli", "download", *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_download_fetches_weights_and_no_code(small_hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = tnl_download(["owner/pickled", "--out", str(out)], tmp_path, small_hub.server_port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(out)
    got = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and ".cache" not in path.parts}
    assert got == {"config.json", "tokenizer.model", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}
    asked = [path for method, path, _ in small_hub.log if "/resolve/" in path]  # type: ignore[attr-defined]
    assert not [path for path in asked if path.endswith((".py", ".pt", "training_args.bin"))]
    # again: nothing is fetched twice
    small_hub.log.clear()  # type: ignore[attr-defined]
    assert tnl_download(["owner/pickled", "--out", str(out)], tmp_path, small_hub.server_port).returncode == 0
    assert not [path for method, path, _ in small_hub.log if "/resolve/" in path and method == "GET"]  # type: ignore[attr-defined]


def test_a_dropped_connection_goes_on_where_it_stopped(small_hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    small_hub.drop.append("model.safetensors")  # type: ignore[attr-defined]
    done = tnl_download(["owner/large", "--out", str(tmp_path / "model")], tmp_path, small_hub.server_port)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE["model.safetensors"]
    ranges = [asked for method, path, asked in small_hub.log if method == "GET" and "/resolve/" in path]  # type: ignore[attr-defined]
    assert ranges == [None, "bytes=10485760-"]  # the library writes pieces of 10 MiB


def test_pickles_beside_safetensors_stay_there_and_the_cache_works_offline(small_hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = tnl_download(["owner/both"], tmp_path, small_hub.server_port)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[0])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    small_hub.shutdown()
    small_hub.server_close()
    again = tnl_download(["owner/both"], tmp_path, small_hub.server_port)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["owner/pickle"], "owner/pickle: no such folder here and no such repository on huggingface"),
        (["owner/pickled", "--revision", "v9"], "owner/pickled: has no revision v9 on huggingface"),
        (["owner/empty"], "owner/empty: has no weights"),
        (["not a name"], "no such"),
    ],
)
def test_what_a_hub_refuses_is_said_in_one_line(small_hub: ThreadingHTTPServer, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = tnl_download(arguments, tmp_path, small_hub.server_port)
    assert done.returncode == 4, done.stderr
    assert said in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr


def test_no_network_is_said_in_one_line(tmp_path: Path) -> None:
    done = tnl_download(["owner/pickled"], tmp_path, 9)  # the discard port: nothing listens
    assert done.returncode == 4, done.stderr
    assert "huggingface could not be reached" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_hub_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    done = tnl_download(["owner/pickled", "--hub", "gitee"], tmp_path, 9)
    assert done.returncode == 2 and "huggingface or modelscope" in done.stderr


def test_too_little_space_is_said_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    files = [types.SimpleNamespace(rfilename="model.safetensors", size=10**15)]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: types.SimpleNamespace(siblings=files, sha=SHA))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: pytest.fail("began to fetch"))
    with pytest.raises(StorageError, match=r"1,000,000,000,000,000 bytes needed, [\d,]+ bytes free"):
        hub.download("owner/large", out=tmp_path / "large")


def test_modelscope_is_asked_for_by_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(RecipeError, match=r"pip install 'tnl\[modelscope\]'"):
        hub.download("owner/model", hub="modelscope")


def test_modelscope_gets_the_same_filter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        (tmp_path / "pytorch_model.bin").write_bytes(b"w")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert hub.download("owner/model", hub="modelscope", revision="v1", out=tmp_path) == tmp_path
    assert asked["allow_patterns"] == hub.WANTED and "*.py" in hub.UNWANTED
    assert (asked["repo"], asked["revision"], asked["local_dir"]) == ("owner/model", "v1", str(tmp_path))


def test_a_local_path_never_touches_the_net(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "download", lambda *a, **k: pytest.fail("asked the net"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/TransNormerLLM-7B").mkdir(parents=True)
    assert hub.resolve("models/TransNormerLLM-7B") == tmp_path / "models/TransNormerLLM-7B"
    assert hub.resolve("./models/TransNormerLLM-7B") == tmp_path / "models/TransNormerLLM-7B"
    for missing in ("models/TransNormerLLM-7b", "./models/x", "/nowhere/at/all", "../x", "~/no-such-model-folder", "models\\x", "x"):
        with pytest.raises(ModelError):
            hub.resolve(missing)
    with pytest.raises(
        ModelError, match=r"^models/TransNormerLLM-7b: no such folder. Did you mean .*TransNormerLLM-7B \(only the case differs\)\?$"
    ):
        hub.resolve("models/TransNormerLLM-7b")


def test_a_repository_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda repo, **options: Path("/cache") / repo / str(options["revision"]))
    assert hub.resolve("OpenNLPLab/TransNormerLLM-7B", revision="abc") == Path("/cache/OpenNLPLab/TransNormerLLM-7B/abc")


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match="needed: the model's folder"):
        hub.resolve(str(tmp_path / "model.bin"))
