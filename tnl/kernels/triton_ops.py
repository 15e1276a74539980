"""The five operations of a layer with the Triton kernels: attention, norm and gate are ours, matrix products PyTorch's."""

import torch
from torch import Tensor

from tnl.kernels.lightning_chunk import lightning_attention
from tnl.kernels.lightning_step import lightning_step
from tnl.kernels.reference import ACTIVATIONS, Projection, linear_relative_position, padded_final_state
from tnl.kernels.simple_rms_norm import norm_gate, simple_rms_norm

SILU = ("silu", "swish")


def apply_norm(x: Tensor, norm: Projection) -> Tensor:
    """SimpleRMSNorm by its kernel; a norm with weights of its own as it is."""
    eps = getattr(norm, "eps", None)
    return norm(x) if eps is None or hasattr(norm, "weight") else simple_rms_norm(x, eps)


def norm_qkvu(x: Tensor, norm: Projection, qkvu_proj: Projection) -> Tensor:
    """As `reference.norm_qkvu`."""
    return qkvu_proj(apply_norm(x, norm))


def norm_glu(x: Tensor, norm: Projection, l1: Projection, l2: Projection) -> Tensor:
    """As `reference.norm_glu`."""
    x = apply_norm(x, norm)
    return l1(x) * l2(x)


def attention_norm_gate(
    qkvu: Tensor,
    *,
    norm: Projection,
    activation: str,
    rotary: tuple[Tensor, Tensor] | None,
    log_decay: Tensor,
    segment_start: Tensor | None,
    real: Tensor | None,
    lengths: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.attention_norm_gate`; q, k and v are read straight from qkvu where SiLU is all that is done to them."""
    heads = log_decay.shape[0]
    q, k, v, u = qkvu.chunk(4, -1)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    silu = activation in SILU and rotary is None and lengths is None
    if not silu and (act := ACTIVATIONS.get(activation)):
        q, k = act(q), act(k)
    if rotary is not None:
        q, k = linear_relative_position(q, rotary), linear_relative_position(k, rotary)
    if real is not None:
        v = v * real[..., None, None]
    if q.shape[1] == 1 and segment_start is None and initial_state is not None and not torch.is_grad_enabled():
        state = initial_state.clone(memory_format=torch.contiguous_format)
        o = lightning_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state, silu=silu)[:, None]
    else:
        o, state = lightning_attention(q, k, v, log_decay, segment_start=segment_start, initial_state=initial_state, silu=silu)
    if lengths is not None:
        state = padded_final_state(k, v, log_decay, lengths, segment_start, initial_state)
    o = o.flatten(2)
    eps = getattr(norm, "eps", None)
    return (u * norm(o) if eps is None or hasattr(norm, "weight") else norm_gate(o, u, eps)), state
