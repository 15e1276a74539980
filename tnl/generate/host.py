"""Reading and decoding with the reference forms, the drawing on the host: a token is known as soon as it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tnl.generate.adapters import Adapters
from tnl.generate.draft import Draft, draw, logprobs_of
from tnl.generate.prefixes import State
from tnl.generate.request import Logprob
from tnl.generate.sampling import History
from tnl.generate.slots import Slots, head, read_chunk

States = list[Tensor | None]
Landed = tuple[Sequence[int | str], Sequence[Logprob | None]]
"""Of each draft the token, or what is wrong; and what it is told about the token."""


class Flight(Protocol):
    """Tokens of some drafts on their way to the host."""

    drafts: list[Draft]

    def land(self) -> Landed:
        """Wait for them."""
        ...


class Steps(Protocol):
    """How an engine reads and decodes on its device."""

    ahead: bool
    """Whether the next step may start before the last one's tokens are on the host."""

    @property
    def demote(self) -> Callable[[State], State] | None:
        """Copies a kept state from the device to the host; None where all are kept there."""
        ...

    def warm(self) -> None:
        """Prepare what would otherwise be prepared at first use."""
        ...

    def begin(self, slot: int | None, found: State | None) -> States:
        """States [1, H, K, V] a layer to read a prompt into, for a slot or apart; found: where they go on from."""
        ...

    def read(self, ids: Sequence[int], states: States, seen: int, row: int) -> tuple[Tensor, States]:
        """Read ids on top of the states with the adapter in the bank's row; what `logits` wants, and the new states."""
        ...

    def logits(self, read: Tensor, row: int) -> Tensor:
        """[1, V] after the last id that was read."""
        ...

    def first(self, logits: Tensor, states: States, seen: int, row: int, drafts: list[Draft]) -> Flight:
        """Put the states into the drafts' slots and draw each one's first token."""
        ...

    def decode(self, drafts: list[Draft]) -> Flight:
        """One more token for each."""
        ...

    def keep(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copies of states that stay as they are."""
        ...

    def states(self, slot: int) -> list[Tensor]:
        """A slot's states where they lie, with all that its answer has read."""
        ...

    def release(self, slot: int) -> None:
        """The slot's answer has ended."""
        ...


class Known:
    """A flight that has arrived."""

    def __init__(self, drafts: list[Draft], logits: Tensor) -> None:
        self.drafts = drafts
        for draft in drafts:
            draft.draws += 1
        tokens = draw(logits, drafts)
        self.landed = tokens, logprobs_of(logits, tokens, drafts)

    def land(self) -> Landed:
        return self.landed


class HostSteps:
    """`Steps` on any device, at few fixed shapes."""

    ahead = False
    demote = None

    def __init__(self, model: Any, slots: Slots, adapters: Adapters, grid: int) -> None:
        self.model, self.slots, self.adapters, self.grid = model, slots, adapters, grid
        self.rows = torch.zeros(len(slots), dtype=torch.long, device=slots.device)
        """[slots]: each row's adapter in the bank."""

    def warm(self) -> None:
        pass

    def begin(self, slot: int | None, found: State | None) -> States:
        return [None] * len(self.slots.states) if found is None else [one.to(self.slots.device, copy=True) for one in found.states]

    def read(self, ids: Sequence[int], states: States, seen: int, row: int) -> tuple[Tensor, States]:
        size = -(-len(ids) // self.grid) * self.grid
        wrap = self.adapters.wrap(torch.tensor([row], device=self.slots.device)) if row else None
        hidden, after = read_chunk(self.model, ids, states, seen, size, wrap)
        return hidden, list(after)

    def logits(self, read: Tensor, row: int) -> Tensor:
        return head(self.model, read, self.adapters.wrap_head(torch.tensor([row], device=self.slots.device)) if row else None)

    def first(self, logits: Tensor, states: States, seen: int, row: int, drafts: list[Draft]) -> Flight:
        for draft in drafts:
            self.slots.put(draft.slot, states, seen)
            self.rows[draft.slot] = row
            if draft.settings.penalises:
                draft.history = History.start([draft.ticket.request.ids], logits.shape[-1], logits.device)
        return Known(drafts, logits.expand(len(drafts), -1))

    def decode(self, drafts: list[Draft]) -> Flight:
        size = self.slots.bucket()
        following = [0] * size
        for draft in drafts:
            following[draft.slot] = draft.ids[-1]
        self.slots.ids[:size].copy_(torch.tensor(following)[:, None])
        wrap = project = None
        if any(draft.ticket.request.adapter is not None for draft in drafts):
            wrap, project = self.adapters.wrap(self.rows[:size]), self.adapters.wrap_head(self.rows[:size])
        logits = self.slots.step(self.model, size, wrap, project)
        return Known(drafts, logits[[draft.slot for draft in drafts]])

    def keep(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(state.to("cpu", copy=True) for state in states)

    def states(self, slot: int) -> list[Tensor]:
        self.slots.settle(torch.tensor([slot], device=self.slots.device))
        return self.slots.views(slot)

    def release(self, slot: int) -> None:
        self.rows[slot] = 0
