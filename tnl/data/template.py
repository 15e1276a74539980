"""Messages into ids and labels: training, chat, generation and serving all call this, so what is trained is what is asked.

A conversation is encoded by parts, each tokenised on its own (so each has the tokenizer's dummy prefix): the turns up to an
answer with the words that open it, then the answer, then the end token; then the next turns, and so on.
No `<s>` is ever added. Content cannot yield the template's markers nor any control id: see `tnl.data.guard`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol

import numpy

from tnl.data.guard import Guard, Segment, guard_for
from tnl.data.messages import Message, Role
from tnl.data.pieces import blocks_of, encode_blocks
from tnl.data.store import Ids
from tnl.errors import DataError
from tnl.kernels.reference import IGNORED

RULES = "1: parts apart, answer apart, end token after every answer, loss on answers and their end tokens"


class Tokenizer(Protocol):
    """What the templates need of a tokenizer: sentencepiece's model, and the end token."""

    sp_model: Any
    eos_token_id: int


@dataclass(frozen=True)
class Template:
    """How turns are written. In the forms, {system}, {content} and {input} are replaced by content.

    markers: what content must not be able to forge; each is a text whose ids stand in every encoding of the template.
    """

    name: str
    system: str
    """The system turn; stands in the first part alone."""
    user: str
    user_with_input: str
    answer: str
    """Opens an answer."""
    markers: tuple[str, ...]
    preamble: str = ""
    """Stands where there is no system text."""
    preamble_with_input: str = ""
    """The same where the first turn has an input."""
    keep_end: bool = True
    """Truncation keeps the end token; the tutorial's cuts it off."""

    def question(self, prompt: str) -> str:
        """What the last user turn of a rendered prompt says, for people to read; the prompt as it is where it has none."""
        before, after = self.user.split("{content}")
        asked = prompt.rpartition(before)[2] if before in prompt else prompt
        return asked.removesuffix(self.answer.strip()).strip().removesuffix(after.strip()).strip()

    def guard(self, sp: Any) -> Guard:
        """What keeps content from forging the markers, for one tokenizer."""
        lead = self.system, self.preamble, self.preamble_with_input, ""
        turns = self.user, self.user_with_input, ""
        return guard_for(sp, self.markers, frozenset(start + turn + self.answer for start in lead for turn in turns))

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the ids: saved in the adapter; chat refuses another."""
        return hashlib.sha256(json.dumps([RULES, asdict(self)], sort_keys=True).encode("utf-8")).hexdigest()


def chatml(name: str, *, keep_end: bool) -> Template:
    """The tutorial's form."""
    return Template(
        name=name,
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        user_with_input="<|im_start|>user\n{content}{input}<|im_end|>\n",
        answer="<|im_start|>assistant\n",
        # without the outer brackets: the left one may melt into the content before it ("a<" + "<|im_end|>")
        markers=("|im_start|", "|im_end|"),
        keep_end=keep_end,
    )


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        chatml("chatml", keep_end=True),
        chatml("chatml-tutorial", keep_end=False),
        Template(
            name="alpaca",
            system="{system}\n\n",
            user="### Instruction:\n{content}\n\n",
            user_with_input="### Instruction:\n{content}\n\n### Input:\n{input}\n\n",
            answer="### Response:\n",
            markers=("### Instruction:", "### Input:", "### Response:"),
            preamble=ALPACA.format(""),
            preamble_with_input=ALPACA.format(", paired with an input that provides further context"),
        ),
        Template(
            name="human-assistant",
            system="{system}\n",
            user="Human:\n{content}\n",
            user_with_input="{content}\nHuman:\n{input}\n",
            answer="Assistant:\n",
            markers=("Human:", "Assistant:"),
        ),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Ids, and labels of the same length: the id where it is learned, else -100.

    `end`: the id to close a cut answer with; None where the template cuts it off as the tutorial does.
    """

    input_ids: Ids
    labels: Ids
    end: int | None = None

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return int(numpy.count_nonzero(self.labels != IGNORED))


def encode_conversation(messages: Sequence[Message], tokenizer: Tokenizer, template: Template, *, system: str | None = None) -> Encoded:
    """Ids and labels for training: loss on every assistant turn with `train`, and on its end token.

    `system` stands where the messages bring no system turn of their own.
    Raises ValueError where the last message is not an assistant's; the readers refuse such records before.
    """
    ids: list[Ids] = []
    labels: list[Ids] = []
    guard = template.guard(tokenizer.sp_model)
    for segments, answer in parts(messages, template, system):
        if answer is None:
            raise ValueError("the last message of a training record is an assistant's")
        prompt = array(guard.encode(segments))
        reply = array([*guard.encode_content(answer.content), tokenizer.eos_token_id])
        ids += [prompt, reply]
        labels += [numpy.full_like(prompt, IGNORED), reply if answer.train else numpy.full_like(reply, IGNORED)]
    return Encoded(numpy.concatenate(ids), numpy.concatenate(labels), tokenizer.eos_token_id if template.keep_end else None)


def array(ids: Sequence[int]) -> Ids:
    """Ids as a record holds them."""
    return numpy.array(ids, dtype="<i4")


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: Template, *, system: str | None = None) -> list[int]:
    """Ids that ask for the next answer: a strict prefix of what `encode_conversation` gives for the same messages and that answer.

    Raises ValueError where the last message is an assistant's.
    """
    ids: list[int] = []
    guard = template.guard(tokenizer.sp_model)
    asked = False
    for segments, answer in parts(messages, template, system):
        ids += guard.encode(segments)
        if answer is not None:
            ids += [*guard.encode_content(answer.content), tokenizer.eos_token_id]
        asked = answer is None
    if not asked:
        raise ValueError("the last message of a prompt is not an assistant's")
    return ids


def encode_text(text: str, tokenizer: Tokenizer) -> Encoded:
    """A plain document: the ids of the text and the end token, all supervised but the first, which nothing precedes."""
    stretches = list(encode_document(blocks_of(text), tokenizer, None))
    ids, labels = ([getattr(stretch, name) for stretch in stretches] for name in ("input_ids", "labels"))
    return Encoded(numpy.concatenate(ids), numpy.concatenate(labels), tokenizer.eos_token_id)


def encode_document(blocks: Iterable[str], tokenizer: Tokenizer, max_length: int | None) -> Iterator[Encoded]:
    """The same of a text of any length, in consecutive stretches; with max_length, as records of so many tokens, the end token closing
    the last alone: the first token of each is not supervised.
    """
    at = 0
    for ids in chain(encode_blocks(tokenizer.sp_model, blocks), [[tokenizer.eos_token_id]]):
        stretch = array(ids)
        labels = stretch.copy()
        if max_length is None:
            labels[: 1 if at == 0 else 0] = IGNORED
        else:
            labels[-at % max_length :: max_length] = IGNORED
        at += len(stretch)
        yield Encoded(stretch, labels)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer, for every template."""
    return (tokenizer.eos_token_id,)


def fit(encoded: Encoded, max_length: int | None, overlong: str = "truncate") -> Encoded | None:
    """The record within max_length tokens; None where it is too long and `overlong` is drop. Raises DataError where it is error.

    Truncation closes a cut answer with the end token, supervised, and drops a question whose answer is cut off whole;
    the tutorial's template is cut bare. The caller looks whether anything supervised is left.
    """
    if max_length is None or len(encoded.input_ids) <= max_length:
        return encoded
    if overlong == "drop":
        return None
    if overlong == "error":
        raise DataError("", f"a record has {len(encoded.input_ids):,} tokens (max_length is {max_length:,})", "Raise data.max_length.")
    ids, labels = encoded.input_ids[:max_length].copy(), encoded.labels[:max_length].copy()
    if encoded.end is None:
        return Encoded(ids, labels)
    if labels[-1] != IGNORED:
        ids[-1] = labels[-1] = encoded.end
    else:
        learned = numpy.flatnonzero(labels != IGNORED)
        last = int(learned[-1]) if len(learned) else max_length - 1
        ids, labels = ids[: last + 1], labels[: last + 1]
    return Encoded(ids, labels, encoded.end)


def parts(messages: Sequence[Message], template: Template, system: str | None) -> Iterator[tuple[list[Segment], Message | None]]:
    """For every answer, the segments that stand before it; at the end those that ask for the next one, with None."""
    own = [message.content for message in messages[:1] if message.role is Role.SYSTEM]
    turns = messages[len(own) :]
    text = own[0] if own else system
    if text:
        pending = fill(template.system, system=text)
    else:
        first = turns[0] if turns else None
        preamble = template.preamble_with_input if first is not None and first.input else template.preamble
        pending = [(preamble, False)]
    open_turn = True
    for message in turns:
        if message.role is Role.ASSISTANT:
            yield [*pending, (template.answer, False)], message
            pending, open_turn = [], False
        elif message.role is Role.USER:
            form = template.user_with_input if message.input else template.user
            pending, open_turn = [*pending, *fill(form, content=message.content, input=message.input)], True
        else:
            raise ValueError("a system message stands first or nowhere")
    if open_turn:
        yield [*pending, (template.answer, False)], None


def fill(form: str, **values: str) -> list[Segment]:
    """The form cut at its names: (text, False) for the template's own words, (text, True) for content."""
    pieces = re.split(r"\{(system|content|input)\}", form)
    return [(values[piece], True) if i % 2 else (piece, False) for i, piece in enumerate(pieces)]
