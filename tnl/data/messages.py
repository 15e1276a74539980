"""What every reader produces and every template takes: records of messages, or of plain text."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tnl.data.files import TextFile
from tnl.data.pieces import blocks_of


class Role(StrEnum):
    """Who speaks. A closed set, so that no text from outside can name a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` is False where an assistant's turn is context only.

    `input` is the second field of an instruction record: chatml joins the two, as the tutorial does; alpaca and human-assistant
    have a place for it.
    """

    role: Role
    content: str
    train: bool = True
    input: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One example: messages, or plain text. `id` is FILE:record N or FILE:line N, as errors name it.

    `scene` marks a transcript's scene, which is learned in several records where it is long.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str | TextFile | None = None
    scene: bool = False

    def blocks(self) -> Iterable[str]:
        """The plain text in blocks, read from its file one by one where it is long."""
        return self.text.blocks() if isinstance(self.text, TextFile) else blocks_of(self.text or "")
