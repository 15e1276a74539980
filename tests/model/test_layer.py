"""The layer's arithmetic stands in one function."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "tnl"
FIVE_OPS = {"norm_qkvu", "attention_norm_gate", "out_residual", "norm_glu", "l3_residual"}


def calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
    }


def test_only_decoder_layer_puts_the_five_ops_together() -> None:
    """A form of an operation may pass a case on to another form of the same one; none calls a second."""
    found = {str(path.relative_to(PACKAGE)): calls(path) & FIVE_OPS for path in PACKAGE.rglob("*.py")}
    assert {path for path, ops in found.items() if ops and not path.startswith("kernels/")} == {"model/layer.py"}
    assert all(len(ops) <= 1 for path, ops in found.items() if path.startswith("kernels/")), found
    assert calls(PACKAGE / "model" / "layer.py") >= FIVE_OPS


def test_nobody_but_the_kernels_calls_an_attention_form() -> None:
    forms = {"recurrent_lightning_attention", "parallel_lightning_attention", "chunk_lightning_attention", "padded_final_state"}
    callers = {path.parent.name for path in PACKAGE.rglob("*.py") if calls(path) & forms}
    assert callers <= {"kernels"}
