"""From ids to text while they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
REPLACEMENT = "\ufffd"


class TextStream:
    """An answer's text, piece by piece; all pieces joined are what decoding all ids at once gives (special tokens left out).

    goes_on: the text goes on with another; then a blank that it begins with is kept.
    stop: the text ends before the first of these strings; `stopped` is then True, and what is pushed later changes nothing.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, goes_on: bool = False) -> None:
        self.sp = tokenizer.sp_model
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces = self.sp.get_piece_size()
        self._head: list[int] | None = None if goes_on else []
        """Ids from the start until one of them shows, since the first blank is no text; None from then on."""
        self._bytes = b""
        """Of a character whose bytes have not all come."""
        self._held = ""
        """Text that may be the beginning of a stop string."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that this id has come; may be empty."""
        return "" if self.stopped else self._release(self._decoded(token_id))

    def finish(self) -> str:
        """What was held back, at the end of the ids."""
        if self.stopped:
            return ""
        rest = self._release(REPLACEMENT * len(self._bytes))
        rest, self._bytes, self._held = rest + self._held, b"", ""
        return rest

    def _decoded(self, token_id: int) -> str:
        if token_id in self._special or token_id >= self._pieces:  # a padded vocabulary has rows that stand for nothing
            return ""
        byte = BYTE.fullmatch(self.sp.id_to_piece(token_id)) if self.sp.is_byte(token_id) else None
        if byte:
            self._head = None
            self._bytes += bytes.fromhex(byte.group(1))
            text, self._bytes = whole_characters(self._bytes)
            return text
        broken, self._bytes = REPLACEMENT * len(self._bytes), b""
        if self._head is not None:
            self._head.append(token_id)
            text = self.sp.decode(self._head)
            if text:
                self._head = None
            return text
        return broken + self.sp.id_to_piece(token_id).replace("▁", " ")

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def whole_characters(data: bytes) -> tuple[str, bytes]:
    """The characters that are complete, U+FFFD for each byte that can be part of none, and the bytes that wait for more."""
    text = ""
    while data:
        size = next((n for n in range(1, min(4, len(data)) + 1) if is_character(data[:n])), 0)
        if size:
            text += data[:size].decode("utf-8")
        elif may_begin(data):
            break
        else:
            text, size = text + REPLACEMENT, 1
        data = data[size:]
    return text, data


def is_character(data: bytes) -> bool:
    """Whether the bytes are one character's."""
    try:
        return len(data.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def may_begin(data: bytes) -> bool:
    """Whether more bytes could make the first ones a character."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return True


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
