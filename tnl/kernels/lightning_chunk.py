"""Lightning attention by chunks on a GPU, forward and backward: the host's side of `lightning_sweep`.

The same function as `reference.chunk_lightning_attention`. One launch forward and one backward where batch x heads fills the
card; else the row is cut into segments, whose states a first launch makes.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tnl.kernels import reference
from tnl.kernels.lightning_sweep import backward_kernel, forward_kernel, local_states_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = range(1, 257)  # of K and V

debug = False
"""True: also check what can only be read from device memory (the values of segment_start), at the price of a synchronisation."""


class Device(NamedTuple):
    """What the plans need to know of a card."""

    multiprocessors: int
    shared_memory: int  # bytes a program may take


class _Row(NamedTuple):
    """The run-time sizes of a launch, in the order in which the kernels take them."""

    T: int
    B: int
    H: int
    segments: int
    span: int  # tokens of a segment


class Plan(NamedTuple):
    """How one launch is cut."""

    chunk: int  # tokens of a chunk
    block: int  # columns of the output, and of the state, a program
    warps: int
    stages: int  # chunks in flight
    segments: int  # pieces of a row that run in parallel


def device_of(x: Tensor) -> Device:
    """What x's card reports; on a CPU (Triton's interpreter) a small card."""
    return _device(x.get_device()) if x.device.type == "cuda" else Device(4, 99 * 1024)


@lru_cache
def _device(index: int) -> Device:
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    return Device(found["multiprocessor_count"], found["max_shared_mem"])


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def plan(device: Device, dtype: torch.dtype, T: int, programs: int, X: int, Z: int, sweeps: int = 1, silu: bool = False) -> Plan:
    """Cut for a sweep with state [X, Z] over `programs` = batch x heads rows of T tokens.

    Fewer, wider blocks repeat less of x y^T; the multiprocessors want at least one program each.
    """
    width = 4 if dtype == torch.float32 else 2
    chunk = 32 if width == 4 else 64
    block = min(_padded(Z), 64 if width == 2 else 32)
    # triton 3.6 miscompiles SiLU before a product with fewer columns, its left operand staying in registers (docs/log.md)
    least = block if silu else 16
    while block > least and programs * -(-Z // block) * 2 <= device.multiprocessors * 5 // 4:
        block //= 2
    blocks = -(-Z // block)
    # the backward pass hides one segment's latency behind another's; wide blocks want the registers that stages take
    wanted = device.multiprocessors * (2 if sweeps > 1 else 1) // (programs * blocks)
    segments = min(max(1, wanted), max(1, T // (4 * chunk)), 64)
    xp = _padded(X)
    stages = 2 if sweeps > 1 and block == 64 else 3
    while chunk > 16 and _shared(chunk, block, xp, width, stages) > device.shared_memory:
        if stages > 1:
            stages -= 1
        else:
            chunk //= 2
    return Plan(chunk, block, 8 if xp * block >= 256 * 64 else 4, stages, segments)


def _shared(chunk: int, block: int, xp: int, width: int, stages: int) -> int:
    """Upper estimate of the bytes of shared memory of a sweep; test_aot.py holds it against the compiler's count."""
    in_flight = stages * chunk * (2 * xp + block) * width
    return in_flight + (xp * block + chunk * block + chunk * xp) * width + 1024


def lightning_attention(
    q: Tensor,  # [B, T, H, K] bfloat16, float16 or float32; may be a view into a wider projection
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    log_decay: Tensor,  # [H] float32, at most 0: what one step multiplies the state by, as a logarithm
    *,
    segment_start: Tensor | None = None,  # [B, T] int32: index of the first token of each token's sequence; -1: it began before this call
    initial_state: Tensor | None = None,  # [B, H, K, V] float32
    restart_state: Tensor | None = None,  # [H, K, V] float32: what every sequence that begins in this call starts from (default zero)
    silu: bool = False,  # take SiLU of q and of k first
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with a constant decay per head; see `reference.recurrent_lightning_attention`.

    Returns o [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32. Gradients reach q, k, v, initial_state
    and restart_state; runs are bit-identical. Raises ValueError where an argument cannot be used, before anything is launched.
    """
    check(q, k, v, log_decay, segment_start, initial_state, restart_state)
    optional = (None if x is None else x.contiguous() for x in (segment_start, initial_state, restart_state))
    return torch.ops.tnl.lightning_attention(q, k, v, log_decay.float(), *optional, silu)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segment_start: Tensor | None,
    initial_state: Tensor | None,
    restart_state: Tensor | None,
) -> None:
    """Raise ValueError for arguments the kernels cannot take."""
    reference.check_shapes(q, k, v, log_decay, segment_start, initial_state, restart_state)
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; the Triton kernels take bfloat16, float16 and float32 (the reference form takes any)")
    if 0 in q.shape or 0 in v.shape or q.shape[3] not in DIMS or v.shape[3] not in DIMS:
        raise ValueError(f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}; no dim may be 0, and the last dims go to {DIMS[-1]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; the last must be 1. Call .contiguous()")
    for name, state in (("initial_state", initial_state), ("restart_state", restart_state)):
        if state is not None and state.dtype != torch.float32:
            raise ValueError(f"{name} is {state.dtype}; states are float32")
    if log_decay.requires_grad:
        raise ValueError("log_decay requires a gradient; the decay is a constant here (only the reference form differentiates it)")
    if segment_start is not None:
        if segment_start.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"segment_start is {segment_start.dtype}; int32 or int64 is needed")
        if debug:
            check_segment_start(segment_start)


def check_segment_start(segment_start: Tensor) -> None:
    """Raise ValueError unless every row [T] names each token's first token; reads device memory."""
    start, t = segment_start.long(), torch.arange(segment_start.shape[1], device=segment_start.device)
    own = start.gather(1, start.clamp(min=0, max=start.shape[1] - 1)) == start  # a first token names itself
    wrong = (start > t) | (start < -1) | ((start >= 0) & ~own)
    wrong[:, 1:] |= start[:, 1:] < start[:, :-1]
    if wrong.any():
        b, i = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"segment_start[{b}, {i}] is {int(start[b, i])}; it must be monotone, at least -1, at most {i}, and name a first token"
        )


def _tile(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A [B, T, H, N] tensor as the kernels take it."""
    return x, x.stride(0), x.stride(1), x.stride(2)


def _span(T: int, p: Plan) -> tuple[int, int]:
    """The number of segments, and the tokens of each: a multiple of the chunk."""
    span = -(-T // (p.segments * p.chunk)) * p.chunk
    return -(-T // span), span


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segment_start: Tensor | None,
    initial_state: Tensor | None,
    restart_state: Tensor | None,
    silu: bool,
    *,
    cut: Plan | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lightning_attention` without checks and gradients; cut: a plan to take, out: where o goes."""
    (B, T, H, K), V = q.shape, v.shape[3]
    cut = cut or plan(device_of(q), q.dtype, T, B * H, K, V, silu=silu)
    o = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device) if out is None else out
    final = torch.empty(B, H, K, V, dtype=torch.float32, device=q.device)
    restart = None if segment_start is None else restart_state
    row = _Row(T, B, H, *_span(T, cut))
    local, _ = _local_states(row, cut, q, k, v, None, log_decay, segment_start, restart, silu)
    forward_kernel[(-(-V // cut.block), H, row.segments * B)](
        *map(_tile, (q, k, v, o)), initial_state, local, restart, final, segment_start, log_decay, *row,
        K, V, _padded(K), cut.block, cut.chunk, silu, _precision(q.dtype),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return o, final


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segment_start: Tensor | None,
    initial_state: Tensor | None,
    restart_state: Tensor | None,
    silu: bool,
    *,
    cut: Plan | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, of the initial state and of the restart state (None without one); out: where the first three go."""
    (B, T, H, K), V = q.shape, v.shape[3]
    cut = cut or plan(device_of(q), q.dtype, T, B * H, max(K, V), max(K, V), sweeps=3, silu=silu)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)) if out is None else out
    do = do if do.stride(3) == 1 else do.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    restart = None if segment_start is None else restart_state
    row = _Row(T, B, H, *_span(T, cut))
    d_initial = torch.empty(B, H, K, V, dtype=torch.float32, device=q.device)
    d_restarts = None if restart is None else torch.empty(row.segments * B, H, K, V, dtype=torch.float32, device=q.device)
    local, d_local = _local_states(row, cut, q, k, v, do, log_decay, segment_start, restart, silu)
    KP, VP = _padded(K), _padded(V)
    BK, BV = min(cut.block, KP), min(cut.block, VP)
    NK, NV = -(-K // BK), -(-V // BV)
    q_, k_, v_, do_, dq_, dk_, dv_ = map(_tile, (q, k, v, do, dq, dk, dv))
    backward_kernel[(2 * NK + NV, H, row.segments * B)](
        q_, k_, v_, do_, dq_, dk_, dv_,
        initial_state, local, restart, d_final, d_local, d_initial, d_restarts, segment_start, log_decay, *row,
        K, V, KP, VP, BK, BV, cut.chunk, silu, _precision(q.dtype), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    d_restart = None if d_restarts is None else d_restarts.sum(0)
    return dq, dk, dv, d_initial, d_restart


def _local_states(
    row: _Row,
    cut: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    log_decay: Tensor,
    segment_start: Tensor | None,
    restart: Tensor | None,
    silu: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The state that each segment alone makes, [segments, B, H, K, V], and (with do) the gradient it alone sends back."""
    if row.segments == 1:
        return None, None
    K, V = q.shape[3], v.shape[3]
    shape = row.segments, row.B, row.H, K, V
    local = torch.empty(shape, dtype=torch.float32, device=q.device)
    d_local = None if do is None else torch.empty(shape, dtype=torch.float32, device=q.device)
    KP, block = _padded(K), min(cut.block, _padded(V))
    q_, k_, v_, do_ = map(_tile, (q, k, v, v if do is None else do))
    local_states_kernel[(-(-V // block) * (1 if do is None else 2), row.H, row.segments * row.B)](
        q_, k_, v_, do_, local, d_local, restart, segment_start, log_decay, *row,
        K, V, KP, block, cut.chunk, silu, _precision(q.dtype), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return local, d_local


_SEQUENCES = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? segment_start, Tensor? initial_state, Tensor? restart_state, bool silu"
)


@torch.library.custom_op("tnl::lightning_attention", mutates_args=(), schema=f"({_SEQUENCES}) -> (Tensor, Tensor)")
def _op(*arguments: Any) -> tuple[Tensor, Tensor]:
    return forward(*arguments)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[3]
    return q.new_empty(B, T, H, V), q.new_empty(B, H, K, V, dtype=torch.float32)


@torch.library.custom_op(
    "tnl::lightning_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? d_final, {_SEQUENCES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(do: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *grads, d_restart = backward(do, *arguments)
    return *grads, do.new_empty(0) if d_restart is None else d_restart  # type: ignore[return-value]


@_backward_op.register_fake
def _(
    do: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    (B, _, H, K), V = q.shape, v.shape[3]
    _, restart_state, _ = others
    restarts = restart_state is not None and start is not None
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(B, H, K, V, dtype=torch.float32), log_decay.new_empty((H, K, V) if restarts else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, segment_start, initial_state, restart_state = ctx.saved_tensors
    if do is None and d_final is None:
        return (None,) * 8
    if do is None:
        do = v.new_zeros(v.shape)
    tensors = do, d_final, q, k, v, log_decay, segment_start, initial_state, restart_state
    dq, dk, dv, d_initial, d_restart = torch.ops.tnl.lightning_attention_backward(*tensors, ctx.silu)
    if restart_state is None:
        d_restart = None
    elif segment_start is None:  # nothing restarts
        d_restart = torch.zeros_like(restart_state)
    return dq, dk, dv, None, None, None if initial_state is None else d_initial, d_restart, None


_op.register_autograd(_gradients, setup_context=_save)
