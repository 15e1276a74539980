"""The few-row products against float64: norm, pair, residual, adapters of each row."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.kernels.reference import simple_rms_norm
from tnl.kernels.skinny_linear import LowRank, expand_, shrink, skinny_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert (found.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 512), (1, 37, 700), (3, 64, 256), (16, 40, 130), (33, 100, 64)])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("norm", ["none", "own", "sums"])
def test_products_are_those_of_float64(M: int, N: int, K: int, pair: bool, norm: str, dtype: torch.dtype) -> None:
    wide = rand(M, K + 8, dtype=dtype)
    x, w, w2, residual = wide[:, :K], rand(N, K, dtype=dtype), rand(N, K, dtype=dtype), rand(M, N, dtype=dtype)
    sums = rand(M, 6).square() * K
    xd = x.double()
    r = {
        "none": torch.ones(M, 1),
        "own": (xd.square().mean(1, keepdim=True) + 1e-6).rsqrt(),
        "sums": (sums.sum(1) / K + 1e-6).rsqrt()[:, None],
    }
    expected = (xd @ w.double().T) * r[norm].to(xd)
    if pair:
        expected = expected * (xd @ w2.double().T) * r[norm].to(xd)
    options = {"none": {}, "own": {"eps": 1e-6}, "sums": {"eps": 1e-6, "sums": sums}}[norm]
    found = skinny_linear(x, w, w2 if pair else None, residual=residual, **options)  # type: ignore[arg-type]
    assert found.dtype == dtype
    close(found, expected + residual.double(), BOUND[dtype])
    if norm == "own" and not pair:
        close(skinny_linear(x, w, eps=1e-6, dtype=torch.float32), simple_rms_norm(xd) @ w.double().T, BOUND[dtype] / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "R"), [(1, 1), (1, 16), (5, 4), (20, 32)])
def test_each_row_has_its_own_adapter(M: int, R: int, dtype: torch.dtype) -> None:
    N, K, adapters = 48, 96, 3
    x, w, w2 = rand(M, K, dtype=dtype), rand(N, K, dtype=dtype), rand(N, K, dtype=dtype)
    a, a2 = rand(adapters, R, K, dtype=dtype), rand(adapters, R, K, dtype=dtype)
    b, b2 = rand(adapters, N, R, dtype=dtype), rand(adapters, N, R, dtype=dtype)
    a[0], b[0] = 0, 0
    rows = torch.arange(M, device=DEVICE) % adapters
    table = torch.stack([torch.zeros(M), rows.cpu().float()], 1).to(DEVICE)  # a column of a table of floats, as the engine has it
    h, h2 = shrink(x, a, table[:, 1], a2)
    assert h2 is not None
    close(h, torch.einsum("mk,mrk->mr", x.double(), a.double()[rows]), 1e-5)
    low, other = LowRank(h, b, table[:, 1]), LowRank(h2, b2, table[:, 1])

    def of(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        full = w.double() + b.double()[rows] @ a.double()[rows]  # [M, N, K]
        return torch.einsum("mk,mnk->mn", x.double(), full)

    r = (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    close(skinny_linear(x, w, eps=1e-6, low=low), of(w, a, b) * r, BOUND[dtype])
    close(skinny_linear(x, w, w2, eps=1e-6, low=low, other_low=other), of(w, a, b) * of(w2, a2, b2) * r * r, BOUND[dtype])
    y = rand(M, N, dtype=dtype)
    close(expand_(y.clone(), low), y.double() + of(w, a, b) - x.double() @ w.double().T, BOUND[dtype])


def test_a_row_has_the_same_bits_beside_anything() -> None:
    w = rand(32, 64)
    x = rand(4, 64)
    alone = skinny_linear(x, w, eps=1e-6)
    x[1:] = torch.nan
    assert torch.equal(skinny_linear(x, w, eps=1e-6)[0], alone[0])


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64, device=DEVICE)}, "one dtype"),
        ({"x": torch.zeros(8, 2, device=DEVICE).T}, "contiguous"),
        ({"weight": torch.zeros(4, 9, device=DEVICE)}, "contiguous"),
        ({"other": torch.zeros(5, 8, device=DEVICE)}, "second weight"),
        ({"residual": torch.zeros(2, 5, device=DEVICE)}, "residual"),
    ],
)
def test_bad_input_is_refused(wrong: dict[str, Tensor], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        skinny_linear(**{"x": torch.zeros(2, 8, device=DEVICE), "weight": torch.zeros(4, 8, device=DEVICE)} | wrong)  # type: ignore[arg-type]
