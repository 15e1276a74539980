"""What is computed again in the backward pass, so that it need not be kept.

none   nothing
glu    each layer's GLU (kernels: norm_glu's `again`): half the memory of a row, a fifth more products
layer  whole layers: only what enters them is kept
host   whole layers, and what enters them waits in host memory: while one layer is computed, what entered the last one leaves, and in
       the backward pass what the next one needs comes back (pinned memory, a stream of its own). No CUDA graph holds that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from tnl.evaluate.perplexity import causal_lm
from tnl.kernels.lora import hindrance
from tnl.train.state_store import StateStore

Layer = Callable[..., tuple[Tensor, Tensor]]
"""x [B, T, D], state, rows, ops -> what leaves the layer, and the state after it."""


Level = Literal["none", "glu", "layer", "host"]
LEVELS: tuple[Level, ...] = ("none", "glu", "layer", "host")
"""Each takes less of the device than the one before it, and more time."""


WORDS: dict[Level, str] = {"none": "nothing", "glu": "GLUs", "layer": "layers", "host": "layers, from host memory"}


def use(model: nn.Module, level: Level, options: dict[str, Any] | None = None, *, own: bool = True) -> None:
    """Compute so much again in the backward pass; of a model at a higher level nothing changes.

    own: layers by the form of this file; where an adapter's dropout is its module's own, or options are given, it is
    torch.utils.checkpoint, which repeats random numbers, with these options, and keeps what enters a layer on the device.
    """
    base = causal_lm(model)
    if LEVELS.index(level) <= LEVELS.index(level_of(model)):
        return
    for layer in base.model.layers:
        layer.glu_again = level == "glu"
    if level == "glu":
        return
    if options:
        # the name since transformers 5.20; the old one warns there
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(options)
        return
    # not by transformers, which would have the embedding's output ask for a gradient as well, and keep both
    own = own and not any(hindrance(module) for module in base.model.layers.modules() if hasattr(module, "lora_A"))
    kept = Kept(base.device, host=level == "host" and base.device.type == "cuda")
    for layer in base.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(recomputed, kept, layer) if own else partial(checkpoint, use_reentrant=False)


def level_of(model: nn.Module) -> Level:
    """What is computed again in the backward pass."""
    layers = causal_lm(model).model.layers
    if any(layer.gradient_checkpointing for layer in layers):
        kept = kept_of(layers[0])
        return "host" if kept is not None and kept.host else "layer"
    return "glu" if any(layer.glu_again for layer in layers) else "none"


def leaner(model: nn.Module) -> Level | None:
    """The level to try next where memory has run out; None where there is none. Graphs have been given up by then."""
    level, kept = level_of(model), kept_of(causal_lm(model).model.layers[0])
    if level in ("none", "glu"):
        return "glu" if level == "none" else "host"
    return "host" if kept is not None and not kept.host and kept.device.type == "cuda" else None


def why_not_recorded(model: nn.Module) -> str:
    """What of it no CUDA graph holds, or an empty string."""
    level, kept = level_of(model), kept_of(causal_lm(model).model.layers[0])
    if level == "host":
        return "what enters a recomputed layer waits in host memory"
    return "layers are recomputed by torch.utils.checkpoint" if level == "layer" and kept is None else ""


def kept_of(layer: Any) -> "Kept | None":
    """Where a layer's inputs wait; None where it is not recomputed by the form of this file."""
    form = getattr(layer, "_gradient_checkpointing_func", None)
    return form.args[0] if isinstance(form, partial) and form.func is recomputed else None


class Kept:
    """What entered each layer of the row that is being computed."""

    def __init__(self, device: torch.device, host: bool) -> None:
        self.device, self.host = device, host
        self.store = StateStore(device, host)

    def put(self, number: int, x: Tensor) -> None:
        if number == 0:
            self.store = StateStore(self.device, self.host)  # a pass that memory has ended may have left something
        self.store.put(number, [x])

    def take(self, number: int) -> Tensor:
        """What entered layer `number`; that of the layer before it begins to come."""
        (x,) = self.store.take(number)
        self.store.fetch(number - 1)
        return x


def recomputed(kept: Kept, layer: Any, run: Layer, x: Tensor, state: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    """The layer's outputs; its backward pass computes them again."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return checkpoint(run, x, state, *others, use_reentrant=False)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return _Recomputed.apply(kept, layer.number, lambda x, state: run(x, state, *others), x, state, *trained)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kept: Kept, number: int, run: Layer, x: Tensor, state: Tensor | None, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept.put(number, x)
        ctx.kept, ctx.number, ctx.run, ctx.trained = kept, number, run, trained
        ctx.save_for_backward(state)
        ctx.set_materialize_grads(False)
        return run(x, state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, (state,) = ctx.kept.take(ctx.number), ctx.saved_tensors
        needs_x, needs_state = ctx.needs_input_grad[3:5]
        with torch.enable_grad():
            x = x.detach().requires_grad_(needs_x)
            state = None if state is None else state.detach().requires_grad_(needs_state)
            outputs = ctx.run(x, state)
        there = [(y, dy) for y, dy in zip(outputs, grads) if dy is not None and y.requires_grad]
        wanted = [leaf for leaf, needed in ((x, needs_x), (state, needs_state)) if needed]
        # the outputs themselves need not live on
        ends, cotangents = [get_gradient_edge(y) for y, _ in there], [dy for _, dy in there]
        del outputs, there
        found = iter(torch.autograd.grad(ends, [*wanted, *ctx.trained], cotangents, allow_unused=True))
        return None, None, None, next(found) if needs_x else None, next(found) if needs_state else None, *found
