"""LoRA's thin products against the masks and sums of the reference; where no card is, in Triton's interpreter."""

import pytest
import torch

from tnl.kernels.lora import keep_mask

pytest.importorskip("triton")
from tnl.kernels.lora_linear import add_product, column_product, row_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SIZES = [(1, 24, 1), (17, 300, 8), (70, 130, 20)]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def keys(T: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (T,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def mask(T: int, D: int, p: float) -> torch.Tensor:
    return keep_mask(keys(T), 7, D, p).double() if p else torch.ones(T, D, dtype=torch.float64, device=DEVICE)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((got.double() - want).norm() <= BOUND[dtype] * want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("T", "D", "R"), SIZES)
def test_products(T: int, D: int, R: int, p: float, dtype: torch.dtype) -> None:
    x, a, b = rand(T, D, dtype=dtype), rand(R, D, seed=1), rand(D, R, seed=2)
    kept = mask(T, D, p)
    h = row_product(x, a, 1.5, p, keys(T), 7).sum(0)
    assert close(h, 1.5 * (x.double() * kept) @ a.double().T, dtype)
    assert close(row_product(x, b.T, 0.5, 0.0, None, 0).sum(0), 0.5 * x.double() @ b.double(), dtype)
    pieces = rand(2, T, R, seed=3)
    g = pieces.sum(0)
    assert close(column_product(pieces, x, p, keys(T), 7), g.double().T @ (x.double() * kept), dtype)
    assert close(column_product(pieces, x, 0.0, None, 0, transposed=True), x.double().T @ g.double(), dtype)
    y = rand(T, D, dtype=dtype, seed=4)
    want = y.double() + (g.double() @ a.double()) * kept
    add_product(y, pieces, a, p, keys(T), 7)
    assert close(y, want, dtype)


def test_rows_of_a_wider_matrix_and_pieces_of_a_long_one() -> None:
    wide, g = rand(600, 50), rand(600, 4, seed=1)
    x = wide[:, 10:30]
    kept = mask(600, 20, 0.5)
    assert close(column_product(g[None], x, 0.5, keys(600), 7), g.double().T @ (x.double() * kept), torch.float32)
    a = rand(4, 20, seed=2)
    assert close(row_product(x, a, 1.0, 0.5, keys(600), 7).sum(0), (x.double() * kept) @ a.double().T, torch.float32)


def test_many_columns_are_summed_in_pieces() -> None:
    x, a = rand(3, 1100), rand(4, 1100, seed=1)
    h = row_product(x, a, 1.0, 0.5, keys(3), 7)
    assert len(h) == 4
    assert close(h.sum(0), (x.double() * mask(3, 1100, 0.5)) @ a.double().T, torch.float32)


def test_the_largest_rank() -> None:
    x, a = rand(5, 40), rand(256, 40, seed=1)
    h = row_product(x, a, 1.0, 0.0, None, 0)
    whole = h.sum(0).double()
    assert close(h.sum(0), x.double() @ a.double().T, torch.float32)
    assert close(column_product(h, x, 0.0, None, 0), whole.T @ x.double(), torch.float32)
    y = torch.zeros_like(x)
    add_product(y, h, a, 0.0, None, 0)
    assert close(y, whole @ a.double(), torch.float32)
