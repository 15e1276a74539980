"""What trains a model on several devices: nothing, DDP, FSDP2 or DeepSpeed, each through Trainer; a step asks it the same few things.

A step's records are those of the recipe, whoever computes them: every process takes its share, the loss is the mean over all their
supervised tokens, and a checkpoint is the same whole files, so that a run goes on under another engine or number of processes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnl.evaluate import perplexity
from tnl.train.crew import Crew

Compute = Callable[[], Tensor]
Record = dict[str, Any]


class Engine:
    """Every process has the whole model; on several, DDP sums their gradients once a step, after all rows.

    So rows are split, streamed and shrunk as on one device, and no process waits for another's rows.
    """

    sharded = False
    """Whether weights or states are shared out, so that all must compute the same number of rows, each whole."""
    parts = False
    """Whether a process's tensors are parts of whole ones."""

    def __init__(self, crew: Crew, device: torch.device, **options: Any) -> None:
        """options: of DistributedDataParallel."""
        self.crew, self.device, self.options = crew, device, options
        self.wrapped: Any = None

    @property
    def home(self) -> torch.device:
        """Where the base is loaded: in host memory where a process keeps but a part, which `prepare` or `wrap` takes from there."""
        return torch.device("cpu") if self.parts else self.device

    @property
    def scale(self) -> int:
        """What a loss is multiplied by, since engines divide summed gradients by the number of processes."""
        return self.crew.size

    def spread(self, needs: Any) -> Any:
        """What of a memory plan (plan.py) one process needs."""
        return needs

    def prepare(self, net: nn.Module) -> None:
        """Before the optimizer is made."""

    def wrap(self, net: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """The model as it is called in training, and the optimizer as it is stepped."""
        if self.crew.size > 1:
            # every trained weight has a gradient in the pass that sums them, and gradients stay where rows have put them
            places = [self.device] if self.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(net, device_ids=places, **self.options)
        return self.wrapped or net, optimizer

    def share(self, records: Sequence[Record]) -> list[Record]:
        """This process's records of a step: the same number of tokens for each, as near as whole records allow."""
        if self.crew.size == 1:
            return list(records)
        lengths = [len(record["input_ids"]) for record in records]
        loads, mine = [0] * self.crew.size, []
        for index in sorted(range(len(records)), key=lambda index: (-lengths[index], index)):
            rank = loads.index(min(loads))
            loads[rank] += lengths[index]
            if rank == self.crew.rank:
                mine.append(index)
        return [records[index] for index in sorted(mine)]

    def passes(self, rows: int) -> int:
        """How many rows this process must compute, where it has so many."""
        return rows

    def run(self, net: nn.Module, compute: Compute, last: bool) -> Tensor:
        """Compute a row's loss and its gradients; last: of the step."""
        loss = compute()
        loss.backward()
        return loss.detach()

    def measure(
        self, net: nn.Module, records: Sequence[Record], budget: int, chunk: int, after_row: Callable[[], None]
    ) -> perplexity.Perplexity:
        """The loss on held-out records, each process measuring its share. Raises as perplexity.loss."""
        if self.crew.size == 1:
            return perplexity.loss(net, records, budget, chunk=chunk, after_row=after_row)
        mine = [records[index] for index in range(self.crew.rank, len(records), self.crew.size)]
        with self.crew.together():
            found = perplexity.loss(net, mine, budget, chunk=chunk) if mine else perplexity.Perplexity(0.0, 0, 0)
        told = self.crew.gather((found.loss * found.tokens, found.tokens))
        tokens = sum(count for _, count in told)
        return perplexity.Perplexity(math.fsum(total for total, _ in told) / tokens, tokens, len(records))

    def settle(self, net: nn.Module, loss: Tensor, failed: bool) -> tuple[Tensor, bool]:
        """The loss of the whole step, and whether memory ran out in any process; if not, gradients are those of the whole step."""
        if self.crew.size == 1:
            return loss, failed
        both = self.crew.sum(torch.stack([loss.float(), torch.tensor(float(failed), device=loss.device)]))
        failed = bool(both[1] > 0)
        if not failed and self.wrapped is not None:
            # DDP sums when a backward pass ends that began in its forward; the rows' gradients wait in .grad
            trained = [p for p in net.parameters() if p.requires_grad]
            through(self.wrapped, net, lambda: torch.stack([p.flatten()[0].float() * 0 for p in trained]).sum()).backward()
        return both[0], failed

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """This process's part of each gradient."""
        return [p.grad for p in parameters]

    def norms(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """[P] float32: norms of whole tensors, of which these are this process's parts; 0 for None. Nothing is read from the device."""
        there = [local(x) for x in tensors if x is not None]
        found = iter(torch._foreach_norm(there) if there else ())
        zero = torch.zeros((), device=self.device)
        norms = torch.stack([next(found).float() if x is not None else zero for x in tensors]) if tensors else zero[None]
        return self.crew.sum(norms.to(self.device).square()).sqrt() if self.parts else norms

    def clip(self, parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
        """Scale gradients down to a norm."""
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def kept(self, optimizer: Any) -> list[Tensor]:
        """This process's part of what the optimizer remembers of the gradients; its counters are not among it."""
        states = optimizer.state.values()
        return [x for state in states for x in state.values() if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1]

    def whole(self, collect: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Name -> whole tensor on the CPU, of the model's tensors that are collected, for the processes that save; empty elsewhere."""
        return {name: x.detach().cpu().contiguous() for name, x in collect().items()} if self.crew.saves else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state as one process would save it, for the processes that save."""
        return optimizer.state_dict() if self.crew.saves else {}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Take such a state."""
        optimizer.load_state_dict(state)

    def load_exact(self, net: nn.Module, weights: dict[str, Tensor]) -> None:
        """Take a checkpoint's weights once more, where the model's own have fewer digits."""


def through(wrapped: Any, net: nn.Module, compute: Compute) -> Tensor:
    """Call `compute` inside the wrapped model's forward, where an engine has made its weights ready and watches what is computed."""
    plain = net.forward

    def once(*args: Any, **kwargs: Any) -> Tensor:
        net.forward = plain
        return compute()

    net.forward = once
    try:
        return wrapped(torch.zeros(1))
    finally:
        net.forward = plain


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def gathered(x: Tensor) -> Tensor:
    """The whole of a tensor; all processes must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
