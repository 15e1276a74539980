"""One layer: the only place where its arithmetic stands. Training, decoding and streaming call it with their forms of the five ops."""

from typing import Any, NamedTuple

from torch import Tensor

from tnl.kernels.deferred import Deferred
from tnl.kernels.dispatch import Ops
from tnl.kernels.lora import Draw
from tnl.kernels.reference import Projection, Rotary


class LayerWeights(NamedTuple):
    """What a layer is made of; projections and norms are callables, so that an adapter may wrap them."""

    token_norm: Projection
    qkvu_proj: Projection  # D -> 4E
    mixer_norm: Projection
    out_proj: Projection  # E -> D
    channel_norm: Projection
    l1: Projection  # D -> glu_dim
    l2: Projection  # D -> glu_dim
    l3: Projection  # glu_dim -> D
    log_decay: Tensor  # [H] float32
    theta: Tensor | None  # [H, 1, K] where the layer has LRPE
    activation: str
    number: int = 0  # which layer it is


class Rows(NamedTuple):
    """Where each token stands."""

    positions: Tensor  # [B, T] integer: its index in its sequence
    segment_start: Tensor | None = None  # [B, T]: index in the row of its sequence's first token, -1: before this call; None: all -1
    real: Tensor | None = None  # [B, T] bool: False where a token is padding
    lengths: Tensor | None = None  # [B]: real tokens of a row, where padding follows them and the final state matters
    dropout_keys: Tensor | None = None  # [B, T] int32: where an adapter's dropout masks come from (kernels/lora.py)
    shared: int = 0  # so many first tokens of the row are every sequence's: segment_start counts from behind them, [B, T - shared]


def decoder_layer(
    x: Tensor,  # [B, T, D]
    state: Tensor | Deferred | None,  # [B, H, K, V] float32: after the tokens before this call; None: zero
    weights: LayerWeights,
    rows: Rows,
    ops: Ops,
) -> tuple[Tensor, Any]:
    """h = x + mixer(norm(x)); h + glu(norm(h)) (arXiv:2307.14995, fig. 1). Returns [B, T, D] and the state after the last token."""
    rotary = None if weights.theta is None else Rotary(weights.theta, rows.positions)
    draw = None if rows.dropout_keys is None else Draw(rows.dropout_keys, weights.number)
    qkvu, x = ops.norm_qkvu(x, weights.token_norm, weights.qkvu_proj, draw)
    mixed, state = ops.attention_norm_gate(
        qkvu,
        norm=weights.mixer_norm,
        activation=weights.activation,
        rotary=rotary,
        log_decay=weights.log_decay,
        segment_start=rows.segment_start,
        real=rows.real,
        lengths=rows.lengths,
        initial_state=state,
        shared=rows.shared,
    )
    x = ops.out_residual(mixed, weights.out_proj, x, draw)
    gated, x = ops.norm_glu(x, weights.channel_norm, weights.l1, weights.l2, draw)
    return ops.l3_residual(gated, weights.l3, x, draw), state
