"""One layer: the only place where its arithmetic stands. Training, decoding and streaming call it with their forms of the five ops."""

from typing import Any, NamedTuple

from torch import Tensor

from tnl.kernels.deferred import Deferred
from tnl.kernels.dispatch import Ops
from tnl.kernels.lora import Draw
from tnl.kernels.reference import Mixer, Projection, Rows


class LayerWeights(NamedTuple):
    """What a layer is made of; projections and norms are callables, so that an adapter may wrap them."""

    token_norm: Projection
    qkvu_proj: Projection  # D -> 4E
    mixer: Mixer
    out_proj: Projection  # E -> D
    channel_norm: Projection
    l1: Projection  # D -> glu_dim
    l2: Projection  # D -> glu_dim
    l3: Projection  # glu_dim -> D
    number: int = 0  # which layer it is


def decoder_layer(
    x: Tensor,  # [B, T, D]
    state: Tensor | Deferred | None,  # [B, H, K, V] float32: after the tokens before this call; None: zero
    weights: LayerWeights,
    rows: Rows,
    ops: Ops,
) -> tuple[Tensor, Any]:
    """h = x + mixer(norm(x)); h + glu(norm(h)) (arXiv:2307.14995, fig. 1). Returns [B, T, D] and the state after the last token."""
    draw = None if rows.dropout_keys is None else Draw(rows.dropout_keys, weights.number)
    qkvu, x = ops.norm_qkvu(x, weights.token_norm, weights.qkvu_proj, draw)
    mixed, state = ops.attention_norm_gate(qkvu, state, weights.mixer, rows)
    x = ops.out_residual(mixed, weights.out_proj, x, draw)
    gated, x = ops.norm_glu(x, weights.channel_norm, weights.l1, weights.l2, draw)
    return ops.l3_residual(gated, weights.l3, x, draw), state
