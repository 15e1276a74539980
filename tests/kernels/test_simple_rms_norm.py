"""The norm kernels against the reference in float64, forward and backward."""

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.kernels import reference
from tnl.kernels.simple_rms_norm import norm_gate, simple_rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 16), (2, 3, 77), (2, 1030)])
def test_norm_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, gated: bool) -> None:
    fused = torch.randn(*shape[:-1], 3 * shape[-1], device=DEVICE).to(dtype)
    x, u, dy = fused.chunk(3, -1)  # rows with a stride
    leaves = [t.detach().requires_grad_() for t in (x, u)][: 1 + gated]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = norm_gate(*leaves) if gated else simple_rms_norm(leaves[0])
    want = reference.simple_rms_norm(wide[0]) * (wide[1] if gated else 1)
    assert y.dtype == dtype and y.shape == x.shape
    pairs = [(y, want)]
    pairs += zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, wide, dy.double()))
    for got, wanted in pairs:
        assert (got.double() - wanted).norm() < BOUND[dtype] * wanted.norm()


def test_eps_counts() -> None:
    x = torch.full((2, 8), 1e-3, device=DEVICE)
    torch.testing.assert_close(simple_rms_norm(x, 1e-2), reference.simple_rms_norm(x, 1e-2))
    assert simple_rms_norm(torch.zeros(1, 8, device=DEVICE)).eq(0).all()


def test_registration() -> None:
    x, u = torch.randn(3, 16, device=DEVICE, requires_grad=True), torch.randn(3, 16, device=DEVICE, requires_grad=True)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.tnl.simple_rms_norm, (x, 1e-6), test_utils=utils)
    torch.library.opcheck(torch.ops.tnl.norm_gate, (x, u, 1e-6), test_utils=utils)


def test_bad_input_is_refused() -> None:
    x = torch.zeros(2, 8, device=DEVICE)
    for call, complaint in (
        (lambda: simple_rms_norm(x.double()), "x is torch.float64"),
        (lambda: simple_rms_norm(x[:0]), "no dim may be 0"),
        (lambda: simple_rms_norm(torch.zeros(1, 16385, device=DEVICE)), "goes to 16384"),
        (lambda: norm_gate(x, x[:, :4]), "must agree"),
        (lambda: norm_gate(x, x.half()), "must agree"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call()
