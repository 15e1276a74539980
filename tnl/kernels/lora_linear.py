"""Triton: the thin products of LoRA, with the dropout mask made where it is used (lora.py). Every kernel reads its wide matrix once.

    row_product      h = s drop(x) a^T    [T, R]    forward: x and A; backward: dy and B; in S pieces, [S, T, R]
    column_product   o = h^T drop(x)      [R, D]    dA from x, dB from dy
    add_product      y += drop(h a)       [T, D]    forward: B onto x W^T; backward: A onto dy W

Sums are float32, in an order that depends on shapes alone: runs are bit-identical.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.kernels.lora import GOLDEN, signed, threshold

MULTIPROCESSORS = 132
"""A card's, near enough to choose how often a sum is split; the same on every card, so that the bits are."""


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep(keys, salt, o_t, o_d, T, cut):
    """lora.keep_mask of a block: [BT, BD]."""
    row = tl.load(keys + o_t, mask=o_t < T, other=0).to(tl.uint32, bitcast=True) + salt.to(tl.uint32)
    z = (_mix(row)[:, None] ^ _mix((o_d + 1).to(tl.uint32))[None, :]) * 0x7FEB352D
    z = (z ^ (z >> 15)) * 0x846CA68B
    return (z >> 1).to(tl.int32) >= cut


@triton.jit
def _sum_of_pieces(h, o_t, o_r, T, R: tl.constexpr, S: tl.constexpr):
    """Block of h [S, T, R], summed over S; o_t and o_r broadcast against each other."""
    m = (o_t < T) & (o_r < R)
    b_h = tl.load(h + o_t * R + o_r, mask=m, other=0.0)
    for s in tl.static_range(1, S):
        b_h += tl.load(h + (s * T + o_t) * R + o_r, mask=m, other=0.0)
    return b_h


@triton.jit(do_not_specialize=["T", "salt", "cut"])
def row_kernel(
    x, a, h, keys, salt, cut, scale, T, s_x, s_ar, s_ad, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SPAN: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of T, pieces of SPAN columns, whose sums lie one behind the other in h."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    first = tl.program_id(1) * SPAN
    b_h = tl.zeros([BT, RP], tl.float32)
    p_x = x + o_t.to(tl.int64)[:, None] * s_x
    for d in range(first, tl.minimum(first + SPAN, D), BD):
        o_d = d + tl.arange(0, BD)
        b_x = tl.load(p_x + o_d[None, :], mask=(o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)
        if DROP:
            b_x = tl.where(_keep(keys, salt, o_t, o_d, T, cut), b_x, 0.0)
        b_a = tl.load(a + o_r[None, :] * s_ar + o_d[:, None] * s_ad, mask=(o_r < R)[None, :] & (o_d < D)[:, None], other=0.0)
        b_h = tl.dot(b_x, b_a.to(b_x.dtype), b_h, input_precision=PRECISION)
    p_h = h + (tl.program_id(1) * T + o_t)[:, None] * R + o_r[None, :]
    tl.store(p_h, b_h * scale, mask=(o_t < T)[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["T", "span", "salt", "cut"])
def column_kernel(
    h, x, out, keys, salt, cut, T, span, s_x, s_or, s_od,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of D, pieces of `span` tokens, whose sums lie one behind the other in out."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, RP)
    first = tl.program_id(1) * span
    b_o = tl.zeros([RP, BD], tl.float32)
    for t in range(first, tl.minimum(first + span, T), BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < T
        b_x = tl.load(x + o_t.to(tl.int64)[:, None] * s_x + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        if DROP:
            b_x = tl.where(_keep(keys, salt, o_t, o_d, T, cut), b_x, 0.0)
        b_h = _sum_of_pieces(h, o_t[None, :], o_r[:, None], T, R, S)
        b_o = tl.dot(b_h.to(b_x.dtype), b_x, b_o, input_precision=PRECISION)
    p_o = out + tl.program_id(1).to(tl.int64) * (R * D) + o_r[:, None] * s_or + o_d[None, :] * s_od
    tl.store(p_o, b_o, mask=(o_r < R)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["T", "salt", "cut"])
def add_kernel(
    y, h, a, keys, salt, cut, T, s_ar, s_ad,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, S: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of D, blocks of T."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    p_y = y + o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    b_y = tl.load(p_y, mask=m, other=0.0)
    b_h = _sum_of_pieces(h, o_t[:, None], o_r[None, :], T, R, S)
    b_a = tl.load(a + o_r[:, None] * s_ar + o_d[None, :] * s_ad, mask=(o_r < R)[:, None] & (o_d < D)[None, :], other=0.0)
    b_z = tl.dot(b_h.to(b_y.dtype), b_a.to(b_y.dtype), input_precision=PRECISION)
    if DROP:
        b_z = tl.where(_keep(keys, salt, o_t, o_d, T, cut), b_z, 0.0)
    tl.store(p_y, (b_y + b_z).to(b_y.dtype), mask=m)


def row_product(x: Tensor, a: Tensor, scale: float, p: float, keys: Tensor | None, module: int) -> Tensor:
    """scale drop(x) a^T in S pieces, whose sum it is: [S, T, R] float32.

    x [T, D] with rows side by side, a [R, D] of any strides; keys [T] where p > 0.
    """
    (T, D), R = x.shape, a.shape[0]
    BT, BD = (32, 32) if R > 64 else (64, 128) if R <= 16 and x.element_size() == 2 else (64, 64)
    # more would fill the readers' shared memory
    most = 8 if R <= 16 else 2 if R <= 64 else 1
    pieces = max(1, min(2 * MULTIPROCESSORS // triton.cdiv(T, BT), D // 256, most))
    span = triton.cdiv(triton.cdiv(D, pieces), BD) * BD
    pieces = triton.cdiv(D, span)
    h = torch.empty(pieces, T, R, dtype=torch.float32, device=x.device)
    row_kernel[(triton.cdiv(T, BT), pieces)](
        x, a, h, keys, signed(module * GOLDEN), threshold(p), scale, T, x.stride(0), a.stride(0), a.stride(1),
        **_options(x, R, BT, BD, p), SPAN=span, num_warps=4, num_stages=3 if R <= 16 else 2,
    )  # fmt: skip
    return h


def column_product(h: Tensor, x: Tensor, p: float, keys: Tensor | None, module: int, *, transposed: bool = False) -> Tensor:
    """h^T drop(x), [R, D] float32 (transposed: [D, R]): h [S, T, R] float32, as row_product makes it, x [T, D] with rows side by side."""
    (T, D), (S, _, R) = x.shape, h.shape
    block = 128 if R <= 16 else 64 if R <= 64 else 32
    pieces = max(1, min(2 * MULTIPROCESSORS // triton.cdiv(D, block), T // 256))
    span = triton.cdiv(triton.cdiv(T, pieces), 64) * 64
    pieces = triton.cdiv(T, span)
    sums = torch.empty((pieces, D, R) if transposed else (pieces, R, D), dtype=torch.float32, device=x.device)
    column_kernel[(triton.cdiv(D, block), pieces)](
        h, x, sums, keys, signed(module * GOLDEN), threshold(p), T, span, x.stride(0), *((1, R) if transposed else (D, 1)),
        **_options(x, R, 64 if R <= 64 else 32, block, p), S=S, num_warps=4, num_stages=2,
    )  # fmt: skip
    return sums[0] if pieces == 1 else sums.sum(0)


def add_product(y: Tensor, h: Tensor, a: Tensor, p: float, keys: Tensor | None, module: int) -> None:
    """y += drop(h a), in place: y [T, D] contiguous, h [S, T, R] float32, as row_product makes it, a [R, D] of any strides."""
    (T, D), (S, _, R) = y.shape, h.shape
    BT, BD = (64, 128) if R <= 32 else (32, 32)
    add_kernel[(triton.cdiv(D, BD), triton.cdiv(T, BT))](
        y, h, a, keys, signed(module * GOLDEN), threshold(p), T, a.stride(0), a.stride(1),
        **_options(y, R, BT, BD, p), S=S, num_warps=4, num_stages=1,
    )  # fmt: skip


def _options(x: Tensor, R: int, BT: int, BD: int, p: float) -> dict[str, object]:
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    return {"D": x.shape[1], "R": R, "RP": max(16, triton.next_power_of_2(R)), "BT": BT, "BD": BD, "DROP": p > 0, "PRECISION": precision}
