"""A layer's projections in training: what makes their input, the frozen product with LoRA, the residual; one autograd node each.

Kept for the backward pass is only what exists anyway: the residual stream, qkvu and the attention output, the two halves of the GLU.
The input of the product (norm, norm times gate, product of the halves) is made again there; frozen weights get no gradient. The wide
products are cuBLAS's, and accumulate: into LoRA's part (and the residual) forward, into each other backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnl.kernels.lora import Draw, Lora
from tnl.kernels.lora_input import Source, Thin, Thins, input_gradients, make_input
from tnl.kernels.lora_output import expand, output_gradients


class Plan(NamedTuple):
    """What a call is made of, beside its tensors."""

    eps: float | None
    loras: tuple[Lora, ...]
    thin: Thins
    keys: Tensor | None  # [T] int32
    again: Callable[[Tensor], tuple[Tensor, ...]] | None


def fused_linear(
    x: Tensor,  # [..., D]
    u: Tensor | None,  # [..., D]
    loras: tuple[Lora, ...],  # one, or two that read the same input
    residual: Tensor | None = None,  # [..., N], added to the first product
    *,
    eps: float | None = None,  # None: x is not normed
    draw: Draw | None = None,
    slot: int = 0,
    again: Callable[[Tensor], tuple[Tensor, ...]] | None = None,  # residual [T, D] -> x, u, ...: makes them anew; they are not kept
) -> tuple[Tensor, ...]:
    """For each of `loras`: z W^T + s drop(z) A^T B^T (+ residual), [..., N], z = norm(x) u; and behind them x.

    Whatever else reads x takes the returned one: its gradient then comes here, and is added where that of the norm is made. Gradients
    reach x, u, residual, and every A and B (float32 sums). draw: where the masks come from, needed where dropout is on.
    """
    keys = None if draw is None else draw.keys.reshape(-1).contiguous()
    thin = [
        None if lora.a is None else Thin(lora.a.detach(), lora.dropout if draw else 0.0, draw.module(slot + i) if draw else 0)
        for i, lora in enumerate(loras)
    ]
    plan = Plan(eps, loras, (thin[0], thin[1] if len(thin) > 1 else None), keys, again)
    factors = [y for lora in loras for y in (lora.a, lora.b)]
    flat = [None if y is None else y.reshape(-1, y.shape[-1]) for y in (x, u, residual)]
    return tuple(y.unflatten(0, x.shape[:-1]) for y in _FusedLinear.apply(plan, *flat, *factors))


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plan: Plan, x: Tensor, u: Tensor | None, residual: Tensor | None, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        z, rstd, hidden = make_input(Source(x, u, plan.eps), plan.thin, plan.keys)
        outputs: list[Tensor] = []
        for lora, thin, h in zip(plan.loras, plan.thin, hidden):
            weight = lora.weight.T
            if thin is not None and h is not None and lora.b is not None:
                y = expand(h, lora.b, factor(lora, thin), None if outputs else residual, x.dtype)
                torch.addmm(y, z, weight, out=y)
            else:
                y = z @ weight if residual is None or outputs else torch.addmm(residual, z, weight)
            outputs.append(y)
        ctx.plan = plan
        ctx.save_for_backward(*((x, u) if plan.again is None else (residual, None)), rstd, *hidden)
        ctx.set_materialize_grads(False)
        ctx.spent = False
        return *outputs, x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.spent:
            raise RuntimeError("a second backward pass through a layer whose GLU was written over; run the forward pass again")
        plan, (x, u, rstd, *hidden) = ctx.plan, ctx.saved_tensors
        if plan.again is not None:
            x, u, *_ = plan.again(x)
        # the halves of the GLU are read by this product alone: their gradients take their place, where a step's memory is at its peak
        ctx.spent = over = plan.eps is None and u is not None and x.is_contiguous() and u.is_contiguous()
        *d_outputs, d_residual = grads
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dz: Tensor | None = None
        g: list[Tensor | None] = [None, None]
        db: list[Tensor | None] = [None, None]
        for i, (lora, thin, dy, h) in enumerate(zip(plan.loras, plan.thin, d_outputs, hidden)):
            dy = torch.zeros(len(x), len(lora.weight), dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
            if wanted:
                dz = dy @ lora.weight if dz is None else torch.addmm(dz, dy, lora.weight, out=dz)
            if thin is not None:
                g[i], db[i] = output_gradients(dy, h, lora.b, factor(lora, thin))
        dx, du, da = input_gradients(Source(x, u, plan.eps), rstd, plan.thin, plan.keys, hidden, g, dz, d_residual, over)
        factors = [
            None if found is None else found.to(of.dtype)
            for lora, *pair in zip(plan.loras, da, db)
            for found, of in zip(pair, (lora.a, lora.b))
        ]
        return None, dx, du, d_outputs[0] if ctx.needs_input_grad[3] else None, *factors


def factor(lora: Lora, thin: Thin) -> float:
    """What LoRA's product is multiplied by."""
    return lora.scale / (1 - thin.dropout)
