"""A layer's projections in training: what makes their input, the frozen product with LoRA, the residual; one autograd node each.

Kept for the backward pass is only what exists anyway: the residual stream, qkvu and the attention output, the two halves of the GLU.
The input of the product (norm, norm times gate, product of the halves) is made again there; frozen weights get no gradient.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tnl.kernels import simple_rms_norm as norms
from tnl.kernels.lora import Draw, Lora
from tnl.kernels.lora_linear import add_product, column_product, row_product

Prologue = Literal["norm", "norm_gate", "product"]


class Plan(NamedTuple):
    """What a call is made of, beside its tensors."""

    prologue: Prologue
    eps: float
    loras: tuple[Lora, ...]
    modules: tuple[int, ...]  # their numbers, for dropout
    keys: Tensor | None  # [T] int32


def fused_linear(
    prologue: Prologue,
    inputs: tuple[Tensor, ...],  # norm: x [..., D]; norm_gate: o, u; product: a, b
    loras: tuple[Lora, ...],
    residual: Tensor | None = None,  # [..., N], added to the first product
    *,
    eps: float = 0.0,
    draw: Draw | None = None,
    slot: int = 0,
) -> tuple[Tensor, ...]:
    """For each of `loras`: z W^T + s drop(z) A^T B^T (+ residual), [..., N], z being the prologue of the inputs.

    Gradients reach inputs, residual, and every A and B (float32 sums). draw: where the masks come from, needed where dropout is on.
    """
    keys = None if draw is None else draw.keys.reshape(-1).contiguous()
    modules = tuple(draw.module(slot + i) if draw else 0 for i in range(len(loras)))
    if keys is None:
        loras = tuple(lora._replace(dropout=0.0) for lora in loras)
    plan = Plan(prologue, eps, loras, modules, keys)
    factors = [x for lora in loras for x in (lora.a, lora.b)]
    shape = inputs[0].shape[:-1]
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    outputs = _FusedLinear.apply(plan, len(flat), None if residual is None else residual.reshape(-1, residual.shape[-1]), *flat, *factors)
    return tuple(y.unflatten(0, shape) for y in outputs)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, count: int, residual: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        inputs = tensors[:count]
        z = _forward(plan, inputs)
        outputs, hidden = [], []
        for lora, module in zip(plan.loras, plan.modules):
            y = z @ lora.weight.T if residual is None else torch.addmm(residual, z, lora.weight.T)
            residual = None
            if lora.a is not None and lora.b is not None:
                hidden.append(row_product(z, lora.a, lora.scale / (1 - lora.dropout), lora.dropout, plan.keys, module))
                add_product(y, hidden[-1], lora.b.T, 0.0, None, 0)
            outputs.append(y)
        ctx.plan, ctx.count = plan, count
        ctx.save_for_backward(*inputs, *hidden)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        plan, tensors = ctx.plan, ctx.saved_tensors
        inputs, hidden = tensors[: ctx.count], list(tensors[ctx.count :])
        z = _forward(plan, inputs)
        dz: Tensor | None = None
        factors: list[Tensor | None] = []
        late = []  # what is added to dz once every frozen product is in it
        for lora, module, dy in zip(plan.loras, plan.modules, grads):
            dy = dy.contiguous()
            dz = dy @ lora.weight if dz is None else torch.addmm(dz, dy, lora.weight, out=dz)
            if lora.a is None or lora.b is None:
                factors += [None, None]
                continue
            g = row_product(dy, lora.b.T, lora.scale / (1 - lora.dropout), 0.0, None, 0)
            da = column_product(g, z, lora.dropout, plan.keys, module)
            factors += [da.to(lora.a.dtype), column_product(hidden.pop(0), dy, 0.0, None, 0, transposed=True).to(lora.b.dtype)]
            late.append((g, lora, module))
        assert dz is not None
        for g, lora, module in late:
            add_product(dz, g, lora.a, lora.dropout, plan.keys, module)  # type: ignore[arg-type]
        d_residual = grads[0] if ctx.needs_input_grad[2] else None
        return None, None, d_residual, *_backward(plan, dz, inputs), *factors


def _forward(plan: Plan, inputs: tuple[Tensor, ...]) -> Tensor:
    """z [T, D]."""
    if plan.prologue == "product":
        return inputs[0] * inputs[1]
    return norms.forward(inputs[0], inputs[1] if plan.prologue == "norm_gate" else None, plan.eps)


def _backward(plan: Plan, dz: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the inputs."""
    if plan.prologue == "product":
        return dz * inputs[1], dz * inputs[0]
    dx, du = norms.backward(dz, inputs[0], inputs[1] if plan.prologue == "norm_gate" else None, plan.eps)
    return (dx,) if du is None else (dx, du)
