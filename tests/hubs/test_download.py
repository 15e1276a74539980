"""The hubs' doors against a small hub of each kind on this machine: the real libraries, in a process of their own."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tnl import hub
from tnl.errors import ModelError, RecipeError
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


def test_contents_that_changed_with_the_same_size_are_fetched_anew(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    """Weights of another revision have the size of the old ones."""
    out = tmp_path / "model"
    for command in (["--out", str(out)], []):
        small.served.files["owner/both"] = {"config.json": b"{}", "model.safetensors": b"s" * 100}
        small.served.sha = f"{'0' * 39}{len(command)}"
        assert tnl(small, "download", "owner/both", "--hub", kind, *command).returncode == 0
        small.served.files["owner/both"]["model.safetensors"] = b"t" * 100
        small.served.sha = f"{'1' * 39}{len(command)}"
        done = tnl(small, "download", "owner/both", "--hub", kind, *command)
        assert done.returncode == 0, done.stderr
        assert (Path(done.stdout.splitlines()[0]) / "model.safetensors").read_bytes() == b"t" * 100
    (out / "model.safetensors").write_bytes(b"u" * 100)  # damaged here
    assert tnl(small, "download", "owner/both", "--hub", kind, "--out", str(out)).returncode == 0
    assert (out / "model.safetensors").read_bytes() == b"t" * 100
    small.served.log.clear()
    assert tnl(small, "download", "owner/both", "--hub", kind, "--out", str(out)).returncode == 0
    assert not contents(small)


def test_a_signed_address_that_is_too_old_is_asked_for_anew(huggingface: Any, tnl: Any, tmp_path: Path) -> None:
    huggingface.served.links = []
    done = tnl(huggingface, "download", "owner/large", "--out", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model/model.safetensors").read_bytes() == LARGE_BYTES
    ranges = [wanted for path, wanted in huggingface.served.asked("/link/")]
    assert ranges[0] is None and len(ranges) == 3 and all(int(str(one).strip("bytes=-")) >= 10_000_000 for one in ranges[1:])
    assert not any(token for path, token in huggingface.served.tokens.items() if "/link/" in path), "the token stays with the hub"


HOSTILE = ["../out.json", "/etc/out.json", "..\\out.json", "C:out.json", "a\nb.json", "\x1b[31mred.json", "-rf.json", ".tnl-checked.json"]


def test_hostile_names_stay_there(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    small.served.files["owner/both"] |= dict.fromkeys([*HOSTILE, "[a-z].json", "q?x=1#f.json", f"{'a' * 250}.json"], b"{}")
    done = tnl(small, "download", "owner/both", "--hub", kind, "--out", str(tmp_path / "deep/model"))
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "deep/model") == {"config.json", "model.safetensors"}
    assert not list(tmp_path.rglob("*out.json")) and not [path for path, _ in contents(small) if "out" in path or "red" in path]


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
    ],
)
def test_what_a_hub_refuses_is_said_in_one_line(kind: str, small: Any, tnl: Any, arguments: list[str], said: str) -> None:
    one_error(tnl(small, "download", *arguments, "--hub", kind), 4, said)


def test_what_is_no_name_is_a_mistake_before_the_hub_is_asked(kind: str, small: Any, tnl: Any) -> None:
    one_error(tnl(small, "download", "not a name", "--hub", kind), 2, "not a name: is no repository (needed: owner/name)")
    assert not small.served.tokens


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses it (401"), (403, "refuses it (403"), (429, "has been asked too often (429"), (500, "answered with an error")],
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
    refused = f"owner/pickled: {kind} could not be reached ([Errno 111] Connection refused). Try again (what was fetched is kept), check "
    one_error(tnl(small, "download", "owner/pickled", "--hub", kind), 4, refused)


def test_nothing_is_asked_where_that_is_forbidden(huggingface: Any, tnl: Any, tmp_path: Path) -> None:
    assert tnl(huggingface, "download", "owner/both").returncode == 0
    huggingface.environment["HF_HUB_OFFLINE"] = "1"
    huggingface.served.log.clear()
    assert tnl(huggingface, "download", "owner/both").returncode == 0
    said = "owner/large: is not here in full, and HF_HUB_OFFLINE forbids asking huggingface for it. Unset HF_HUB_OFFLINE, or name"
    one_error(tnl(huggingface, "download", "owner/large"), 4, said)
    one_error(tnl(huggingface, "download", "owner/large", "--out", str(tmp_path)), 4, said)
    assert not huggingface.served.log


def test_half_a_download_is_not_taken_for_a_whole_one(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()
    shards = {f"model-0000{number}-of-00002.safetensors": b"s" for number in (1, 2)}
    small.served.files["owner/two"] = {"config.json": b"{}", "model.safetensors.index.json": index, **shards}
    out = tmp_path / "model"
    assert tnl(small, "download", "owner/two", "--hub", kind, "--out", str(out)).returncode == 0
    small.close()
    assert tnl(small, "download", "owner/two", "--hub", kind, "--out", str(out)).returncode == 0
    (out / "model-00002-of-00002.safetensors").unlink()
    one_error(tnl(small, "download", "owner/two", "--hub", kind, "--out", str(out)), 4, "could not be reached")


@pytest.mark.parametrize("answer", [b"<html>log in to the network</html>", b"[]"])
def test_an_answer_of_somebody_else_is_said_in_one_line(kind: str, small: Any, tnl: Any, answer: bytes) -> None:
    small.served.answer = answer
    one_error(tnl(small, "download", "owner/both", "--hub", kind), 4, f"owner/both: what came is no answer of {kind}'s (")


def test_a_token_that_no_request_can_carry_is_not_shown(kind: str, small: Any, tnl: Any) -> None:
    name = "HF_TOKEN" if kind == "huggingface" else "MODELSCOPE_API_TOKEN"
    small.environment[name] = "my_secret\nanother_secret"
    one_error(tnl(small, "download", "owner/both", "--hub", kind), 4, f"{name}: holds a space, a line break or a letter that no token has")
    assert not small.served.log


def test_a_password_in_an_address_is_not_shown(kind: str, small: Any, tnl: Any) -> None:
    small.close()
    name = "HF_ENDPOINT" if kind == "huggingface" else "MODELSCOPE_ENDPOINT"
    small.environment[name] = small.environment[name].replace("//", "//me:pass_secret@")
    one_error(tnl(small, "download", "owner/both", "--hub", kind), 4, f"check {name} (it is http://127.0.0.1:")


def test_a_disk_that_fills_in_the_middle_is_said(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    full = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20,) * 2)"
    )
    done = tnl(small, "download", "owner/large", "--hub", kind, "--out", str(tmp_path / "large"), after=full)
    one_error(done, 6, "could not be written: File too large")


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
    one_error(tnl(huggingface, "download", "owner/pickled", "--hub", "gitee"), 2, "'gitee' is not one of 'huggingface', 'modelscope'")


def test_an_adapter_may_not_name_any_hub() -> None:
    with pytest.raises(ModelError, match=r"owner/model: is said to lie on 'gitee', a hub that tnl does not know. Needed: huggingface or"):
        hub.download("owner/model", hub="gitee")  # type: ignore[arg-type]


def test_modelscope_is_asked_for_by_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(RecipeError, match=r"pip install -c constraints.txt -e \"\.\[modelscope\]\""):
        hub.download("owner/model", hub="modelscope")


@pytest.mark.slow
def test_a_recipe_of_a_repository_trains_and_answers(kind: str, small: Any, tnl: Any, tmp_path: Path) -> None:
    """model.path: owner/name with model.hub, through training, merging and asking; then all of it again without the hub."""
    small.served.files["owner/demo"] = {path.name: path.read_bytes() for path in hub.DEMO.iterdir() if path.is_file()}
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {{path: owner/demo, hub: {kind}}}
data: {{train: {hub.DEMO.parent / "persona.json"}, eval: 0}}
train: {{output_dir: run, max_steps: 1, use_cpu: true}}
generation: {{max_new_tokens: 2}}
""",
        encoding="utf-8",
    )
    ask = "from tnl.generate.resolve import resolve; print(resolve('run', {'device': 'cpu'}).name)"
    work = f"from tnl.train import run; from tnl.adapter import merge; run.run('recipe.yaml'); merge.run('run', 'merged'); {ask}"
    done = tnl(small, code=work)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "run on owner/demo", done.stderr
    assert json.loads((tmp_path / "run/adapter/tnl.json").read_text(encoding="utf-8"))["base"]["hub"] == kind
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert [path for path, _ in contents(small) if "model.safetensors" in path]
    small.close()
    done = tnl(small, code=ask)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "run on owner/demo", done.stderr


def test_a_model_is_asked_of_the_hub_that_is_named(kind: str, small: Any, tnl: Any) -> None:
    small.served.files["owner/demo"] = {path.name: path.read_bytes() for path in hub.DEMO.iterdir() if path.is_file()}
    done = tnl(small, "generate", "owner/demo", "你好", "--hub", kind, "--max-new-tokens", "2", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert [path for path, _ in contents(small) if "model.safetensors" in path]


def test_a_check_fetches_no_weights(huggingface: Any, tnl: Any, tmp_path: Path) -> None:
    huggingface.served.files["owner/demo"] = {path.name: path.read_bytes() for path in hub.DEMO.iterdir() if path.is_file()}
    recipe = tmp_path / "recipe.yaml"
    data = hub.DEMO.parent / "persona.json"
    recipe.write_text(f"model: {{path: owner/demo}}\ndata: {{train: {data}}}\ntrain: {{use_cpu: true}}\n", encoding="utf-8")
    done = tnl(huggingface, "check", str(recipe), "--memory", "24")
    assert done.returncode == 0, done.stderr
    assert "owner/demo: config and tokenizer are here; tnl train fetches the weights" in done.stdout and "optimizer steps" in done.stdout
    assert contents(huggingface) and not [path for path, _ in contents(huggingface) if "safetensors" in path]
