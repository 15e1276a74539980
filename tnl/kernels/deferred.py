"""A state that is written every 24th token: the definition, in plain PyTorch. A GPU that decodes many slots waits for its memory.

With n tokens since the state S was last written, k_i and v_i theirs (i = 0 ... n-1, the oldest first), λ = exp(log_decay):

    o = λ^(n+1) q S + Σ λ^(n-i) (q·k_i) v_i + (q·k) v

S is read through a copy of fewer bits, which costs one rounding of what is read and is never accumulated; it is folded in float32:

    S' = λ^n S + Σ λ^(n-1-i) k_iᵀ v_i
"""

from typing import NamedTuple

import torch
from torch import Tensor

EVERY = 24
"""Tokens from one writing of the state to the next: 23 wait, the 24th writes them all."""


class Deferred(NamedTuple):
    """The states of N slots whose writing waits. Written in place."""

    state: Tensor  # [N, H, K, V] float32: S
    copy: Tensor  # the same as it is read: bfloat16, or `state` itself
    k: Tensor  # [N, H, W, K]: W = EVERY - 1; behind a slot's count stands anything, NaN too
    v: Tensor  # [N, H, W, V]
    waiting: Tensor  # [N] integer: n of each slot, 0 to W

    @property
    def shape(self) -> torch.Size:
        """Of the state."""
        return self.state.shape


def deferred_lightning_attention(
    q: Tensor,  # [N, H, K] one token of each of N slots
    k: Tensor,  # [N, H, K]
    v: Tensor,  # [N, H, V]
    log_decay: Tensor,  # [H]
    deferred: Deferred,
    live: Tensor | None = None,  # [N]: 0 where a slot is to stay as it is; None: all are live
) -> Tensor:
    """One step of `reference.recurrent_lightning_attention` for every slot: o [N, H, V] in q's dtype; a full slot's state is written."""
    dtype, W = deferred.state.dtype, deferred.k.shape[2]
    qc, kc, vc, g = (x.to(dtype) for x in (q, k, v, log_decay))
    keys, values, weight = _waiting(deferred, g)
    after = torch.exp(g * (deferred.waiting[:, None] + 1))[..., None, None]  # [N, H, 1, 1]
    scores = (qc[:, :, None] @ keys.transpose(-1, -2)) * (weight * g.exp()[:, None])[:, :, None]  # [N, H, 1, W]
    own = (qc * kc).sum(-1, keepdim=True) * vc
    o = ((qc[:, :, None] @ deferred.copy.to(dtype)) * after + scores @ values)[:, :, 0] + own

    alive = torch.ones_like(deferred.waiting, dtype=torch.bool) if live is None else live.bool()
    writes = alive & (deferred.waiting == W)
    at = (torch.arange(W, device=q.device) == deferred.waiting[:, None]) & alive[:, None]  # [N, W]: nowhere in a full slot
    for ring, new in ((deferred.k, kc), (deferred.v, vc)):
        ring.copy_(torch.where(at[:, None, :, None], new[:, :, None].to(ring.dtype), ring))
    # a graph of a GPU may not ask; there all are computed
    if q.is_cuda or bool(writes.any()):
        new = _folded(deferred, g) * g.exp()[:, None, None] + kc[..., None] * vc[..., None, :]
        _write(deferred, torch.where(writes[:, None, None, None], new, deferred.state))
    return o.to(q.dtype)


def fold_(deferred: Deferred, log_decay: Tensor, which: Tensor) -> None:
    """Write what waits into the states of the slots `which` [n]; whoever counts has to count from 0 again."""
    of_them = Deferred(*(x.index_select(0, which) for x in deferred))
    state = _folded(of_them, log_decay.to(deferred.state.dtype))
    for target in (deferred.state, deferred.copy):
        target.index_copy_(0, which, state.to(target.dtype))


def _waiting(deferred: Deferred, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [N, H, W, K] and values [N, H, W, V] that wait, zero behind the count, and what each has decayed to by now, [N, H, W]."""
    i, n = torch.arange(deferred.k.shape[2], device=g.device), deferred.waiting[:, None]
    there = (i < n)[:, None]  # [N, 1, W]
    keys, values = (torch.where(there[..., None], x, 0).to(g.dtype) for x in (deferred.k, deferred.v))
    return keys, values, torch.exp(g[:, None] * (n - 1 - i).clamp(min=0)[:, None]) * there


def _folded(deferred: Deferred, g: Tensor) -> Tensor:
    """S' [N, H, K, V]. λ^n - 1 is what multiplies S: near 1, λ^n itself has lost g's digits."""
    keys, values, weight = _waiting(deferred, g)
    less_one = torch.expm1(g * deferred.waiting[:, None])[..., None, None]
    return deferred.state + (deferred.state * less_one + (keys * weight[..., None]).transpose(-1, -2) @ values)


def _write(deferred: Deferred, state: Tensor) -> None:
    deferred.state.copy_(state)
    if deferred.copy is not deferred.state:
        deferred.copy.copy_(state)
