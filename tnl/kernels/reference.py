"""The definition: linear attention with a constant decay per head, and the other operations of a layer, in plain PyTorch.

Letters: B batch, T time, H heads, K key dim, V value dim, D model dim, C chunk, N chunks.
The recurrence (arXiv:2401.04658, eq. 5; arXiv:2307.14995, eq. 9), for token t of a sequence:

    S_t = exp(log_decay) S_{t-1} + k_t^T v_t,    o_t = q_t S_t

A row may hold several sequences one after another (`segment_start`); each restarts the recurrence. The three attention
forms compute the same function: `parallel_` as one masked product, `recurrent_` token by token, `chunk_` in blocks of C tokens:
memory and time grow linearly with T. Everything accumulates in float32, or in float64 where the inputs are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tnl.kernels.deferred import Deferred, deferred_lightning_attention
from tnl.kernels.lora import Draw, project

IGNORED = -100
"""A target that is not learned."""

Projection = Callable[[Tensor], Tensor]


def recurrent_lightning_attention(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    log_decay: Tensor,  # [H] float32, at most 0: what one step multiplies the state by, as a logarithm
    *,
    segment_start: Tensor | None = None,  # [B, T] integer: index of the first token of each token's sequence; -1: it began before this call
    initial_state: Tensor | None = None,  # [B, H, K, V] float32, or float64 where the inputs are
    restart_state: Tensor | None = None,  # [H, K, V]: what every sequence that begins in this call starts from (default zero)
) -> tuple[Tensor, Tensor]:
    """Token by token. Returns o [B, T, H, V] in q's dtype and the final state [B, H, K, V] in float32 (float64)."""
    check_shapes(q, k, v, log_decay, segment_start, initial_state, restart_state)
    qc, kc, vc, decay = _accumulable(q, k, v, log_decay)
    decay = decay.exp()[:, None, None]
    state = _initial(qc, vc, initial_state)
    restart = torch.zeros_like(state[0]) if restart_state is None else restart_state.to(qc)
    outputs = []
    for t in range(q.shape[1]):
        if segment_start is not None:
            begins = (segment_start[:, t] == t)[:, None, None, None]
            state = torch.where(begins, restart, state)
        state = decay * state + kc[:, t, :, :, None] * vc[:, t, :, None, :]
        outputs.append((qc[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, 1).to(q.dtype), state


def parallel_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    segment_start: Tensor | None = None,
    initial_state: Tensor | None = None,
    restart_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One masked product over the whole length: T x T memory, for tests. Arguments and results as `recurrent_lightning_attention`."""
    return chunk_lightning_attention(
        q,
        k,
        v,
        log_decay,
        segment_start=segment_start,
        initial_state=initial_state,
        restart_state=restart_state,
        chunk_size=q.shape[1],
    )


def chunk_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    segment_start: Tensor | None = None,
    initial_state: Tensor | None = None,
    restart_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """In chunks of `chunk_size` tokens (arXiv:2401.04658, alg. 1). Arguments and results as `recurrent_lightning_attention`.

    Within a chunk the masked product; between chunks the state, whose decay is taken from a token to its chunk's last token,
    so that no exponent is ever positive.
    """
    check_shapes(q, k, v, log_decay, segment_start, initial_state, restart_state)
    B, T = q.shape[:2]
    C, N = chunk_size, -(-T // chunk_size)
    qc, kc, vc, g = _accumulable(q, k, v, log_decay)
    state = _initial(qc, vc, initial_state)
    qc, kc, vc = (_chunks(x, N, C) for x in (qc, kc, vc))  # [B, N, H, C, K or V]
    pos = torch.arange(N * C, device=q.device)
    start = pos.new_full((B, T), -1) if segment_start is None else segment_start.long()
    start = torch.cat([start, pos[T:].expand(B, -1)], 1).view(B, N, C)  # padding tokens are sequences of their own
    pos = pos.view(N, C)
    first, last = pos[:, 0], pos[:, -1].clamp(max=T - 1)  # [N]: bounds of each chunk
    at_last = start.gather(2, (last - first).expand(B, N)[..., None])  # [B, N, 1]: first token of the sequence that leaves the chunk

    distance = pos[0, :, None] - pos[0, None, :]  # [C, C]: t - s
    same = (distance >= 0) & (pos[None, :, None, :] >= start[..., None])  # [B, N, C, C]
    within = torch.exp(g[:, None, None] * distance.clamp(min=0)) * same[:, :, None]  # [B, N, H, C, C]
    o = ((qc @ kc.transpose(-1, -2)) * within) @ vc

    before = start < first[:, None]  # [B, N, C]: the token's sequence came in through the chunk's state
    enters = _decayed(g, pos - first[:, None] + 1, before)  # [B, N, H, C]
    to_last = _decayed(g, last[:, None] - pos, (pos <= last[:, None]) & (pos >= at_last))  # [B, N, H, C]
    added = (kc * to_last[..., None]).transpose(-1, -2) @ vc  # [B, N, H, K, V]
    carried = _decayed(g, last - first + 1, at_last[..., 0] < first)  # [B, H, N]
    if restart_state is not None:
        restart = restart_state.to(qc)
        o = o + (qc @ restart) * _decayed(g, pos - start + 1, ~before)[..., None]
        reaches = _decayed(g, last - at_last[..., 0] + 1, at_last[..., 0] >= first)  # [B, H, N]
        added = added + torch.einsum("bhn,hkv->bnhkv", reaches, restart)
    states = []
    for n in range(N):
        states.append(state)
        state = carried[:, :, n, None, None] * state + added[:, n]
    o = o + (qc * enters[..., None]) @ torch.stack(states, 1)
    return o.transpose(2, 3).flatten(1, 2)[:, :T].to(q.dtype), state


def padded_final_state(
    k: Tensor, v: Tensor, log_decay: Tensor, lengths: Tensor, segment_start: Tensor | None, initial_state: Tensor | None
) -> Tensor:
    """The state after the first `lengths` [B] tokens of each row, [B, H, K, V]: padding on the right neither adds nor decays."""
    _, kc, vc, g = _accumulable(k, k, v, log_decay)
    last = (lengths - 1)[:, None]
    start = torch.full_like(last, -1) if segment_start is None else segment_start.long().gather(1, last.clamp(min=0))
    pos = torch.arange(k.shape[1], device=k.device)
    weight = torch.exp(g * (last - pos).clamp(min=0)[..., None]) * ((pos <= last) & (pos >= start))[..., None]  # [B, T, H]
    carried = torch.exp(g * lengths[:, None]) * ((start < 0) | (last < 0))  # [B, H]
    added = (kc * weight[..., None]).permute(0, 2, 3, 1) @ vc.transpose(1, 2)
    return added + carried[..., None, None] * _initial(kc, vc, initial_state)


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segment_start: Tensor | None,
    initial_state: Tensor | None,
    restart_state: Tensor | None,
) -> None:
    """Raise ValueError where the arguments of an attention form do not fit together; reads no device memory."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    wanted = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, H, V)),
        "log_decay": (log_decay, (H,)),
        "segment_start": (segment_start, (B, T)),
        "initial_state": (initial_state, (B, H, K, V)),
        "restart_state": (restart_state, (H, K, V)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; q of shape {tuple(q.shape)} and v of {tuple(v.shape)} need {shape}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k and v need one floating dtype (found {q.dtype}, {k.dtype}, {v.dtype})")


def _accumulable(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype)


def _initial(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    return initial_state.to(k.dtype)


def _chunks(x: Tensor, N: int, C: int) -> Tensor:
    """[B, T, H, X] to [B, N, H, C, X], zeros after T."""
    x = F.pad(x, (0, 0, 0, 0, 0, N * C - x.shape[1]))
    return x.unflatten(1, (N, C)).transpose(2, 3)


def _decayed(g: Tensor, steps: Tensor, where: Tensor) -> Tensor:
    """exp(g)^steps where `where`, else 0: [..., N, C] to [..., N, H, C], [..., N] to [..., H, N]."""
    steps = steps.clamp(min=0).unsqueeze(-2)
    return torch.exp(g[:, None] * steps) * where.unsqueeze(-2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(x - x.amax(-1, keepdim=True)),
    "leak": F.leaky_relu,
    "1+elu": lambda x: 1 + F.elu(x),
    "2+elu": lambda x: 2 + F.elu(x),
    "silu": F.silu,
    "swish": F.silu,
    "sine": torch.sin,
}
"""linear_act_fun of a published config; any other word is the identity."""


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x rsqrt(mean(x^2) + eps) over the last dim, in float32 (float64), back to x's dtype (arXiv:2307.14995, eq. 7)."""
    xc = x.to(torch.promote_types(x.dtype, torch.float32))
    return (xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Rotary(NamedTuple):
    """What LRPE turns a layer's q and k by: the angles position x theta, which are wide, and made where they are used."""

    theta: Tensor  # [H, 1, K]
    positions: Tensor  # [B, T] integer: a token's index in its sequence

    def angles(self, dtype: torch.dtype, tokens: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """cos and sin of some tokens' angles, [B, T, H, K], in `dtype` or float32, whichever is wider: the angle itself in float64, since
        float32 is off by 0.06 at a million tokens. Apple's MPS has no float64: there the angle is float32.
        """
        exact = torch.float32 if self.theta.device.type == "mps" else torch.float64
        angle = self.positions[:, tokens, None, None].to(exact) * self.theta[:, 0].to(exact)
        dtype = torch.promote_types(dtype, torch.float32)
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Rows(NamedTuple):
    """Where each token of a call stands."""

    positions: Tensor  # [B, T] integer: its index in its sequence
    segment_start: Tensor | None = None  # [B, T]: index in the row of its sequence's first token, -1: before this call; None: all -1
    real: Tensor | None = None  # [B, T] bool: False where a token is padding
    lengths: Tensor | None = None  # [B]: real tokens of a row, where padding follows them and the final state matters
    dropout_keys: Tensor | None = None  # [B, T] int32: where an adapter's dropout masks come from (kernels/lora.py)
    shared: int = 0  # so many first tokens of the row are every sequence's: segment_start counts from behind them, [B, T - shared]


class Mixer(NamedTuple):
    """What a layer's attention is made of, its projections left out."""

    norm: Projection  # over all E of a token
    activation: str  # of q and k
    log_decay: Tensor  # [H] float32
    theta: Tensor | None = None  # [H, 1, K] where the layer has LRPE

    def rotary(self, rows: Rows) -> Rotary | None:
        """What turns q and k, where the layer has LRPE."""
        return None if self.theta is None else Rotary(self.theta, rows.positions)


def linear_relative_position(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """LRPE (arXiv:2307.14995, sec. 3.1): [B, T, H, K] to [x cos, x sin], [B, T, H, 2K]; angles: cos and sin, [B, T, H, K]."""
    return torch.cat([(x * factor).to(x.dtype) for factor in angles], -1)


def norm_qkvu(x: Tensor, norm: Projection, qkvu_proj: Projection, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
    """[B, T, D] to [B, T, 4E]; draw: where the masks of an adapter's dropout come from (None: the module's own).

    Behind it x again, for the residual: a form that is one node of autograd's adds the residual's gradient where it makes the norm's.
    """
    return project(qkvu_proj, norm(x), draw, 0), x


def attention_norm_gate(
    qkvu: Tensor,  # [B, T, 4E]: q, k, v, u, each head-major
    state: Tensor | Deferred | None,  # [B, H, K, V] before this call; one whose writing waits is for T = 1, and is written in place
    mixer: Mixer,
    rows: Rows,
) -> tuple[Tensor, Any]:
    """u * norm(attention(f(q), f(k), v)): [B, T, E], and the final state [B, H, K, V]."""
    heads, real = mixer.log_decay.shape[0], rows.real
    q, k, v, u = qkvu.chunk(4, -1)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    if act := ACTIVATIONS.get(mixer.activation):
        q, k = act(q), act(k)
    if rotary := mixer.rotary(rows):
        angles = rotary.angles(q.dtype)
        q, k = linear_relative_position(q, angles), linear_relative_position(k, angles)
    if isinstance(state, Deferred):
        live = None if real is None else real[:, 0]
        o = deferred_lightning_attention(q[:, 0], k[:, 0], v[:, 0], mixer.log_decay, state, live)
        return u * mixer.norm(o.flatten(1)[:, None]), state
    if real is not None:
        v = v * real[..., None, None]
    form = recurrent_lightning_attention if q.shape[1] == 1 else chunk_lightning_attention
    o, after = attend(form, (q, k, v), state, mixer.log_decay, rows)
    return u * mixer.norm(o.flatten(2)), after


def attend(
    form: Callable[..., tuple[Tensor, Tensor]],  # of the attention
    qkv: tuple[Tensor, Tensor, Tensor],
    state: Tensor | None,
    log_decay: Tensor,
    rows: Rows,
) -> tuple[Tensor, Tensor]:
    """`form`; where the row's first `shared` tokens are every sequence's, each sequence behind them starts from the state they leave."""
    if not rows.shared:
        o, after = form(*qkv, log_decay, segment_start=rows.segment_start, initial_state=state)
        if rows.lengths is not None:
            after = padded_final_state(*qkv[1:], log_decay, rows.lengths, rows.segment_start, state)
        return o, after
    first, after = form(*(x[:, : rows.shared] for x in qkv), log_decay, initial_state=state)
    rest, after = form(*(x[:, rows.shared :] for x in qkv), log_decay, segment_start=rows.segment_start, restart_state=after[0])
    return torch.cat([first, rest], 1), after


def out_residual(x: Tensor, out_proj: Projection, residual: Tensor, draw: Draw | None = None) -> Tensor:
    """[B, T, E] to residual + out_proj(x), [B, T, D]."""
    return residual + project(out_proj, x, draw, 1)


class Pending(NamedTuple):
    """What l3 takes where it is not to be kept: made of x, [..., D], when l3 is computed, and again in its backward pass."""

    make: Callable[[Tensor], Any]
    fused: bool = False  # make gives the halves that a fused l3 takes


def norm_glu(
    x: Tensor, norm: Projection, l1: Projection, l2: Projection, draw: Draw | None = None, again: bool = False
) -> tuple[Tensor | Pending, Tensor]:
    """[B, T, D] to l1(norm(x)) * l2(norm(x)), [B, T, glu_dim] (arXiv:2307.14995, eq. 6: no activation), and x as `norm_qkvu`.

    again: nothing but x is kept for the backward pass, which computes this and what follows from it once more.
    """

    def make(x: Tensor) -> Tensor:
        z = norm(x)
        return project(l1, z, draw, 2) * project(l2, z, draw, 3)

    return Pending(make) if again else make(x), x


def l3_residual(x: Tensor | Pending, l3: Projection, residual: Tensor, draw: Draw | None = None) -> Tensor:
    """[B, T, glu_dim] to residual + l3(x), [B, T, D]."""
    if isinstance(x, Pending):
        make = x.make
        return residual + checkpoint(lambda x: project(l3, make(x), draw, 4), residual, use_reentrant=False)  # type: ignore[no-any-return]
    return residual + project(l3, x, draw, 4)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of logits [M, V] against targets [M] (IGNORED: 0), float32 or wider; logits become its gradient."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    learned, at = targets != IGNORED, targets.clamp(min=0)[:, None]
    losses = (exact.logsumexp(-1) - exact.gather(1, at)[:, 0]) * learned
    grad = exact.softmax(-1).scatter_add_(1, at, exact.new_full(at.shape, -1.0))
    logits.copy_(grad.mul_(learned[:, None]))
    return losses.sum()
