"""Layers that are computed again in the backward pass. Between the passes only what enters a layer is kept, on a GPU in host memory.

So a row's residual stream takes no device memory either: while one layer is computed, what entered the last one leaves, and in the
backward pass what the next one needs comes back (pinned memory, a stream of its own).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnl.evaluate.perplexity import causal_lm
from tnl.kernels.lora import hindrance
from tnl.train.state_store import StateStore

Layer = Callable[..., tuple[Tensor, Tensor]]
"""x [B, T, D], state, rows, ops -> what leaves the layer, and the state after it."""


def enable(model: nn.Module, options: dict[str, Any] | None = None, *, own: bool = True) -> None:
    """Recompute every layer in the backward pass.

    own: by the form of this file; where an adapter's dropout is its module's own, or options are given, it is torch.utils.checkpoint,
    which repeats random numbers, with these options.
    """
    base = causal_lm(model)
    # the name since transformers 5.20; the old one warns there
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(options or {"use_reentrant": False})
    if own and not options and not any(hindrance(module) for module in base.model.layers.modules() if hasattr(module, "lora_A")):
        kept = Kept(base.device)
        for layer in base.model.layers:
            layer._gradient_checkpointing_func = partial(recomputed, kept, layer)


def enabled(model: nn.Module) -> bool:
    """Whether layers are recomputed in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class Kept:
    """What entered each layer of the row that is being computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.store = self.empty()

    def empty(self) -> StateStore:
        return StateStore(self.device, host=self.device.type == "cuda")

    def put(self, number: int, x: Tensor) -> None:
        if number == 0:
            self.store = self.empty()  # a pass that memory has ended may have left something
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
        ends, cotangents = [y for y, _ in there], [dy for _, dy in there]
        found = iter(torch.autograd.grad(ends, [*wanted, *ctx.trained], cotangents, allow_unused=True))
        return None, None, None, next(found) if needs_x else None, next(found) if needs_state else None, *found
