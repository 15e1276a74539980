"""LoRA's part of an output and the gradients from the output's side, against float64; where no card is, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from tnl.kernels.lora_output import add_up, expand, output_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SIZES = [(1, 24, 1), (17, 300, 8), (150, 1100, 16), (70, 130, 64), (40, 70, 200)]


@pytest.fixture(autouse=True)
def empty_is_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kernel writes shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(got: torch.Tensor | None, want: torch.Tensor, dtype: torch.dtype) -> bool:
    return got is not None and bool((got.double() - want).norm() <= BOUND[dtype] * want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "R"), SIZES)
def test_output_and_gradients(T: int, N: int, R: int, dtype: torch.dtype) -> None:
    h, b, dy = rand(T, R), rand(N, R, seed=1), rand(T, N, dtype=dtype, seed=2)
    residual = rand(T, 3 * N, dtype=dtype, seed=3)[:, N : 2 * N]
    want = 1.5 * h.double() @ b.double().T
    assert close(expand(h, b, 1.5, None, dtype), want, dtype)
    y = expand(h, b, 1.5, residual, dtype)
    assert close(y, want + residual.double(), dtype) and y.dtype == dtype and y.is_contiguous()
    g, db = output_gradients(dy, h, b, 1.5)
    assert g.dtype == db.dtype == torch.float32
    assert close(g, 1.5 * dy.double() @ b.double(), dtype)
    assert close(db, 1.5 * dy.double().T @ h.double(), dtype)
    assert all(torch.equal(x, y) for x, y in zip((g, db), output_gradients(dy, h, b, 1.5)))


def test_pieces_are_added_in_one_launch() -> None:
    many, few, one = rand(37, 5, 60), rand(2, 7), rand(1, 9)
    for pieces in ((many, few), (one, many), (many, None), (None, few), (one, None)):
        for total, x in zip(add_up(*pieces), pieces):
            assert total is None if x is None else close(total, x.double().sum(0), torch.float32)
