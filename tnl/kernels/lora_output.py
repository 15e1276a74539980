"""Triton: LoRA's part of a projection's output, and the gradients that come from the output's side.

    expand             y = s h B^T (+ residual)    [T, N]    written once; cuBLAS then adds the frozen product onto it
    output_gradients   g = s dy B  [T, R],  dB = s dy^T h  [N, R]    in one read of dy

h = drop(z) A^T comes from `lora_input`. Sums are float32, in an order that depends on shapes alone: runs are bit-identical.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = 132
"""A card's, near enough to choose how often a sum is split; the same on every card, so that the bits are."""
WIDEST_RANK = 32
"""Above it the partial sums of dB would outweigh dy, and the products are wide enough for cuBLAS."""


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    h, b, residual, y, scale, T, s_res,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of N, blocks of T."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    m = (o_t < T)[:, None] & (o_n < N)[None, :]
    b_h = tl.load(h + o_t[:, None] * R + o_r[None, :], mask=(o_t < T)[:, None] & (o_r < R)[None, :], other=0.0) * scale
    b_b = tl.load(b + o_n[None, :] * R + o_r[:, None], mask=(o_n < N)[None, :] & (o_r < R)[:, None], other=0.0)
    dtype = y.dtype.element_ty
    b_y = tl.dot(b_h.to(dtype), b_b.to(dtype), input_precision=PRECISION)
    row = o_t.to(tl.int64)[:, None]
    if residual is not None:
        b_y += tl.load(residual + row * s_res + o_n[None, :], mask=m, other=0.0)
    tl.store(y + row * N + o_n[None, :], b_y.to(dtype), mask=m)


@triton.jit(do_not_specialize=["T"])
def output_gradient_kernel(
    dy, h, b, g, db, scale, T,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of T, pieces of SPAN columns. The pieces of g, and each token block's dB, lie one behind the other."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    m_t, m_r = o_t < T, o_r < R
    first = tl.program_id(1) * SPAN
    dtype = dy.dtype.element_ty
    b_h = tl.load(h + o_t[None, :] * R + o_r[:, None], mask=m_t[None, :] & m_r[:, None], other=0.0).to(dtype)
    b_g = tl.zeros([BT, RP], tl.float32)
    p_dy = dy + o_t.to(tl.int64)[:, None] * N
    p_db = db + tl.program_id(0).to(tl.int64) * (N * R) + o_r[:, None]
    for n in range(first, tl.minimum(first + SPAN, N), BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        b_dy = tl.load(p_dy + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_b = tl.load(b + o_n[:, None] * R + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
        b_g = tl.dot(b_dy, b_b.to(dtype), b_g, input_precision=PRECISION)
        b_db = tl.dot(b_h, b_dy, input_precision=PRECISION)
        tl.store(p_db + o_n[None, :] * R, b_db * scale, mask=m_r[:, None] & m_n[None, :])
    p_g = g + (tl.program_id(1) * T + o_t)[:, None] * R + o_r[None, :]
    tl.store(p_g, b_g * scale, mask=m_t[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["count", "size", "count_2", "size_2"])
def sum_kernel(x, y, count, size, x_2, y_2, count_2, size_2, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """y = the sum of `count` pieces of x. Grid: blocks of both sums, the second's behind the first's."""
    i = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    if i < blocks:
        _sum_block(x, y, i, count, size, BLOCK, AT_ONCE)
    else:
        _sum_block(x_2, y_2, i - blocks, count_2, size_2, BLOCK, AT_ONCE)


@triton.jit
def _sum_block(x, y, i, count, size, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    o = i * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, AT_ONCE):
        o_p = first + tl.arange(0, AT_ONCE)
        m = (o_p < count)[:, None] & (o < size)[None, :]
        total += tl.sum(tl.load(x + o_p.to(tl.int64)[:, None] * size + o[None, :], mask=m, other=0.0), 0)
    tl.store(y + o, total, mask=o < size)


def expand(h: Tensor, b: Tensor, scale: float, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale h b^T (+ residual): h [T, R] float32, b [N, R], residual [T, N] with rows side by side; [T, N] in `dtype`."""
    (T, R), N = h.shape, b.shape[0]
    y = torch.empty(T, N, dtype=dtype, device=h.device)
    BT, BN = (64, 128) if R <= 32 else (32, 64)
    expand_kernel[(triton.cdiv(N, BN), triton.cdiv(T, BT))](
        h, b.contiguous(), residual, y, scale, T, 0 if residual is None else residual.stride(0),
        N=N, R=R, RP=padded(R), BT=BT, BN=BN, PRECISION=precision(dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


def output_gradients(dy: Tensor, h: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """g = scale dy b [T, R] and dB = scale dy^T h [N, R], float32: dy [T, N] contiguous, h [T, R] float32, b [N, R]."""
    (T, N), R = dy.shape, h.shape[1]
    if R > WIDEST_RANK:
        return (dy @ b.to(dy.dtype)).float() * scale, (dy.T @ h.to(dy.dtype)).float() * scale
    BT = 128 if dy.element_size() == 2 else 64
    blocks = triton.cdiv(T, BT)
    pieces = max(1, min(2 * MULTIPROCESSORS // blocks, N // 512))
    span = triton.cdiv(triton.cdiv(N, pieces), 64) * 64
    pieces = triton.cdiv(N, span)
    parts, sums = (torch.empty(*shape, dtype=torch.float32, device=h.device) for shape in ((pieces, T, R), (blocks, N, R)))
    output_gradient_kernel[(blocks, pieces)](
        dy, h, b.contiguous(), parts, sums, scale, T,
        N=N, R=R, RP=padded(R), SPAN=span, BT=BT, BN=64, PRECISION=precision(dy.dtype), num_warps=8, num_stages=3,
    )  # fmt: skip
    g, db = add_up(parts, sums)
    assert g is not None
    assert db is not None
    return g, db


def add_up(*pieces: Tensor | None) -> list[Tensor | None]:
    """x.sum(0) of one or two x [P, ...] float32, in one launch."""
    sums = [None if x is None else x[0] if len(x) == 1 else torch.empty_like(x[0]) for x in pieces]
    work = [(x, y, len(x), y.numel()) for x, y in zip(pieces, sums) if x is not None and y is not None and len(x) > 1]
    if work:
        first, second = work[0], work[1] if len(work) > 1 else (*work[0][:2], 0, 0)
        block = 256
        sum_kernel[(triton.cdiv(first[3], block) + triton.cdiv(second[3], block),)](*first, *second, BLOCK=block, AT_ONCE=16, num_warps=4)
    return sums


def padded(R: int) -> int:
    """A rank as the tensor cores take it."""
    return max(16, triton.next_power_of_2(R))


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
