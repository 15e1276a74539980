"""Triton: a projection's input, what LoRA takes from it, and the gradients that come back through it.

The input is z = x u r: a gate u where there is one, r = rsqrt(mean(x^2) + eps) where x is normed (norm: x r; gated norm: x u r;
product of the GLU's halves: x u). It is made here forward and again backward, and is kept nowhere. With t = dz + drop(g A):

    make_input        z [T, D], r [T],  h = drop(z) A^T  [T, R]                in one kernel
    input_gradients   du = t x r,  dx = r (t u - x r mean(t z)) + residual,  dA = g^T drop(z)    in one (normed: two)

for one adapter or the two of l1 and l2. Dropout masks are made where they are used (lora.keep_mask). mean(t z) needs no t: the mean
over columns of drop(g A) z is g h / D. Sums are float32, in an order that depends on shapes alone: runs are bit-identical.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.kernels.lora import GOLDEN, signed, threshold
from tnl.kernels.lora_output import MULTIPROCESSORS, add_up, padded, precision


class Thin(NamedTuple):
    """An adapter on the input's side."""

    a: Tensor  # [R, D]
    dropout: float
    module: int  # its number, for the mask


Thins = tuple[Thin | None, Thin | None]


class Source(NamedTuple):
    """What an input is made of."""

    x: Tensor  # [T, D], rows side by side; so are u's
    u: Tensor | None
    eps: float | None  # None: x is not normed


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep(keys, salt, cut, column):
    """lora.keep_mask of a block: keys [BT] uint32, column [BD] mixed; [BT, BD]."""
    z = (_mix(keys + salt.to(tl.uint32))[:, None] ^ column[None, :]) * 0x7FEB352D
    z = (z ^ (z >> 15)) * 0x846CA68B
    return z >= cut.to(tl.uint32) * 2


@triton.jit
def _block(x, s_x, o_t, o_d, m):
    """x[o_t, o_d] in float32."""
    return tl.load(x + o_t.to(tl.int64)[:, None] * s_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _shrink(
    b_h, b_z, a, keys, salt, cut, column, d, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr
):
    """b_h + drop(b_z) A^T: [BT, RP], or [W, BT, RP] where the warps share the sum over columns and not the ranks."""
    BT: tl.constexpr = b_z.shape[0]
    BD: tl.constexpr = b_z.shape[1]
    if DROP:
        b_z = tl.where(_keep(keys, salt, cut, column), b_z, 0.0)
    if len(b_h.shape) == 2:
        b_a = tl.trans(_thin(a, d + tl.arange(0, BD), D, R, RP)).to(b_z.dtype)
    else:
        W: tl.constexpr = b_h.shape[0]
        o_d = d + (tl.arange(0, W) * (BD // W))[:, None, None] + tl.arange(0, BD // W)[None, :, None]
        o_r = tl.arange(0, RP)[None, None, :]
        b_a = tl.load(a + o_r * D + o_d, mask=(o_r < R) & (o_d < D), other=0.0).to(b_z.dtype)
        b_z = b_z.reshape(BT, W, BD // W).permute(1, 0, 2)
    return tl.dot(b_z, b_a, b_h, input_precision=PRECISION)


@triton.jit
def _thin(a, o_d, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """A's columns o_d, [RP, BD]."""
    o_r = tl.arange(0, RP)
    return tl.load(a + o_r[:, None] * D + o_d[None, :], mask=(o_r < R)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _store_hidden(b_h, h, o_t, T, R: tl.constexpr, RP: tl.constexpr):
    o_r = tl.arange(0, RP)
    b_h = b_h if len(b_h.shape) == 2 else tl.sum(b_h, 0)
    tl.store(h + o_t[:, None] * R + o_r[None, :], b_h, mask=(o_t < T)[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["T", "salt", "cut", "salt_2", "cut_2"])
def input_kernel(
    x, u, z, rstd, keys, a, h, salt, cut, a_2, h_2, salt_2, cut_2, eps, T, s_x, s_u,
    R: tl.constexpr, R_2: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of T."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    if rstd is not None:
        squares = tl.zeros([BT, BD], tl.float32)
        for d in tl.range(0, D, BD, num_stages=4):
            o_d = d + tl.arange(0, BD)
            b_x = _block(x, s_x, o_t, o_d, m_t[:, None] & (o_d < D)[None, :])
            squares += b_x * b_x
        b_r = tl.rsqrt(tl.sum(squares, 1) / D + eps)
        tl.store(rstd + o_t, b_r, mask=m_t)
    b_keys = tl.load(keys + o_t, mask=m_t, other=0).to(tl.uint32, bitcast=True) if DROP else None
    b_h = tl.zeros([BT, RP] if W == 1 else [W, BT, RP], tl.float32)
    b_h2 = b_h
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m = m_t[:, None] & (o_d < D)[None, :]
        b_z = _block(x, s_x, o_t, o_d, m)
        if u is not None:
            b_z *= _block(u, s_u, o_t, o_d, m)
        if rstd is not None:
            b_z *= b_r[:, None]
        b_z = b_z.to(z.dtype.element_ty)
        tl.store(z + o_t.to(tl.int64)[:, None] * D + o_d[None, :], b_z, mask=m)
        column = _mix((o_d + 1).to(tl.uint32))
        if a is not None:
            b_h = _shrink(b_h, b_z, a, b_keys, salt, cut, column, d, D, R, RP, DROP, PRECISION)
        if a_2 is not None:
            b_h2 = _shrink(b_h2, b_z, a_2, b_keys, salt_2, cut_2, column, d, D, R_2, RP, DROP, PRECISION)
    if a is not None:
        _store_hidden(b_h, h, o_t, T, R, RP)
    if a_2 is not None:
        _store_hidden(b_h2, h_2, o_t, T, R_2, RP)


@triton.jit
def mean_kernel(
    dz, x, u, rstd, g, h, g_2, h_2, mean, s_x, s_u,
    R: tl.constexpr, R_2: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean(t z) of each row. Grid: rows."""
    i = tl.program_id(0).to(tl.int64)
    o_d, o_r = tl.arange(0, BLOCK), tl.arange(0, RP)
    m = o_d < D
    b = tl.load(dz + i * D + o_d, mask=m, other=0.0).to(tl.float32) * tl.load(x + i * s_x + o_d, mask=m, other=0.0)
    if u is not None:
        b *= tl.load(u + i * s_u + o_d, mask=m, other=0.0)
    total = tl.sum(b, 0) * tl.load(rstd + i)
    if g is not None:
        o = i * R + o_r
        total += tl.sum(tl.load(g + o, mask=o_r < R, other=0.0) * tl.load(h + o, mask=o_r < R, other=0.0), 0)
    if g_2 is not None:
        o = i * R_2 + o_r
        total += tl.sum(tl.load(g_2 + o, mask=o_r < R_2, other=0.0) * tl.load(h_2 + o, mask=o_r < R_2, other=0.0), 0)
    tl.store(mean + i, total / D)


@triton.jit
def _down(g, o_t, m_t, R: tl.constexpr, RP: tl.constexpr):
    """A block of g, [BT, RP]."""
    o_r = tl.arange(0, RP)
    return tl.load(g + o_t[:, None] * R + o_r[None, :], mask=m_t[:, None] & (o_r < R)[None, :], other=0.0)


@triton.jit
def _dropped(b_x, keys, salt, cut, column, DROP: tl.constexpr):
    """drop(b_x)."""
    if DROP:
        b_x = tl.where(_keep(keys, salt, cut, column), b_x, 0.0)
    return b_x


@triton.jit
def _store_gradient(b_da, da, o_d, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    o_r = tl.arange(0, RP)
    p_da = da + tl.program_id(1).to(tl.int64) * (R * D) + o_r[:, None] * D + o_d[None, :]
    tl.store(p_da, b_da, mask=(o_r < R)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["T", "span", "salt", "cut", "salt_2", "cut_2"])
def input_gradient_kernel(
    dz, x, u, dx, du, residual, rstd, mean, keys, a, g, da, salt, cut, a_2, g_2, da_2, salt_2, cut_2, T, span, s_x, s_u, s_res,
    R: tl.constexpr, R_2: tl.constexpr, D: tl.constexpr, RP: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of D, pieces of `span` tokens, whose sums for dA lie one behind the other. Without dz: dA alone."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    dtype = x.dtype.element_ty
    column = _mix((o_d + 1).to(tl.uint32))
    b_da = tl.zeros([RP, BD], tl.float32)
    b_da2 = b_da
    if a is not None:
        b_a = _thin(a, o_d, D, R, RP).to(dtype)
    if a_2 is not None:
        b_a2 = _thin(a_2, o_d, D, R_2, RP).to(dtype)
    first = tl.program_id(1) * span
    for t in range(first, tl.minimum(first + span, T), BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < T
        m = m_t[:, None] & (o_d < D)[None, :]
        b_y = _block(x, s_x, o_t, o_d, m)
        if u is not None:
            b_u = _block(u, s_u, o_t, o_d, m)
        b_t = dz
        if dz is not None:
            b_t = _block(dz, D, o_t, o_d, m)
        if residual is not None:
            b_res = _block(residual, s_res, o_t, o_d, m)
        b_keys = tl.load(keys + o_t, mask=m_t, other=0).to(tl.uint32, bitcast=True) if DROP else None
        if rstd is not None:
            b_r = tl.load(rstd + o_t, mask=m_t, other=0.0)[:, None]
            b_y *= b_r
        b_z = (b_y * b_u if u is not None else b_y).to(dtype)
        if a is not None:
            b_g = _down(g, o_t, m_t, R, RP).to(dtype)
            if dz is not None:
                b_t += _dropped(tl.dot(b_g, b_a, input_precision=PRECISION), b_keys, salt, cut, column, DROP)
            b_kept = _dropped(b_z, b_keys, salt, cut, column, DROP)
            b_da = tl.dot(tl.trans(b_g), b_kept, b_da, input_precision=PRECISION)
        if a_2 is not None:
            b_g = _down(g_2, o_t, m_t, R_2, RP).to(dtype)
            if dz is not None:
                b_t += _dropped(tl.dot(b_g, b_a2, input_precision=PRECISION), b_keys, salt_2, cut_2, column, DROP)
            b_kept = _dropped(b_z, b_keys, salt_2, cut_2, column, DROP)
            b_da2 = tl.dot(tl.trans(b_g), b_kept, b_da2, input_precision=PRECISION)
        if dz is not None:
            p = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
            if u is not None:
                tl.store(du + p, (b_t * b_y).to(dtype), mask=m)
                b_t *= b_u
            if rstd is not None:
                b_t = b_r * (b_t - b_y * tl.load(mean + o_t, mask=m_t, other=0.0)[:, None])
            if residual is not None:
                b_t += b_res
            tl.store(dx + p, b_t.to(dtype), mask=m)
    if a is not None:
        _store_gradient(b_da, da, o_d, D, R, RP)
    if a_2 is not None:
        _store_gradient(b_da2, da_2, o_d, D, R_2, RP)


def make_input(source: Source, thin: Thins, keys: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """z [T, D], r [T] float32 where x is normed, and of each adapter drop(z) A^T [T, R] float32; keys [T] where dropout is on."""
    x, u, eps = source
    T, D = x.shape
    z = torch.empty(T, D, dtype=x.dtype, device=x.device)
    rstd = None if eps is None else torch.empty(T, dtype=torch.float32, device=x.device)
    hidden = [t and torch.empty(T, len(t.a), dtype=torch.float32, device=x.device) for t in thin]
    options = _options(x, thin)
    RP = options["RP"]
    BT, BD = 16, max(32, min(256, 4096 // RP) * 2 // x.element_size())
    input_kernel[(triton.cdiv(T, BT),)](
        x, u, z, rstd, keys, *_arguments(thin, hidden), eps or 0.0, T, x.stride(0), 0 if u is None else u.stride(0),
        **options, W=8 if BD >= 128 else 1, BT=BT, BD=BD, num_warps=8, num_stages=3 if RP <= 32 else 1,
    )  # fmt: skip
    return z, rstd, hidden


def input_gradients(
    source: Source,
    rstd: Tensor | None,
    thin: Thins,
    keys: Tensor | None,
    hidden: list[Tensor | None],
    g: list[Tensor | None],  # [T, R] float32 each, as `output_gradients` makes it
    dz: Tensor | None,  # [T, D] contiguous: dy W, summed over the projections; None where the input needs no gradient
    residual: Tensor | None,  # [T, D], rows side by side: added to dx
    over: bool = False,  # dx and du are written over x and u, which nobody needs any more and whose rows touch
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dx and du [T, D] (None where there is no dz or no u), and each adapter's dA [R, D] float32."""
    x, u, _ = source
    T, D = x.shape
    options = _options(x, thin)
    strides = x.stride(0), 0 if u is None else u.stride(0)
    mean = dx = du = None
    if dz is not None:
        dx, du = (x, u) if over else (torch.empty_like(dz), None if u is None else torch.empty_like(dz))
        if rstd is not None:
            mean = torch.empty_like(rstd)
            pairs = [y for pair in zip(g, hidden) for y in pair]
            rank = {name: options[name] for name in ("R", "R_2", "D", "RP")}
            block = triton.next_power_of_2(D)
            mean_kernel[(T,)](dz, x, u, rstd, *pairs, mean, *strides, **rank, BLOCK=block, num_warps=min(max(block // 1024, 1), 16))
    elif not any(thin):
        return None, None, [None, None]
    RP = options["RP"]
    BT, BD = 32 if RP <= 64 or x.element_size() == 2 else 16, 64 if RP <= 64 else 32 if x.element_size() == 2 else 16
    columns = triton.cdiv(D, BD)
    span = triton.cdiv(triton.cdiv(T, max(1, min(4 * MULTIPROCESSORS // columns, T // 128))), BT) * BT
    pieces = triton.cdiv(T, span)
    sums = [t and torch.empty(pieces, *t.a.shape, dtype=torch.float32, device=x.device) for t in thin]
    input_gradient_kernel[(columns, pieces)](
        dz, x, u, dx, du, residual, rstd, mean, keys, *_arguments(thin, g, sums), T, span, *strides,
        0 if residual is None else residual.stride(0),
        **options, BT=BT, BD=BD, num_warps=4 if RP <= 16 else 8 if RP <= 64 else 16, num_stages=1, maxnreg=128,
    )  # fmt: skip
    return dx, du, add_up(*sums)


def _options(x: Tensor, thin: Thins) -> dict[str, Any]:
    ranks = [0 if t is None else len(t.a) for t in thin]
    return {
        "R": ranks[0],
        "R_2": ranks[1],
        "D": x.shape[1],
        "RP": padded(max(ranks)),
        "DROP": any(t is not None and t.dropout > 0 for t in thin),
        "PRECISION": precision(x.dtype),
    }


def _arguments(thin: Thins, *tensors: list[Tensor | None]) -> list[Any]:
    """Of both adapters what a kernel takes: A, the tensors that are its own, salt and cut."""
    found: list[Any] = []
    for i, t in enumerate(thin):
        drawn = (signed(t.module * GOLDEN), threshold(t.dropout)) if t else (0, 0)
        found += [t and t.a.contiguous(), *(own[i] for own in tensors), *drawn]
    return found
