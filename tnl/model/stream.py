"""Read a document of any length forward, segment by segment: the state goes on, nothing else stays.

For reading a prompt in, and for the loss of a document by position. The ids may lie in a memory-mapped file: a segment is
read when its turn comes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tnl.data.template import IGNORED
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.state import TransnormerCache

SEGMENT = 4096
"""Tokens read at once: on a GPU more are no faster."""
FIRST_BUCKET = 1024
"""Positions before this one make the first bucket; every further one is as long as all before it."""
BUCKETS = 40

Ids = Sequence[int] | np.ndarray | Tensor
"""One document, [T]."""


@dataclass(frozen=True)
class Bucket:
    """The loss of the tokens at positions start ... stop - 1 of their documents."""

    start: int
    stop: int
    tokens: int
    loss: float
    """Mean negative log-likelihood in nats."""

    @property
    def value(self) -> float:
        """Perplexity; infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class LossByPosition:
    """Token losses summed by position: up to `first`, up to twice that, up to four times ...; the device is read at the end alone."""

    def __init__(self, device: torch.device, first: int = FIRST_BUCKET) -> None:
        self.edges = first * 2 ** torch.arange(BUCKETS - 1)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums, self.counts = torch.zeros(BUCKETS, dtype=exact, device=device), torch.zeros(BUCKETS, dtype=torch.int64)

    def add(self, positions: Tensor, losses: Tensor) -> None:
        """positions [M] on the CPU, losses [M] on the device."""
        bucket = torch.bucketize(positions, self.edges, right=True)
        self.counts += torch.bincount(bucket, minlength=BUCKETS)
        # few buckets at a time: a sum each, in a fixed order
        for i in bucket.unique().tolist():
            mine = to_device((bucket == i).nonzero()[:, 0], losses.device)
            self.sums[i] += losses.index_select(0, mine).to(self.sums.dtype).sum()

    def buckets(self) -> list[Bucket]:
        """The mean of each bucket that has a token."""
        bounds = [0, *self.edges.tolist(), 2**62]
        rows = zip(bounds, bounds[1:], self.counts.tolist(), self.sums.tolist())
        return [Bucket(start, stop, tokens, total / tokens) for start, stop, tokens, total in rows if tokens]


@torch.inference_mode()
def hidden_states(
    model: TransnormerForCausalLM, ids: Ids, cache: TransnormerCache | None = None, *, segment_length: int = SEGMENT
) -> Iterator[tuple[int, Tensor]]:
    """For each segment the index of its first token and its final hidden states [n, D]; `cache` goes on, in place.

    The model's mode is the caller's. Raises ValueError for a segment length below 1.
    """
    if segment_length < 1:
        raise ValueError("a segment holds at least one token")
    cache = TransnormerCache(len(model.model.layers)) if cache is None else cache
    device = model.model.embed_tokens.weight.device
    for start in range(0, len(ids), segment_length):
        part = to_device(piece(ids, start, start + segment_length), device)
        yield start, model.model(input_ids=part[None], past_key_values=cache, use_cache=True).last_hidden_state[0]


@torch.inference_mode()
def prefill(model: TransnormerForCausalLM, ids: Ids, cache: TransnormerCache, *, segment_length: int = SEGMENT) -> Tensor:
    """Read ids (at least one) into the cache, in place; returns the logits after the last, [1, V] float32.

    However the ids are cut into segments and calls, state and logits are the same within rounding.
    """
    hidden = None
    for _, hidden in hidden_states(model, ids, cache, segment_length=segment_length):  # noqa: B007
        pass
    if hidden is None:
        raise ValueError("there is nothing to read")
    return at_least_float32(model.lm_head(hidden[-1:]))


@torch.inference_mode()
def token_losses(
    model: TransnormerForCausalLM, ids: Ids, labels: Ids | None = None, *, segment_length: int = SEGMENT, chunk: int = 1024
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each segment the positions [M] of the supervised tokens it predicts (on the CPU) and their losses [M] (on the device).

    labels: as long as ids, -100 where a token is not supervised; None: all are but the first. chunk: positions whose logits exist at
    once. The last token of a segment predicts the first of the next.
    """
    labels = ids if labels is None else labels
    for start, hidden in hidden_states(model, ids, segment_length=segment_length):
        targets = piece(labels, start + 1, start + 1 + len(hidden))
        index = (targets != IGNORED).nonzero()[:, 0]
        if not len(index):
            continue
        wanted = to_device(targets[index], hidden.device)
        rows = hidden[: len(index)] if len(index) == int(index[-1]) + 1 else hidden.index_select(0, to_device(index, hidden.device))
        parts = zip(rows.split(chunk), wanted.split(chunk))
        losses = [F.cross_entropy(at_least_float32(model.lm_head(x)), t, reduction="none") for x, t in parts]
        yield index + start + 1, torch.cat(losses)


def loss_by_position(
    model: TransnormerForCausalLM,
    documents: Iterable[tuple[Ids, Ids | None]],
    *,
    segment_length: int = SEGMENT,
    chunk: int = 1024,
    first: int = FIRST_BUCKET,
) -> list[Bucket]:
    """The mean loss of all documents' supervised tokens by position, in LossByPosition's buckets.

    Where it falls with the distance, the model uses what it read long before. documents: (ids, labels or None), read one by one.
    Reads the device once.
    """
    sums = LossByPosition(model.model.embed_tokens.weight.device, first)
    for ids, labels in documents:
        for positions, losses in token_losses(model, ids, labels, segment_length=segment_length, chunk=chunk):
            sums.add(positions, losses)
    return sums.buckets()


def total(buckets: Sequence[Bucket]) -> Bucket:
    """All buckets as one."""
    tokens = sum(bucket.tokens for bucket in buckets)
    loss = math.fsum(bucket.loss * bucket.tokens for bucket in buckets) / tokens if tokens else math.nan
    return Bucket(0, max((bucket.stop for bucket in buckets), default=0), tokens, loss)


def piece(ids: Ids, start: int, stop: int) -> Tensor:
    """ids[start:stop] as int64 on the CPU, whatever holds them."""
    part: Any = ids[start:stop]
    return part.to("cpu", torch.int64) if isinstance(part, Tensor) else torch.from_numpy(np.array(part, dtype=np.int64))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x there; the computation that is under way is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
