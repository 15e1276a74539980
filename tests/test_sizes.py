"""The sizes that people can hold in the head (CONTRIBUTING.md): a limit that nobody measures is a wish."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tnl"
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, ARGUMENTS = 450, 60, 150, 8
FILES = sorted(PACKAGE.rglob("*.py"))


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_fits_in_the_head(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LINES
    in_kernels = path.parent.name == "kernels"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= (KERNEL_LINES if is_kernel(node) else FUNCTION_LINES), f"{path.name}:{node.lineno} {node.name} has {lines} lines"
        arguments = len(node.args.args) + len(node.args.kwonlyargs) + len(node.args.posonlyargs)
        arguments -= bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
        assert in_kernels or arguments <= ARGUMENTS, f"{path.name}:{node.lineno} {node.name} takes {arguments} arguments"


def test_only_the_model_registers_itself() -> None:
    filled = [path.parent.name for path in FILES if path.name == "__init__.py" and path.read_text(encoding="utf-8").strip()]
    assert filled in ([], ["model"])
