"""The step kernel against the recurrence in float64."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.kernels import reference
from tnl.kernels.lightning_step import lightning_step

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * CUDA)
@pytest.mark.parametrize(("N", "H", "K", "V"), [(1, 1, 16, 16), (3, 2, 128, 128), (2, 2, 24, 20), (2, 1, 256, 48)])
@pytest.mark.parametrize("silu", [False, True])
def test_step_is_the_recurrence(N: int, H: int, K: int, V: int, silu: bool, dtype: torch.dtype) -> None:
    fused = torch.randn(N, 4, H, max(K, V), device=DEVICE).to(dtype)  # views into one projection
    q, k, v = fused[:, 0, :, :K], fused[:, 1, :, :K], fused[:, 2, :, :V]
    g, state = -torch.rand(H, device=DEVICE), torch.randn(N, H, K, V, device=DEVICE)
    wide = [x.double()[:, None] for x in (q, k, v)]
    if silu:
        wide[:2] = map(torch.nn.functional.silu, wide[:2])
    want, final = reference.recurrent_lightning_attention(*wide, g.double(), initial_state=state.double())
    twin = state.clone()
    o = lightning_step(q, k, v, g, state, silu=silu)
    assert o.dtype == dtype
    assert (o.double() - want[:, 0]).norm() < BOUND[dtype] * want.norm()
    assert (state.double() - final).norm() < 1e-6 * final.norm()
    assert torch.equal(lightning_step(q, k, v, g, twin, silu=silu), o) and torch.equal(twin, state)


def test_registration() -> None:
    q, k, v = (torch.randn(2, 2, 16, device=DEVICE) for _ in range(3))
    args = (q, k, v, torch.zeros(2, device=DEVICE), torch.zeros(2, 2, 16, 16, device=DEVICE), False)
    torch.library.opcheck(torch.ops.tnl.lightning_step, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"state": torch.zeros(2, 2, 16, 16, dtype=torch.float16, device=DEVICE)}, "float32 and contiguous"),
        ({"state": torch.zeros(2, 2, 16, 16, device=DEVICE).mT}, "float32 and contiguous"),
        ({"state": torch.zeros(3, 2, 16, 16, device=DEVICE)}, "state has shape"),
        ({"k": torch.zeros(2, 2, 16, dtype=torch.float16, device=DEVICE)}, "one dtype"),
        ({"q": torch.zeros(2, 16, 2, device=DEVICE).mT}, "q has strides"),
        ({"v": torch.zeros(2, 2, 16, device="meta")}, "v is on meta"),
    ],
)
def test_bad_input_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    good = {n: torch.zeros(2, 2, 16, device=DEVICE) for n in "qkv"} | {"log_decay": torch.zeros(2, device=DEVICE)}
    with pytest.raises(ValueError, match=complaint):
        lightning_step(**good | {"state": torch.zeros(2, 2, 16, 16, device=DEVICE)} | wrong)
