"""The processes that train together: who this one is, and how all of them come to the same decision or the same error.

Launched by `tnl train --num-processes`, torchrun or accelerate launch, which all set RANK, WORLD_SIZE and LOCAL_RANK.
"""

import atexit
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from tnl import errors
from tnl.errors import RecipeError, TnlError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Crew:
    """One process's place among all. A crew of one does nothing that costs anything."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    save_on_each_node: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process speaks to the person."""
        return self.rank == 0

    @property
    def saves(self) -> bool:
        """Whether this process writes a run's files: the first of all, or of its machine."""
        return self.leads or (self.save_on_each_node and self.local_rank == 0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside for one process goes wrong for all, once: the first of them says it, the others end with its code."""
        raised: BaseException | None = None
        try:
            yield
        except (Exception, SystemExit) as error:
            raised = error
        if self.size == 1:
            if raised is not None:
                raise raised
            return
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, describe(raised))
        who = next((rank for rank, one in enumerate(told) if one is not None), None)
        if who is None:
            return
        kind, code, parts = told[who]
        if not hasattr(errors, kind) and raised is not None:
            raise raised
        if not self.leads or not hasattr(errors, kind):
            self.leave(code, 1 if hasattr(errors, kind) else 5)
        where, what, todo = parts
        raise getattr(errors, kind)(where, what if who == 0 else f"{what} (process {who} of {self.size})", todo)

    def leave(self, code: int, seconds: float = 1) -> NoReturn:
        """End with this code, but after another process has spoken: a launcher ends all as soon as one has ended."""
        time.sleep(seconds)
        raise SystemExit(code)

    @contextlib.contextmanager
    def said_once(self) -> Iterator[None]:
        """What goes wrong in training goes wrong for all in the same step: the first process says it."""
        try:
            yield
        except TnlError as error:
            if self.leads:
                raise
            self.leave(error.exit_code)

    def require_same(self, values: dict[str, Any]) -> None:
        """Raise, on all, where a process has another recipe or other data: the first field that differs is named."""
        if self.size == 1:
            return
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, values)
        for rank, theirs in enumerate(told):
            changed = [name for name in {**told[0], **theirs} if told[0].get(name) != theirs.get(name)]
            if not changed:
                continue
            name = changed[0]
            old, new = (str(one.get(name))[:40] for one in (told[0], theirs))
            if not self.leads:
                self.leave(RecipeError.exit_code)
            what = f"process {rank} of {self.size} has another {name} ({new}) than process 0 ({old})"
            raise RecipeError("", what, "Give every machine the same recipe, data and base.")

    def share(self, value: Value) -> Value:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        held: list[Any] = [value if self.leads else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank, for all."""
        if self.size == 1:
            return [value]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, value)
        return told

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def most(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


def describe(error: BaseException | None) -> tuple[str, int, tuple[str, ...]] | None:
    """An error as it can be sent: kind, exit code, words."""
    if isinstance(error, TnlError):
        return type(error).__name__, error.exit_code, (error.where, error.what, error.todo)
    code = getattr(error, "code", 70)  # a SystemExit's; anything else is our bug
    return None if error is None else ("", code if isinstance(code, int) else 0, ())


def here() -> Crew:
    """This process's place, as its launcher set it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Crew()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    return Crew(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")), local_size)


def join(use_cpu: bool, timeout: int = 1800, backend: str | None = None, save_on_each_node: bool = False) -> Crew:
    """Meet the other processes that the launcher started; alone, a crew of one. Raises RecipeError for fewer GPUs than processes.

    timeout: seconds after which a process that does not come ends all. backend: of torch.distributed between devices; without it nccl
    on GPUs, gloo on CPUs.
    """
    crew = replace(here(), save_on_each_node=save_on_each_node)
    local_size = crew.local_size
    if crew.size == 1:
        return crew
    on_gpu = not use_cpu and torch.cuda.is_available()
    cards = torch.cuda.device_count()
    if on_gpu and cards < local_size:
        if not crew.leads:
            crew.leave(RecipeError.exit_code)
        what = f"{local_size} processes on a machine of {cards} GPU{'s' * (cards > 1)}"
        raise RecipeError("", what, f"Start {cards} processes a machine, or set train.use_cpu=true.")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "").lower() in ("true", "1"):
            what = f"accelerate's own configuration asks for {name.rpartition('_')[2]}, of which the recipe knows nothing"
            raise RecipeError("", what, "Use train.fsdp or train.deepspeed, and accelerate launch without it.")
    device = torch.device("cuda", crew.local_rank) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # words and offloaded weights travel between hosts, all else between GPUs
        backend = f"cpu:gloo,cuda:{backend or 'nccl'}" if on_gpu else backend or "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=device)
        atexit.register(part)
    return crew


def part() -> None:
    """Leave the others in order: threads of gloo that still run would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
