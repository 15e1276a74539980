"""The tutorial's reader: the cells with their one-line edits run on the demo base, with plain transformers and peft."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tnl" / "demo" / "base"

spec = importlib.util.spec_from_file_location("tutorial", Path(__file__).with_name("tutorial.py"))
assert spec is not None and spec.loader is not None
tutorial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tutorial)

RECORDS = [
    {"instruction": "你是谁？", "input": "", "output": "我是甄嬛，家父是大理寺少卿甄远道。"},
    {"instruction": "今日天气如何？", "input": "", "output": "雨后新晴，园中海棠开得正好。"},
    {"instruction": "可曾用膳？", "input": "", "output": "用过了，多谢挂念。"},
]


def test_as_written_the_tutorial_does_not_compile() -> None:
    with pytest.raises(SyntaxError, match="repeated"):
        compile(tutorial.CELLS["load"], "load", "exec")


@pytest.mark.parametrize("language", ("README.md", "README.zh.md"))
def test_the_readme_lists_every_edit(language: str) -> None:
    text = (ROOT / language).read_text(encoding="utf-8")
    for edit in tutorial.EDITS:
        assert edit.new in text or not edit.new, edit.new
        assert edit.old in text, edit.old


def test_the_cells_with_their_edits_train_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}

    def run(code: str) -> None:
        exec(compile(code.replace(tutorial.MODEL_PATH, str(DEMO)), "tutorial", "exec"), space)

    run(tutorial.BEFORE_THE_FIRST_CELL)
    run(tutorial.edited("load"))
    run(tutorial.edited("prompt"))
    (tmp_path / "huanhuan.json").write_text(json.dumps(RECORDS * 24, ensure_ascii=False), encoding="utf-8")
    run("tokenized_id = [process_func(record) for record in json.load(open('huanhuan.json', encoding='utf-8'))]")
    run(tutorial.edited("lora"))
    run(tutorial.edited("arguments"))
    run(tutorial.edited("train"))
    logs = [entry["loss"] for entry in space["trainer"].state.log_history if "loss" in entry]  # type: ignore[attr-defined]
    assert logs and logs[-1] < 8
    run(tutorial.edited("chat"))
    assert isinstance(space["response"], str)
    assert (tmp_path / "output" / "TransNormerLLM-7B-Lora" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
