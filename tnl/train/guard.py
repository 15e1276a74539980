"""What watches the numbers of a run: nothing that is not finite reaches a weight, and no adapter stays unconnected."""

import math
from collections.abc import Callable
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


class Guard:
    """Checks every optimizer step between its gradients and its update."""

    def __init__(self, model: nn.Module, engine: Engine | None = None) -> None:
        self.model, self.engine = model, engine or alone(model)
        self.parameters = trainable(model)
        matrices = set(adapter_matrices(model))
        device = self.parameters[0][1].device
        self.is_matrix = torch.tensor([name in matrices for name, _ in self.parameters], device=device)
        self.had_gradient = torch.zeros_like(self.is_matrix)
        self.norms = torch.zeros(len(self.parameters), device=device)
        """[P] float32: the gradient norm of each trained parameter at the latest step."""
        self.steps = 0

    @property
    def norm(self) -> Tensor:
        """The norm of all gradients together."""
        return torch.linalg.vector_norm(self.norms)

    def check(self, result: StepResult, batch: Batch, optimizer: Any, number: int, loss_of: Callable[[dict[str, Any]], float]) -> None:
        """Look at a step's loss, gradients and the optimizer's state, reading one flag from the device.

        number: of the step, from 1. loss_of: measures one record, to name the guilty ones. Raises NumbersError before the update.
        """
        self.norms = self.engine.norms(self.engine.gradients([p for _, p in self.parameters]))
        kept = self.engine.norms([*self.engine.kept(optimizer), None])
        watched = torch.cat([self.norms, kept.to(self.norms.device), result.loss.float()[None].to(self.norms.device)])
        if not bool(torch.isfinite(watched).all()):
            raise self.not_finite(result, batch, optimizer, number, loss_of)
        self.had_gradient |= self.norms > 0
        self.steps += 1
        if self.steps == STEPS_TO_GRADIENTS:
            self.require_gradients(number)

    def finish(self, number: int) -> None:
        """The same at the end of a run of fewer steps; after one or two a module's A may rightly have none, but not all of it."""
        if 0 < self.steps < STEPS_TO_GRADIENTS:
            self.require_gradients(number, whole_modules=self.steps < STEPS_TO_GRADIENTS - 1)

    def not_finite(
        self, result: StepResult, batch: Batch, optimizer: Any, number: int, loss_of: Callable[[dict[str, Any]], float]
    ) -> NumbersError:
        """Say which step, which records and which tensor; only a run that ends pays for finding out."""
        loss = float(result.loss)
        bad = None if self.engine.sharded else first_bad(self.model, optimizer)
        if math.isfinite(loss):
            what = f"the loss is {loss:.4f}, but {bad or 'the gradient norm'} is not finite (records: {names(batch.records)})"
        else:
            # a record alone cannot be measured where every process holds a part of the weights
            guilty = [] if self.engine.sharded else [record for record in batch.records if not math.isfinite(loss_of(record))]
            guilty = guilty or batch.records
            what = f"the loss is {loss} (records: {names(guilty)}; first bad tensor: {bad or 'none, it arises in the computation'})"
        todo = (
            "No weight was changed by this step, and checkpoints before it are whole. Lower train.learning_rate, or look at these records."
        )
        return NumbersError(f"step {number}", what, todo)

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
