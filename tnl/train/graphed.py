"""The graphed form of a row: forward, loss, backward and the sum of its gradients as one CUDA graph, which the host starts in one launch.

A graph belongs to a shape: the tokens of a row and its supervised positions, both rounded up (step.py). The first row of a shape is
computed eagerly, which compiles what it needs; when the shape comes again it is recorded. Both forms run the same kernels on the same
numbers, so that a resumed run, which records anew, goes on bit for bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tnl.evaluate.perplexity import INPUTS, causal_lm
from tnl.kernels.graphs import Graphs
from tnl.train import recomputation

MOST = 64
"""Shapes that are recorded; a run of more has the others computed eagerly."""
Batch = dict[str, Tensor]
RowLoss = Callable[[Batch, Tensor, Tensor], Tensor]
"""batch, index [M], targets [M] -> the sum of the row's token losses; index says which of its positions predict the targets."""


class Graphed:
    """The graphs of a run's rows, and the gradients that they add to.

    On a CPU nothing is recorded, and what a graph would do is done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        self.graphs = Graphs(self.parameters[0].device)
        self.inputs: dict[tuple[int, int], list[Tensor]] = {}
        self.seen: set[tuple[int, int]] = set()
        self.on = True

    def run(self, batch: Batch, index: Tensor, targets: Tensor, share: Tensor, loss: RowLoss) -> Tensor | None:
        """The row's loss over `share`, its gradients added to the parameters'; None where the row is to be computed eagerly.

        The result is overwritten by the next row of this shape.
        """
        key = batch["input_ids"].shape[1], len(index)
        fixed = {name: x for name, x in batch.items() if name == "shared"}  # the same in all rows of a run
        names = [name for name in INPUTS if name in batch]
        values = [*(batch[name] for name in names), index, targets, share]
        if not self.on or (key not in self.graphs.known and not self.worth(key)):
            return None
        self.adopt()
        if key not in self.inputs:
            self.inputs[key] = [torch.empty_like(x, device=self.graphs.device) for x in values]
        pinned = self.graphs.device.type == "cuda"
        for static, value in zip(self.inputs[key], values):
            static.copy_(value.pin_memory() if pinned else value, non_blocking=pinned)
        self.graphs.prepare(key, lambda: self.body(self.inputs[key], names, fixed, loss), warm=True)
        return self.graphs.run(key)

    def worth(self, key: tuple[int, int]) -> bool:
        """Whether a shape that has no graph is to get one."""
        again, room = key in self.seen, len(self.graphs.known) < MOST
        self.seen.add(key)
        return again and room

    def body(self, inputs: list[Tensor], names: list[str], fixed: Batch, loss: RowLoss) -> Tensor:
        """What is recorded."""
        *tensors, index, targets, share = inputs
        value = loss(fixed | dict(zip(names, tensors)), index, targets) / share
        grads = torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(self.sums, grads)
        return value.detach()

    def adopt(self) -> None:
        """The parameters' gradients lie where the graphs add to them, with what earlier rows of the step have left."""
        if fresh := [total for p, total in zip(self.parameters, self.sums) if p.grad is None]:
            torch._foreach_zero_(fresh)
        for p, total in zip(self.parameters, self.sums):
            if p.grad is not None and p.grad is not total:
                total.copy_(p.grad)
            p.grad = total

    def give_up(self) -> bool:
        """Free the graphs' memory for good; False where there was none."""
        held = bool(self.inputs)
        self.graphs, self.inputs, self.on = Graphs(self.graphs.device), {}, False
        return held


def why_not(model: nn.Module) -> str:
    """What keeps a model's step from being recorded, or an empty string."""
    base = causal_lm(model)
    if base.device.type != "cuda":
        return "there is no GPU"
    if why := recomputation.why_not_recorded(model):
        return why
    hooked = next((name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks), None)
    return "" if hooked is None else f"{hooked} has a hook (neftune_noise_alpha and its like)"
