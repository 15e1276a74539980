"""Encode a template's words around content so that content can never yield the template's markers.

ChatML's markers are ordinary pieces to the Baichuan tokenizer, so a user who types `<|im_end|>` would forge a turn. Here every
marker is known by the ids it has inside the template (its forms). A part is encoded whole, as the tutorial does; where content
could be mistaken for a marker, or melts into one, the part is encoded segment by segment, and every form found in content is
spelled out piece by piece: other ids, the same text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

from tnl.data.pieces import PIECE, blocks_of, encode_blocks
from tnl.errors import ModelError

Segment = tuple[str, bool]  # text, and whether it is content
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SURROGATE = re.compile("[\ud800-\udfff]")
# Texts that pieces do not reach across; the first that holds for a tokenizer is taken.
FENCES = ("\n", "\x02", "。", "|", "7")


@dataclass(frozen=True)
class Guard:
    """One tokenizer's ids of one template's markers."""

    sp: Any
    markers: tuple[str, ...]
    forms: tuple[tuple[int, ...], ...]
    """The longest first."""
    firsts: frozenset[int]
    """The ids that begin a form."""

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of one part, its content unable to forge a marker."""
        segments = merged(segments)
        ids = encode_whole(self.sp, "".join(text for text, _ in segments))
        if not any(is_content for _, is_content in segments):
            return ids
        forged = any(marker in text for text, is_content in segments if is_content for marker in self.markers)
        own = sum(text.count(marker) for text, is_content in segments if not is_content for marker in self.markers)
        if not forged and self.count(ids) == own:
            return ids
        ids = []
        for i, (text, is_content) in enumerate(segments):
            piece = encode_whole(self.sp, text) if i == 0 else encode_inside(self.sp, text)
            ids += self.spelled(piece) if is_content else piece
        return ids

    def encode_content(self, text: str) -> list[int]:
        """Ids of an answer, which is a part of its own."""
        return self.spelled(encode_whole(self.sp, text))

    def count(self, ids: Sequence[int]) -> int:
        """How many markers stand in the ids."""
        return sum(1 for _ in self.find(ids))

    def find(self, ids: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Where markers stand, and in which form: from the left, the longest form first, none over another."""
        if self.firsts.isdisjoint(ids):
            return
        at = 0
        while at < len(ids):
            step = 1
            if ids[at] in self.firsts:
                form = next((form for form in self.forms if tuple(ids[at : at + len(form)]) == form), None)
                if form is not None:
                    yield at, form
                    step = len(form)
            at += step

    def spelled(self, ids: list[int]) -> list[int]:
        """The same text without any marker's ids: one piece of each is replaced by its characters, or by bytes."""
        while True:  # almost always twice: only odd neighbours of what was spelled out could make a marker anew
            changed: list[int] = []
            spellings: dict[tuple[int, ...], tuple[int, list[int]]] = {}
            end = 0
            for at, form in self.find(ids):
                if form not in spellings:
                    sizes = [0 if BYTE.fullmatch(piece) else len(piece) for piece in map(self.sp.id_to_piece, form)]
                    longest = sizes.index(max(sizes))
                    spellings[form] = longest, spell(self.sp, form[longest])
                longest, spelling = spellings[form]
                changed += ids[end : at + longest]
                changed += spelling
                end = at + longest + 1
            if not end:
                return ids
            ids = [*changed, *ids[end:]]


@lru_cache(maxsize=32)
def guard_for(sp: Any, markers: tuple[str, ...], parts: frozenset[str]) -> Guard:
    """The guard of a tokenizer and a template's markers and parts; made once. Forms are taken from parts encoded whole and by segments."""
    encoded: list[list[int]] = []
    for part in parts:
        words = re.split(r"\{(?:system|content|input)\}", part)
        encoded.append(sp.encode("a".join(words)))
        encoded += [sp.encode(words[0]), *(encode_inside(sp, text) for text in words)]
    forms = {form for ids in encoded for marker in markers for form in forms_of(sp, marker, ids)}
    ordered = tuple(sorted(forms, key=lambda form: (-len(form), form)))
    return Guard(sp, markers, ordered, frozenset(form[0] for form in forms))


def forms_of(sp: Any, marker: str, ids: Sequence[int]) -> set[tuple[int, ...]]:
    """The pieces that lie within each occurrence of the marker, or touch it where none lies within."""
    pieces = [sp.id_to_piece(i) for i in ids]
    # a piece that begins with the blank before the marker (the dummy prefix) is one of the marker's own
    blanks = [piece.startswith("▁") for piece in pieces]
    surfaces = [chr(int(piece[1:-1], 16)) if BYTE.fullmatch(piece) else piece.replace("▁", " ") for piece in pieces]
    ends = list(accumulate(map(len, surfaces)))
    spans = list(zip([0, *ends], ends, blanks, ids))
    text = "".join(surfaces)
    forms = set()
    start = text.find(marker)
    while start >= 0:
        end = start + len(marker)
        within = tuple(i for begin, stop, blank, i in spans if start <= begin + blank and start < stop <= end)
        forms.add(within or tuple(i for begin, stop, _, i in spans if begin < end and start < stop))
        start = text.find(marker, end)
    return forms


def spell(sp: Any, piece_id: int) -> list[int]:
    """The piece's text in other ids: one a character; of a single character, its bytes."""
    piece = sp.id_to_piece(piece_id)
    if BYTE.fullmatch(piece):
        raise no_spelling()
    if len(piece) == 1:
        return in_bytes(sp, piece)
    ids: list[int] = []
    for character in piece:
        single = sp.piece_to_id(character)
        ids += in_bytes(sp, character) if single == sp.unk_id() else [single]
    return ids


def in_bytes(sp: Any, character: str) -> list[int]:
    """A character by the tokenizer's byte pieces."""
    ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in character.replace("▁", " ").encode("utf-8")]
    if sp.unk_id() in ids:
        raise no_spelling()
    return ids


def no_spelling() -> ModelError:
    """Nothing but bytes spells the marker, or nothing can: no tokenizer of a published model is so."""
    return ModelError("tokenizer.model", "has no second spelling for a marker that stands in a text", "Use the model's own tokenizer.")


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one kind as one: a marker cut over two fields is one text."""
    result: list[Segment] = []
    for text, is_content in segments:
        if not text:
            continue
        if result and result[-1][1] == is_content:
            result[-1] = (result[-1][0] + text, is_content)
        else:
            result.append((text, is_content))
    return result


def encode_whole(sp: Any, text: str) -> list[int]:
    """Ids of a text on its own. Half a surrogate pair, which no file of ours can hold but a terminal can send, becomes U+FFFD."""
    if not text.isascii() and SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return sp.encode(text) if len(text) < PIECE else list(chain.from_iterable(encode_blocks(sp, blocks_of(text))))


def encode_inside(sp: Any, text: str) -> list[int]:
    """Ids of a text as they are in the middle of another: no dummy prefix, outer blanks kept."""
    for fence in FENCES:
        head, both = sp.encode(fence), sp.encode(fence + fence)
        tail = both[len(head) :]
        ids = encode_whole(sp, fence + text + fence)
        if tail and both[: len(head)] == head and ids[: len(head)] == head and ids[-len(tail) :] == tail:
            return ids[len(head) : -len(tail)]
    return encode_whole(sp, text)
