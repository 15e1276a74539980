"""The notebook is the tutorial made true: made from the same cells, and executed on the demo base."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "scripts" / "make_notebook.py")
assert spec is not None and spec.loader is not None
make_notebook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebook)

RECORDS = [{"instruction": f"你是谁？第{i}问", "input": "", "output": "我是甄嬛，家父是大理寺少卿甄远道。"} for i in range(20)]


def test_the_notebook_is_what_its_script_makes() -> None:
    assert make_notebook.NOTEBOOK.read_text(encoding="utf-8") == nbformat.writes(make_notebook.make()) + "\n"


@pytest.mark.slow
def test_the_notebook_runs_on_the_demo_base(tmp_path: Path) -> None:
    text = make_notebook.NOTEBOOK.read_text(encoding="utf-8").replace(make_notebook.MODEL, str(ROOT / "tnl" / "demo" / "base"))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "dataset" / "huanhuan.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(make_notebook.load_tutorial().LEARNED))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path / "notebooks"}}).execute()
    answer = notebook.cells[-2].outputs[-1]
    assert answer["output_type"] == "stream" and answer["text"].strip()
    assert (tmp_path / "notebooks" / "output" / "TransNormerLLM-7B-Lora" / "adapter_model.safetensors").is_file()
