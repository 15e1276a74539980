"""The person's side of a chat: lines in, text out, on any terminal and on pipes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Pipe(Console):
    """A console that leaves a reader's going away to the command line, which knows the exit code."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Screen:
    """Writes text as it comes. Control characters of a model or a file are made visible; what the encoding lacks is escaped."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.encoding = getattr(self.out, "encoding", None) or "utf-8"
        self.console = Pipe(file=self.out, highlight=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """A piece of an answer, shown at once."""
        self.out.write(self.fit(text))
        self.out.flush()

    def line(self, text: str = "") -> None:
        """A line of its own."""
        self.write(text + "\n")

    def dim(self, text: str) -> None:
        """A line about the answer, fainter than it where the terminal can."""
        self.console.print(Text(self.fit(text.replace("·", "|") if "·" not in self.fit(text) else text), style="dim"))

    def working(self, text: str) -> AbstractContextManager[Any]:
        """A sign of life on a terminal while something takes time; it leaves nothing behind."""
        return self.console.status(self.fit(text)) if self.console.is_terminal else nullcontext()

    def fit(self, text: str) -> str:
        """The text as this terminal can show it."""
        return visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)


def visible(text: str) -> str:
    """The text with control characters written out, which could move the cursor, rename the window or turn the line around."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def line_reader(screen: Screen) -> Callable[[], str]:
    """A function that returns the person's next line, and raises EOFError after the last.

    On a terminal it is prompt_toolkit's editor (Chinese input, arrow keys, history); from a pipe plain lines, which are shown.
    """
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        return lambda: piped_line(screen)
    # takes 0.2 s to import, which only a terminal needs
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    return lambda: session.prompt("> ")


def piped_line(screen: Screen) -> str:
    """The next line of standard input, shown where nobody has typed it. Raises EOFError at its end."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    text = line.rstrip("\r\n")
    if not sys.stdin.isatty():
        screen.line(f"> {text}")
    return text
