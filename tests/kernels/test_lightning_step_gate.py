"""The fused step against the reference form of the same operation in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.kernels import reference
from tnl.kernels.deferred import EVERY, Deferred, fold_
from tnl.kernels.lightning_step_gate import lightning_fold, lightning_step_gate

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * CUDA)
@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 16), (3, 2, 128), (2, 2, 24), pytest.param(9, 32, 16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lrpe", [False, True])
def test_the_fused_step_is_the_reference(N: int, H: int, V: int, lrpe: bool, dtype: torch.dtype) -> None:
    K = 2 * V if lrpe else V
    qkvu = torch.randn(N, 4 * H * V + 8, device=DEVICE).to(dtype)[:, : 4 * H * V]
    g, state = -torch.rand(H, device=DEVICE), torch.randn(N, H, K, V, device=DEVICE)
    theta, positions = torch.rand(H, 1, V, device=DEVICE) if lrpe else None, torch.arange(N, device=DEVICE)[:, None]
    mixer = reference.Mixer(lambda x: x, "swish", g.double(), theta)
    turns = mixer.rotary(reference.Rows(positions))
    rotary = turns and turns.angles(torch.float32)
    live = torch.ones(N, device=DEVICE)
    live[-1] = N == 1
    expected, after = reference.attention_norm_gate(qkvu.double()[:, None], state.double(), mixer, reference.Rows(positions))
    flat = None if rotary is None else (rotary[0][:, 0], rotary[1][:, 0])
    before, twin = state.clone(), state.clone()
    found, sums = lightning_step_gate(qkvu, state, g, live, flat)
    o, _ = lightning_step_gate(qkvu, twin, g, live, flat, gate=False)
    on = live.bool()
    assert (found.double() - expected[:, 0])[on].norm() < BOUND[dtype] * expected[:, 0][on].norm()
    assert (state.double() - after)[on].norm() < 1e-6 * after[on].norm()
    assert torch.equal(state[~on], before[~on]) and not found[~on].any() and not sums[~on].any()
    squares = o.double().square().sum(1)
    assert torch.allclose(sums.double().sum(1), squares, rtol=2e-2 if dtype != torch.float32 else 1e-5)
    assert torch.equal(state, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * CUDA)
@pytest.mark.parametrize(("N", "H", "V"), [(3, 2, 16), (2, 1, 24), pytest.param(9, 32, 16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lrpe", [False, True])
def test_a_state_whose_writing_waits_is_the_reference(N: int, H: int, V: int, lrpe: bool, dtype: torch.dtype) -> None:
    """Slots with nothing, something and all that may wait; what stands behind it is NaN and never seen."""
    K, W = 2 * V if lrpe else V, EVERY - 1
    g, state = -torch.rand(H, device=DEVICE), torch.randn(N, H, K, V, device=DEVICE)
    waiting = torch.tensor([W, 0, *[5, W, 1, 22, 7, 9, 3]][:N], device=DEVICE)
    there = (torch.arange(W, device=DEVICE) < waiting[:, None])[:, None, :, None]
    k, v = (torch.where(there, torch.randn(N, H, W, dim, device=DEVICE), torch.nan).to(dtype) for dim in (K, V))
    ours = Deferred(state.clone(), state.to(dtype), k, v, waiting)
    exact = Deferred(*(x.double() for x in ours[:4]), waiting)
    theta, positions = torch.rand(H, 1, V, device=DEVICE) if lrpe else None, torch.arange(N, device=DEVICE)[:, None]
    mixer = reference.Mixer(lambda x: x, "swish", g.double(), theta)
    turns = mixer.rotary(reference.Rows(positions))
    rotary = turns and turns.angles(torch.float32)
    live = torch.ones(N, device=DEVICE)
    live[-1] = 0
    before, on = Deferred(*(x.clone() for x in ours)), live.bool()
    qkvu = torch.randn(N, 4 * H * V, device=DEVICE).to(dtype)
    expected, _ = reference.attention_norm_gate(qkvu.double()[:, None], exact, mixer, reference.Rows(positions, real=live[:, None]))
    found, sums = lightning_step_gate(qkvu, ours, g, live, None if rotary is None else (rotary[0][:, 0], rotary[1][:, 0]))
    assert (found.double() - expected[:, 0])[on].norm() < BOUND[dtype] * expected[:, 0][on].norm()
    assert not found[~on].any() and not sums[~on].any()
    for one, other, old in zip(ours[:4], exact[:4], before[:4]):
        assert torch.equal(one[~on].nan_to_num(99), old[~on].nan_to_num(99))
        assert torch.equal(one.isnan(), other.isnan())
        assert (one.double() - other)[on].nan_to_num(0).norm() < BOUND[dtype] * other[on].nan_to_num(0).norm()
    assert torch.equal(ours.copy[0], ours.state[0].to(dtype)) and not torch.equal(ours.state[0], before.state[0])

    lightning_fold(ours, g, torch.tensor([1, N - 1], device=DEVICE))
    fold_(exact, g.double(), torch.tensor([1, N - 1], device=DEVICE))
    assert (ours.state.double() - exact.state).norm() < BOUND[dtype] * exact.state.norm()
    assert torch.equal(ours.copy[-1], ours.state[-1].to(dtype))


def test_a_layer_that_hardly_decays_forgets_as_it_should() -> None:
    """e^g in float32 is 1 or 1 - 6e-8; over many steps either would be far off g = -3.9e-8."""
    g = torch.tensor([-3.9e-8], device=DEVICE)
    state = torch.rand(1, 1, 16, 16, device=DEVICE) + 1
    exact = state.double()
    live = torch.ones(1, device=DEVICE)
    for _ in range(300):
        qkvu = torch.randn(1, 64, device=DEVICE) * 0.01
        qkvu[:, 32:48] += 1
        k = torch.nn.functional.silu(qkvu[:, 16:32].double())
        exact = exact * torch.exp(g.double()) + k[0, :, None] * qkvu[0, None, 32:48].double()
        lightning_step_gate(qkvu, state, g, live)
    drift = ((state.double() - exact) / exact).mean().abs()
    assert drift < 1e-7, drift  # e^g in float32 would be off by 300 x 2e-8


def test_bad_input_is_refused() -> None:
    state, g, live = torch.zeros(2, 2, 16, 16, device=DEVICE), torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match="qkvu is"):
        lightning_step_gate(torch.zeros(2, 64, device=DEVICE), state, g, live)
    with pytest.raises(ValueError, match="in place"):
        lightning_step_gate(torch.zeros(2, 128, device=DEVICE), state.mT, g, live)
    short = torch.zeros(2, 2, EVERY - 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"k is .* it must be"):
        lightning_step_gate(torch.zeros(2, 128, device=DEVICE), Deferred(state, state, short, short, live), g, live)
    with pytest.raises(ValueError, match="twice V"):
        lightning_step_gate(torch.zeros(2, 128, device=DEVICE), state, g, live, (torch.zeros(2, 2, 16), torch.zeros(2, 2, 16)))
