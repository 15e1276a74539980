"""The five operations of a layer with the Triton kernels; the wide matrix products are PyTorch's.

Between two operations travels what the next one makes its input of (`Mixed`, `Halves`), so that the input itself is kept nowhere.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnl.kernels import lightning_chunk, reference
from tnl.kernels.fused_linear import fused_linear
from tnl.kernels.lightning_chunk import lightning_attention
from tnl.kernels.lightning_step import lightning_step
from tnl.kernels.lora import Draw, Lora, lora_of, project
from tnl.kernels.reference import (
    ACTIVATIONS,
    Mixer,
    Pending,
    Projection,
    Rotary,
    Rows,
    attend,
    linear_relative_position,
    padded_final_state,
)
from tnl.kernels.silu import silu, silu_backward
from tnl.kernels.simple_rms_norm import norm_gate, simple_rms_norm

SILU = ("silu", "swish")


class Mixed(NamedTuple):
    """u * norm(o) is what out_proj takes."""

    o: Tensor  # [B, T, E]
    u: Tensor
    eps: float


class Halves(NamedTuple):
    """a * b is what l3 takes."""

    a: Tensor  # [B, T, glu_dim]
    b: Tensor


def norm_qkvu(x: Tensor, norm: Projection, qkvu_proj: Projection, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.norm_qkvu`."""
    lora, eps = fusable(qkvu_proj, x, draw), eps_of(norm)
    if lora is not None and eps is not None:
        qkvu, x = fused_linear(x, None, (lora,), eps=eps, draw=draw)
        return qkvu, x
    return project(qkvu_proj, apply_norm(x, norm), draw, 0), x


def out_residual(x: Tensor | Mixed, out_proj: Projection, residual: Tensor, draw: Draw | None = None) -> Tensor:
    """As `reference.out_residual`."""
    lora = fusable(out_proj, residual, draw)
    if isinstance(x, Mixed):
        if lora is not None:
            return fused_linear(x.o, x.u, (lora,), residual, eps=x.eps, draw=draw, slot=1)[0]
        x = norm_gate(x.o, x.u, x.eps)
    return residual + project(out_proj, x, draw, 1)


def norm_glu(
    x: Tensor, norm: Projection, l1: Projection, l2: Projection, draw: Draw | None = None, again: bool = False
) -> tuple[Tensor | Halves | Pending, Tensor]:
    """As `reference.norm_glu`."""
    one, two, eps = fusable(l1, x, draw), fusable(l2, x, draw), eps_of(norm)

    def halves(x: Tensor) -> tuple[Tensor, ...]:
        return fused_linear(x, None, (one, two), eps=eps, draw=draw, slot=2)  # type: ignore[arg-type]

    def product(x: Tensor) -> Tensor:
        z = apply_norm(x, norm)
        return project(l1, z, draw, 2) * project(l2, z, draw, 3)

    if one is None or two is None or eps is None:
        return Pending(product) if again else product(x), x
    if again:
        return Pending(halves, fused=True), x
    a, b, x = halves(x)
    return Halves(a, b), x


def l3_residual(x: Tensor | Halves | Pending, l3: Projection, residual: Tensor, draw: Draw | None = None) -> Tensor:
    """As `reference.l3_residual`."""
    lora = fusable(l3, residual, draw)
    if isinstance(x, Pending):
        make = x.make
        if not x.fused:
            return reference.l3_residual(x, l3, residual, draw)
        if lora is None:
            return reference.l3_residual(Pending(lambda x: torch.mul(*make(x)[:2])), l3, residual, draw)
        a, b, residual = make(residual)
        return fused_linear(a, b, (lora,), residual, draw=draw, slot=4, again=make)[0]
    if isinstance(x, Halves):
        if lora is not None:
            return fused_linear(x.a, x.b, (lora,), residual, draw=draw, slot=4)[0]
        x = x.a * x.b
    return residual + project(l3, x, draw, 4)


def attention_norm_gate(
    qkvu: Tensor, state: Tensor | None, mixer: Mixer, rows: Rows, restart: bool = False
) -> tuple[Tensor | Mixed, Tensor]:
    """As `reference.attention_norm_gate`; where nothing but SiLU, and angles that are not trained, is done to q and k, qkvu alone is kept.

    restart: without gradients and of a batch of one, the state is where each sequence that begins in this call starts from.
    """
    eps, log_decay, rotary, start = eps_of(mixer.norm), mixer.log_decay, mixer.rotary(rows), rows.segment_start
    frozen = rotary is None or not rotary.theta.requires_grad
    fused = mixer.activation in SILU and frozen and rows.real is None and rows.lengths is None
    if fused and eps is not None and qkvu.shape[1] > 1 and not restart:
        o, u, after = _Attention.apply(qkvu, log_decay, start, state, rows.shared, rotary)
        return Mixed(o, u, eps), after
    heads = log_decay.shape[0]
    q, k, v, u = qkvu.chunk(4, -1)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    step = q.shape[1] == 1 and start is None and state is not None and not torch.is_grad_enabled()
    inside = step and mixer.activation in SILU and rotary is None and rows.lengths is None  # the step's kernel makes SiLU itself
    if not inside and (act := ACTIVATIONS.get(mixer.activation)):
        q, k = act(q), act(k)
    if rotary is not None:
        angles = rotary.angles(q.dtype)
        q, k = linear_relative_position(q, angles), linear_relative_position(k, angles)
    if rows.real is not None:
        v = v * rows.real[..., None, None]
    if step and state is not None:
        after = state.clone(memory_format=torch.contiguous_format)
        o = lightning_step(q[:, 0], k[:, 0], v[:, 0], log_decay, after, silu=inside)[:, None]
        if rows.lengths is not None:
            after = padded_final_state(k, v, log_decay, rows.lengths, None, state)
    elif restart and start is not None and state is not None:
        o, after = lightning_attention(q, k, v, log_decay, segment_start=start, restart_state=state[0])
    else:
        o, after = attend(lightning_attention, (q, k, v), state, log_decay, rows)
    return (u * mixer.norm(o.flatten(2)) if eps is None else Mixed(o.flatten(2), u, eps)), after


class _Attention(torch.autograd.Function):
    """Attention of SiLU(q), SiLU(k) and v as they lie in qkvu [B, T, 4E]: o [B, T, E], u as it is, and the final state.

    SiLU is made by itself, forward and again backward: inside the sweeps every block of columns would make it anew. So is LRPE, whose
    q and k are twice as wide. The gradient of qkvu is written in place, into one tensor. Of a row whose first `shared` tokens are all
    its sequences' (`reference.attend`) both parts read and write slices of the same tensors.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        qkvu: Tensor,
        log_decay: Tensor,
        segment_start: Tensor | None,
        initial_state: Tensor | None,
        shared: int,
        rotary: Rotary | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = _activated(qkvu, len(log_decay), rotary)
        start, initial = (None if x is None else x.contiguous() for x in (segment_start, initial_state))
        o = torch.empty(parts[2].shape, dtype=qkvu.dtype, device=qkvu.device)
        before, restart = initial, None
        if shared:
            first = *_of(slice(shared), parts), log_decay
            lightning_chunk.check(*first, None, initial, None)
            before, restart = None, lightning_chunk.forward(*first, None, initial, None, False, out=o[:, :shared])[1][0]
        rest = *_of(slice(shared, None), parts), log_decay
        lightning_chunk.check(*rest, start, before, restart)
        _, state = lightning_chunk.forward(*rest, start, before, restart, False, out=o[:, shared:])
        ctx.save_for_backward(qkvu, log_decay, start, initial, restart)
        ctx.shared, ctx.rotary = shared, rotary
        ctx.set_materialize_grads(False)
        return o.flatten(2), qkvu[..., -o.shape[2] * o.shape[3] :], state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, du: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkvu, *saved = ctx.saved_tensors
        heads, E, rotary = len(saved[0]), qkvu.shape[-1] // 4, ctx.rotary
        sweeps = partial(_sweeps, saved, ctx.shared, d_final)
        do = qkvu.new_zeros(*qkvu.shape[:2], E) if do is None else do
        if rotary is None:
            d_qkvu = torch.empty_like(qkvu, memory_format=torch.contiguous_format)
            dq, dk, dv, _ = d_qkvu.unflatten(-1, (4, heads, -1)).unbind(2)
            d_initial = sweeps(do, _activated(qkvu, heads, None), (dq, dk, dv))
        else:
            parts = _activated(qkvu, heads, rotary)
            dv = torch.empty_like(parts[2], memory_format=torch.contiguous_format)
            d_turned = dv.new_empty(*dv.shape[:2], 2, *parts[0].shape[2:])
            dq, dk = d_turned.unbind(2)
            d_initial = sweeps(do, parts, (dq, dk, dv))
            del parts  # before there is another tensor of that width
            d_qkvu = torch.empty_like(qkvu, memory_format=torch.contiguous_format)
            d_qkvu[..., 2 * E : 3 * E] = dv.flatten(2)
            _turn_back(d_turned, rotary, d_qkvu[..., : 2 * E].unflatten(-1, (2, heads, -1)))
        d_qkvu[..., 3 * E :] = 0 if du is None else du
        silu_backward(d_qkvu.flatten(0, 1)[:, : 2 * E], qkvu.flatten(0, 1)[:, : 2 * E])
        return d_qkvu, None, None, d_initial if ctx.needs_input_grad[3] else None, None, None


Parts = tuple[Tensor, Tensor, Tensor]
"""q, k and v."""


def _sweeps(saved: list[Any], shared: int, d_final: Tensor | None, do: Tensor, parts: Parts, out: Parts) -> Tensor | None:
    """The backward sweeps of _Attention: gradients of the activated q, k and v into `out`; returns that of the initial state."""
    log_decay, start, initial, restart = saved
    d_o = do.unflatten(-1, (len(log_decay), -1))

    def sweep(
        of: slice, d_final: Tensor | None, start: Tensor | None, initial: Tensor | None, restart: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of a part's q, k and v, where they belong, and of its initial and its restart state."""
        args = (*_of(of, parts), log_decay, start, initial, restart)
        return lightning_chunk.backward(d_o[:, of], d_final, *args, False, out=_of(of, out))[3:]

    d_initial, d_restart = sweep(slice(shared, None), d_final, start, None if shared else initial, restart)
    if d_restart is not None:
        d_initial, _ = sweep(slice(shared), d_restart[None], None, initial, None)
    return d_initial


def _activated(qkvu: Tensor, heads: int, rotary: Rotary | None) -> Parts:
    """SiLU(q), SiLU(k) and v, each [B, T, H, E / H]; with LRPE q and k are turned, twice as wide."""
    E = qkvu.shape[-1] // 4
    qk = silu(qkvu.flatten(0, 1)[:, : 2 * E]).view(*qkvu.shape[:2], 2, heads, -1)
    q, k = (qk if rotary is None else _turn(qk, rotary)).unbind(2)
    return q, k, qkvu[..., 2 * E : 3 * E].unflatten(-1, (heads, -1))


def _turn(x: Tensor, rotary: Rotary) -> Tensor:
    """linear_relative_position of x [B, T, 2, H, K]: [B, T, 2, H, 2K]. Of a few tokens at once: angles are four times as wide as x."""
    y = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    for tokens in _pieces(x.shape[1]):
        for factor, half in zip(rotary.angles(x.dtype, tokens), y.chunk(2, -1)):
            torch.mul(x[:, tokens], factor[:, :, None], out=half[:, tokens])
    return y


def _turn_back(dy: Tensor, rotary: Rotary, dx: Tensor) -> None:
    """The gradient dx [B, T, 2, H, K] of what `_turn` takes, from that of what it gives."""
    for tokens in _pieces(dx.shape[1]):
        cos, sin = rotary.angles(dx.dtype, tokens)
        one, two = dy[:, tokens].chunk(2, -1)
        dx[:, tokens] = (one * cos[:, :, None]).addcmul_(two.to(sin.dtype), sin[:, :, None])


def _pieces(T: int) -> list[slice]:
    """A row's tokens in pieces of 1,024."""
    return [slice(a, a + 1024) for a in range(0, T, 1024)]


def _of(tokens: slice, qkv: Parts) -> Parts:
    """Some tokens of each."""
    q, k, v = qkv
    return q[:, tokens], k[:, tokens], v[:, tokens]


def fusable(module: Projection, x: Tensor, draw: Draw | None) -> Lora | None:
    """The module's parts where the fused form can take its place: more than one token, frozen weights, LoRA without extras."""
    if x.shape[1] == 1 or torch.is_autocast_enabled(x.device.type):
        return None
    lora = lora_of(module)
    return None if lora is not None and lora.dropout and draw is None else lora


def eps_of(norm: Projection) -> float | None:
    """SimpleRMSNorm's epsilon; None for a norm with weights of its own."""
    return None if hasattr(norm, "weight") else getattr(norm, "eps", None)


def apply_norm(x: Tensor, norm: Projection) -> Tensor:
    """SimpleRMSNorm by its kernel; another norm as it is."""
    eps = eps_of(norm)
    return norm(x) if eps is None else simple_rms_norm(x, eps)
