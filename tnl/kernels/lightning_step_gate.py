"""Triton: one token of many slots straight from qkvu to u * o: SiLU, LRPE, the state in place, the gate, and the sums for the norm.

A state may be written every few tokens alone (`deferred.py`).
"""

# mypy: disable-error-code="no-untyped-def"
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tnl.kernels import skinny_linear
from tnl.kernels.deferred import Deferred
from tnl.kernels.lightning_sweep import _expm1


@triton.jit
def _silu(p, offsets, mask):
    x = tl.load(p + offsets, mask=mask, other=0.0).to(tl.float32)
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["H"])
def step_gate_kernel(
    qkvu, cos, sin, state, copy, ring_k, ring_v, waiting, log_decay, live, o, sums, s_x, s_live, H,
    V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of V, H, slots. K is V, or with LRPE (cos, sin [slots, H, V]) twice V; KP, WP: powers of two.

    W = 0: the state is read and written. Else it is written by a slot whose W tokens wait, and the others read its copy and them.
    A slot that is not live keeps its state and gives 0. The state's decay is S + (e^g - 1) S: near 1, e^g itself has lost g's digits.
    """
    i_v, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K: tl.constexpr = V if cos is None else 2 * V
    o_k = tl.arange(0, KP)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    m_k, m_v = o_k < K, o_v < V
    head = i_n * H + i_h
    p_s = state + head * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    p_o = o + head * V + o_v
    p_sum = sums + head * tl.num_programs(0) + i_v
    alive = tl.load(live + i_n * s_live) != 0
    if alive:
        g = tl.load(log_decay + i_h).to(tl.float32)
        if W == 0:
            b_s = tl.load(p_s, mask=m_s, other=0.0)
        else:
            n = tl.load(waiting + i_n).to(tl.int32)
            p_copy = copy + head * (K * V) + o_k[:, None] * V + o_v[None, :]
            if n == W:  # noqa: SIM108
                b_s = tl.load(p_s, mask=m_s, other=0.0)
            else:
                b_s = tl.load(p_copy, mask=m_s, other=0.0).to(tl.float32)
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        p_x = qkvu + i_n * s_x + i_h * V
        E = H * V
        b_q = _silu(p_x, o_k % V, m_k)
        b_k = _silu(p_x + E, o_k % V, m_k)
        if cos is not None:
            p_r = head * V + o_k % V
            turn = tl.where(o_k < V, tl.load(cos + p_r, mask=m_k, other=0.0), tl.load(sin + p_r, mask=m_k, other=0.0))
            b_q *= turn
            b_k *= turn
        b_v = tl.load(p_x + 2 * E + o_v, mask=m_v, other=0.0).to(tl.float32)
        if W == 0:
            b_s = b_s + (b_s * _expm1(g) + b_k[:, None] * b_v[None, :])
            tl.store(p_s, b_s, mask=m_s)
            b_o = tl.sum(b_s * b_q[:, None], 0)
        else:
            # what stands behind n is never read: it may be anything
            p_k = ring_k + head * (W * K) + o_k
            p_v = ring_v + head * (W * V) + o_v
            o_w = tl.arange(0, WP)
            m_w = o_w < n
            b_keys = tl.load(p_k[None, :] + o_w[:, None] * K, mask=m_w[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_values = tl.load(p_v[None, :] + o_w[:, None] * V, mask=m_w[:, None] & m_v[None, :], other=0.0).to(tl.float32)
            scores = tl.sum(b_keys * b_q[None, :], 1) * tl.exp(g * tl.where(m_w, n - o_w, 0))
            less_one = _expm1(g * (n + 1))
            read = tl.sum(b_s * b_q[:, None], 0)
            b_o = read + (read * less_one + tl.sum(scores[:, None] * b_values, 0) + tl.sum(b_q * b_k, 0) * b_v)
            if n == W:
                b_s = b_s + (b_s * less_one + b_k[:, None] * b_v[None, :])
                b_s = _added(b_s, p_k, p_v, g, W, W, m_k, m_v, K, V)
                tl.store(p_s, b_s, mask=m_s)
                tl.store(p_copy, b_s.to(copy.dtype.element_ty), mask=m_s)
            else:
                tl.store(p_v + n * V, b_v.to(ring_v.dtype.element_ty), mask=m_v)
                tl.store(p_k + n * K, b_k.to(ring_k.dtype.element_ty), mask=m_k & (i_v == 0))
        tl.store(p_sum, tl.sum(b_o * b_o, 0))
        if GATE:
            b_o *= tl.load(p_x + 3 * E + o_v, mask=m_v, other=0.0).to(tl.float32)
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
    else:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        tl.store(p_sum, 0.0)
        tl.store(p_o, tl.zeros([BLOCK], o.dtype.element_ty), mask=m_v)


@triton.jit
def _added(b_s, p_k, p_v, g, n, age, m_k, m_v, K: tl.constexpr, V: tl.constexpr):
    """b_s and the first n tokens that wait; the first of them is `age` tokens old."""
    for i in range(n):
        weight = tl.exp(g * (age - i))
        b_k = tl.load(p_k + i * K, mask=m_k, other=0.0).to(tl.float32) * weight
        b_s += b_k[:, None] * tl.load(p_v + i * V, mask=m_v, other=0.0).to(tl.float32)[None, :]
    return b_s


@triton.jit(do_not_specialize=["H"])
def fold_kernel(
    state, copy, ring_k, ring_v, waiting, log_decay, which, H,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of V, H, slots of `which`."""
    i_h, slot = tl.program_id(1), tl.load(which + tl.program_id(2)).to(tl.int64)
    o_k = tl.arange(0, KP)
    o_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    head = slot * H + i_h
    at = head * (K * V) + o_k[:, None] * V + o_v[None, :]
    g = tl.load(log_decay + i_h).to(tl.float32)
    n = tl.load(waiting + slot).to(tl.int32)
    b_s = tl.load(state + at, mask=m_s, other=0.0)
    b_s += b_s * _expm1(g * n)
    b_s = _added(b_s, ring_k + head * (W * K) + o_k, ring_v + head * (W * V) + o_v, g, n, n - 1, m_k, m_v, K, V)
    tl.store(state + at, b_s, mask=m_s)
    tl.store(copy + at, b_s.to(copy.dtype.element_ty), mask=m_s)


def lightning_step_gate(
    qkvu: Tensor,  # [N, 4E]: q, k, v, u, each head-major; the last stride is 1
    state: Tensor | Deferred,  # [N, H, K, V] float32, contiguous: updated in place
    log_decay: Tensor,  # [H] float32, at most 0
    live: Tensor,  # [N] of any number type: 0 where a slot is to stay as it is
    rotary: tuple[Tensor, Tensor] | None = None,  # cos and sin [N, H, V] float32 where LRPE is on: K is 2V
    *,
    gate: bool = True,
) -> tuple[Tensor, Tensor]:
    """u * o [N, E] (gate False: o) before its norm, with SiLU on q and k, and the sums of squares of o [N, parts] that the norm wants.

    Raises ValueError for what the kernel cannot take.
    """
    N, H, K, V = state.shape
    E = H * V
    if qkvu.shape != (N, 4 * E) or qkvu.stride(1) != 1 or qkvu.dtype not in skinny_linear.DTYPES:
        raise ValueError(f"qkvu is {qkvu.dtype} {tuple(qkvu.shape)}; {(N, 4 * E)} in bfloat16, float16 or float32 is needed")
    if (V if rotary is None else 2 * V) != K or K > 256:
        raise ValueError(f"state is {tuple(state.shape)}; K must be V, with LRPE twice V, and at most 256")
    memory = check(state)
    cos, sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
    KP, VP, W = triton.next_power_of_2(K), triton.next_power_of_2(V), 0 if memory.k is None else memory.k.shape[2]
    # few slots: more and smaller programs, to keep all multiprocessors reading
    block = min(VP, max(16, (2048 if N * H < 256 else 8192) // KP))
    parts = triton.cdiv(V, block)
    o = torch.empty(N, E, dtype=qkvu.dtype, device=qkvu.device)
    sums = torch.empty(N, H * parts, dtype=torch.float32, device=qkvu.device)
    step_gate_kernel[(parts, H, N)](
        qkvu, cos, sin, *memory, log_decay, live, o, sums, qkvu.stride(0), live.stride(0), H,
        V, KP, block, W, triton.next_power_of_2(max(W, 1)), gate, skinny_linear.overlap,
        num_warps=4, **skinny_linear.launch(),
    )  # fmt: skip
    return o, sums


def lightning_fold(deferred: Deferred, log_decay: Tensor, which: Tensor) -> None:
    """As `deferred.fold_`. Raises ValueError for what the kernel cannot take."""
    _, H, K, V = deferred.shape
    KP, VP = triton.next_power_of_2(K), triton.next_power_of_2(V)
    block = min(VP, max(16, 2048 // KP))
    fold_kernel[(triton.cdiv(V, block), H, len(which))](
        *check(deferred), log_decay, which, H, K, V, KP, block, deferred.k.shape[2], num_warps=4
    )


class Memory(NamedTuple):
    """The kernels' arguments that hold a state."""

    state: Tensor
    copy: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    waiting: Tensor | None = None


def check(state: Tensor | Deferred) -> Memory:
    """The state as the kernels take it. Raises ValueError where they cannot, before anything is launched."""
    memory = Memory(*state) if isinstance(state, Deferred) else Memory(state)
    N, H, K, V = state.shape
    shapes: list[tuple[int, ...]] = [(N, H, K, V)] * 2
    if memory.k is not None:
        W = memory.k.shape[2]
        shapes += [(N, H, W, K), (N, H, W, V), (N,)]
    for name, x, shape in zip(Memory._fields, memory, shapes):
        if x is not None and (x.shape != shape or not x.is_contiguous()):
            raise ValueError(
                f"{name} is {tuple(x.shape)} with strides {x.stride()}; it must be {shape} and contiguous: all are written in place"
            )
    if memory.state.dtype != torch.float32:
        raise ValueError(f"state is {memory.state.dtype}; it must be float32")
    return memory
