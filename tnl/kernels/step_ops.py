"""The five operations of a layer while a model answers, without gradients: one token of many slots, and a prompt's next chunk.

In these forms a state is updated where it lies, and so is the residual: a layer's input is gone after it. Up to MOST rows a layer is
five launches; with more rows cuBLAS multiplies. What is not of the published shape (a bias, another norm, another activation) takes the
plain Triton forms.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnl.kernels import reference, triton_ops
from tnl.kernels.deferred import Deferred
from tnl.kernels.lightning_step_gate import lightning_step_gate
from tnl.kernels.lora import Draw
from tnl.kernels.reference import Mixer, Projection, Rows
from tnl.kernels.row_linear import RowLinear
from tnl.kernels.simple_rms_norm import norm_gate, simple_rms_norm
from tnl.kernels.skinny_linear import LowRank, expand_, shrink, skinny_linear
from tnl.kernels.triton_ops import SILU, Mixed, apply_norm, eps_of

MOST = 16
"""Rows up to which the products are ours and not cuBLAS's."""
read_attention = partial(triton_ops.attention_norm_gate, restart=True)
"""A prompt's chunk that stands at the end of its row, garbage before it: `segment_start` begins a sequence where the chunk does, and
there the state before the call goes on."""


class Gated(NamedTuple):
    """u * o [B, E] whose norm is still owed: `out_residual` pays it."""

    values: Tensor
    sums: Tensor
    eps: float


def norm_qkvu(x: Tensor, norm: Projection, qkvu_proj: Projection, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.norm_qkvu`, x [B, 1, D]."""
    eps = eps_of(norm)
    if eps is None or matrix(qkvu_proj) is None:
        return read_norm_qkvu(x, norm, qkvu_proj)
    return project(x[:, 0], qkvu_proj, eps=eps)[:, None], x


def read_norm_qkvu(x: Tensor, norm: Projection, qkvu_proj: Projection, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.norm_qkvu`, any [B, T, D]."""
    return qkvu_proj(apply_norm(x, norm)), x


def attention_norm_gate(
    qkvu: Tensor,  # [B, 1, 4E]
    state: Tensor | Deferred,  # updated in place
    mixer: Mixer,
    rows: Rows,  # real [B, 1]: 0 or False where a slot is to stay as it is
) -> tuple[Any, Any]:
    """As `reference.attention_norm_gate`; the first result is for `out_residual` of this module."""
    eps, real = eps_of(mixer.norm), rows.real
    assert real is not None
    if eps is None or mixer.activation not in SILU:
        if isinstance(state, Deferred):
            return reference.attention_norm_gate(qkvu, state, mixer, rows)
        mixed, new = triton_ops.attention_norm_gate(qkvu, state, mixer, rows._replace(real=None))
        state.copy_(torch.where(real.bool()[..., None, None], new, state))
        return mixed, state
    flat = None
    if rotary := mixer.rotary(rows):
        cos, sin = rotary.angles(qkvu.dtype)
        flat = cos[:, 0], sin[:, 0]
    # float16 could not hold u * o before its norm
    owed = len(qkvu) <= MOST and qkvu.dtype != torch.float16
    values, sums = lightning_step_gate(qkvu[:, 0], state, mixer.log_decay, real[:, 0], flat, gate=owed)
    if owed:
        return Gated(values, sums, eps), state
    return norm_gate(values, qkvu[:, 0, -values.shape[1] :], eps)[:, None], state


def out_residual(x: Any, out_proj: Projection, residual: Tensor, draw: Draw | None = None) -> Tensor:
    """As `reference.out_residual`; the residual is overwritten."""
    if isinstance(x, Mixed):
        x = norm_gate(x.o, x.u, x.eps)
    if not isinstance(x, Gated):
        return add_projection(x, out_proj, residual)
    if matrix(out_proj) is not None:
        return project(x.values, out_proj, eps=x.eps, sums=x.sums, residual=residual[:, 0])[:, None]
    r = torch.rsqrt(x.sums.sum(1, keepdim=True) / x.values.shape[1] + x.eps)
    return residual + out_proj((x.values * r).to(x.values.dtype)[:, None])


def norm_glu(x: Tensor, norm: Projection, l1: Projection, l2: Projection, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.norm_glu`, x [B, 1, D]."""
    eps, first, second = eps_of(norm), matrix(l1), matrix(l2)
    alike = isinstance(l1, RowLinear) == isinstance(l2, RowLinear)
    if eps is None or first is None or second is None or len(x) > MOST or not alike:
        return read_norm_glu(x, norm, l1, l2)
    flat = x[:, 0]
    low = other = None
    if isinstance(l1, RowLinear) and isinstance(l2, RowLinear):
        if l1.A.shape != l2.A.shape:
            low, other = lowered(flat, l1), lowered(flat, l2)
        else:
            h, h2 = shrink(flat, l1.A, l1.rows, l2.A)
            assert h2 is not None
            low, other = LowRank(h, l1.B, l1.rows), LowRank(h2, l2.B, l2.rows)
    return skinny_linear(flat, first, second, eps=eps, low=low, other_low=other)[:, None], x


def add_projection(x: Tensor, projection: Projection, residual: Tensor, draw: Draw | None = None) -> Tensor:
    """residual + projection(x), [B, T, D], over the residual."""
    weight = matrix(projection)
    if weight is None:
        return residual + projection(x)
    if x.shape[1] == 1:
        return project(x[:, 0], projection, residual=residual[:, 0])[:, None]
    flat = residual.view(-1, residual.shape[-1])
    torch.addmm(flat, x.flatten(0, 1), weight.T, out=flat)
    # an adapter's part alone: the frozen product stands in the sum already
    return residual.add_(projection.delta(x)) if isinstance(projection, RowLinear) else residual


def read_norm_glu(x: Tensor, norm: Projection, l1: Projection, l2: Projection, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.norm_glu`, any [B, T, D]; the product is written over its first factor."""
    z = apply_norm(x, norm)
    return each(z, l1).mul_(each(z, l2)), x


def each(x: Tensor, projection: Projection) -> Tensor:
    """A projection of [B, T, in]; of one token a row by `project`."""
    return project(x[:, 0], projection)[:, None] if x.shape[1] == 1 and matrix(projection) is not None else projection(x)


def head(hidden: Tensor, norm: Projection, lm_head: Projection) -> Tensor:
    """[B, D] to logits [B, vocabulary] float32."""
    eps = eps_of(norm)
    if eps is None or matrix(lm_head) is None:
        return lm_head(norm(hidden)).float()
    return project(hidden, lm_head, eps=eps, dtype=torch.float32)


def project(
    x: Tensor,  # [B, K]
    projection: Projection,  # one whose `matrix` there is
    *,
    eps: float | None = None,
    sums: Tensor | None = None,
    residual: Tensor | None = None,  # [B, N], overwritten
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x) W^T + residual, [B, N]: by one kernel of ours (two with adapters), or with many rows by cuBLAS."""
    weight = matrix(projection)
    assert weight is not None
    if len(x) <= MOST:
        low = lowered(x, projection) if isinstance(projection, RowLinear) else None
        return skinny_linear(x, weight, eps=eps, sums=sums, residual=residual, low=low, dtype=dtype)
    if eps is not None:
        x = simple_rms_norm(x, eps)
    if residual is not None:
        y = torch.addmm(residual, x, weight.T, out=residual)
    elif dtype is None or dtype == x.dtype or not x.is_cuda:
        y = (x @ weight.T).to(dtype or x.dtype)
    else:
        y = torch.mm(x, weight.T, out_dtype=dtype)
    return expand_(y, lowered(x, projection)) if isinstance(projection, RowLinear) else y


def lowered(x: Tensor, projection: RowLinear) -> LowRank:
    """What the rows' adapters make of x [B, K]."""
    return LowRank(shrink(x, projection.A, projection.rows)[0], projection.B, projection.rows)


def matrix(projection: Projection) -> Tensor | None:
    """The weight [N, K] of a projection that is one matrix, adapters or not; None for anything else."""
    inner = projection.project if isinstance(projection, RowLinear) else projection
    return inner.weight if type(inner) is nn.Linear and inner.bias is None else None
