"""What watches the numbers of a run: nothing that is not finite reaches a weight, and no adapter stays unconnected.

An optimizer that can leave a step out by itself is told so on the device, and the host hears of it one step later: a GPU never waits
for the host between two steps. Other optimizers are asked to wait.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnl.errors import NumbersError
from tnl.train.checkpoint import tensors_of
from tnl.train.engines import Engine
from tnl.train.lora import adapter_matrices, trainable
from tnl.train.order import Batch
from tnl.train.step import StepResult, alone, names

STEPS_TO_GRADIENTS = 4
"""By then every adapter matrix must have had a gradient: B at step 1, A as soon as B has moved (step 3 where the warm-up starts at 0)."""


@dataclass
class Checked:
    """A step whose numbers are on their way to the host."""

    number: int
    batch: Batch
    loss: Tensor
    optimizer: Any
    again: Callable[[], object]
    """Computes the step's gradients again."""
    loss_of: Callable[[dict[str, Any]], float]
    """Measures one record, to name the guilty ones."""
    finite: Tensor
    """bool, in memory that the host reads."""
    there: torch.cuda.Event | None
    """When it has arrived; None: at once."""


class Guard:
    """Checks every optimizer step between its gradients and its update."""

    def __init__(self, model: nn.Module, engine: Engine | None = None) -> None:
        self.model, self.engine = model, engine or alone(model)
        self.parameters = trainable(model)
        matrices = set(adapter_matrices(model))
        device = self.engine.device
        self.is_matrix = torch.tensor([name in matrices for name, _ in self.parameters], device=device)
        self.had_gradient = torch.zeros_like(self.is_matrix)
        self.norms = torch.zeros(len(self.parameters), device=device)
        """[P] float32: the gradient norm of each trained parameter at the latest step."""
        self.steps = 0
        self.pending: Checked | None = None
        self.late = device.type == "cuda"
        """Whether the host hears of a step while the next one is computed, where the optimizer allows it."""

    @property
    def norm(self) -> Tensor:
        """The norm of all gradients together."""
        return torch.linalg.vector_norm(self.norms)

    def check(
        self,
        result: StepResult,
        batch: Batch,
        optimizer: Any,
        number: int,
        again: Callable[[], object],
        loss_of: Callable[[dict[str, Any]], float],
    ) -> None:
        """Look at a step's loss, gradients and the optimizer's state; where one is not finite, the update that comes changes nothing.

        number: of the step, from 1. again, loss_of: as in Checked. Reads one flag from the device: this step's, or where the optimizer
        leaves such a step out by itself the one of the step before. Raises NumbersError.
        """
        self.settle()
        self.norms = self.engine.norms(self.engine.gradients([p for _, p in self.parameters]))
        kept = self.engine.norms([*self.engine.kept(optimizer), None])
        watched = torch.cat([self.norms, kept.to(self.norms.device), result.loss.float()[None].to(self.norms.device)])
        finite = torch.isfinite(watched).all()
        self.had_gradient |= (self.norms > 0) & finite
        late = leaves_out(optimizer) if self.late else None
        if late is not None:
            late.found_inf = (~finite).float()
        self.pending = Checked(number, batch, result.loss, optimizer, again, loss_of, *fetched(finite))
        if late is None:
            self.settle(at_once=True)
        self.steps += 1
        if self.steps == STEPS_TO_GRADIENTS:
            self.settle()
            self.require_gradients(number)

    def settle(self, at_once: bool = False) -> None:
        """Hear of the latest step; at_once: its gradients still stand, and its update has not come. Raises NumbersError."""
        checked, self.pending = self.pending, None
        if checked is None:
            return
        if checked.there is not None:
            checked.there.synchronize()
        if not bool(checked.finite):
            if not at_once:
                self.model.zero_grad()
                checked.again()
            raise self.not_finite(checked)

    def finish(self, number: int) -> None:
        """The same at the end of a run of fewer steps; after one or two a module's A may rightly have none, but not all of it."""
        self.settle()
        if 0 < self.steps < STEPS_TO_GRADIENTS:
            self.require_gradients(number, whole_modules=self.steps < STEPS_TO_GRADIENTS - 1)

    def not_finite(self, checked: Checked) -> NumbersError:
        """Say which step, which records and which tensor; only a run that ends pays for finding out."""
        loss, records = float(checked.loss), checked.batch.records
        bad = None if self.engine.sharded else first_bad(self.model, checked.optimizer)
        if math.isfinite(loss):
            what = f"the loss is {loss:.4f}, but {bad or 'the gradient norm'} is not finite (records: {names(records)})"
        else:
            # a record alone cannot be measured where every process holds a part of the weights
            guilty = [] if self.engine.sharded else [record for record in records if not math.isfinite(checked.loss_of(record))]
            what = (
                f"the loss is {loss} (records: {names(guilty or records)}; first bad tensor: {bad or 'none, it arises in the computation'})"
            )
        todo = (
            "No weight was changed by this step, and checkpoints before it are whole. Lower train.learning_rate, or look at these records."
        )
        return NumbersError(f"step {checked.number}", what, todo)

    def require_gradients(self, number: int, whole_modules: bool = False) -> None:
        """Raise NumbersError where an adapter matrix has had no gradient yet: it is not connected to the loss.

        whole_modules: only where no matrix of its module has had one.
        """
        silent = (self.is_matrix & ~self.had_gradient).nonzero()[:, 0].tolist()
        if silent and whole_modules:
            alive = {module_of(self.parameters[i][0]) for i in (self.is_matrix & self.had_gradient).nonzero()[:, 0].tolist()}
            silent = [i for i in silent if module_of(self.parameters[i][0]) not in alive]
        if silent:
            first = self.parameters[silent[0]][0]
            what = f"{len(silent)} of {int(self.is_matrix.sum())} adapter matrices have had no gradient so far (first: {first})"
            raise NumbersError(f"step {number}", what, "Take them out of lora.target_modules, or report it.")


def leaves_out(optimizer: Any) -> Any:
    """The optimizer inside Trainer's, where its kernel looks at `found_inf` and leaves a step out; None where it does not."""
    inner = getattr(optimizer, "optimizer", optimizer)
    fused = getattr(inner, "_step_supports_amp_scaling", False) and all(group.get("fused") for group in inner.param_groups)
    return inner if fused else None


def fetched(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A flag in memory that the host reads, and when it is there; the device is not waited for."""
    if flag.device.type != "cuda":
        return flag, None
    copy, there = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True), torch.cuda.Event()
    there.record()
    return copy, there


def module_of(name: str) -> str:
    """The module that an adapter matrix belongs to."""
    return name.partition(".lora_")[0]


def first_bad(model: nn.Module, optimizer: Any) -> str | None:
    """Name of the first weight, optimizer state or gradient that is not finite."""
    parameters = list(model.named_parameters())
    candidates = [(f"weight {name}", p.data) for name, p in parameters]
    for name, p in parameters:
        candidates += tensors_of(optimizer.state.get(p, {}), f"optimizer state {name}")
    candidates += [(f"gradient {name}", p.grad) for name, p in parameters if p.grad is not None]
    return next((name for name, x in candidates if x.is_floating_point() and not bool(torch.isfinite(x).all())), None)
