"""Write notebooks/TransNormerLLM-7B-Lora.ipynb: the tutorial's cells with the edits of tests/journeys/tutorial.py, and why.

    python scripts/make_notebook.py

A test makes it anew and compares, then executes it on the demo base.
"""

import importlib.util
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "TransNormerLLM-7B-Lora.ipynb"
MODEL = "OpenNLPLab/TransNormerLLM-7B"
DATA = "../dataset/huanhuan.json"


def load_tutorial() -> Any:
    """The module tests/journeys/tutorial.py."""
    spec = importlib.util.spec_from_file_location("tutorial", ROOT / "tests" / "journeys" / "tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make() -> Any:
    """The notebook, the same bytes at every call."""
    tutorial = load_tutorial()

    def code(cell: str) -> str:
        return tutorial.edited(cell).replace(tutorial.MODEL_PATH, MODEL).strip()

    parts: list[tuple[str, str]] = [
        (
            "md",
            "# TransNormerLLM-7B LoRA 微调\n\n"
            "教程的代码，改到能在今天的 transformers 和 peft 上运行；每处修改及其原因见 README.zh.md 的“教程要改哪些地方”。\n\n"
            "Each change and its reason: README.md, *What to change in the tutorial*. `tnl train recipes/huanhuan-7b.yaml` does all "
            "of this in one command, faster.",
        ),
        ("md", "## 环境 / Environment\n\n`pip install -c constraints.txt -e .`（见 README）。不需要 triton 2.0.0、flash-attn 或远程代码。"),
        ("code", tutorial.BEFORE_THE_FIRST_CELL.strip()),
        (
            "md",
            "## 加载分词器和模型 / Tokenizer and model\n\n本地文件夹或仓库名都可以；`import tnl.model` 让 transformers 认识这个模型。"
            '没有 GPU 时 `device_map="auto"` 会用 CPU。',
        ),
        ("code", code("load")),
        (
            "md",
            "## 数据 / Data\n\n`huanhuan.json` 来自 <https://github.com/datawhalechina/self-llm/blob/master/dataset/huanhuan.json>。"
            "每个回答以 `</s>` 结尾并参与训练，截断时也保留它。",
        ),
        ("code", code("prompt")),
        (
            "code",
            f'with open("{DATA}", encoding="utf-8") as file:\n    tokenized_id = [process_func(record) for record in json.load(file)]',
        ),
        ("md", "## LoRA\n\n这个模型的线性层叫 `qkvu_proj`、`out_proj`、`l1`、`l2`、`l3`。"),
        ("code", code("lora")),
        ("md", "## 训练参数 / Training arguments\n\n梯度检查点在这里真正生效；显存足够时设为 `False` 会快三分之一。"),
        ("code", code("arguments")),
        ("md", "## 训练 / Train"),
        ("code", code("train")),
        ("md", "## 加载适配器并推理 / Load the adapter and ask"),
        ("code", code("chat")),
    ]
    cells = [new_code_cell(text) if kind == "code" else new_markdown_cell(text) for kind, text in parts]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=metadata)


if __name__ == "__main__":
    NOTEBOOK.write_text(nbformat.writes(make()) + "\n", encoding="utf-8")
    print(NOTEBOOK.relative_to(ROOT))
