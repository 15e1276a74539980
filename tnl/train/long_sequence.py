"""One row of any length with the gradients of full backpropagation through time, in memory that does not grow with it.

A layer's recurrent state is all that crosses from one segment of a row to the next. Pass 1 runs the segments in order without
gradients and keeps the states each one starts from. Pass 2 runs them in reverse: each forward again, with gradients, from its
stored states, then backward from its own loss and from the gradient that the segment behind it left for the states between them.

Randomness (dropout): every segment's generators start from a seed that is drawn once a row, so both passes, and any recomputation
between stored states, see the same masks; the generators go on afterwards as if nothing but that seed had been drawn.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnl.data.collate import record_keys
from tnl.evaluate.perplexity import causal_lm, supervised_positions
from tnl.model.state import TransnormerCache
from tnl.model.stream import to_device
from tnl.train.state_store import Offload, Placement, StateStore, on_host, place, state_bytes

Mode = Literal["fast", "lean"]
Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def streamed_backward(
    model: nn.Module,
    batch: Batch,  # as collate_long or collate_rows makes it, [1, T]; on the CPU, memory-mapped or not
    segment_length: int,
    loss: Loss,  # sum over hidden [M, D] and targets [M]
    *,
    supervised: float,
    offload: Offload = "auto",
    mode: Mode = "fast",
    every: int | None = None,
) -> Tensor:
    """Add the gradients of one row's loss / supervised to the parameters, whatever the row's length; returns that loss.

    segment_length: tokens whose activations live at once. offload: where states wait (state_store.place). mode: fast keeps a segment's
    activations, lean computes each layer again in the backward pass; GLUs that the model computes again stay so in fast. every: keep
    every so many segments' states and compute the others again (default: each, or as many as memory holds). Raises MemoryBudgetError
    where not even that fits; ValueError.
    """
    if segment_length < 1 or (every is not None and every < 1):
        raise ValueError("a segment holds at least one token, and a group at least one segment")
    if batch["input_ids"].shape[0] != 1:
        raise ValueError("one row is streamed at a time")
    device = next(model.parameters()).device
    segments = cut(batch, segment_length)
    stream = _Stream(model, batch, segments, loss, supervised, mode == "lean", seed=int(torch.randint(2**62, ())))
    total = torch.zeros((), device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for chain in chains(segments):
            if every is None:
                placed = place(len(chain), segment_length, state_bytes(causal_lm(model).config), offload, device)
            else:
                placed = Placement(on_host(offload, device), every)
            store = StateStore(device, placed.host)
            try:
                total = total + stream.two_passes(chain, store, placed.every)
            finally:
                store.settle()
    return total


@dataclass(frozen=True)
class Segment:
    """Tokens start ... stop - 1 of a row."""

    start: int
    stop: int
    continues: bool
    """Its first token goes on with the sequence before it, so it begins from a state."""
    learned: bool
    """One of its tokens predicts a supervised one."""


def cut(batch: Batch, length: int) -> list[Segment]:
    """A row's segments of `length` tokens, the last one of what is left."""
    total, positions = batch["input_ids"].shape[1], batch.get("position_ids")
    segments = []
    for start in range(0, total, length):
        stop = min(start + length, total)
        continues = start > 0
        if continues and positions is not None:
            before, first = int(positions[0, start - 1]), int(positions[0, start])
            continues = first == before + 1
        segments.append(Segment(start, stop, continues, bool(len(targets_of(batch, start, stop)[0]))))
    return segments


def targets_of(batch: Batch, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which tokens of a segment, counted from its start, predict a supervised token, and that token: the last one's stands behind it."""
    window = {name: batch[name][:, start : stop + 1] for name in ("labels", "position_ids") if name in batch}
    return supervised_positions(window)


def chains(segments: list[Segment]) -> list[list[int]]:
    """Indices of the segments through which gradients flow, those that hand states on to each other together.

    A segment behind the last supervised token of its sequence has no part in any gradient, and is not computed.
    """
    found: list[list[int]] = []
    needed = False  # by the segment behind
    for i in reversed(range(len(segments))):
        if needed:
            found[-1].append(i)
        elif segments[i].learned:
            found.append([i])
        needed = segments[i].continues and (needed or segments[i].learned)
    return [chain[::-1] for chain in reversed(found)]


@dataclass
class _Stream:
    """The two passes over one row."""

    model: nn.Module
    batch: Batch
    segments: list[Segment]
    loss: Loss
    supervised: float
    lean: bool
    seed: int

    def __post_init__(self) -> None:
        self.inner: Any = causal_lm(self.model).model
        self.device = next(self.model.parameters()).device

    def two_passes(self, chain: list[int], store: StateStore, every: int) -> Tensor:
        """The loss of a chain of segments, the first of which starts from zero. every: how many segments share one kept start."""
        groups = [chain[i : i + every] for i in range(0, len(chain), every)]
        states = None
        for group, following in pairwise(groups):
            for i in group:
                states = self.advance(i, states)
            store.put(following[0], states or [])
        del states
        total, grads = torch.zeros((), device=self.device), None
        for group in reversed(groups):
            start = None if group[0] == chain[0] else store.take(group[0])
            self.fill(group, start, store)
            for i in reversed(group):
                states = start if i == group[0] else store.take(i)
                store.fetch(i - 1 if i > group[0] else i - every)  # comes while this segment is computed
                value, grads = self.backward(i, states, grads)
                total = total + value
        return total

    def fill(self, group: list[int], start: list[Tensor] | None, store: StateStore) -> None:
        """Compute the states inside a group again from those it starts from."""
        states = start
        for i in group[:-1]:
            states = self.advance(i, states)
            store.put(i + 1, states)

    def advance(self, i: int, states: list[Tensor] | None) -> list[Tensor]:
        """The states after segment i, without gradients."""
        with torch.no_grad(), recomputing(self.inner.layers, False):
            return self.forward(i, states)[1]

    def backward(self, i: int, states: list[Tensor] | None, grads: list[Tensor | None] | None) -> tuple[Tensor, list[Tensor | None] | None]:
        """Backward through segment i: its loss, and the gradient of the states it starts from (None: it starts from zero).

        grads: the gradient of the states after it, from the segments behind.
        """
        leaves = None if states is None else [state.detach().requires_grad_() for state in states]
        outputs: list[Tensor] = []
        cotangents: list[Tensor | None] = []
        value = torch.zeros((), device=self.device)
        with recomputing(self.inner.layers, self.lean):
            hidden, finals = self.forward(i, leaves)
            segment = self.segments[i]
            if segment.learned:
                index, targets = targets_of(self.batch, segment.start, segment.stop)
                if len(index) < len(hidden):
                    hidden = hidden.index_select(0, to_device(index, self.device))
                own = self.loss(hidden, to_device(targets.long(), self.device)) / self.supervised
                outputs, cotangents, value = [own], [None], own.detach()
            for final, grad in zip(finals, grads or []):
                if grad is not None and final.requires_grad:
                    outputs.append(final)
                    cotangents.append(grad)
            torch.autograd.backward(outputs, cotangents)
        return value, None if leaves is None else [leaf.grad for leaf in leaves]

    def forward(self, i: int, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [T, D] of segment i and the states after it."""
        segment = self.segments[i]
        torch.manual_seed(self.seed + i)
        cache = TransnormerCache(len(self.inner.layers))
        if states is not None:
            cache.states = list(states)
        window = slice(segment.start, segment.stop)
        ids = to_device(self.batch["input_ids"][:, window].long(), self.device)
        positions = to_device(self.positions(segment).long(), self.device)
        keys = self.dropout_keys(segment)
        keys = None if keys is None else to_device(keys, self.device)
        out = self.inner(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, dropout_keys=keys)
        return out.last_hidden_state[0], cache.states  # type: ignore[return-value]

    def positions(self, segment: Segment) -> Tensor:
        """[1, T]: they go on from segment to segment; a 0 begins a sequence."""
        if "position_ids" in self.batch:
            return self.batch["position_ids"][:, segment.start : segment.stop]
        return torch.arange(segment.start, segment.stop)[None]

    def dropout_keys(self, segment: Segment) -> Tensor | None:
        """[1, T] int32: what each token's dropout mask is drawn from; made where the row has but one record."""
        if "draw" in self.batch:
            return record_keys(self.batch, torch.arange(segment.start, segment.stop))[None]
        keys = self.batch.get("dropout_keys")
        return None if keys is None else keys[:, segment.start : segment.stop]


@contextlib.contextmanager
def recomputing(layers: nn.ModuleList, on: bool) -> Iterator[None]:
    """Inside, every layer is computed again in the backward pass (of a model in training mode), or none is; afterwards as before."""
    wanted: dict[str, Any] = {"gradient_checkpointing": on, "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False)}
    if on:
        wanted["glu_again"] = False  # its layer is
    before = [{name: vars(layer)[name] for name in wanted if name in vars(layer)} for layer in layers]
    for layer in layers:
        vars(layer).update(wanted)
    try:
        yield
    finally:
        for layer, values in zip(layers, before):
            for name in wanted:
                vars(layer).pop(name, None)
            vars(layer).update(values)
