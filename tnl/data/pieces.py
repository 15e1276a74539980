"""A text of any length into ids, a piece at a time, exactly as the tokenizer cuts the whole.

SentencePiece's BPE joins neighbours only where the result is a piece of its vocabulary. So between two characters that stand side by
side in no piece nothing is ever joined, and what is left and right of them is cut as if the other were not there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

PIECE = 1 << 18
"""Characters that are encoded at once, where the text can be cut there."""
BLANK = "\u2581"
"""How SentencePiece writes a blank."""
NORMALIZER, TRAINER = 3, 2
BPE = 2


def encode_blocks(sp: Any, blocks: Iterable[str]) -> Iterator[list[int]]:
    """The ids of all blocks as one text, in consecutive lists. Holds little more than PIECE characters at once, save where the
    tokenizer may join all of them or changes the text before it cuts (no published model's does): that is encoded at once.
    """
    before, held, seen = "", "", 0  # the character in front of what is held; where no cut needs to be looked for again
    for block in blocks:
        held += block
        if len(held) < PIECE:
            continue
        at = last_cut(sp, held, seen)
        if not at:
            seen = len(held)
            continue
        yield encode_behind(sp, before, held[:at])
        before, held, seen = held[at - 1], held[at:], 0
    yield encode_behind(sp, before, held)


def blocks_of(text: str) -> Iterator[str]:
    """A text in blocks of PIECE characters."""
    for at in range(0, max(len(text), 1), PIECE):
        yield text[at : at + PIECE]


def encode_behind(sp: Any, before: str, text: str) -> list[int]:
    """The ids of text behind a character that it is never joined to ("": at the beginning)."""
    ids: list[int] = sp.encode(before + text)
    return ids[len(sp.encode(before)) :] if before else ids


def last_cut(sp: Any, text: str, seen: int) -> int:
    """The last index in text at which it may be cut, none before `seen` looked at; 0 where there is none."""
    joints = joints_of(sp)
    if joints is None:
        return 0
    return next((at for at in range(len(text) - 1, max(seen, 1) - 1, -1) if joints.apart(text[at - 1], text[at])), 0)


@dataclass(frozen=True)
class Joints:
    """What stands side by side in the pieces of a vocabulary."""

    pairs: frozenset[str]
    known: frozenset[str] | None
    """Characters that are pieces; None: the others are spelled in bytes, so no two unknown ones become one."""

    def apart(self, left: str, right: str) -> bool:
        """Whether nothing is joined across left and right, and neither is a blank, which may be added or dropped at an edge."""
        known = self.known is None or left in self.known
        return known and left not in (" ", BLANK) and right not in (" ", BLANK) and left + right not in self.pairs


@lru_cache(maxsize=8)
def joints_of(sp: Any) -> Joints | None:
    """A tokenizer's, made once; None for one whose text cannot be cut: no BPE, or characters are changed before they are looked up."""
    spec = {number: dict(fields(value)) for number, value in fields(sp.serialized_model_proto()) if number in (NORMALIZER, TRAINER)}
    normalizer, trainer = spec.get(NORMALIZER, {}), spec.get(TRAINER, {})
    changes = normalizer.get(2) or not normalizer.get(5, 1)  # a character map; blanks stay blanks
    if trainer.get(3) != BPE or trainer.get(24) or changes:  # 24: blanks stand behind words
        return None
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    pairs = frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))
    in_bytes = bool(trainer.get(35))
    return Joints(pairs, None if in_bytes else frozenset(piece for piece in pieces if len(piece) == 1))


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: integers, and bytes for all else. Raises ValueError where it is cut."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError("no protobuf")
        size, at = varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + size > len(data):
            raise ValueError("a protobuf is cut")
        yield tag >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf integer at `at`, and where it ends. Raises ValueError."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("no varint")
