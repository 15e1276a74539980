"""From a recipe's data section to encoded records for training and evaluation, with a report that accounts for every row read."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tnl.data.files import Source
from tnl.data.formats import Reading, read
from tnl.data.messages import Message, Record, Role
from tnl.data.store import Room
from tnl.data.template import TEMPLATES, Encoded, Template, Tokenizer, encode_conversation, encode_document, fit
from tnl.data.transcript import windows
from tnl.errors import DataError

MANY = 0.2
"""Share of duplicates, or of the held-out records that are also trained on, that is worth a warning."""
STRETCH = 1 << 16
"""Tokens of a document that are looked at at once."""
NO_LETTERS = re.compile(r"[\W_]+")
FEW_SCENES = 20
"""Below so many scenes a transcript is held out by windows, not by scenes."""


class Section(Protocol):
    """What `build` reads of a recipe's data section."""

    train: Any
    eval: Any
    format: str
    columns: Mapping[str, str] | None
    encoding: str | None
    template: str
    system: str | None
    persona: str | None
    max_length: int | None
    overlong: str


@dataclass
class Report:
    """What became of the rows of data.train; `sources` has the files of data.eval too.

    `supervised` counts the tokens that are learned; lengths are in tokens, before truncation.
    """

    formats: dict[str, int] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    rows: int = 0
    records: int = 0
    train_records: int = 0
    eval_records: int = 0
    tokens: int = 0
    supervised: int = 0
    eval_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    passed: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    longest_id: str = ""
    percentiles: dict[int, int] = field(default_factory=dict)
    duplicates: int = 0
    overlap: int = 0
    speakers: dict[str, int] = field(default_factory=dict)
    template: str = ""
    template_hash: str = ""
    notices: list[str] = field(default_factory=list)


@dataclass
class Dataset:
    """Records {"id", "input_ids", "labels"} to train on and to evaluate with, and the report."""

    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    report: Report


@dataclass(frozen=True, slots=True)
class Example:
    """A record, encoded: tokens start ... stop - 1 of the room. `question` and `answer` are hashes that are equal for near-duplicates,
    `same` one for duplicates, `unit` what is held out whole.
    """

    id: str
    unit: str
    start: int
    stop: int
    supervised: int
    question: bytes
    answer: bytes
    same: bytes

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def build(section: Section, tokenizer: Tokenizer, *, seed: int = 42) -> Dataset:
    """Read, encode, fit and split. Raises DataError, which names the file and record, for all that cannot be trained on.

    Held out are, of the units (records; scenes or windows of transcripts; pieces of documents) that share neither their questions nor
    their answers with another (letters and digits alone compared, case and width ignored), the share `eval` with the smallest hashes of
    seed and content: the same ones whatever the order, and never a near-duplicate of what is learned.
    """
    template = template_named(section.template)
    report = Report(template=template.name, template_hash=template.hash)
    share = 0.0 if isinstance(section.eval, str | Path | list | tuple) or not section.eval else float(section.eval)
    if not 0 <= share < 1:
        raise DataError("data.eval", f"is no share (found {section.eval}; needed 0 to below 1, or files)", "Set data.eval: 0.05.")
    encoder = Encoder(tokenizer, template, section.system, section.max_length, Room())
    examples = encode_files(section.train, section, encoder, report)
    if share:
        train, held = hold_out(examples, share, seed, report)
    else:
        train, held = examples, []
    if section.eval and not share:
        other = Report()
        held = encode_files(section.eval, section, encoder, other)
        report.sources += other.sources
        report.notices += [f"data.eval: {notice}" for notice in other.notices]
    finish(train, held, report)
    ids, labels = encoder.room.mapped()

    def records(side: list[Example]) -> list[dict[str, Any]]:
        return [{"id": e.id, "input_ids": ids[e.start : e.stop], "labels": labels[e.start : e.stop]} for e in side]

    return Dataset(records(train), records(held), report)


def template_named(name: str) -> Template:
    """The template of that name."""
    if name not in TEMPLATES:
        raise DataError("data.template", f"unknown template {name!r}", f"Use one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def encode_files(paths: Any, section: Section, encoder: "Encoder", report: Report) -> list[Example]:
    """Examples of all records of the files, within max_length; the report filled in."""
    reading = read(paths, format=section.format, columns=section.columns, encoding=section.encoding, persona=section.persona)
    examples: list[Example] = []
    lengths: list[tuple[int, str]] = []
    empty: list[str] = []
    few_scenes = sum(record.scene for record in reading.records) < FEW_SCENES
    for record in reading.records:
        if record.text is not None:
            found = list(encoder.document(record))
            lengths += [(one.tokens, one.id) for one in found]
            examples += found
            continue
        for part, encoded in encoder.conversations(record, reading):
            lengths.append((len(encoded.input_ids), part.id))
            fitted = fit(encoded, section.max_length, "drop" if section.overlong == "drop" else "truncate")
            if fitted is None or (not fitted.supervised and section.overlong == "drop"):
                report.dropped += 1
            elif not fitted.supervised:
                empty.append(part.id)
            else:
                examples.append(encoder.example(part, fitted, part.id if record.scene and few_scenes else record.id))
    account(report, reading, lengths)
    overlong = [one for one in lengths if section.max_length and one[0] > section.max_length]
    if overlong:
        judge_overlong(overlong, empty, section, report)
    if empty:
        raise DataError(empty[0], f"nothing is left to learn, in {len(empty):,} records", "Remove them, or set data.overlong: drop.")
    if not examples:
        what = f"0 trained tokens: all {report.dropped:,} records are dropped (max_length {section.max_length})"
        raise DataError(reading.sources[0].path, what, f"Raise data.max_length; the median record has {report.percentiles[50]:,} tokens.")
    return examples


@dataclass(frozen=True)
class Encoder:
    """Records into ids, with what a recipe says of all of them, and the room that the ids lie in."""

    tokenizer: Tokenizer
    template: Template
    system: str | None
    max_length: int | None
    room: Room

    def document(self, record: Record) -> Iterator[Example]:
        """A plain text by records of at most max_length tokens, nothing lost; no more of it than a block is in memory at once."""
        begin = self.room.count
        for stretch in encode_document(record.blocks(), self.tokenizer, self.max_length):
            self.room.add(stretch.input_ids, stretch.labels)
        size = self.max_length or self.room.count - begin
        for number, start in enumerate(range(begin, self.room.count, size), start=1):
            stop = min(start + size, self.room.count)
            if stop - start > 1:
                name = record.id if number == 1 else f"{record.id} piece {number}"
                same = hashlib.sha256()
                answer = alike(self.texts(start, stop, same))
                yield Example(name, name, start, stop, stop - start - 1, alike([]), answer, same.digest())

    def texts(self, start: int, stop: int, same: Any) -> Iterator[str]:
        """What the room's ids say, in stretches; `same` is told the ids."""
        for at in range(start, stop, STRETCH):
            ids = self.room.ids(at, min(at + STRETCH, stop))
            same.update(ids.data)
            yield self.tokenizer.sp_model.decode(ids.tolist())

    def conversations(self, record: Record, reading: Reading) -> Iterable[tuple[Record, Encoded]]:
        """The record; a transcript's scene by windows."""
        parts = [record]
        if record.scene:
            parts, lost = windows(record, self.size, self.max_length)
            if lost:
                reading.passed["lines cut from long questions"] += lost
        for part in parts:
            yield part, self.conversation(part.messages)

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        return encode_conversation(messages, self.tokenizer, self.template, system=self.system)

    def size(self, messages: tuple[Message, ...]) -> int:
        return len(self.conversation(messages).input_ids)

    def example(self, record: Record, encoded: Encoded, unit: str) -> Example:
        """The encoded conversation, in its place in the room, with the hashes that find its near-duplicates."""
        question = alike(m.content + m.input for m in record.messages if m.role is Role.USER)
        answer = alike(m.content for m in record.messages if m.role is Role.ASSISTANT and m.train)
        start = self.room.count
        self.room.add(encoded.input_ids, encoded.labels)
        same = hashlib.sha256(encoded.input_ids.data).digest()
        return Example(record.id, unit, start, self.room.count, encoded.supervised, question, answer, same)


def account(report: Report, reading: Reading, lengths: list[tuple[int, str]]) -> None:
    """What was read, into the report; lengths: tokens and name of each record."""
    report.rows, report.records = reading.rows, len(reading.records)
    report.sources, report.formats = list(reading.sources), dict(Counter(reading.formats))
    report.passed, report.speakers = dict(reading.passed), dict(reading.speakers.most_common())
    report.notices += reading.notices
    report.longest, report.longest_id = max(lengths, key=lambda one: one[0], default=(0, ""))
    ordered = sorted(length for length, _ in lengths)
    report.percentiles = {share: ordered[min(len(ordered) * share // 100, len(ordered) - 1)] for share in (50, 90, 95, 99)}


def judge_overlong(overlong: list[tuple[int, str]], empty: list[str], section: Section, report: Report) -> None:
    """Count what is too long, and raise DataError where the recipe wants none."""
    longest, where = max(overlong, key=lambda pair: pair[0])
    many = "1 record exceeds" if len(overlong) == 1 else f"{len(overlong):,} records exceed"
    what = f"{many} max_length {section.max_length} (p95 {report.percentiles[95]:,}, longest {longest:,}: {where})"
    if section.overlong == "error":
        raise DataError(overlong[0][1], what, f"Set data.max_length: {longest}, or data.overlong: truncate or drop.")
    if section.overlong == "truncate":
        report.truncated = len(overlong)
        if empty:
            what += f"; in {len(empty):,} of them no answer would be left"
            raise DataError(empty[0], what, f"Set data.max_length: {longest}, or data.overlong: drop.")
    report.notices.append(f"{what}: {'cut, the end token kept' if section.overlong == 'truncate' else 'dropped'}")


def alike(texts: Iterable[str]) -> bytes:
    """A hash that ignores case, width, blanks and punctuation; b"" where nothing else is in the texts."""
    digest, empty = hashlib.sha256(), True
    for text in texts:
        letters = NO_LETTERS.sub("", unicodedata.normalize("NFKC", text).casefold())
        digest.update(letters.encode("utf-8", "replace"))
        empty = empty and not letters
    return b"" if empty else digest.digest()


def hold_out(examples: list[Example], share: float, seed: int, report: Report) -> tuple[list[Example], list[Example]]:
    """Examples to learn and to hold out, by the rule of `build`."""
    questions, answers = Counter[bytes](), Counter[bytes]()
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(example.unit, []).append(example)
    for unit in members.values():
        questions.update({example.question for example in unit})
        answers.update({example.answer for example in unit})
    alone = [
        (hashlib.sha256(b"%d " % seed + b"".join(e.question + e.answer for e in unit)).digest(), name)
        for name, unit in members.items()
        if all(questions[e.question] == 1 or not e.question for e in unit) and all(answers[e.answer] == 1 for e in unit)
    ]
    wanted = round(share * len(members))
    held = {name for _, name in sorted(alone)[: min(wanted, len(members) - 1)]}
    if len(held) < max(wanted, 1):
        few = f"{few_words(len(members))} too few"
        reason = few if wanted < 1 or len(members) == 1 else f"{few_words(len(alone))} without a near-duplicate among the others"
        report.notices.append(f"{few_words(len(held))} held out instead of {share:.0%}: {reason}")
    return [e for e in examples if e.unit not in held], [e for e in examples if e.unit in held]


def few_words(count: int) -> str:
    """So many records are: "no record is", "1 record is", "3 records are"."""
    return f"{count or 'no'} record is" if count < 2 else f"{count:,} records are"


def finish(train: list[Example], held: list[Example], report: Report) -> None:
    """Counts of both sides, and warnings on duplicates and overlap."""
    report.train_records, report.eval_records = len(train), len(held)
    report.tokens = sum(e.tokens for e in train)
    report.supervised = sum(e.supervised for e in train)
    report.eval_tokens = sum(e.tokens for e in held)
    kinds = {e.same for e in train}
    report.duplicates = len(train) - len(kinds)
    if report.duplicates > MANY * len(train):
        report.notices.append(f"{report.duplicates:,} of {len(train):,} records are duplicates of another")
    report.overlap = sum(e.same in kinds for e in held)
    if report.overlap:
        report.notices.append(f"{report.overlap:,} of {len(held):,} held-out records are trained on too: their loss says little")
    if report.supervised == 0:
        raise DataError("data.train", "0 trained tokens", "Give records with answers.")
