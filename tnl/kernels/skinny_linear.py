"""Triton: y = x W^T for few rows, where reading W is all that takes time; the norm before it and the residual after it cost nothing.

A SimpleRMSNorm multiplies a row by one number r, and r (x W^T) = (r x) W^T: so r is found while x is read, or from sums that the
kernel before left, and multiplies the sum at the end. Beside W each row may have a low-rank update of its own (an adapter):
h = A[row] x by `shrink`, and B[row] h is added here.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_NORM, OWN_NORM, NORM_OF_SUMS = 0, 1, 2
overlap = False
"""Whether a kernel may begin, and read its first weights, while the one before ends (programmatic dependent launch; Hopper and newer)."""


class Plan(NamedTuple):
    """Rows, columns and depth of a block; block_m 1: one row, without tensor cores."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class LowRank(NamedTuple):
    """What the adapters add: h [M, R] float32 (see `shrink`), B [adapters, N, R], and each row's adapter [M] (any number type)."""

    h: Tensor
    b: Tensor
    rows: Tensor


def plan(M: int, N: int, itemsize: int, pair: bool) -> Plan:
    """The blocks for M rows and N columns; pair: two matrices at once. Searched by benchmarks/decoding.py --search."""
    if M == 1:
        return Plan(1, 4 if pair else 8, 512 * 2 // itemsize, 4, 1)
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    depth = 128 * 2 // itemsize
    return Plan(block_m, 32 if N <= 8192 or pair else 64, depth, 4, 3 if pair or block_m == 64 else 4)


@triton.jit
def _norm_factor(sums, o_m, m_m, eps, K: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    """r of each row from the S sums of squares that another kernel left."""
    o_s = tl.arange(0, SP)
    parts = tl.load(sums + o_m[:, None] * S + o_s[None, :], mask=m_m[:, None] & (o_s < S)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(parts, 1) / K + eps)


@triton.jit
def _low_rank(h, b, rows, s_rows, o_m, o_n, m_m, m_n, N: tl.constexpr, R: tl.constexpr):
    """[BM, BN]: B[row] h of every row, a few ranks at a time."""
    RB: tl.constexpr = R if R < 8 else 8
    o_r = tl.arange(0, RB)
    row = tl.load(rows + o_m * s_rows, mask=m_m, other=0).to(tl.int64)
    m = (m_m[:, None] & m_n[None, :])[:, :, None]
    total = tl.zeros([o_m.shape[0], o_n.shape[0]], tl.float32)
    for r in range(0, R, RB):
        b_h = tl.load(h + o_m[:, None] * R + (r + o_r)[None, :], mask=m_m[:, None], other=0.0)
        p_b = b + (row[:, None, None] * N + o_n[None, :, None]) * R + (r + o_r)[None, None, :]
        total += tl.sum(b_h[:, None, :] * tl.load(p_b, mask=m, other=0.0).to(tl.float32), 2)
    return total


@triton.jit
def matvec_kernel(
    x, w, w2, residual, sums, h, b, h2, b2, rows, y, s_x, s_rows, M, eps,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row. Grid: blocks of N. The next block of W is on its way while this one is multiplied, the first before x is there."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_m, m_n = tl.arange(0, 1), o_n < N
    m_m = o_m < M
    at = o_n[:, None].to(tl.int64) * K + o_k[None, :]
    b_w = tl.load(w + at, mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
    if w2 is not None:
        b_w2 = tl.load(w2 + at, mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BN, BK], tl.float32)
    acc2 = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for k in range(0, K, BK):
        b_x = tl.load(x + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
        m = m_n[:, None] & (k + BK + o_k < K)[None, :]
        next_w = tl.load(w + at + (k + BK), mask=m, other=0.0)
        acc += b_w.to(tl.float32) * b_x[None, :]
        b_w = next_w
        if w2 is not None:
            next_w2 = tl.load(w2 + at + (k + BK), mask=m, other=0.0)
            acc2 += b_w2.to(tl.float32) * b_x[None, :]
            b_w2 = next_w2
        if NORM == 1:
            squares += b_x * b_x
    b_y = tl.sum(acc, 1)[None, :]
    b_y2 = tl.sum(acc2, 1)[None, :]
    if NORM == 1:
        r = tl.rsqrt(tl.zeros([1], tl.float32) + tl.sum(squares, 0) / K + eps)
    elif NORM == 2:
        r = _norm_factor(sums, o_m, m_m, eps, K, S, SP)
    else:
        r = tl.full([1], 1.0, tl.float32)
    _finish(b_y, b_y2, r, w2, residual, h, b, h2, b2, rows, y, s_rows, o_m, o_n, m_m, m_n, N, R)


@triton.jit
def _finish(b_y, b_y2, r, w2, residual, h, b, h2, b2, rows, y, s_rows, o_m, o_n, m_m, m_n, N: tl.constexpr, R: tl.constexpr):
    """Adapters, norm, product, residual; written once."""
    if h is not None:
        b_y += _low_rank(h, b, rows, s_rows, o_m, o_n, m_m, m_n, N, R)
    b_y *= r[:, None]
    if w2 is not None:
        if h2 is not None:
            b_y2 += _low_rank(h2, b2, rows, s_rows, o_m, o_n, m_m, m_n, N, R)
        b_y *= b_y2 * r[:, None]
    m = m_m[:, None] & m_n[None, :]
    o = o_m[:, None].to(tl.int64) * N + o_n[None, :]
    if residual is not None:
        b_y += tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def skinny_kernel(
    x, w, w2, residual, sums, h, b, h2, b2, rows, y, s_x, s_rows, M, eps,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Several rows, on tensor cores. Grid: blocks of N, blocks of M."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    p_x = x + o_m[:, None].to(tl.int64) * s_x + o_k[None, :]
    at = o_n[:, None].to(tl.int64) * K + o_k[None, :]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BM, BN], tl.float32)
    acc2 = tl.zeros([BM, BN], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        m_k = (k + o_k < K)[None, :]
        b_x = tl.load(p_x + k, mask=m_m[:, None] & m_k, other=0.0)
        b_w = tl.load(w + at + k, mask=m_n[:, None] & m_k, other=0.0)
        acc = tl.dot(b_x, b_w.trans(), acc, input_precision="ieee")
        if w2 is not None:
            b_w2 = tl.load(w2 + at + k, mask=m_n[:, None] & m_k, other=0.0)
            acc2 = tl.dot(b_x, b_w2.trans(), acc2, input_precision="ieee")
        if NORM == 1:
            f = b_x.to(tl.float32)
            squares += tl.sum(f * f, 1)
    if NORM == 1:
        r = tl.rsqrt(squares / K + eps)
    elif NORM == 2:
        r = _norm_factor(sums, o_m, m_m, eps, K, S, SP)
    else:
        r = tl.full([BM], 1.0, tl.float32)
    _finish(acc, acc2, r, w2, residual, h, b, h2, b2, rows, y, s_rows, o_m, o_n, m_m, m_n, N, R)


@triton.jit
def shrink_kernel(
    x, a, a2, rows, h, h2, s_x, s_rows, K: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """h[m] = A[row of m] x[m]. Grid: blocks of R, M, 1 or 2 matrices."""
    i_m = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 1:
        a = a2
        h = h2
    o_r = tl.program_id(0) * RB + tl.arange(0, RB)
    o_k = tl.arange(0, BK)
    row = tl.load(rows + i_m * s_rows).to(tl.int64)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    p_a = a + (row * R + o_r[:, None]) * K + o_k[None, :]
    acc = tl.zeros([RB, BK], tl.float32)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        b_x = tl.load(x + i_m * s_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        acc += tl.load(p_a + k, mask=(o_r < R)[:, None] & m_k[None, :], other=0.0).to(tl.float32) * b_x[None, :]
    tl.store(h + i_m * R + o_r, tl.sum(acc, 1), mask=o_r < R)


@triton.jit
def expand_kernel(y, h, b, rows, s_y, s_rows, M, N: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y += B[row] h, in place. Grid: blocks of N, blocks of M."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_m, m_n = o_m < M, o_n < N
    m = m_m[:, None] & m_n[None, :]
    p_y = y + o_m[:, None].to(tl.int64) * s_y + o_n[None, :]
    b_y = tl.load(p_y, mask=m, other=0.0).to(tl.float32) + _low_rank(h, b, rows, s_rows, o_m, o_n, m_m, m_n, N, R)
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m)


def skinny_linear(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], contiguous
    other: Tensor | None = None,  # [N, K]: the result is the product of both projections
    *,
    eps: float | None = None,  # SimpleRMSNorm of x first; None: x as it is
    sums: Tensor | None = None,  # [M, S] float32: x's norm is that of a vector of K numbers whose squares sum to sums' row
    residual: Tensor | None = None,  # [M, N], contiguous: added
    low: LowRank | None = None,
    other_low: LowRank | None = None,
    dtype: torch.dtype | None = None,
    cut: Plan | None = None,
) -> Tensor:
    """[M, N] in `dtype` (x's): rounded once, after everything. Without gradients. Raises ValueError for what the kernels cannot take."""
    check(x, weight, other, residual, low, other_low)
    (M, K), N = x.shape, weight.shape[0]
    cut = cut or plan(M, N, x.element_size(), other is not None)
    y = torch.empty(M, N, dtype=dtype or x.dtype, device=x.device)
    norm = NO_NORM if eps is None else OWN_NORM if sums is None else NORM_OF_SUMS
    S = 1 if sums is None else sums.shape[1]
    R = 1 if low is None else low.h.shape[1]
    h, b, rows = low or (None, None, None)
    h2, b2, _ = other_low or (None, None, None)
    kernel, grid = (matvec_kernel, (triton.cdiv(N, cut.block_n), M)) if cut.block_m == 1 else (skinny_kernel, _grid(M, N, cut))
    kernel[grid](
        x, weight, other, residual, sums, h, b, h2, b2, rows, y, x.stride(0), 0 if rows is None else rows.stride(0), M, eps or 0.0,
        N, K, S, triton.next_power_of_2(S), R, norm, cut.block_m, cut.block_n, cut.block_k, cut.stages, overlap,
        num_warps=cut.warps, **launch(),
    )  # fmt: skip
    return y


def launch() -> dict[str, bool]:
    """Options of a launch: only Triton's NVIDIA compiler knows this one, so it is absent unless it is on."""
    return {"launch_pdl": True} if overlap else {}


def _grid(M: int, N: int, cut: Plan) -> tuple[int, int]:
    return triton.cdiv(N, cut.block_n), triton.cdiv(M, cut.block_m)


def check(x: Tensor, weight: Tensor, other: Tensor | None, residual: Tensor | None, low: LowRank | None, other_low: LowRank | None) -> None:
    """Raise ValueError for arguments the kernels cannot take."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; one dtype of bfloat16, float16, float32 is needed")
    if x.dim() != 2 or x.stride(1) != 1 or 0 in x.shape or weight.shape[1:] != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; [M, K] and a contiguous [N, K] are needed")
    if other is not None and (other.shape != weight.shape or not other.is_contiguous() or other.dtype != weight.dtype):
        raise ValueError(f"the second weight is {tuple(other.shape)}, the first {tuple(weight.shape)}; they must agree")
    if residual is not None and (residual.shape != (x.shape[0], weight.shape[0]) or not residual.is_contiguous()):
        raise ValueError(f"residual is {tuple(residual.shape)}; a contiguous {(x.shape[0], weight.shape[0])} is needed")
    for one in (low, other_low):
        if one is not None and one.b.shape[1:] != (weight.shape[0], one.h.shape[1]):
            raise ValueError(f"h is {tuple(one.h.shape)}, B {tuple(one.b.shape)}; B needs to be [adapters, {weight.shape[0]}, R]")


def shrink(x: Tensor, a: Tensor, rows: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A[rows[m]] x[m] for every row of x [M, K]: [M, R] float32, with A [adapters, R, K] (R a power of two); the same for `other`."""
    M, K = x.shape
    R = a.shape[1]
    h = torch.empty(M, R, dtype=torch.float32, device=x.device)
    h2 = None if other is None else torch.empty_like(h)
    block = min(R, 4)
    shrink_kernel[(R // block, M, 1 if other is None else 2)](
        x, a, a if other is None else other, rows, h, h if h2 is None else h2, x.stride(0), rows.stride(0), K, R, block, 1024, overlap,
        num_warps=4, **launch(),
    )  # fmt: skip
    return h, h2


def expand_(y: Tensor, low: LowRank) -> Tensor:
    """y [M, N] += B[rows] h, in place."""
    (M, N), R = y.shape, low.h.shape[1]
    block_m, block_n = 4, 128
    expand_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        y, low.h, low.b, low.rows, y.stride(0), low.rows.stride(0), M, N, R, block_m, block_n, num_warps=4
    )
    return y
