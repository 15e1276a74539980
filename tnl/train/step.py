"""One optimizer step: records in, gradients out. Order, schedule, logging and saving are Trainer's.

The loss is the mean over all supervised tokens of the step, however its records are laid out: 8 batches of 1, 1 batch of 8, packed
or padded give the same gradients within float error, and so does a last step of fewer records.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnl.data.collate import collate_long, collate_padded, collate_rows
from tnl.data.packing import pack
from tnl.data.template import IGNORED
from tnl.errors import DataError, MemoryBudgetError
from tnl.evaluate.perplexity import (
    SMALLEST_BUDGET,
    causal_lm,
    count_supervised,
    hidden_states,
    is_out_of_memory,
    release_memory,
    supervised_positions,
)
from tnl.kernels.linear_cross_entropy import linear_cross_entropy
from tnl.model.stream import to_device
from tnl.train import recomputation
from tnl.train.crew import Crew
from tnl.train.engines import Engine
from tnl.train.graphed import Graphed
from tnl.train.long_sequence import streamed_backward
from tnl.train.recomputation import Level
from tnl.train.state_store import Offload

ROUND = 64
"""Tokens: on a GPU rows are filled up to a multiple of it."""
SHORTEST_SEGMENT = 256
"""Tokens: shorter segments than this are not tried when memory runs out."""


@dataclass
class Rows:
    """How the records of a step become rows, and how these shrink when memory runs out."""

    budget: int
    """Tokens a packed row may have; a longer record has a row of its own."""
    padded: int | None = None
    """None: packed end to end. Else records that are padded to one length and computed at once."""
    pad_id: int = 0
    chunk: int = 1024
    """Positions whose logits exist at once."""
    label_smoothing: float = 0.0
    segment_length: int | None = None
    """A row of more tokens is computed in segments; None: every row is whole."""
    offload: Offload = "auto"
    """Where the states between segments wait."""
    multiple: int = 1
    """Whole rows are filled up to a multiple of so many tokens (ROUND on a GPU), of more where they are longer (`step_of`), and their
    supervised positions to one of eight times as many: few shapes, whose products are quick and whose CUDA graphs come again."""
    shared: int = 0
    """Tokens that all records of the run begin with (packing.shared_tokens): a packed row has them once. Dropout takes the same of them in
    every record of a step, so that its masks, too, are the same however rows are laid out."""
    level: Level = "none"
    """What the memory plan has computed again in the backward pass; what is, recomputation.level_of says."""
    say: Callable[[str], None] = print

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run lays out its rows, and rounds, as before."""
        layout = {"budget": self.budget, "padded": self.padded, "chunk": self.chunk, "segment_length": self.segment_length}
        return {**layout, "shared": self.shared, "checkpointing": recomputation.level_of(model)}

    def restore(self, state: dict[str, Any], model: nn.Module) -> None:
        """Take a checkpoint's layout."""
        self.budget, self.padded, self.chunk = state["budget"], state["padded"], state["chunk"]
        self.segment_length, self.shared = state["segment_length"], state["shared"]
        recomputation.use(model, state["checkpointing"])

    def batches(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """The rows as tensors on the CPU."""
        if self.padded is None:
            return [self.collate(row) for row in pack(records, self.budget, self.shared)]
        whole = [record for record in records if not self.streams(len(record["input_ids"]))]
        long = [collate_long(record) for record in records if self.streams(len(record["input_ids"]))]
        return long + [collate_padded(whole[i : i + self.padded], self.pad_id) for i in range(0, len(whole), self.padded)]

    def collate(self, row: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A packed row; one that is computed in segments is not filled up, and stays where it lies where it is one record."""
        if self.streams(self.tokens(row)):
            return collate_long(row[0]) if len(row) == 1 else collate_rows(row)
        return collate_rows(row, shared=self.shared, multiple=self.step_of(self.tokens(row)), pad_id=self.pad_id)

    def step_of(self, tokens: int) -> int:
        """What a row of so many tokens is filled up to a multiple of: at most 16 lengths from each power of 2 to the next."""
        return self.multiple if self.multiple == 1 else max(self.multiple, 2 ** (tokens.bit_length() - 1) // 16)

    def tokens(self, row: Sequence[Mapping[str, Any]]) -> int:
        """Tokens that are computed of a row."""
        return sum(len(record["input_ids"]) - self.shared for record in row) + self.shared

    def supervised(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """supervised_positions, filled up with targets that are ignored; both empty where there are none."""
        index, targets = supervised_positions(batch)
        fill = (0, -len(index) % (8 * self.multiple)) if self.multiple > 1 else (0, 0)
        return F.pad(index, fill), F.pad(targets, fill, value=IGNORED)

    def idle(self) -> dict[str, Tensor]:
        """A row that teaches nothing, for a process that must compute as many as the others."""
        size = self.shared + 2
        return collate_rows([{"id": "", "input_ids": [self.pad_id] * size, "labels": [IGNORED] * size}], shared=self.shared)

    def streams(self, tokens: int) -> bool:
        """Whether a row of so many tokens, filled up or not, is computed in segments."""
        return self.segment_length is not None and tokens + -tokens % self.step_of(tokens) > self.segment_length

    def shrink(self, model: nn.Module, records: Sequence[dict[str, Any]]) -> bool:
        """Make the next attempt smaller, the same gradients: half the row, GLUs and then layers again, segments, fewer logits.

        False where nothing is left to try.
        """
        longest = max(len(record["input_ids"]) for record in records)
        if self.padded is not None and self.padded > 1:
            self.padded //= 2
            self.say(f"out of memory: from now on {self.padded} padded records at once; the loss and its gradients stay the same")
        elif self.padded is None and len(records) > 1 and self.budget > max(longest, SMALLEST_BUDGET):
            self.budget = max(min(self.budget, self.tokens(records)) // 2, SMALLEST_BUDGET)
            self.say(f"out of memory: from now on rows of at most {self.budget} tokens; the loss and its gradients stay the same")
        elif level := recomputation.leaner(model):
            recomputation.use(model, level)
            how = "the layers' GLUs computed again, a fifth slower" if level == "glu" else "train.gradient_checkpointing, a third slower"
            self.say(f"out of memory: from now on with {how}; the gradients stay the same")
        elif min(longest, self.segment_length or longest) > SHORTEST_SEGMENT:
            self.segment_length = max(min(longest, self.segment_length or longest) // 2 // 64 * 64, SHORTEST_SEGMENT)
            self.budget = min(self.budget, self.segment_length)
            self.say(f"out of memory: from now on longer rows in segments of {self.segment_length} tokens; the gradients stay the same")
        elif self.chunk > SMALLEST_BUDGET:
            self.chunk //= 4
            self.say(f"out of memory: from now on logits of {self.chunk} tokens at once")
        else:
            return False
        return True


@dataclass(frozen=True)
class StepResult:
    """What a step computed; the gradients stand in the parameters."""

    loss: Tensor
    """Mean over the step's supervised tokens: a float32 scalar on the model's device, not yet read."""
    tokens: int
    """Real tokens; padding does not count."""
    supervised: int
    rows: int


def step(
    model: nn.Module,
    records: Sequence[dict[str, Any]],
    rows: Rows,
    seed: int | None = None,
    engine: Engine | None = None,
    graphed: Graphed | None = None,
) -> StepResult:
    """Add the gradients of one optimizer step to the parameters, which had none.

    engine: where several processes train together, each computes its share; loss and gradients are those of all records.
    graphed: computes rows as CUDA graphs; None: eagerly.
    seed: where the step's random numbers start, so that a repeated step repeats them; an adapter's dropout masks are a function of it,
    of the record's file and number and of the token's position in the record, however rows are laid out. Reads nothing from the device.
    Raises DataError where no token is supervised, MemoryBudgetError where even the smallest rows do not fit.
    """
    supervised = sum(map(count_supervised, records))
    if not supervised:
        raise DataError(names(records), "no token of these records is supervised", "Give records with an answer.")
    if seed is not None:
        shared = {"shared_draw": (rows.shared, seed_of(seed, "shared tokens"))} if rows.shared else {}
        # of the id, the file's name without its folder: a run is the same wherever its data lies
        records = [{**record, "draw": seed_of(seed, Path(str(record["id"])).name), **shared} for record in records]
    engine = engine or alone(model)
    mine = engine.share(records)
    while True:
        if seed is not None:
            seed_all(seed)
        total, count, failed = torch.zeros((), device=engine.device), 0, False
        try:
            total, count = forward_backward(model, rows, mine, supervised, engine, graphed)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or engine.sharded:
                raise
            failed = True
        # outside the handler, so that its traceback no longer holds the activations
        total, failed = engine.settle(model, total, failed)
        if not failed:
            break
        model.zero_grad(set_to_none=True)
        spared = graphed is not None and graphed.give_up()
        release_memory()
        if spared:
            rows.say("out of memory: from now on without CUDA graphs, whose memory is free again; the gradients stay the same")
        elif not rows.shrink(model, records):
            raise MemoryBudgetError("", *too_large(records))
    return StepResult(total, sum(len(record["input_ids"]) for record in records), supervised, count)


def alone(model: nn.Module) -> Engine:
    """One process on the model's device."""
    return Engine(Crew(), next(model.parameters()).device)


def forward_backward(
    model: nn.Module,
    rows: Rows,
    records: Sequence[dict[str, Any]],
    supervised: int,
    engine: Engine | None = None,
    graphed: Graphed | None = None,
) -> tuple[Tensor, int]:
    """Row by row: each row's graph is gone before the next begins. Returns these records' part of the loss and how many rows there were."""
    engine = engine or alone(model)
    device, share = engine.device, torch.tensor(supervised / engine.scale)
    total, share_there = torch.zeros((), device=device), to_device(share, device)
    batches = rows.batches(records)
    passes = engine.passes(len(batches))
    batches += [rows.idle() for _ in range(passes - len(batches))]
    for number, batch in enumerate(batches, start=1):
        if len(batch["input_ids"]) == 1 and rows.streams(batch["input_ids"].shape[1]):
            total += streamed(model, batch, rows, float(share)).float()
            continue
        index, targets = rows.supervised(batch)
        if not len(targets) and not engine.sharded:
            continue
        loss = partial(row_loss, model, rows)
        value = None if graphed is None else graphed.run(batch, index, targets, share, loss)
        if value is None:
            compute = partial(loss, batch, to_device(index, device), to_device(targets, device))
            value = engine.run(model, lambda compute=compute: compute() / share_there, number == passes)  # type: ignore[misc]
        total += value.float()
    return total / engine.scale, len(batches)


def row_loss(model: nn.Module, rows: Rows, batch: dict[str, Tensor], index: Tensor, targets: Tensor) -> Tensor:
    """Sum of the token losses of one batch; index [M]: which of its positions predict targets [M], -100 where a target is ignored."""
    hidden = hidden_states(model, batch, index.device)
    return head_loss(model, hidden.index_select(0, index), targets, rows)


def streamed(model: nn.Module, batch: dict[str, Tensor], rows: Rows, supervised: float) -> Tensor:
    """`forward_backward` of one row in segments; with gradient checkpointing on, layers are recomputed inside them."""
    loss = partial(head_loss, model, rows=rows)
    mode, length = "lean" if recomputation.level_of(model) in ("layer", "host") else "fast", rows.segment_length or SHORTEST_SEGMENT
    return streamed_backward(model, batch, length, loss, supervised=supervised, offload=rows.offload, mode=mode)  # type: ignore[arg-type]


def head_loss(model: nn.Module, hidden: Tensor, targets: Tensor, rows: Rows) -> Tensor:
    """Sum of the cross entropies of hidden [M, D] against targets [M], chunk by chunk.

    A plain head goes through the kernel; one that an adapter wraps, or a smoothed loss, through the module itself.
    """
    base = causal_lm(model)
    head = base.get_output_embeddings()
    if plain_head(head, rows):
        return linear_cross_entropy(hidden, head.weight, targets, rows.chunk, base.model.ops.cross_entropy_)
    total = hidden.new_zeros((), dtype=torch.float32)
    for x, t in zip(hidden.split(rows.chunk), targets.split(rows.chunk)):
        total = total + checkpoint(module_loss, head, x, t, rows.label_smoothing, use_reentrant=False)  # type: ignore[operator]
    return total


def plain_head(head: nn.Module, rows: Rows) -> bool:
    """Whether head and loss are the kernel's: no adapter on the head, no smoothing."""
    return type(head) is nn.Linear and head.bias is None and not rows.label_smoothing


def module_loss(head: nn.Module, x: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Sum of the cross entropies of head(x) [M, vocabulary] against targets [M], in float32."""
    return F.cross_entropy(head(x).float(), targets, reduction="sum", label_smoothing=smoothing)


def seed_of(seed: int, position: int | str) -> int:
    """A 32-bit seed for one step of a run: randomness is a function of the recipe's seed and the step, so a resumed run repeats it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{position}".encode()).digest()[:4], "big")


def seed_all(seed: int) -> None:
    """Set every generator that a collator, a dropout or NEFTune may draw from."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # every GPU's as well


def too_large(records: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What is wrong, and the line that would fit, where one record alone is too much."""
    longest = max(records, key=lambda record: len(record["input_ids"]))
    length = len(longest["input_ids"])
    fits = max(length * 2 // 3 // 8 * 8, 8)
    what = f"out of memory with gradient checkpointing and one record at once ({longest['id']} has {length} tokens)"
    return what, f"This would fit: data.max_length={fits} (or a smaller lora.r)."


def names(records: Sequence[dict[str, Any]], limit: int = 8) -> str:
    """The records' ids, shortened."""
    ids = [str(record["id"]) for record in records]
    return ", ".join(ids[:limit]) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")
