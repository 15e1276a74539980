"""From a recipe's data section to encoded records for training and evaluation, with a report that accounts for every row read."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tnl.data.files import Source
from tnl.data.formats import Reading, read
from tnl.data.messages import Message, Record, Role
from tnl.data.template import TEMPLATES, Encoded, Template, Tokenizer, cut_text, encode_conversation, encode_text, fit
from tnl.data.transcript import windows
from tnl.errors import DataError

MANY = 0.2
"""Share of duplicates, or of the held-out records that are also trained on, that is worth a warning."""
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
    """A record, encoded; `question` and `answer` are hashes that are equal for near-duplicates, `unit` what is held out whole."""

    record: dict[str, Any]
    unit: str
    question: bytes
    answer: bytes


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
    examples = encode_files(section.train, section, tokenizer, template, report)
    if share:
        train, held = hold_out(examples, share, seed, report)
    else:
        train, held = examples, []
    if section.eval and not share:
        other = Report()
        held = encode_files(section.eval, section, tokenizer, template, other)
        report.sources += other.sources
        report.notices += [f"data.eval: {notice}" for notice in other.notices]
    finish(train, held, report)
    return Dataset([example.record for example in train], [example.record for example in held], report)


def template_named(name: str) -> Template:
    """The template of that name."""
    if name not in TEMPLATES:
        raise DataError("data.template", f"unknown template {name!r}", f"Use one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def encode_files(paths: Any, section: Section, tokenizer: Tokenizer, template: Template, report: Report) -> list[Example]:
    """Examples of all records of the files, within max_length; the report filled in."""
    reading = read(paths, format=section.format, columns=section.columns, encoding=section.encoding, persona=section.persona)
    encoder = Encoder(tokenizer, template, section.system, section.max_length)
    examples: list[Example] = []
    lengths: list[int] = []
    empty: list[str] = []
    overlong: list[tuple[int, str]] = []
    few_scenes = sum(record.scene for record in reading.records) < FEW_SCENES
    for record in reading.records:
        for part, encoded in encoder.encode(record, report, reading):
            length = len(encoded.input_ids)
            lengths.append(length)
            if length > report.longest:
                report.longest, report.longest_id = length, part.id
            if section.max_length and length > section.max_length:
                overlong.append((length, part.id))
            fitted = fit(encoded, section.max_length, "drop" if section.overlong == "drop" else "truncate")
            if fitted is None or (not fitted.supervised and section.overlong == "drop"):
                report.dropped += 1
            elif not fitted.supervised:
                empty.append(part.id)
            else:
                unit = part.id if record.text is not None or (record.scene and few_scenes) else record.id
                examples.append(example_of(part, fitted, unit))
    account(report, reading, lengths)
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
    """Records into ids, with what a recipe says of all of them."""

    tokenizer: Tokenizer
    template: Template
    system: str | None
    max_length: int | None

    def encode(self, record: Record, report: Report, reading: Reading) -> Iterable[tuple[Record, Encoded]]:
        """The record; a document by pieces, a transcript's scene by windows."""
        if record.text is not None:
            for number, piece in enumerate(cut_text(encode_text(record.text, self.tokenizer), self.max_length), start=1):
                name = record.id if number == 1 else f"{record.id} piece {number}"
                yield Record(name, text=self.tokenizer.sp_model.decode(piece.input_ids)), piece
            return
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


def account(report: Report, reading: Reading, lengths: list[int]) -> None:
    """What was read, into the report."""
    report.rows, report.records = reading.rows, len(reading.records)
    report.sources, report.formats = list(reading.sources), dict(Counter(reading.formats))
    report.passed, report.speakers = dict(reading.passed), dict(reading.speakers.most_common())
    report.notices += reading.notices
    ordered = sorted(lengths)
    report.percentiles = {share: ordered[min(len(ordered) * share // 100, len(ordered) - 1)] for share in (50, 90, 95, 99)}


def judge_overlong(overlong: list[tuple[int, str]], empty: list[str], section: Section, report: Report) -> None:
    """Count what is too long, and raise DataError where the recipe wants none."""
    longest, where = max(overlong, key=lambda pair: pair[0])
    what = (
        f"{len(overlong):,} records exceed max_length {section.max_length} (p95 {report.percentiles[95]:,}, longest {longest:,}: {where})"
    )
    if section.overlong == "error":
        raise DataError(overlong[0][1], what, f"Set data.max_length: {longest}, or data.overlong: truncate or drop.")
    if section.overlong == "truncate":
        report.truncated = len(overlong)
        if empty:
            what += f"; in {len(empty):,} of them no answer would be left"
            raise DataError(empty[0], what, f"Set data.max_length: {longest}, or data.overlong: drop.")
    report.notices.append(f"{what}: {'cut, the end token kept' if section.overlong == 'truncate' else 'dropped'}")


def example_of(record: Record, encoded: Encoded, unit: str) -> Example:
    """The encoded record with the hashes that find its near-duplicates."""
    asked = [m.content + m.input for m in record.messages if m.role is Role.USER]
    answered = [m.content for m in record.messages if m.role is Role.ASSISTANT and m.train] if record.text is None else [record.text]
    fields = {"id": record.id, "input_ids": encoded.input_ids, "labels": encoded.labels}
    return Example(fields, unit, alike(asked), alike(answered))


def alike(texts: list[str]) -> bytes:
    """A hash that ignores case, width, blanks and punctuation; b"" where nothing else is in the texts."""
    text = unicodedata.normalize("NFKC", "\n".join(texts)).casefold()
    letters = "".join(filter(str.isalnum, text))
    return hashlib.sha256(letters.encode("utf-8", "replace")).digest() if letters else b""


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
        reason = f"{len(members)} records are too few" if wanted < 1 else f"only {len(alone)} records have no near-duplicate"
        report.notices.append(f"{len(held)} records are held out instead of {share:.0%}: {reason}")
    return [e for e in examples if e.unit not in held], [e for e in examples if e.unit in held]


def finish(train: list[Example], held: list[Example], report: Report) -> None:
    """Counts of both sides, and warnings on duplicates and overlap."""
    report.train_records, report.eval_records = len(train), len(held)
    report.tokens = sum(len(e.record["input_ids"]) for e in train)
    report.supervised = sum(len(e.record["labels"]) - e.record["labels"].count(-100) for e in train)
    report.eval_tokens = sum(len(e.record["input_ids"]) for e in held)
    kinds = Counter(tuple(e.record["input_ids"]) for e in train)
    report.duplicates = len(train) - len(kinds)
    if report.duplicates > MANY * len(train):
        report.notices.append(f"{report.duplicates:,} of {len(train):,} records are duplicates of another")
    report.overlap = sum(tuple(e.record["input_ids"]) in kinds for e in held)
    if report.overlap:
        report.notices.append(f"{report.overlap:,} of {len(held):,} held-out records are trained on too: their loss says little")
    if report.supervised == 0:
        raise DataError("data.train", "0 trained tokens", "Give records with answers.")
