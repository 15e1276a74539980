"""Triton: cross entropies of logits, and the gradient written over them: nothing else of their size exists."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl.kernels.reference import IGNORED


@triton.jit
def cross_entropy_kernel(logits, targets, losses, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    """losses = logsumexp - logit of the target; logits become softmax - one-hot; both 0 where the target is IGNORED. Grid: rows."""
    i = tl.program_id(0).to(tl.int64)
    p_x = logits + i * V
    target = tl.load(targets + i)
    o_v = tl.arange(0, BLOCK)
    largest, total, own = -float("inf"), 0.0, 0.0
    for v in range(0, V, BLOCK):
        b_x = tl.load(p_x + v + o_v, mask=v + o_v < V, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(b_x, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(b_x - above), 0)
        largest = above
        own += tl.sum(tl.where(v + o_v == target, b_x, 0.0), 0)  # here, since below other threads write over it
    learned = target != IGNORED
    tl.store(losses + i, tl.where(learned, largest + tl.log(total) - own, 0.0))
    for v in range(0, V, BLOCK):
        b_x = tl.load(p_x + v + o_v, mask=v + o_v < V, other=0.0).to(tl.float32)
        b_d = tl.exp(b_x - largest) / total - tl.where(v + o_v == target, 1.0, 0.0)
        tl.store(p_x + v + o_v, tl.where(learned, b_d, 0.0).to(logits.dtype.element_ty), mask=v + o_v < V)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """As `reference.cross_entropy_`: logits [M, V] contiguous."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(len(logits),)](logits, targets, losses, logits.shape[1], IGNORED=IGNORED, BLOCK=4096, num_warps=8)
    return losses.sum()
