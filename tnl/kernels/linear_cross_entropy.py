"""Head and loss by chunks of rows: the logits of a whole sequence never exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of x W^T against targets; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.zeros(weight.shape, dtype=dtype, device=x.device) if needs_weight else None
        for rows in torch.arange(x.shape[0], device="cpu").split(chunk):
            a, b = int(rows[0]), int(rows[-1]) + 1
            logits = (x[a:b] @ weight.T).to(dtype)
            total += F.cross_entropy(logits, targets[a:b], reduction="sum")
            if not (needs_x or needs_weight):
                continue
            grad = torch.softmax(logits, -1)
            grad[torch.arange(b - a, device=x.device), targets[a:b]] -= 1
            grad = grad.to(x.dtype)
            if dx is not None:
                dx[a:b] = grad @ weight
            if dw is not None:
                dw += grad.T @ x[a:b]
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))  # type: ignore[arg-type]
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        dx, dw = ctx.saved_tensors  # type: ignore[attr-defined]
        return None if dx is None else dx * grad.to(dx.dtype), None if dw is None else dw * grad.to(dw.dtype), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum over rows of the cross entropy of x W^T: x [M, D], weight [vocabulary, D], targets [M] (every row is supervised).

    Returns a float32 scalar (float64 where x is). Memory: chunk x vocabulary, whatever M is.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, chunk)
