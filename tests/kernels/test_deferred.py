"""A state whose writing waits is the recurrence: exactly where it is read as it is, within 0.3% where its copy is bfloat16."""

import pytest
import torch
from torch import Tensor

from tnl.kernels.deferred import EVERY, Deferred, deferred_lightning_attention, fold_
from tnl.kernels.reference import chunk_lightning_attention, recurrent_lightning_attention
from tnl.model.decay import log_decay

W = EVERY - 1
HEADS, LAYERS = 32, 30
DECAYS = torch.cat([log_decay(HEADS, layer, LAYERS) for layer in (0, LAYERS // 2, LAYERS - 1)])
"""Of the 7B's first, middle and last layer."""


def empty(N: int, H: int, K: int, V: int, dtype: torch.dtype, copy: torch.dtype | None = None, ring: torch.dtype | None = None) -> Deferred:
    """States of zero, with NaN wherever nothing has been written yet; copy None: there is none beside the state."""
    state = torch.zeros(N, H, K, V, dtype=dtype)
    k, v = (torch.full((N, H, W, dim), torch.nan, dtype=ring or dtype) for dim in (K, V))
    return Deferred(state, state if copy is None else state.to(copy), k, v, torch.zeros(N, dtype=torch.long))


def tokens(T: int, N: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as they come out of SiLU, and v."""
    draw = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(N, T, H, dim, generator=draw, dtype=torch.float32).to(dtype) for dim in (K, K, V))
    return torch.nn.functional.silu(q), torch.nn.functional.silu(k), v


def test_it_is_the_recurrence_for_slots_at_different_counts() -> None:
    """Also where a slot stands still for a while, and where what waits is folded between two tokens."""
    N, H, K, V, T = 3, 4, 8, 6, 3 * EVERY + 5
    g = -torch.rand(H, dtype=torch.float64)
    q, k, v = tokens(T, N, H, K, V)
    expected, final = recurrent_lightning_attention(q, k, v, g)
    deferred = empty(N, H, K, V, torch.float64)
    at = torch.zeros(N, dtype=torch.long)
    every = torch.arange(N)
    for step in range(2 * T):
        live = (at < T) & torch.tensor([True, step % 2 == 0, step > 7])
        token = at.clamp(max=T - 1)
        before = [x.clone() for x in deferred]
        o = deferred_lightning_attention(q[every, token], k[every, token], v[every, token], g, deferred, live)
        torch.testing.assert_close(o[live], expected[every, token][live])
        for one, other in zip(deferred, before):
            torch.testing.assert_close(one[~live], other[~live], rtol=0, atol=0, equal_nan=True)
        deferred.waiting.copy_(torch.where(live, (deferred.waiting + 1) % EVERY, deferred.waiting))
        at += live
        if step in (9, 40):
            fold_(deferred, g, torch.tensor([0, 2]))
            deferred.waiting[[0, 2]] = 0
    assert at.tolist() == [T] * N
    fold_(deferred, g, every)
    torch.testing.assert_close(deferred.state, final)


def test_the_state_is_written_every_24th_token_alone() -> None:
    deferred = empty(1, 1, 4, 4, torch.float32, torch.bfloat16)
    q, k, v = tokens(2 * EVERY, 1, 1, 4, 4, torch.float32)
    written = []
    for t in range(2 * EVERY):
        before = deferred.state.clone()
        deferred_lightning_attention(q[:, t], k[:, t], v[:, t], torch.tensor([-0.1]), deferred)
        written.append(not torch.equal(before, deferred.state))
        assert torch.equal(deferred.copy, deferred.state.bfloat16())
        deferred.waiting.copy_((deferred.waiting + 1) % EVERY)
    assert [t + 1 for t, wrote in enumerate(written) if wrote] == [EVERY, 2 * EVERY]


def errors(T: int, K: int, V: int, tail: int = 64) -> tuple[Tensor, Tensor]:
    """Of each head the error of the last outputs after T tokens against float64, as bfloat16 models run: deferred, and with a state
    that is kept in bfloat16 itself."""
    H = len(DECAYS)
    q, k, v = tokens(T, 1, H, K, V, torch.bfloat16)
    expected = chunk_lightning_attention(q.double(), k.double(), v.double(), DECAYS.double())[0][0, -tail:]
    deferred = empty(1, H, K, V, torch.float32, torch.bfloat16, torch.bfloat16)
    plain = torch.zeros(1, H, K, V, dtype=torch.bfloat16)
    found, rounded = [], []
    for t in range(T):
        # o in float32: what is measured is the state's error, not the output's rounding
        o = deferred_lightning_attention(q[:, t].float(), k[:, t].float(), v[:, t].float(), DECAYS, deferred)
        deferred.waiting.copy_((deferred.waiting + 1) % EVERY)
        plain = (plain * DECAYS.exp()[:, None, None] + k[:, t, :, :, None].float() * v[:, t, :, None, :].float()).bfloat16()
        if t >= T - tail:
            found.append(o[0])
            rounded.append((q[:, t, :, None].float() @ plain.float())[0, :, 0])
    return tuple((torch.stack(x).double() - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2)) for x in (found, rounded))  # type: ignore[return-value]


def hold(T: int, K: int, V: int) -> None:
    deferred, rounded = errors(T, K, V)
    assert deferred.max() < 3e-3, deferred
    assert rounded.max() > 3e-2  # what the copy would cost if it were added to


def test_a_bfloat16_copy_costs_less_than_a_third_of_a_percent() -> None:
    hold(3000, 16, 16)


@pytest.mark.slow
def test_after_32k_tokens_too() -> None:
    hold(32768, 64, 32)
