"""The tutorial's reader: the cells with their one-line edits run on the demo base, with plain transformers and peft."""

import importlib.util
import json
from pathlib import Path
from typing import Any

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

NAMES = {
    "README.md": {cell: cell for cell in tutorial.CELLS},
    "README.zh.md": {"load": "加载", "prompt": "数据", "lora": "LoRA", "train": "训练", "chat": "推理"},
}


def test_as_written_the_tutorial_does_not_compile() -> None:
    with pytest.raises(SyntaxError, match="repeated"):
        compile(tutorial.CELLS["load"], "load", "exec")


@pytest.mark.parametrize("language", ("README.md", "README.zh.md"))
def test_the_readme_lists_every_edit_and_no_other(language: str) -> None:
    lines = (ROOT / language).read_text(encoding="utf-8").splitlines()
    names = NAMES[language]
    rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines if line.split(" | ")[0].strip("| ") in names.values()]
    assert len(rows) == len(tutorial.EDITS)
    for (cell, old, new, reason), edit in zip(rows, tutorial.EDITS):
        assert cell == names[edit.cell] and reason
        assert old == f"`{edit.old}`" if edit.old else "`" not in old
        assert new.strip("`") == edit.new if edit.new else "`" not in new
        assert language != "README.md" or reason == edit.reason


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
    learned: Any = space["tokenized_id"]
    assert space["trainer"].state.global_step == 15  # type: ignore[attr-defined]
    run(tutorial.edited("chat"))
    exec(tutorial.LEARNED, space)
    asked = space["model_inputs"].input_ids[0].tolist()  # type: ignore[attr-defined]
    assert asked == learned[0]["input_ids"][: len(asked)] and learned[0]["labels"][len(asked)] != -100, "what is trained is what is asked"
    (answer,) = space["generated_ids"]  # type: ignore[misc]
    assert 0 < len(answer) <= 512 and space["response"] == space["tokenizer"].decode(answer, skip_special_tokens=True)  # type: ignore[attr-defined]
    capsys.readouterr()
