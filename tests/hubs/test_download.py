"""The hubs' doors against a small hub of each kind on this machine: the real libraries, in a process of their own."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tnl import hub
from tnl.errors import RecipeError
from tnl.hubs.files import partial_bytes

HUBS = ["huggingface", "modelscope"]
LARGE_BYTES = b"s" * 12_000_000


@pytest.fixture(params=HUBS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small(kind: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(kind)


def names(folder: Path) -> set[str]:
    """Names of the files of a download, without the libraries' own."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}


def contents(small: Any) -> list[tuple[str, str | None]]:
    """Path and range of the requests for a file's contents."""
    return [*small.served.asked("/resolve/"), *small.served.asked("FilePath=")]


def one_error(done: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr and "_secret" not in done.stderr


def test_download_fetches_weights_and_no_code(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = tnl(small, "download", "owner/pickled", "--hub", kind, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(out)
    assert names(out) == {"config.json", "tokenizer.model", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}
    assert not [path for path, _ in contents(small) if any(word in path for word in (".py&", ".py", ".pt", "training_args", "sub"))]
    # again: nothing is fetched twice
    small.served.log.clear()
    assert tnl(small, "download", "owner/pickled", "--hub", kind, "--out", str(out)).returncode == 0
    assert not contents(small)


def test_a_dropped_connection_goes_on_where_it_stopped(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    small.served.drop.append("model.safetensors")
    done = tnl(small, "download", "owner/large", "--hub", kind, "--out", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE_BYTES
    ranges = [wanted for path, wanted in contents(small) if "model.safetensors" in path]
    assert len(ranges) == 2 and ranges[0] is None and int(str(ranges[1]).removeprefix("bytes=").rstrip("-")) >= 10_000_000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_download_goes_on_in_another_process(number: int, code: int, kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    small.served.hang.append("model.safetensors")
    arguments = ["download", "owner/large", "--hub", kind, "--out", str(tmp_path / "model")]
    command = [sys.executable, "-m", "tnl", *arguments]
    process = subprocess.Popen(command, env=small.all_environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while partial_bytes(tmp_path / "model") < 10_000_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == code and "Traceback" not in said and "error" not in said, said
    assert not (tmp_path / "model/model.safetensors").exists()
    small.served.log.clear()
    done = tnl(small, *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE_BYTES
    first = next(wanted for path, wanted in contents(small) if "model.safetensors" in path)
    assert first is not None and int(first.removeprefix("bytes=").rstrip("-")) >= 10_000_000


def test_pickles_beside_safetensors_stay_there_and_the_cache_works_offline(kind: str, small: Any, tnl: Any) -> None:
    done = tnl(small, "download", "owner/both", "--hub", kind)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[0])
    assert names(folder) == {"config.json", "model.safetensors"}
    small.close()
    again = tnl(small, "download", "owner/both", "--hub", kind)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


def test_wrong_contents_are_deleted_and_fetched_anew(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    out = tmp_path / "model"
    small.served.spoilt.add("model.safetensors")
    one_error(tnl(small, "download", "owner/both", "--hub", kind, "--out", str(out)), 4, "model.safetensors came with other contents")
    assert not (out / "model.safetensors").exists()
    small.served.spoilt.clear()
    done = tnl(small, "download", "owner/both", "--hub", kind, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == b"s" * 100


def test_small_files_are_checked_too(huggingface: Any, tnl: Any, tmp_path: Path) -> None:
    huggingface.served.spoilt.add("config.json")
    done = tnl(huggingface, "download", "owner/both", "--out", str(tmp_path / "model"))
    one_error(done, 4, "config.json came with other contents than huggingface lists")
    assert not (tmp_path / "model/config.json").exists()


def test_the_token_is_sent_and_not_said(kind: str, small: Any, tnl: Any) -> None:
    done = tnl(small, "download", "owner/both", "--hub", kind)
    assert "_secret" not in done.stdout + done.stderr
    secret = "Bearer " + ("hf_secret" if kind == "huggingface" else "ms_secret")
    assert {secret} == {token for path, token in small.served.tokens.items() if "owner/both" in path}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["owner/pickle"], "owner/pickle: no such folder here and no such repository on"),
        (["owner/pickled", "--revision", "v9"], "owner/pickled: has no revision v9 on"),
        (["owner/empty"], "owner/empty: has no weights (found README.md"),
        (["not a name"], "no such"),
    ],
)
def test_what_a_hub_refuses_is_said_in_one_line(kind: str, small: Any, tnl: Any, arguments: list[str], said: str) -> None:
    one_error(tnl(small, "download", *arguments, "--hub", kind), 4, said)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses it (401"), (403, "refuses it (403"), (429, "has been asked too often (429"), (500, "could not be reached")],
)
def test_a_status_is_said_in_one_line(kind: str, small: Any, tnl: Any, status: int, said: str) -> None:
    small.served.status["/api/"] = status
    one_error(tnl(small, "download", "owner/both", "--hub", kind), 4, said)


def test_a_hub_that_asks_to_wait_is_waited_for(kind: str, small: Any, tnl: Any) -> None:
    small.served.once["model.safetensors"] = 429
    done = tnl(small, "download", "owner/both", "--hub", kind)
    assert done.returncode == 0 and not small.served.once, done.stderr


def test_no_network_is_said_in_one_line(kind: str, small: Any, tnl: Any) -> None:
    small.close()
    one_error(tnl(small, "download", "owner/pickled", "--hub", kind), 4, f"{kind} could not be reached")


def test_a_revision_is_pinned(small: Any, kind: str, tnl: Any) -> None:
    revision = "v1" if kind == "modelscope" else "0123456789abcdef0123456789abcdef01234567"
    done = tnl(small, "download", "owner/both", "--hub", kind, "--revision", revision)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).name == revision
    asked = [path for path, _ in contents(small)]
    assert asked and all(revision in path for path in asked)


def test_too_little_space_is_said_before_anything_is_fetched(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    full = "import tnl.storage; tnl.storage.free_bytes = lambda path: 1000"
    done = tnl(small, "download", "owner/large", "--hub", kind, "--out", str(tmp_path / "large"), after=full)
    one_error(
        done, 6, "too little space (12,000,002 bytes needed, 1,000 bytes free). Free some space, or name a folder on another disk (--out)"
    )
    assert not contents(small) and not (tmp_path / "large" / "model.safetensors").exists()


def test_what_has_come_already_needs_no_room(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    name = f".cache/{hashlib.sha256(LARGE_BYTES).hexdigest()}.tnl.incomplete" if kind == "huggingface" else "model.safetensors.incomplete"
    (tmp_path / "model/.cache").mkdir(parents=True)
    (tmp_path / "model" / name).write_bytes(b"s" * 11_500_000)
    small_disk = "import tnl.storage; tnl.storage.free_bytes = lambda path: 600_000"
    done = tnl(small, "download", "owner/large", "--hub", kind, "--out", str(tmp_path / "model"), after=small_disk)
    assert done.returncode == 0, done.stderr


def test_settings_alone_are_enough_for_a_check(kind: str, small: Any, tnl: Any) -> None:
    both = f"from tnl import hub; print(hub.resolve('owner/both', {kind!r}, weights=False))"
    done = tnl(small, code=both)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert names(folder) == {"config.json"}
    assert tnl(small, code=both.replace("False", "True")).stdout.strip() == str(folder)
    assert names(folder) == {"config.json", "model.safetensors"}
    small.close()
    assert tnl(small, code=both).stdout.strip() == str(folder)


def test_an_unknown_hub_is_a_mistake_of_the_command_line(huggingface: Any, tnl: Any) -> None:
    one_error(tnl(huggingface, "download", "owner/pickled", "--hub", "gitee"), 2, "huggingface or modelscope")


def test_modelscope_is_asked_for_by_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(RecipeError, match=r"pip install -c constraints.txt -e \"\.\[modelscope\]\""):
        hub.download("owner/model", hub="modelscope")


def test_a_check_fetches_no_weights(huggingface: Any, tnl: Any, tmp_path: Path) -> None:
    huggingface.served.files["owner/demo"] = {path.name: path.read_bytes() for path in hub.DEMO.iterdir() if path.is_file()}
    recipe = tmp_path / "recipe.yaml"
    data = hub.DEMO.parent / "persona.json"
    recipe.write_text(f"model: {{path: owner/demo}}\ndata: {{train: {data}}}\ntrain: {{use_cpu: true}}\n", encoding="utf-8")
    done = tnl(huggingface, "check", str(recipe), "--memory", "24")
    assert done.returncode == 0, done.stderr
    assert "owner/demo: config and tokenizer are here; tnl train fetches the weights" in done.stdout and "optimizer steps" in done.stdout
    assert contents(huggingface) and not [path for path, _ in contents(huggingface) if "safetensors" in path]
