"""`tnl chat`: talk to a model, an adapter or a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from tnl import paths
from tnl.data.messages import Role
from tnl.errors import DataError, ModelError, RecipeError, StorageError
from tnl.generate.conversation import Conversation
from tnl.generate.resolve import Options, Talker, resolve
from tnl.generate.terminal import Screen, line_reader

HELP = """\
/reset          forget the conversation
/system TEXT    take another system prompt and begin anew; without TEXT show it
/save FILE      write the conversation (a recipe's data.train reads it); FILE.safetensors keeps its state too
/load FILE      go on with a saved one; of a .safetensors nothing is read anew
/help           this
/quit           end (so does Ctrl-D; Ctrl-C stops an answer)
A line that begins with // is sent with one slash."""


class Quit(Exception):
    """The person wants to end."""


def run(model_or_run: str, resume: Path | None = None, **options: Unpack[Options]) -> None:
    """Load what the word names and talk until the input ends; resume: a saved conversation to go on with.

    Raises what `resolve` and `Conversation.load` raise, and NumbersError.
    """
    if resume is not None and options.get("system") is not None:
        raise RecipeError("--system", f"{resume.name} has a system prompt of its own, before all turns", "Leave --system out")
    screen = Screen()
    with screen.working(f"loading {model_or_run}"):
        talker = resolve(model_or_run, options)
    chat = Chat(talker, screen, line_reader(screen))
    if resume is not None:
        chat.take_up(paths.absolute(str(resume)))
    chat.loop()


class Chat:
    """One person's session."""

    def __init__(self, talker: Talker, screen: Screen, read: Callable[[], str]) -> None:
        self.talker, self.screen, self.read = talker, screen, read
        self.conversation: Conversation = talker.conversation()
        self.saved: Path | None = None
        """Where this conversation was saved, so that it may be again."""
        self.commands: dict[str, Callable[[str], None]] = {
            "reset": self.reset,
            "system": self.system,
            "save": self.save,
            "load": self.load,
            "help": lambda _: self.screen.line(HELP),
            "quit": self.quit,
            "exit": self.quit,
        }

    def loop(self) -> None:
        """Read, answer, until the end of the input."""
        for notice in self.talker.notices:
            self.screen.dim(notice)
        self.screen.dim(f"{self.talker.name} · template {self.talker.template.name} · /help")
        if self.conversation.system:
            self.screen.dim(f"system: {self.conversation.system}")
        for message in self.conversation.messages[-2:]:
            self.screen.line(f"> {message.content}" if message.role is Role.USER else message.content)
        while True:
            try:
                line = self.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                self.screen.dim("Ctrl-D or /quit ends")
                continue
            try:
                self.turn(line)
            except Quit:
                return

    def turn(self, line: str) -> None:
        """Carry out a command, or answer."""
        text = line.strip()
        if not text:
            return
        if text.startswith("/") and not text.startswith("//"):
            word, _, rest = text[1:].partition(" ")
            command = self.commands.get(word)
            if command is not None:
                command(rest.strip())
                return
            near = paths.nearest(word, list(self.commands))
            self.screen.line(f"no command is called /{word}." + (f" Did you mean /{near}?" if near else " /help lists them."))
            return
        self.answer(text.removeprefix("/") if text.startswith("//") else text)

    def answer(self, text: str) -> None:
        """Show the answer as it comes; Ctrl-C stops it."""
        stopped = False
        with contextlib.closing(self.conversation.say(text)) as pieces:
            try:
                for piece in pieces:
                    self.screen.write(piece)
            except KeyboardInterrupt:
                stopped = True
        self.screen.line()
        self.screen.dim(self.status() + (" · stopped" if stopped else ""))

    def status(self) -> str:
        """State, tokens and speed of the last answer, on one line."""
        last = self.conversation.last
        words = [f"state {self.conversation.state_bytes / 1e6:.1f} MB", f"{self.conversation.seen:,} tokens seen"]
        if last is not None and last.tokens_per_second:
            words.append(f"{last.tokens_per_second:.3g} tokens/s")
        if last is not None and last.finish == "length":
            words.append(f"cut at {last.tokens} tokens")
        return " · ".join(words)

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.saved = None
        self.screen.dim("forgotten")

    def system(self, text: str) -> None:
        if text:
            self.conversation.set_system(text)
            self.saved = None
        self.screen.dim(f"system: {self.conversation.system or '(none)'}")

    def save(self, name: str) -> None:
        path = self.file(name) if name or self.saved is None else self.saved
        if path is None:
            return
        if path.exists() and path != self.saved:
            self.screen.line(f"{path} exists. Name another file.")
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.conversation.save(path)
        except (DataError, StorageError, OSError) as error:
            self.screen.line(f"error: {error}")
            return
        self.saved = path
        self.screen.dim(f"saved: {path}")

    def load(self, name: str) -> None:
        path = self.file(name)
        if path is None:
            return
        try:
            self.take_up(path)
        except (DataError, ModelError, StorageError, OSError) as error:
            self.screen.line(f"error: {error}")

    def take_up(self, path: Path) -> None:
        """Go on with a saved conversation. Raises what `Conversation.load` raises."""
        self.conversation.load(path)
        self.saved = path
        read = f" · {self.conversation.seen:,} tokens, none read anew" if self.conversation.seen else ""
        self.screen.dim(f"loaded: {len(self.conversation.messages)} messages{read}")

    def file(self, name: str) -> Path | None:
        """The file that a command names; says what is missing."""
        if not name:
            self.screen.line("name a file, for example /save talk.json")
            return None
        try:
            return paths.absolute(name)
        except KeyError as error:
            self.screen.line(f"${error.args[0]} is not set.")
            return None

    def quit(self, _: str) -> None:
        raise Quit
