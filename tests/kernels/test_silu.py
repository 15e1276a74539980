"""SiLU of columns of a wider matrix against PyTorch's, in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from tnl.kernels.silu import silu, silu_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 1e-6), (torch.float16, 1e-3), pytest.param(torch.bfloat16, 6e-3, marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("columns", [1, 40, 2100])
def test_silu_and_its_gradient(columns: int, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    wide, d_wide = (torch.randn(5, columns + 7, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    x, d = wide[:, :columns], d_wide[:, :columns]
    exact = x.double().requires_grad_()
    expected = F.silu(exact)
    (gradient,) = torch.autograd.grad(expected, exact, d.double())
    rest = d_wide[:, columns:].clone()
    assert (silu(x).double() - expected).norm() <= bound * expected.norm()
    silu_backward(d, x)
    assert (d.double() - gradient).norm() <= bound * gradient.norm()
    assert torch.equal(d_wide[:, columns:], rest)
