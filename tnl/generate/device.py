"""Reading and decoding on a GPU: each shape is one CUDA graph, tokens are drawn inside it, and the host is never waited for.

A step's tokens stay on the device, where the next step finds them; the host hears of them one step later. So a draft that a stop id
ended has read that id too by then, and its state is kept as one that has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnl.generate.adapters import Adapters
from tnl.generate.draft import NOT_FINITE, Draft
from tnl.generate.host import Flight, Landed, States
from tnl.generate.prefixes import State
from tnl.generate.request import Logprob
from tnl.generate.slots import Slots, copy_states, forward
from tnl.kernels import dispatch, draw
from tnl.kernels.graphs import Graphs
from tnl.kernels.reference import Projection, Rows

SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of a prompt that are read at once: the shapes that there are graphs for, cut at the engine's chunk."""
RING = 4
"""Buffers that copies under way may be in."""
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


class Uploads:
    """Host arrays sent to a device tensor without waiting: each lies in a pinned buffer that is used again once it has been read."""

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.buffers = [torch.zeros(target.shape, dtype=target.dtype, pin_memory=target.is_cuda) for _ in range(RING)]
        self.arrays = [buffer.numpy() for buffer in self.buffers]
        self.events = [torch.cuda.Event() for _ in range(RING)] if target.is_cuda else []
        self.turn = 0

    @contextmanager
    def next(self, count: int) -> Iterator[np.ndarray]:
        """The array to fill; its first `count` rows are sent at the end."""
        self.turn = (self.turn + 1) % RING
        if self.events:
            self.events[self.turn].synchronize()
        yield self.arrays[self.turn]
        self.target[:count].copy_(self.buffers[self.turn][:count], non_blocking=True)
        if self.events:
            self.events[self.turn].record()


class Sent:
    """Tokens, and log-probabilities where they are wanted, on their way to the host."""

    def __init__(self, drafts: list[Draft], tokens: Tensor, rows: Sequence[int], told: tuple[Tensor, Tensor, Tensor] | None) -> None:
        self.drafts, self.rows = drafts, rows
        self.tokens = fetched(tokens)
        self.told = None if told is None else tuple(map(fetched, told))
        self.event = None
        if tokens.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def land(self) -> Landed:
        if self.event is not None:
            self.event.synchronize()
        tokens = self.tokens.tolist()
        found: list[int | str] = [tokens[row] if tokens[row] >= 0 else NOT_FINITE for row in self.rows]
        return found, [None] * len(found) if self.told is None else self._told(found)

    def _told(self, tokens: Sequence[int | str]) -> list[Logprob | None]:
        assert self.told is not None
        values, best, top = (one.tolist() for one in self.told)
        result: list[Logprob | None] = []
        for i, (token, draft) in enumerate(zip(tokens, self.drafts)):
            wanted = draft.ticket.request.logprobs
            if wanted is None or isinstance(token, str):
                result.append(None)
            else:
                result.append(Logprob(token, values[i], tuple(zip(best[i][:wanted], top[i][:wanted]))))
        return result


def fetched(x: Tensor) -> Tensor:
    """x in (pinned) host memory, once the device gets there."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


class DeviceSteps:
    """`Steps` with the Triton forms, on a GPU (or in Triton's interpreter, without graphs)."""

    ahead = True

    def __init__(self, model: Any, slots: Slots, adapters: Adapters, chunk: int) -> None:
        self.model, self.slots, self.adapters = model, slots, adapters
        self.forms = dispatch.answering(model.model.ops)
        self.graphs = Graphs(slots.device)
        self.sizes = [*(size for size in SIZES if size < chunk), chunk]
        device, dtype = slots.device, slots.states[0].dtype
        self.control = torch.zeros(len(slots), draw.COLUMNS, device=device)
        self.table = np.zeros((len(slots), draw.COLUMNS), dtype=np.float32)
        """The control table as the host has it: every slot's settings."""
        self.inputs = torch.zeros(3 + chunk, dtype=torch.long, device=device)
        """Of a chunk: position of its row's first column, columns of padding before it, adapter, ids."""
        self.staged = [torch.zeros(1, *state.shape[1:], dtype=dtype, device=device) for state in slots.states]
        """The states while a chunk is read: a graph knows no other place."""
        self.tokens = torch.zeros(len(slots), dtype=torch.int32, device=device)
        """[slots]: what the last step has drawn."""
        self.which = torch.zeros(1, dtype=torch.long, device=device)
        """The slot whose states are settled."""
        self.history: Tensor | None = None
        """[slots, V] int32, once somebody wants penalties."""
        self._control, self._inputs = Uploads(self.control), Uploads(self.inputs)
        self._version = adapters.version
        if device.type == "cuda":
            self.beside = torch.cuda.Stream(device)
            """Where states go to the host while steps go on."""

    def warm(self) -> None:
        """Capture every shape of a base model's reading and decoding."""
        if self.slots.deferred:
            self._settle()
        for size in self.slots.buckets:
            self._step(size, False)
        for size in self.sizes:
            self._chunk(size, False, False)
        self._chunk(self.sizes[-1], True, False)

    # ---------------------------------------------------------------- reading

    def begin(self, slot: int | None, found: State | None) -> States:
        states = [torch.zeros_like(state) for state in self.staged] if slot is None else self.slots.views(slot)
        if found is not None:
            if found.ready is not None:
                torch.cuda.current_stream(self.slots.device).wait_event(found.ready)
            copy_states(states, found.states)
        return list(states)

    def read(self, ids: Sequence[int], states: States, seen: int, row: int) -> tuple[Tensor, States]:
        own = [state for state in states if state is not None]
        size = next(size for size in self.sizes if size >= len(ids))
        pad = size - len(ids)
        key = self._chunk(size, len(ids) == self.sizes[-1], bool(row))
        with self._inputs.next(3 + size) as inputs:
            inputs[:3] = seen - pad, pad, row
            inputs[3 : 3 + pad] = 0
            inputs[3 + pad : 3 + size] = ids
        copy_states(self.staged, own)
        logits = self.graphs.run(key)
        copy_states(own, self.staged)
        return logits, states

    def logits(self, read: Tensor, row: int) -> Tensor:
        return read

    def _chunk(self, size: int, whole: bool, adapted: bool) -> tuple[Any, ...]:
        """Key of the graph that reads a chunk of `size` columns into the staged states and gives logits [1, V]; whole: no padding."""

        def body() -> Tensor:
            offset, pad, row, ids = self.inputs[0], self.inputs[1], self.inputs[2:3], self.inputs[3 : 3 + size]
            column = torch.arange(size, device=self.inputs.device)
            start = None if whole else torch.where(column >= pad, pad, 0).int()[None]
            wrap, project = self._adapted(row, adapted)
            rows = Rows((column + offset)[None], start)
            hidden, after = forward(self.model, ids[None], self.staged, rows, wrap, self.forms.read)
            copy_states(self.staged, after)
            return self.forms.head(hidden[:, -1], self.model.model.final_norm, project)

        return self._prepared(("read", size, whole), adapted, body)

    # ---------------------------------------------------------------- decoding

    def first(self, logits: Tensor, states: States, seen: int, row: int, drafts: list[Draft]) -> Flight:
        for draft in drafts:
            self.slots.put(draft.slot, states, seen)
            self._set(draft, row)
        self._send([draft.slot for draft in drafts], drafts, len(self.slots))
        where = torch.tensor([draft.slot for draft in drafts])
        where = where.pin_memory().to(logits.device, non_blocking=True) if logits.is_cuda else where
        spread = logits.expand(len(drafts), -1)
        tokens = self.forms.draw(spread, self.control, self.slots.ids[:, 0], self.slots.seen, slots=where, history=self.history)
        return self._sent(drafts, tokens, list(range(len(drafts))), spread)

    def decode(self, drafts: list[Draft]) -> Flight:
        size = self.slots.bucket()
        key = self._step(size, any(draft.ticket.request.adapter is not None for draft in drafts))
        rows = [draft.slot for draft in drafts]
        self._send(rows, drafts, size)
        logits = self.graphs.run(key)
        return self._sent(drafts, self.tokens[:size], rows, logits)

    def _step(self, size: int, adapted: bool) -> tuple[Any, ...]:
        """Key of the graph that reads and draws a token in each of the first `size` slots and gives the logits [size, V]."""

        def body() -> Tensor:
            control, slots = self.control[:size], self.slots
            wrap, project = self._adapted(control[:, draw.ADAPTER], adapted)
            rows = Rows(slots.seen[:size, None], real=control[:, draw.LIVE : draw.LIVE + 1])
            hidden, _ = forward(self.model, slots.ids[:size], slots.rows(size), rows, wrap, self.forms.step)
            logits = self.forms.head(hidden[:, 0], self.model.model.final_norm, project)
            drawn = self.forms.draw(logits, control, slots.ids[:, 0], slots.seen, history=self.history, advance=True)
            self.tokens[:size].copy_(drawn)
            return logits

        return self._prepared(("step", size, self.history is None), adapted, body)

    def _set(self, draft: Draft, row: int) -> None:
        """Write a slot's settings into the table, and what its prompt holds where penalties look at it."""
        settings = draft.settings
        warmth = 0.0 if settings.greedy else settings.temperature
        cuts = settings.top_k, settings.top_p, settings.min_p
        self.table[draft.slot] = (
            0, row, warmth, *cuts, settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty, 0,
        )  # fmt: skip
        if settings.penalises:
            if self.history is None:
                shape = len(self.slots), self.model.config.vocab_size
                self.history = torch.zeros(shape, dtype=torch.int32, device=self.control.device)
            self.history[draft.slot] = 0
            prompt = torch.tensor(sorted(set(draft.ticket.request.ids)))
            self.history[draft.slot].index_fill_(0, prompt.to(self.control.device), draw.PROMPT)

    def _send(self, rows: Sequence[int], drafts: Sequence[Draft], size: int) -> None:
        """Say which slots draw, and from which numbers."""
        self.table[:, draw.LIVE] = 0
        self.table[rows, draw.LIVE] = 1
        self.table[rows, draw.UNIFORM] = [0.0 if draft.settings.greedy else min(draft.uniform(), BELOW_ONE) for draft in drafts]
        with self._control.next(size) as control:
            control[:] = self.table

    def _sent(self, drafts: list[Draft], tokens: Tensor, rows: Sequence[int], logits: Tensor) -> Sent:
        for draft in drafts:
            draft.draws += 1
        wanted = [draft.ticket.request.logprobs for draft in drafts]
        told = None
        if most := [one for one in wanted if one is not None]:
            index = torch.tensor(rows, device=logits.device)
            values = logits.index_select(0, index).float().log_softmax(-1)
            best = values.topk(min(max(1, *most), values.shape[1]))
            own = values.gather(1, tokens.index_select(0, index).clamp(min=0).long()[:, None])[:, 0]
            told = own, best.indices, best.values
        return Sent(drafts, tokens, rows, told)

    # ---------------------------------------------------------------- both

    def keep(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        copies = [torch.empty_like(state) for state in states]
        copy_states(copies, states)
        return tuple(copies)

    def demote(self, state: State) -> State:
        """A copy in pinned host memory; the steps that follow do not wait for it."""
        if self.slots.device.type != "cuda":
            return state
        beside, event = self.beside, torch.cuda.Event()
        beside.wait_stream(torch.cuda.current_stream(self.slots.device))
        with torch.cuda.stream(beside):
            copies = tuple(map(fetched, state.states))
            event.record(beside)
        for one in state.states:
            one.record_stream(beside)
        return replace(state, states=copies, ready=event)

    def states(self, slot: int) -> list[Tensor]:
        if self.slots.deferred:
            key = self._settle()
            self.which.fill_(slot)
            self.graphs.run(key)
        return self.slots.views(slot)

    def _settle(self) -> tuple[Any, ...]:
        """Key of the graph that writes what waits into the states of the slot `which`."""

        def body() -> Tensor:
            self.slots.settle(self.which, self.forms.fold)
            return self.which

        return self._prepared(("settle",), False, body)

    def release(self, slot: int) -> None:
        self.table[slot] = 0

    def _adapted(self, rows: Tensor, adapted: bool) -> tuple[Any, Projection]:
        if not adapted:
            return None, self.model.lm_head
        return self.adapters.wrap(rows), self.adapters.wrap_head(rows) or self.model.lm_head

    def _prepared(self, key: tuple[Any, ...], adapted: bool, body: Callable[[], Tensor]) -> tuple[Any, ...]:
        """The key, once its graph is there; with adapters it holds the addresses of their bank, and is made anew with it."""
        if self._version != self.adapters.version:
            self._version = self.adapters.version
            self.graphs.known = {known: graph for known, graph in self.graphs.known.items() if not known[-1]}
        key = (*key, adapted)
        if key not in self.graphs.known:
            self.control.zero_()  # no slot is live while it is recorded
            self.graphs.prepare(key, body)
        return key
