"""What is asked of the engine, and what it hands back, piece by piece."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from tnl.generate.sampling import Settings

Finish = Literal["stop", "length", "cancelled", "error"]


class QueueFull(Exception):
    """More requests wait than may; come again later."""


class Closed(Exception):
    """The engine takes no new work: it is being stopped, or has died."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is answered."""

    ids: tuple[int, ...]
    """The prompt, at least one id."""
    settings: Settings = field(default_factory=Settings)
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer and are left out of it."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are left out of it."""
    seed: int | None = None
    """The same gives the same answer; answer i of n is drawn from seed + i. None draws anew."""
    n: int = 1
    """Answers wanted."""
    logprobs: int | None = None
    """How many of the most probable tokens are told beside each that was drawn; None tells nothing."""
    goes_on: bool = False
    """Whether its text goes on with the prompt's; else it is one of its own, before whose first word there is no blank."""
    adapter: str | None = None
    """Key of a loaded adapter (`Adapters.load`); None is the base."""

    @cached_property
    def packed(self) -> np.ndarray:
        """ids as int32, made once: a long prompt is looked at several times. Raises OverflowError where an id is larger."""
        return np.fromiter(self.ids, np.int32, len(self.ids))


@dataclass(frozen=True)
class Logprob:
    """A token and the natural logarithm of its probability, as the model gives it before temperature, penalties and cuts."""

    id: int
    value: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens in its place."""


@dataclass(frozen=True)
class Piece:
    """What is new of one answer: text, the ids drawn (end tokens left out), and at the end why it ended."""

    index: int
    """Which of n."""
    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    tokens: int = 0
    """Tokens drawn for this answer so far, end tokens left out, those that a stop text cut off included."""
    finish: Finish | None = None
    error: str = ""
    """What went wrong, where finish is error."""


@dataclass
class Answer:
    """All pieces of one answer together."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    tokens: int = 0
    finish: Finish | None = None
    error: str = ""

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self.text += piece.text
        self.ids += piece.ids
        self.logprobs += piece.logprobs
        self.tokens = piece.tokens
        self.finish, self.error = piece.finish or self.finish, piece.error or self.error


class Ticket:
    """A request on its way. `deliver` is called with every piece, on the engine's thread; it must be quick."""

    def __init__(self, request: Request, deliver: Callable[[Piece], None] | None = None) -> None:
        self.request = request
        self.answers = [Answer() for _ in range(request.n)]
        self.done = threading.Event()
        """Set once every answer has its finish."""
        self.cancelled = False
        self.cached_tokens = 0
        """Prompt tokens whose state was found and not read."""
        self.submitted = time.perf_counter()
        self.started: float | None = None
        """When the first token was drawn."""
        self.open = request.n
        """Answers without their finish."""
        self._deliver = deliver

    def cancel(self) -> None:
        """End all its answers as soon as the engine looks; from any thread."""
        self.cancelled = True

    def give(self, piece: Piece) -> None:
        """Take a piece from the engine. A listener that fails loses its request, not the engine."""
        self.answers[piece.index].add(piece)
        if piece.finish is not None:
            self.open -= 1
        try:
            if self._deliver is not None:
                self._deliver(piece)
        except Exception:
            self._deliver = None
            self.cancel()
        if not self.open:
            self.done.set()
