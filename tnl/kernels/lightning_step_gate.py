"""Triton: one token of many slots straight from qkvu to u * o: SiLU, LRPE, the state in place, the gate, and the sums for the norm."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tnl.kernels import skinny_linear
from tnl.kernels.lightning_sweep import _expm1


@triton.jit
def _silu(p, offsets, mask):
    x = tl.load(p + offsets, mask=mask, other=0.0).to(tl.float32)
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["H"])
def step_gate_kernel(
    qkvu, cos, sin, state, log_decay, live, o, sums, s_x, s_live, H,
    V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of V, H, slots. K is V, or with LRPE (cos, sin [slots, H, V]) twice V; KP: its power of two.

    A slot that is not live keeps its state and gives 0. The state's decay is S + (e^g - 1) S: near 1, e^g itself has lost g's digits.
    """
    i_v, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K: tl.constexpr = V if cos is None else 2 * V
    o_k = tl.arange(0, KP)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    m_k, m_v = o_k < K, o_v < V
    p_s = state + (i_n * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    head = i_n * H + i_h
    p_o = o + head * V + o_v
    p_sum = sums + head * tl.num_programs(0) + i_v
    alive = tl.load(live + i_n * s_live) != 0
    if alive:
        less_one = _expm1(tl.load(log_decay + i_h).to(tl.float32))
        b_s = tl.load(p_s, mask=m_s, other=0.0)
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
        b_s = b_s + (b_s * less_one + b_k[:, None] * b_v[None, :])
        tl.store(p_s, b_s, mask=m_s)
        b_o = tl.sum(b_s * b_q[:, None], 0)
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


def lightning_step_gate(
    qkvu: Tensor,  # [N, 4E]: q, k, v, u, each head-major; the last stride is 1
    state: Tensor,  # [N, H, K, V] float32, contiguous: updated in place
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
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype} with strides {state.stride()}; it must be float32 and contiguous: it is updated in place")
    if (V if rotary is None else 2 * V) != K or K > 256:
        raise ValueError(f"state is {tuple(state.shape)}; K must be V, with LRPE twice V, and at most 256")
    cos, sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
    KP, VP = triton.next_power_of_2(K), triton.next_power_of_2(V)
    # few slots: more and smaller programs, to keep all multiprocessors reading
    block = min(VP, max(16, (2048 if N * H < 256 else 8192) // KP))
    parts = triton.cdiv(V, block)
    o = torch.empty(N, E, dtype=qkvu.dtype, device=qkvu.device)
    sums = torch.empty(N, H * parts, dtype=torch.float32, device=qkvu.device)
    step_gate_kernel[(parts, H, N)](
        qkvu, cos, sin, state, log_decay, live, o, sums, qkvu.stride(0), live.stride(0), H, V, KP, block, gate, skinny_linear.overlap,
        num_warps=4, **skinny_linear.launch(),
    )  # fmt: skip
    return o, sums
