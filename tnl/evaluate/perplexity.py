"""The loss of a model on records, by rows: no logits of a whole sequence ever exist, so evaluating takes less memory than training."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnl.data.collate import as_tensor, collate_rows
from tnl.data.packing import LEAST, pack, shared_tokens
from tnl.data.template import IGNORED
from tnl.errors import DataError, MemoryBudgetError, NumbersError
from tnl.model import stream

SMALLEST_BUDGET = 64
"""Tokens: shorter rows than this are not tried when memory runs out."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "dropout_keys")
"""What of a batch the model reads on its device; of a row that says so ("shared") also how many first tokens its records have in common."""


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood, in nats, of the supervised tokens of some records."""

    loss: float
    tokens: int
    """Supervised tokens, the ones the mean is over."""
    records: int
    by_position: tuple[stream.Bucket, ...] = ()
    """The same by the position of a token in its record; empty where no record is long."""

    @property
    def value(self) -> float:
        """exp(loss); infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def causal_lm(model: nn.Module) -> Any:
    """The TransnormerForCausalLM inside a PeftModel, or the model itself; adapters stand inside its modules."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def supervised_positions(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which positions of a batch, counted over its flattened [B, T], predict a supervised token, and that token.

    Position t predicts label t + 1, but never the first token of the next sequence in its row.
    """
    labels, positions = batch["labels"], batch.get("position_ids")
    wanted = labels[:, 1:] != IGNORED
    if positions is not None:
        wanted = wanted & (positions[:, 1:] == positions[:, :-1] + 1)
    row, column = wanted.nonzero(as_tuple=True)
    return row * labels.shape[1] + column, labels[:, 1:][wanted]


def count_supervised(record: Mapping[str, Any]) -> int:
    """Tokens of a record that are predicted and learned: labels but the first, which nothing precedes."""
    return int(numpy.count_nonzero(numpy.asarray(record["labels"])[1:] != IGNORED))


def hidden_states(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """The final hidden states of a batch, flattened to [B T, D]; the head is left to the caller."""
    inputs = {name: stream.to_device(batch[name], device) for name in INPUTS if name in batch}
    return causal_lm(model).model(**inputs, use_cache=False, shared=int(batch.get("shared", 0))).last_hidden_state.flatten(0, 1)


def loss(
    model: nn.Module,
    records: Sequence[Mapping[str, Any]],
    row_budget: int = 4096,
    *,
    chunk: int = 1024,
    after_row: Callable[[], None] | None = None,
) -> Perplexity:
    """Measure `model` on `records` ({"id", "input_ids", "labels"}), in rows of at most `row_budget` tokens (a longer record has one alone).

    What all of them begin with, and none learns, is computed once a row.
    chunk: positions whose logits exist at once. Where memory runs out, both are halved. after_row is called after every row or segment
    and may raise to stop. Draws no random numbers and leaves the model's mode as it was. Raises DataError where nothing is supervised,
    NumbersError naming the record whose loss is not finite, MemoryBudgetError.
    """
    while True:
        try:
            return measure(model, records, row_budget, chunk, after_row)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()
        if row_budget <= SMALLEST_BUDGET:
            longest = max(len(record["input_ids"]) for record in records)
            what = f"out of memory while measuring records (the longest has {longest} tokens)"
            raise MemoryBudgetError("", what, f"This would fit: data.max_length={max(longest // 2, 8)}.")
        row_budget, chunk = row_budget // 2, max(chunk // 2, SMALLEST_BUDGET)


def measure(
    model: nn.Module, records: Sequence[Mapping[str, Any]], row_budget: int, chunk: int, after_row: Callable[[], None] | None
) -> Perplexity:
    """One attempt of `loss`."""
    device = next(model.parameters()).device
    total, tokens = list[float](), 0
    by_position = stream.LossByPosition(device, stream.FIRST_BUCKET)
    common = shared_tokens(records)
    shared = common if common >= LEAST else 0
    # not inference_mode: FSDP2 makes the buffers here, at step 0, that it trains with later
    with evaluating(model), torch.no_grad():
        for row in pack(records, row_budget, shared):
            summed = torch.zeros_like(by_position.sums[0])
            for positions, losses in token_losses(model, row, device, chunk, row_budget, shared):
                by_position.add(positions, losses)
                summed, tokens = summed + losses.sum(dtype=summed.dtype), tokens + len(losses)
                if after_row is not None:
                    after_row()
            if not math.isfinite(value := float(summed)):
                raise not_finite(model, row, device, chunk)
            total.append(value)
    if not tokens:
        raise DataError("", f"none of the {len(records)} records has a supervised token", "Give records with an answer.")
    buckets = by_position.buckets()
    return Perplexity(math.fsum(total) / tokens, tokens, len(records), tuple(buckets) if len(buckets) > 1 else ())


def supervised_places(record: Mapping[str, Any]) -> Tensor:
    """[M]: where in the record its supervised tokens stand."""
    return (as_tensor(record["labels"])[1:] != IGNORED).nonzero()[:, 0] + 1


def not_finite(model: nn.Module, row: Sequence[Mapping[str, Any]], device: torch.device, chunk: int) -> NumbersError:
    """The error for a row whose losses are not finite; each record is measured alone, since one can spoil its neighbours."""
    for record in row:
        value = loss_of(model, record, device, chunk)
        if not math.isfinite(value):
            return NumbersError(record["id"], f"the loss of this record is {value}", "Look at the record and at the model's weights.")
    return NumbersError(row[0]["id"], "the loss of this record and those after it is not finite", "Look at the model's weights.")


def token_losses(
    model: nn.Module,
    row: Sequence[Mapping[str, Any]],
    device: torch.device,
    chunk: int = 1024,
    budget: int = stream.SEGMENT,
    shared: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in their records [M] (on the CPU) and losses [M] of all supervised tokens of a row, in order; a record that is longer than
    budget, alone in its row, is read by segments. shared: as collate_rows.
    """
    length = min(budget, stream.SEGMENT)
    if len(row) == 1 and len(row[0]["input_ids"]) > length:
        yield from stream.token_losses(causal_lm(model), row[0]["input_ids"], row[0]["labels"], segment_length=length, chunk=chunk)
        return
    batch = collate_rows(row, shared=shared)
    index, targets = supervised_positions(batch)
    hidden = hidden_states(model, batch, device)[index.to(device)]
    head = causal_lm(model).get_output_embeddings()
    pieces = zip(hidden.split(chunk), targets.to(device).split(chunk))
    losses = [F.cross_entropy(head(x).float(), t, reduction="none") for x, t in pieces]
    yield torch.cat([supervised_places(record) for record in row]), torch.cat(losses) if losses else torch.zeros(0, device=device)


def loss_of(model: nn.Module, record: Mapping[str, Any], device: torch.device, chunk: int = 1024) -> float:
    """Sum of one record's token losses, whatever it is."""
    with evaluating(model), torch.no_grad():
        return math.fsum(float(losses.sum()) for _, losses in token_losses(model, [record], device, chunk))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, the mode as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator has no error class of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def release_memory() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
