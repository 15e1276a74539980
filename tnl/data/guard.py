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
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tnl.errors import ModelError

if TYPE_CHECKING:
    from tnl.data.template import Template

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
        """Where markers stand, and in which form."""
        for form in self.forms:
            at = -1
            for _ in range(ids.count(form[0])):
                at = ids.index(form[0], at + 1)
                if tuple(ids[at : at + len(form)]) == form:
                    yield at, form

    def spelled(self, ids: list[int]) -> list[int]:
        """The same text without any marker's ids: one piece of each is replaced by its characters, or by bytes."""
        while (found := next(self.find(ids), None)) is not None:
            at, form = found
            longest = max(range(len(form)), key=lambda i: len(self.sp.id_to_piece(form[i])))
            ids = [*ids[: at + longest], *spell(self.sp, form[longest]), *ids[at + longest + 1 :]]
        return ids


@lru_cache(maxsize=32)
def guard_for(sp: Any, template: "Template") -> Guard:
    """The guard of a tokenizer and a template; made once."""
    lead = [template.system, template.preamble, template.preamble_with_input, ""]
    turns = [template.user, template.user_with_input, ""]
    texts = {start + turn + template.answer for start in lead for turn in turns}
    forms = {form for text in texts for marker in template.markers for form in forms_of(sp, marker, plain_form(text))}
    return Guard(sp, template.markers, tuple(sorted(forms)))


def plain_form(form: str) -> str:
    """A template's form with harmless content."""
    for name in ("{system}", "{content}", "{input}"):
        form = form.replace(name, "a")
    return form


def forms_of(sp: Any, marker: str, text: str) -> set[tuple[int, ...]]:
    """The ids of the pieces that lie within each occurrence of the marker in the text, or touch it where none lies within."""
    pieces = [sp.id_to_piece(i) for i in sp.encode(text)]
    surfaces = ["?" if BYTE.fullmatch(piece) else piece.replace("▁", " ") for piece in pieces]
    ends = list(accumulate(map(len, surfaces)))
    spans = list(zip([0, *ends], ends, pieces))
    forms = set()
    start = "".join(surfaces).find(marker)
    while start >= 0:
        end = start + len(marker)
        # a piece that begins with the blank before the marker (the dummy prefix) is one of the marker's own
        within = tuple(sp.piece_to_id(piece) for a, b, piece in spans if start <= a + piece.startswith("▁") and b <= end and b > start)
        forms.add(within or tuple(sp.piece_to_id(piece) for a, b, piece in spans if a < end and b > start))
        start = "".join(surfaces).find(marker, end)
    return forms


def spell(sp: Any, piece_id: int) -> list[int]:
    """The piece's text in other ids: one a character; of a single character, its bytes."""
    piece = sp.id_to_piece(piece_id)
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
        raise ModelError(
            "tokenizer.model", "has no byte pieces, so a marker in a text cannot be spelled out", "Use the model's own tokenizer."
        )
    return ids


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
    return sp.encode(text)


def encode_inside(sp: Any, text: str) -> list[int]:
    """Ids of a text as they are in the middle of another: no dummy prefix, outer blanks kept."""
    for fence in FENCES:
        head, both = sp.encode(fence), sp.encode(fence + fence)
        tail = both[len(head) :]
        ids = encode_whole(sp, fence + text + fence)
        if tail and both[: len(head)] == head and ids[: len(head)] == head and ids[-len(tail) :] == tail:
            return ids[len(head) : -len(tail)]
    return encode_whole(sp, text)
