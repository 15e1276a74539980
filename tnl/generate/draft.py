"""One answer while it is drawn: its own generator, history and text, so that nothing of it depends on its neighbours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnl.generate.prefixes import State
from tnl.generate.request import Finish, Logprob, Piece, Ticket
from tnl.generate.sampling import History, Settings, finite_rows, sample, seeded
from tnl.generate.text import TextStream

log = logging.getLogger(__name__)
NOT_FINITE = "the model's numbers are not finite for this request"


class Draft:
    """One of a ticket's n answers."""

    def __init__(self, ticket: Ticket, index: int, tokenizer: Any, slot: int) -> None:
        request = ticket.request
        self.ticket, self.index, self.slot = ticket, index, slot
        self.settings: Settings = request.settings
        self.generator = seeded(None if request.seed is None else request.seed + index)
        self.history: History | None = None
        """What has stood before, where the settings ask and the host draws."""
        self.text = TextStream(tokenizer, request.stop, goes_on=request.goes_on)
        self.ids: list[int] = []
        self.last: Piece | None = None
        """The piece that ends it: the engine hands it over once the slot is free."""
        self.ended_by: int | None = None
        """The stop id that ended it, which is no part of it."""
        self.draws = 0
        """Tokens drawn for it, those included that the host has not seen yet."""
        self.kept: State | None = None
        """A state to keep once the next token that comes back is a sound one."""
        self._uniform: list[float] = []
        self._told: list[tuple[int, Logprob | None]] = []
        """Drawn, and held back with their text."""

    @property
    def outstanding(self) -> bool:
        """Whether a token is on its way from the device."""
        return self.draws > len(self.ids) + (self.ended_by is not None)

    @property
    def read(self) -> tuple[int, ...]:
        """The ids that its slot's state has read: the prompt, and every drawn one but the last."""
        ended = () if self.ended_by is None else (self.ended_by,)
        return (*self.ticket.request.ids, *self.ids, *ended)[: len(self.ticket.request.ids) + self.draws - 1]

    def uniform(self) -> float:
        """The generator's next number from 0 to below 1, many fetched at once: the numbers are those of as many single calls."""
        if not self._uniform:
            self._uniform = torch.rand(64, generator=self.generator, dtype=torch.float64).tolist()[::-1]
        return self._uniform.pop()

    def push(self, token_id: int, logprob: Logprob | None) -> None:
        """Take the next token: hand on what is certain of the text, and see whether this ends it."""
        if token_id in self.ticket.request.stop_ids:
            self.ended_by = token_id
            self._end("stop")
            return
        self.ids.append(token_id)
        text = self.text.push(token_id)
        if text or not self.text.stopped:
            self._told.append((token_id, logprob))
        if self.text.stopped:
            self._end("stop", text)
        elif len(self.ids) >= self.settings.max_new_tokens:
            self._end("length", text)
        elif text:
            self.ticket.give(self._piece(text))

    def fail(self, error: str) -> None:
        """End it for a reason of its own."""
        self.last = Piece(self.index, tokens=len(self.ids), finish="error", error=error)

    def cancel(self) -> None:
        """End it because nobody wants the rest."""
        self.last = Piece(self.index, tokens=len(self.ids), finish="cancelled")

    def _end(self, finish: Finish, text: str = "") -> None:
        self.last = self._piece(text + self.text.finish(), finish)

    def _piece(self, text: str, finish: Finish | None = None) -> Piece:
        ids = tuple(token_id for token_id, _ in self._told)
        logprobs = tuple(logprob for _, logprob in self._told if logprob is not None)
        self._told = []
        return Piece(self.index, text, ids, logprobs, len(self.ids), finish)


def draw(logits: Tensor, drafts: Sequence[Draft]) -> list[int | str]:
    """The next token of each draft from logits [B, V], row i its own; what is wrong where there is none: that one fails alone.

    Rows with equal settings are drawn together, which gives each the bits that it has alone.
    """
    fine = finite_rows(logits).tolist()
    groups: dict[Settings, list[int]] = {}
    for row, draft in enumerate(drafts):
        if fine[row]:
            groups.setdefault(draft.settings, []).append(row)
    tokens: list[int | str] = [NOT_FINITE] * len(drafts)
    for settings, rows in groups.items():
        histories = [history for row in rows if (history := drafts[row].history) is not None]
        history = None
        if histories:
            history = History(torch.cat([one.seen for one in histories]), torch.cat([one.counts for one in histories]))
        try:
            drawn = sample(logits[rows], settings, history, [drafts[row].generator for row in rows])
        except Exception as error:
            log.exception("drawing a token failed")
            for row in rows:
                tokens[row] = f"no token could be drawn ({type(error).__name__})"
            continue
        for row, token, one in zip(rows, drawn.tolist(), drawn.split(1)):
            tokens[row] = token
            if (own := drafts[row].history) is not None:
                own.add(one)
    return tokens


def logprobs_of(logits: Tensor, tokens: Sequence[int | str], drafts: Sequence[Draft]) -> list[Logprob | None]:
    """What each answer that asked is told about its token."""
    told: list[Logprob | None] = [None] * len(drafts)
    for row, (token, draft) in enumerate(zip(tokens, drafts)):
        wanted = draft.ticket.request.logprobs
        if wanted is None or isinstance(token, str):
            continue
        values = logits[row].log_softmax(-1)
        best = values.topk(min(wanted, len(values)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        told[row] = Logprob(token, float(values[token]), top)
    return told
