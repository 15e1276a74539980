"""Head and loss by chunks of rows: the logits of a whole sequence never exist at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from tnl.kernels import reference

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""`reference.cross_entropy_`'s form."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of x W^T against targets; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, cross_entropy_: CrossEntropy
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.zeros(weight.shape, dtype=dtype, device=x.device) if needs_weight else None
        for a in range(0, len(x), chunk):
            rows = slice(a, a + chunk)
            grad = x[rows] @ weight.T
            total += cross_entropy_(grad, targets[rows])
            if dx is not None:
                torch.mm(grad, weight, out=dx[rows])
            if dw is not None:
                dw += grad.T @ x[rows]
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))  # type: ignore[arg-type]
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dw = ctx.saved_tensors  # type: ignore[attr-defined]
        return None if dx is None else dx * grad.to(dx.dtype), None if dw is None else dw * grad.to(dw.dtype), None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024, cross_entropy_: CrossEntropy = reference.cross_entropy_
) -> Tensor:
    """Sum over rows of the cross entropy of x W^T: x [M, D], weight [vocabulary, D], targets [M], reference.IGNORED where not learned.

    Returns a float32 scalar (float64 where x is). Memory: chunk x vocabulary, whatever M is.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, chunk, cross_entropy_)
