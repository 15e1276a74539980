"""Triton: one token for many slots, the float32 states updated in place: each is read once and written once."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["H"])
def step_kernel(
    q, k, v, o, state, log_decay, H, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Grid: blocks of V, H, slots. q, k, v: (pointer, stride of a slot, stride of a head)."""
    i_h, i_n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k = tl.arange(0, KP)
    o_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_k, m_v = o_k < K, o_v < V
    b_q = tl.load(q[0] + i_n * q[1] + i_h * q[2] + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k[0] + i_n * k[1] + i_h * k[2] + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v[0] + i_n * v[1] + i_h * v[2] + o_v, mask=m_v, other=0.0).to(tl.float32)
    if SILU:
        b_q = b_q * tl.sigmoid(b_q)
        b_k = b_k * tl.sigmoid(b_k)
    p_s = state + (i_n * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    decay = tl.exp(tl.load(log_decay + i_h).to(tl.float32))
    b_s = tl.load(p_s, mask=m_s, other=0.0) * decay + b_k[:, None] * b_v[None, :]
    tl.store(p_s, b_s, mask=m_s)
    b_o = tl.sum(b_s * b_q[:, None], 0)
    tl.store(o + (i_n * H + i_h) * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)


def lightning_step(
    q: Tensor,  # [N, H, K] one token of each of N slots; may be a view into a wider projection
    k: Tensor,  # [N, H, K]
    v: Tensor,  # [N, H, V]
    log_decay: Tensor,  # [H] float32, at most 0
    state: Tensor,  # [N, H, K, V] float32, contiguous: updated in place
    *,
    silu: bool = False,  # take SiLU of q and of k first
) -> Tensor:
    """One step of `reference.recurrent_lightning_attention` for every slot: o [N, H, V] in q's dtype; without gradients.

    Raises ValueError where an argument cannot be used, before anything is launched.
    """
    check(q, k, v, log_decay, state)
    return torch.ops.tnl.lightning_step(q, k, v, log_decay, state, silu)


def check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> None:
    """Raise ValueError for arguments the kernel cannot take."""
    (N, H, K), V = q.shape, v.shape[-1]
    wanted = {"k": (k, (N, H, K)), "v": (v, (N, H, V)), "log_decay": (log_decay, (H,)), "state": (state, (N, H, K, V))}
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; q of shape {tuple(q.shape)} and v of {tuple(v.shape)} need {shape}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype of bfloat16, float16, float32 (found {q.dtype}, {k.dtype}, {v.dtype})")
    if 0 in state.shape or max(K, V) > 256:
        raise ValueError(f"state has shape {tuple(state.shape)}; no dim may be 0, and the last two go to 256")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; the last must be 1. Call .contiguous()")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype} with strides {state.stride()}; it must be float32 and contiguous: it is updated in place")


@torch.library.custom_op("tnl::lightning_step", mutates_args=("state",))
def _op(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, silu: bool) -> Tensor:
    (N, H, K), V = q.shape, v.shape[2]
    o = torch.empty(N, H, V, dtype=q.dtype, device=q.device)
    KP = triton.next_power_of_2(K)
    block = min(triton.next_power_of_2(V), max(16, 8192 // KP))
    step_kernel[(triton.cdiv(V, block), H, N)](
        *((x, x.stride(0), x.stride(1)) for x in (q, k, v)), o, state, log_decay, H, K, V, KP, block, silu, num_warps=4
    )  # fmt: skip
    return o


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, silu: bool) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
