"""Continuous batching: requests are admitted to static slots, read by chunks between decoding steps, and drawn together.

One step of the engine is one decoding step of all running answers and one chunk of one prompt. A prompt is read on its own, at one
shape and from the same boundaries whatever else goes on; decoding has fixed shapes: so an answer does not depend on its neighbours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnl.generate.adapters import Adapters
from tnl.generate.draft import Draft
from tnl.generate.host import Flight, HostSteps, Steps
from tnl.generate.prefixes import Prefixes, State, load_state, model_key, save_state
from tnl.generate.request import Answer, Closed, Piece, QueueFull, Request, Ticket
from tnl.generate.slots import Slots

log = logging.getLogger(__name__)
STATE_WRITES = ("auto", "each-step", "deferred")
DEFER_FROM = 64
"""Slots."""
READING = 4
"""Prompts that are read at a time, a chunk of each in turn: a long one does not keep short ones waiting."""


@dataclass
class Reading:
    """A prompt on its way into the slots that wait for it."""

    ticket: Ticket
    slots: list[int]
    states: list[Tensor | None]
    seen: int = 0
    mark: int = 0
    """Where to keep a copy of the states; 0 is nowhere."""
    kept: State | None = None
    """That copy."""


@dataclass
class Counts:
    """What the engine has done since it was made."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Answers by how they ended."""


class Engine:
    """A model that answers many requests at once. `submit` from any thread; `start` runs it on a thread of its own, or call `step`.

    slots: answers that run at a time. chunk: tokens of a prompt read at once. prefix_bytes: host memory for prefix states.
    queue: requests that may wait for slots.
    state_writes: "each-step", "deferred" (`Slots`), or "auto": see `defers`; ValueError for another word.
    """

    def __init__(
        self,
        model: Any,  # TransnormerForCausalLM
        tokenizer: Any,
        *,
        adapters: Adapters | None = None,
        slots: int = 8,
        chunk: int | None = None,
        prefix_bytes: int = 1 << 30,
        queue: int = 64,
        state_writes: str = "auto",
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.slots = Slots(model, slots, deferred=defers(state_writes, model, slots))
        self.adapters = adapters or Adapters(model)
        self.chunk = chunk or (32 if self.slots.device.type == "cpu" else 2048)
        self.grid = min(self.chunk, 64)
        self.steps = steps_for(model, self.slots, self.adapters, self.chunk, self.grid)
        self.prefixes = Prefixes(prefix_bytes, self.grid, self.steps.demote)
        self.key = model_key(model)
        self.queue = queue
        self.counts = Counts()
        self.closed = False
        """Whether new work is refused."""
        self.error: BaseException | None = None
        """What the engine died of."""
        self.on_death: Callable[[], None] | None = None
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[Reading] = deque()
        self._running: dict[int, Draft] = {}
        self._flights: deque[Flight] = deque()
        """Tokens that are on their way, the oldest first."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- asking

    def submit(self, request: Request, deliver: Callable[[Piece], None] | None = None) -> Ticket:
        """Queue a request; `deliver` gets its pieces on the engine's thread.

        Raises QueueFull, Closed, ValueError for what no request can be, KeyError where its adapter is not loaded.
        """
        vocabulary = self.model.config.vocab_size
        if not request.ids or request.packed.min() < 0 or request.packed.max() >= vocabulary:
            raise ValueError(f"a prompt has at least one id, each from 0 to {vocabulary - 1}")
        if not 1 <= request.n <= len(self.slots) or request.settings.max_new_tokens < 1:
            raise ValueError(f"n is from 1 to {len(self.slots)}, max_new_tokens at least 1")
        ticket = Ticket(request, deliver)
        with self._lock:
            if self.closed:
                raise Closed("no new requests are taken")
            wanted = accumulate([*(one.request.n for one in self._waiting), request.n])
            # those that come while slots are free do not wait, although no step has admitted them yet
            if sum(slots > self.slots.free for slots in wanted) > self.queue:
                raise QueueFull(f"{self.queue} requests wait already")
            if request.adapter is not None:
                self.adapters.hold(request.adapter)
            self._waiting.append(ticket)
        self._wake.set()
        return ticket

    def generate(self, request: Request) -> list[Answer]:
        """All answers of one request; steps the engine itself where no thread does."""
        ticket = self.submit(request)
        while not ticket.done.is_set():
            if self._thread is not None:
                ticket.done.wait()
            else:
                self.step()
        return ticket.answers

    @property
    def load(self) -> dict[str, int]:
        """How many requests wait and are read, how many answers run, how many slots are free."""
        return {
            "waiting": len(self._waiting),
            "reading": len(self._reading),
            "running": len(self._running),
            "free": self.slots.free,
            "slots": len(self.slots),
        }

    # ---------------------------------------------------------------- keeping conversations

    def scope(self, adapter: str | None) -> str:
        """Whose states are whose: the weights, and the adapter's content."""
        return self.key if adapter is None else f"{self.key}+{adapter}"

    def save_state(self, path: Path, ids: tuple[int, ...], adapter: str | None = None, about: Mapping[str, Any] | None = None) -> None:
        """Write what the model remembers after ids, read now where it is not kept. Raises StorageError."""
        scope = self.scope(adapter)
        state = self.prefixes.get(scope, ids) or self._read(ids, adapter)
        if state.ready is not None:
            state.ready.synchronize()
        save_state(path, State(state.ids, tuple(one.to("cpu", copy=True) for one in state.states), about or {}), scope)

    def load_state(self, path: Path, adapter: str | None = None) -> State:
        """Take up a saved state: a prompt that begins with its ids goes on from it without reading them. Raises ModelError."""
        state = load_state(path, self.model, self.scope(adapter))
        self.prefixes.put(self.scope(adapter), state)
        return state

    @torch.inference_mode()
    def _read(self, ids: tuple[int, ...], adapter: str | None) -> State:
        reading = Reading(Ticket(Request(ids, adapter=adapter)), [], self.steps.begin(None, None))
        while reading.seen < len(ids):
            self._read_on(reading)
        return self._state(ids, reading.states)

    @torch.inference_mode()
    def warm(self) -> None:
        """Prepare what else the first requests would wait for: compiled kernels and CUDA graphs, on a GPU."""
        self.steps.warm()

    # ---------------------------------------------------------------- running

    def start(self) -> None:
        """Run on a thread until `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self.error is None and self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Take no new work, end what runs with an error, and end the thread."""
        self.closed = True
        self._stop.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._abort("the engine was stopped")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._wake.clear()
                if not self.step():
                    self._wake.wait()
        except BaseException as error:
            log.critical("the engine died", exc_info=error)
            self.error, self.closed = error, True
            self._abort("the engine died; see the server's log")
            if self.on_death is not None:
                self.on_death()

    def _abort(self, reason: str) -> None:
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for ticket in waiting:
            self._refuse(ticket, Piece(0, finish="error", error=reason))
        while self._reading:
            self._drop_reading(self._reading.popleft(), Piece(0, finish="error", error=reason))
        for draft in list(self._running.values()):
            draft.fail(reason)
            self._close(draft)
        self._flights.clear()

    @torch.inference_mode()
    def step(self) -> bool:
        """One decoding step of all that runs and one chunk of one prompt; False where there was nothing to do."""
        self._sweep()
        self._admit()
        before = len(self._flights)
        decoded = self._decode()
        filled = self._fill()
        # what was on its way before this step has had its time; where nothing else is to do, all is waited for
        self._land(before if decoded or filled else len(self._flights))
        return decoded or filled or before > 0

    def _sweep(self) -> None:
        """Let go of what nobody wants any more."""
        with self._lock:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._refuse(ticket, Piece(0, finish="cancelled"))
        for reading in [reading for reading in self._reading if reading.ticket.cancelled]:
            self._reading.remove(reading)
            self._drop_reading(reading, Piece(0, finish="cancelled"))
        for draft in [draft for draft in self._running.values() if draft.ticket.cancelled]:
            draft.cancel()
            self._close(draft)

    def _admit(self) -> None:
        """First come, first served: the first waits until it has all its slots."""
        while len(self._reading) < READING:
            with self._lock:
                if not self._waiting or self._waiting[0].request.n > self.slots.free:
                    return
                ticket = self._waiting.popleft()
            request, scope = ticket.request, self.scope(ticket.request.adapter)
            slots, found = [self.slots.take() for _ in range(request.n)], self.prefixes.find(scope, request.packed)
            reading = Reading(ticket, slots, self.steps.begin(slots[0], found))
            if found:
                reading.seen = ticket.cached_tokens = len(found.ids)
            mark = self.prefixes.shared(scope, request.packed)
            reading.mark = mark if mark > reading.seen else 0
            self._reading.append(reading)

    def _fill(self) -> bool:
        """Read a chunk of the prompt whose turn it is; once it is read, its answers run."""
        if not self._reading:
            return False
        reading = self._reading.popleft()
        try:
            hidden = self._read_on(reading)
            whole = reading.seen == len(reading.ticket.request.ids)
            logits = self.steps.logits(hidden, self._row(reading)) if whole else None
        except Exception as error:
            # whatever it was, it was this prompt's: nobody else's state was touched
            log.exception("reading a prompt failed")
            self._drop_reading(reading, Piece(0, finish="error", error=f"reading the prompt failed ({type(error).__name__})"))
            return True
        if logits is None:
            self._reading.append(reading)
        else:
            self._launch(reading, logits)
        return True

    def _read_on(self, reading: Reading) -> Tensor:
        """Read up to the next boundary; returns the hidden [1, D] after it."""
        request, start = reading.ticket.request, reading.seen
        end = min(len(request.ids), (start // self.chunk + 1) * self.chunk)
        if start < reading.mark < end:
            end = reading.mark
        hidden, reading.states = self.steps.read(request.ids[start:end], reading.states, start, self._row(reading))
        reading.seen = end
        self.counts.prompt_tokens += end - start
        if end == reading.mark:
            reading.kept = self._state(request.ids[:end], reading.states)
        return hidden

    def _row(self, reading: Reading) -> int:
        return self.adapters.row(reading.ticket.request.adapter)

    def _launch(self, reading: Reading, logits: Tensor) -> None:
        """Put the states that have read the prompt into its slots, and draw each answer's first token from logits [1, V]."""
        drafts = [Draft(reading.ticket, i, self.tokenizer, slot) for i, slot in enumerate(reading.slots)]
        drafts[0].kept = reading.kept
        self._running |= {draft.slot: draft for draft in drafts}
        self._take_off(self.steps.first(logits, reading.states, reading.seen, self._row(reading), drafts))

    def _decode(self) -> bool:
        """One token for every answer that runs, but for those whose last one is on its way."""
        drafts = [draft for _, draft in sorted(self._running.items()) if draft.draws < draft.settings.max_new_tokens]
        if not drafts:
            return False
        self.counts.steps += 1
        self._take_off(self.steps.decode(drafts))
        return True

    def _take_off(self, flight: Flight) -> None:
        self._flights.append(flight)
        if not self.steps.ahead:
            self._land(1)

    def _land(self, count: int) -> None:
        """Take the tokens of the oldest flights and hand on what they say; an answer that fails fails alone."""
        for _ in range(count):
            flight = self._flights.popleft()
            for draft, token, logprob in zip(flight.drafts, *flight.land()):
                if draft.kept is not None and not isinstance(token, str):
                    self.prefixes.put(self.scope(draft.ticket.request.adapter), draft.kept)
                draft.kept = None
                if draft.last is not None:
                    continue  # it has ended since
                draft.ticket.started = draft.ticket.started or time.perf_counter()
                try:
                    if isinstance(token, str):
                        draft.fail(token)
                    else:
                        draft.push(token, logprob)
                except Exception as error:
                    log.exception("an answer failed")
                    draft.fail(f"the answer could not be written ({type(error).__name__})")
                if draft.last is not None:
                    self._close(draft)

    # ---------------------------------------------------------------- ending

    def _close(self, draft: Draft) -> None:
        """Free the slot, keep the state where a next turn may go on from it, and hand over the last piece."""
        last, ticket = draft.last, draft.ticket
        assert last is not None
        if self.prefixes.budget and (draft.ended_by is not None or last.finish == "length"):
            kept = self._state(draft.read, self.steps.states(draft.slot))
            if draft.outstanding:
                draft.kept = kept
            else:
                self.prefixes.put(self.scope(ticket.request.adapter), kept)
        del self._running[draft.slot]
        self.steps.release(draft.slot)
        self.slots.release(draft.slot)
        self.counts.generated_tokens += last.tokens
        self._give_last(ticket, last)

    def _drop_reading(self, reading: Reading, last: Piece) -> None:
        for slot in reading.slots:
            self.slots.release(slot)
        self._refuse(reading.ticket, last)

    def _refuse(self, ticket: Ticket, last: Piece) -> None:
        """End a ticket of which nothing runs."""
        for index, answer in enumerate(ticket.answers):
            if answer.finish is None:
                self._give_last(ticket, Piece(index, finish=last.finish, error=last.error))

    def _give_last(self, ticket: Ticket, last: Piece) -> None:
        if ticket.open == 1 and ticket.request.adapter is not None:
            with suppress(KeyError):
                self.adapters.release(ticket.request.adapter)
        self.counts.finished[last.finish or ""] += 1
        ticket.give(last)

    def _state(self, ids: tuple[int, ...], states: Sequence[Tensor | None]) -> State:
        return State(tuple(ids), self.steps.keep([state for state in states if state is not None]))


def defers(state_writes: str, model: Any, slots: int) -> bool:
    """Whether states are written every 24th token alone.

    auto: from 64 slots of a bfloat16 model on a GPU, where states are most of what a step reads and writes. It costs 0.1% of an
    attention's output (`kernels.deferred`) and half as much memory again. Raises ValueError for a word that is none.
    """
    if state_writes not in STATE_WRITES:
        raise ValueError(f'state_writes is "{state_writes}"; there are {", ".join(STATE_WRITES)}')
    pays = slots >= DEFER_FROM and model.backend == "triton" and model.model.embed_tokens.weight.dtype == torch.bfloat16
    return state_writes == "deferred" or (state_writes == "auto" and pays)


def steps_for(model: Any, slots: Slots, adapters: Adapters, chunk: int, grid: int) -> Steps:
    """How to read and decode where the model is: with the kernels that it runs."""
    if model.backend != "triton":
        return HostSteps(model, slots, adapters, grid)
    # triton is there on Linux alone
    from tnl.generate.device import DeviceSteps

    return DeviceSteps(model, slots, adapters, chunk)
