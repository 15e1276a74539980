"""`tnl push` into a small hub of each kind, and back: what was pushed is fetched and loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tnl.hub import DEMO
from tnl.train import run as training

DATA = Path(__file__).resolve().parents[2] / "tnl/demo/persona.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on a local copy of the demo base."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "secret-place").symlink_to(DEMO)
    (folder / "my <b>records.json").write_text(json.dumps(json.loads(DATA.read_text(encoding="utf-8"))[:24]), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{path: "{folder}/secret-place"}}
data: {{train: "{folder}/my <b>records.json", eval: 0.1, max_length: 192, system: "a\\n```\\nb"}}
lora: {{r: 2}}
train: {{output_dir: "{folder}/run", run_name: "{folder}/runs/first", max_steps: 2, logging_steps: 1, eval_steps: 1, use_cpu: true}}
generation: {{max_new_tokens: 4, do_sample: false}}
""",
        encoding="utf-8",
    )
    return training.run(recipe).path


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_a_run_is_pushed_with_a_card_and_comes_back(kind: str, run: Path, tnl: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    small = request.getfixturevalue(kind)
    done = tnl(small, "push", str(run), "me/storyteller", "--hub", kind, "--base", "owner/demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("me/storyteller") and small.server.private is True
    files = small.served.files["me/storyteller"]
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tnl.json", "manifest.json", "loss.png"} <= set(files)
    card = files["README.md"].decode()
    assert (
        card.startswith("---\nbase_model: owner/demo\nlibrary_name: peft")
        and "my \\<b\\>records.json: " in card
        and "learned tokens" in card
    )
    assert "| training, first | 1 |" in card and "| held out, lowest |" in card and "| question | before | after |" in card
    assert "lora_alpha: 32" in card and "run_name: first" in card
    assert card.count("````") == 2, "a text of the recipe must not end its block"
    assert ("\ntnl chat me/storyteller\n" if kind == "huggingface" else "\ntnl chat me/storyteller --hub modelscope\n") in card
    assert f"path: owner/demo\n  hub: {kind}" in card
    for name, body in files.items():
        assert str(run.parent).encode() not in body and b"secret-place" not in body, name
    back = tnl(small, "download", "me/storyteller", "--hub", kind, "--out", str(tmp_path / "back"))
    assert back.returncode == 0, back.stderr
    mine, theirs = load_file(run / "adapter/adapter_model.safetensors"), load_file(tmp_path / "back/adapter_model.safetensors")
    assert mine.keys() == theirs.keys() and all(bool((mine[name] == theirs[name]).all()) for name in mine)
    asked = tnl(small, "generate", str(tmp_path / "back"), "你是谁", "--base", str(DEMO), "--max-new-tokens", "2", "--device", "cpu")
    assert asked.returncode == 0, asked.stderr
    again = tnl(small, "push", str(run), "me/storyteller", "--hub", kind, "--public")
    assert again.returncode == 0 and "give --base OWNER/NAME" in again.stdout and len(again.stdout.splitlines()) == 2, again.stderr
    assert "--base FOLDER_OF_THE_BASE" in files["README.md"].decode()


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_nothing_private_goes_to_a_public_repository(kind: str, run: Path, tnl: Any, request: pytest.FixtureRequest) -> None:
    small = request.getfixturevalue(kind)
    small.served.files["me/storyteller"] = {"README.md": b"mine"}
    small.served.public.add("me/storyteller")
    done = tnl(small, "push", str(run), "me/storyteller", "--hub", kind)
    assert done.returncode == 4 and f"me/storyteller: is on {kind} already and everybody can see it" in done.stderr, done.stderr
    assert small.served.files["me/storyteller"] == {"README.md": b"mine"}
    assert tnl(small, "push", str(run), "me/storyteller", "--hub", kind, "--public").returncode == 0
    assert "adapter_model.safetensors" in small.served.files["me/storyteller"]


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_an_upload_that_ended_halfway_is_said_and_can_be_repeated(kind: str, run: Path, tnl: Any, request: pytest.FixtureRequest) -> None:
    small = request.getfixturevalue(kind)
    small.served.status["/commit"] = 413
    done = tnl(small, "push", str(run), "me/storyteller", "--hub", kind)
    said = {"huggingface": "huggingface answered with an error (", "modelscope": "the upload to modelscope ended halfway (6 files"}[kind]
    assert done.returncode == 4 and f"me/storyteller: {said}" in done.stderr and "Repeat the command" in done.stderr, done.stderr
    small.served.status.clear()
    assert tnl(small, "push", str(run), "me/storyteller", "--hub", kind).returncode == 0
    assert "adapter_model.safetensors" in small.served.files["me/storyteller"]


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
@pytest.mark.parametrize(("status", "said"), [(401, "refuses it (401"), (403, "refuses it (403"), (500, "answered with an error")])
def test_a_hub_that_does_not_let_one_is_said(
    kind: str, status: int, said: str, run: Path, tnl: Any, request: pytest.FixtureRequest
) -> None:
    small = request.getfixturevalue(kind)
    small.served.status["/api/"] = status
    done = tnl(small, "push", str(run), "me/storyteller", "--hub", kind)
    assert done.returncode == 4 and said in done.stderr and "Traceback" not in done.stderr and "_secret" not in done.stderr
    assert "fetched" not in done.stderr  # nothing of an upload is kept


def test_what_cannot_be_pushed_is_said(huggingface: Any, run: Path, tnl: Any, tmp_path: Path) -> None:
    for arguments, code, said in (
        ([str(tmp_path), "me/x"], 4, "is not the folder of a finished run"),
        ([str(tmp_path / "nowhere"), "me/x"], 4, "no such folder"),
        ([str(run), "storyteller"], 2, "needed: owner/name"),
        ([str(run), "me/.."], 2, "needed: owner/name"),
        ([str(run), "me/x", "--base", "a/b\nc: d"], 2, "--base is 'a/b\\nc: d' (needed: owner/name)"),
    ):
        done = tnl(huggingface, "push", *arguments)
        assert done.returncode == code and said in done.stderr, done.stderr
    assert not huggingface.served.log
