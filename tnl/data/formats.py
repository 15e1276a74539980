"""Read records: instruction records, OpenAI messages, ShareGPT conversations, transcripts and plain text, from files of any kind.

Our own reader, because the usual one reads GB18030 as mojibake without a word, turns NA into nothing and names no file.
A record that is malformed ends the reading with its place; nothing is left out in silence.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnl.data.files import Source, find_files, read_whole, source_of, text_of
from tnl.data.messages import Message, Record, Role
from tnl.data.rows import Row, rows_of, shown_keys, type_name
from tnl.data.transcript import Line, Scenes, parse_transcript, persona_records, scenes_of_rows
from tnl.errors import DataError

FORMATS = ("auto", "alpaca", "messages", "sharegpt", "transcript", "text")
NEEDS = {
    **dict.fromkeys(("instruction", "input", "output"), "Every record needs instruction and output; input may be empty."),
    **dict.fromkeys(("name", "line"), "Every row of a transcript needs name and line."),
}

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("user", "human", "tool", "function", "observation", "function_response"), Role.USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), Role.ASSISTANT),
}
"""A tool's call is the assistant's turn and its result the user's: that is the order in which the model meets them."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "role", "content", "system", "tools"),
    "sharegpt": ("conversations", "from", "value", "system", "tools"),
    "transcript": ("name", "line", "scene"),
    "text": ("text",),
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "instruction": ("prompt", "question", "query", "user", "q", "问题", "问", "指令"),
    "output": ("response", "answer", "completion", "target", "reply", "assistant", "a", "回答", "答", "答案"),
    "input": ("context", "输入"),
    "messages": ("dialog", "dialogue", "chat", "turns"),
    "text": ("content", "document", "body", "文本"),
}
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Reading:
    """What was read: every row is a record, or counted in `passed` with the reason."""

    records: list[Record] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    rows: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)


def read_records(
    paths: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    persona: str | None = None,
) -> list[Record]:
    """The records of files, folders or a list of these. Raises DataError at the first that cannot be used."""
    return read(paths, format=format, columns=columns, encoding=encoding, persona=persona).records


def read(
    paths: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    persona: str | None = None,
) -> Reading:
    """The same with sources, counts and notices.

    `columns` maps our names to the file's: {instruction: prompt, output: response}. `persona` is for transcripts, and needed there.
    """
    check_options(format, columns)
    files, notices = find_files(paths)
    reading = Reading(notices=notices)
    scenes: list[tuple[Path, Scenes]] = []
    for path in files:
        reading.sources.append(source_of(path))
        if path.suffix.lower() == ".txt":
            read_txt(path, format, encoding, persona, reading, scenes)
        else:
            read_rows(path, format, Mapper(dict(columns or {})), encoding, reading, scenes)
    if scenes:
        add_transcripts(scenes, persona, reading)
    elif persona:
        what = f"data.persona is for transcripts, and there is none (found {', '.join(sorted(set(reading.formats)))})"
        raise DataError(files[0], what, "Remove it, or set data.format: transcript.")
    if not reading.records:
        raise DataError(files[0], "no records", "Put records into it.")
    note_oddities(reading)
    return reading


def speakers(
    paths: str | Path | Sequence[str | Path], *, columns: Mapping[str, str] | None = None, encoding: str | None = None
) -> Counter[str]:
    """Who speaks in transcripts, and how many lines each has."""
    counts: Counter[str] = Counter()
    for path in find_files(paths)[0]:
        if path.suffix.lower() == ".txt":
            counts += parse_transcript(read_whole(path, encoding)).speakers
        else:
            mapper = Mapper(dict(columns or {}))
            counts += scenes_of_rows([transcript_line(row, mapper) for row in rows_of(path, encoding)]).speakers
    return counts


def check_options(format: str, columns: Mapping[str, str] | None) -> None:
    """Refuse a format or a column of ours that does not exist."""
    if format not in FORMATS:
        raise DataError("data.format", f"unknown format {format!r}", f"Use one of {', '.join(FORMATS)}.")
    known = sorted({name for names in COLUMNS.values() for name in names})
    for name in columns or {}:
        if name not in known:
            todo = f"On the left stands one of {', '.join(known)}; on the right the file's own name."
            raise DataError("data.columns", f"no column is called {name!r}", todo)


class Mapper:
    """Our column names in a row that may use others."""

    def __init__(self, columns: dict[str, str]) -> None:
        self.columns = columns

    def name(self, ours: str) -> str:
        return self.columns.get(ours, ours)

    def has(self, row: Mapping[str, Any], ours: str) -> bool:
        return self.name(ours) in row

    def shown(self, ours: str) -> str:
        theirs = self.name(ours)
        return f'"{theirs}"' if theirs == ours else f'"{theirs}" (data.columns: {ours})'

    def text(self, row: Mapping[str, Any], ours: str, where: str, *, needed: bool = False) -> str:
        """The column's text; "" where it is absent or null and not needed. Raises DataError for another type."""
        value = row.get(self.name(ours))
        if value is None:
            if not needed:
                return ""
            what = "is null" if self.has(row, ours) else "is missing"
            todo = mapping_to_try(row, [ours]) or NEEDS.get(ours, f"Every record needs {ours}.")
            raise DataError(where, f"{self.shown(ours)} {what} (found {shown_keys(row)})", todo)
        return checked_text(value, self.shown(ours), where)


def checked_text(value: Any, name: str, where: str) -> str:
    """The value, where it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(where, f"{name} is {type_name(value)} (found {str(value)[:40]}; needed text)", "Write it in double quotes.")
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(where, f"{name} holds half of a surrogate pair", "Write the character itself, or both halves of its \\u escape.")
    return value


def read_txt(
    path: Path, format: str, encoding: str | None, persona: str | None, reading: Reading, scenes: list[tuple[Path, Scenes]]
) -> None:
    """A .txt file: a transcript where the format or a persona says so, else one document."""
    if format not in ("auto", "text", "transcript"):
        raise DataError(path, f"a .txt file holds no {format} records", "Use text or transcript, or another file.")
    if format == "transcript" or (format == "auto" and persona):
        text = read_whole(path, encoding)
        require_text(path, [text])
        reading.formats.append("transcript")
        scenes.append((path, parse_transcript(text)))
        return
    record = Record(f"{path}:record 1", text=text_of(path, encoding))
    require_text(path, record.blocks())
    reading.formats.append("text")
    reading.rows += 1
    reading.records.append(record)
    beginning = next(iter(record.blocks()))
    if format == "auto" and len(found := parse_transcript(beginning).speakers) >= 2 and found.total() > beginning.count("\n") // 2:
        names = ", ".join(name for name, _ in found.most_common(4))
        looks = f"looks like a transcript ({names}); set data.persona to learn one of them"
        reading.notices.append(f"{path}: read as one plain document, but {looks}")


def require_text(path: Path, blocks: Iterable[str]) -> None:
    """Raise DataError where nothing but blanks is in the file."""
    if not any(block.strip() for block in blocks):
        raise DataError(path, "no records (the file is blank)", "Put text into it.")


def read_rows(path: Path, format: str, mapper: Mapper, encoding: str | None, reading: Reading, scenes: list[tuple[Path, Scenes]]) -> None:
    """A file of rows: its format is that of its first record, unless given."""
    converters: dict[str, Callable[[Row, Mapper], Record]] = {
        "alpaca": alpaca, "messages": messages, "sharegpt": sharegpt, "text": text_record
    }  # fmt: skip
    seen: set[str] = set()
    lines: list[Line] = []
    before = len(reading.records)
    for row in rows_of(path, encoding):
        if not seen and format == "auto":
            format = detect(row, mapper)
        seen.update(row.value)
        if format == "transcript":
            lines.append(transcript_line(row, mapper))
        else:
            reading.records.append(converters[format](row, mapper))
    if lines:
        scenes.append((path, scenes_of_rows(lines)))
    elif len(reading.records) == before:
        raise DataError(path, "no records", "Put records into it.")
    reading.rows += len(reading.records) - before
    reading.formats.append(format)
    unused = sorted(str(name) for name in seen - {mapper.name(ours) for ours in COLUMNS[format]})
    if unused:
        reading.notices.append(f"{path}: columns that are not used: {', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}")


def detect(row: Row, mapper: Mapper) -> str:
    """The format that a record's columns show. Raises DataError with a mapping to try where they show none."""
    keys = row.value
    if mapper.has(keys, "messages"):
        return "messages"
    if mapper.has(keys, "conversations"):
        return "sharegpt"
    if mapper.has(keys, "instruction") or mapper.has(keys, "output"):
        return "alpaca"
    if mapper.has(keys, "text"):
        return "text"
    todo = mapping_to_try(keys, ["instruction", "input", "output"]) or mapping_to_try(keys, ["messages"]) or mapping_to_try(keys, ["text"])
    todo = todo or "Set data.columns: {instruction: THEIR_NAME, output: THEIR_NAME}."
    needed = "instruction and output, or messages, or conversations, or text"
    raise DataError(row.where, f"no usable columns (found {shown_keys(keys)}; needed {needed})", todo)


def mapping_to_try(row: Mapping[str, Any], needed: Sequence[str]) -> str:
    """A line for the recipe where the row has other words for the columns that are needed; "" where it has none."""
    pairs = [(ours, next((key for key in row if str(key).lower() in SYNONYMS.get(ours, ())), None)) for ours in needed]
    named = ", ".join(f"{ours}: {theirs}" for ours, theirs in pairs if theirs is not None)
    return f"Set data.columns: {{{named}}}." if named else ""


def alpaca(row: Row, mapper: Mapper) -> Record:
    """instruction, input, output; system and history ([[question, answer], ...]) where there are any. Null is absent where optional."""
    value, where = row.value, row.where
    instruction = mapper.text(value, "instruction", where, needed=True)
    extra = mapper.text(value, "input", where)
    output = mapper.text(value, "output", where, needed=True)
    system = mapper.text(value, "system", where)
    if not output.strip():
        raise DataError(where, f"{mapper.shown('output')} is empty", "Give the answer to learn, or remove the record.")
    if not instruction.strip() and not extra.strip():
        raise DataError(
            where, f"{mapper.shown('instruction')} and {mapper.shown('input')} are both empty", "Give the question, or remove the record."
        )
    turns = [Message(Role.SYSTEM, system)] if system else []
    turns += history_turns(value.get(mapper.name("history")) or [], mapper.shown("history"), where)
    # an instruction that is empty leaves its place to the input, so that every template has one question
    question = Message(Role.USER, instruction, input=extra) if instruction else Message(Role.USER, extra)
    return Record(where, (*turns, question, Message(Role.ASSISTANT, output)))


def history_turns(value: Any, name: str, where: str) -> list[Message]:
    """Earlier turns, [[question, answer], ...]; their answers are learned too."""
    turns: list[Message] = []
    for number, pair in enumerate(listed(value, name, where), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(where, f"{name} entry {number} is no pair (needed [question, answer])", "Correct the record.")
        asked, answered = (checked_text(part, f"{name} entry {number}", where) for part in pair)
        if not answered.strip():
            raise DataError(where, f"{name} entry {number} has an empty answer", "Give the answer, or remove the pair.")
        turns += [Message(Role.USER, asked), Message(Role.ASSISTANT, answered)]
    return turns


def listed(value: Any, name: str, where: str) -> list[Any]:
    """A list, or a JSON text of one, as .csv and some parquet files hold it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(where, f"{name} is text, but not a JSON list ({error})", "Correct the record.") from error
    if not isinstance(value, list):
        raise DataError(where, f"{name} is {type_name(value)} (needed a list)", "Correct the record.")
    return value


def messages(row: Row, mapper: Mapper) -> Record:
    """OpenAI's form: [{role, content}]; a weight of 0 leaves an answer unlearned, as there."""
    return conversation(row, mapper, ("messages", "role", "content"))


def sharegpt(row: Row, mapper: Mapper) -> Record:
    """ShareGPT's form: [{from, value}]."""
    return conversation(row, mapper, ("conversations", "from", "value"))


def conversation(row: Row, mapper: Mapper, names: tuple[str, str, str]) -> Record:
    """Turns in order, with `system` and `tools` beside them; the tools' text joins the system turn as it stands."""
    turns_name, role_name, text_name = names
    value, where = row.value, row.where
    if value.get(mapper.name(turns_name)) is None:
        what = "is null" if mapper.has(value, turns_name) else "is missing"
        raise DataError(where, f"{mapper.shown(turns_name)} {what} (found {shown_keys(value)})", f"Every record needs {turns_name}.")
    turns: list[Message] = []
    for number, turn in enumerate(listed(value[mapper.name(turns_name)], mapper.shown(turns_name), where), start=1):
        place = f"message {number}"
        if not isinstance(turn, dict):
            raise DataError(where, f"{place} is {type_name(turn)} (needed an object)", f"Write {{{role_name}: ..., {text_name}: ...}}.")
        named = turn.get(mapper.name(role_name))
        role = ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise DataError(where, f"{place} has no known {role_name} (found {str(named)[:40]!r})", f"Known are {', '.join(ROLES)}.")
        text = turn_text(turn, mapper.name(text_name), place, where)
        turns.append(Message(role, text, train=turn.get("weight", 1) != 0))
    system, tools = mapper.text(value, "system", where), mapper.text(value, "tools", where)
    return Record(where, ordered(with_system(turns, system, tools, where), where, value))


def turn_text(turn: dict[str, Any], key: str, place: str, where: str) -> str:
    """A turn's text: a string, OpenAI's list of text parts, or its tool calls where there is no text."""
    value = turn.get(key)
    if not value and isinstance(turn.get("tool_calls"), list):
        return json.dumps([call.get("function", call) for call in turn["tool_calls"] if isinstance(call, dict)], ensure_ascii=False)
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise DataError(where, f"{place} holds something other than text", "Only text can be learned.")
        value = "".join(checked_text(part.get("text"), place, where) for part in value)
    if value is None:
        what = f'{place}: "{key}" is {"null" if key in turn else "missing"} (found {shown_keys(turn)})'
        raise DataError(where, what, "Every message needs a text.")
    return checked_text(value, f'{place}: "{key}"', where)


def with_system(turns: list[Message], system: str, tools: str, where: str) -> list[Message]:
    """The turns behind one system turn made of the record's own, its `system` and its `tools`."""
    if turns and turns[0].role is Role.SYSTEM:
        if system:
            raise DataError(where, "has two system texts (a message and a column)", "Keep one.")
        system, turns = turns[0].content, turns[1:]
    if tools.strip() not in ("", "[]"):
        system = f"{system}\n\nTools: {tools}" if system else f"Tools: {tools}"
    return [Message(Role.SYSTEM, system), *turns] if system else turns


def ordered(turns: list[Message], where: str, value: dict[str, Any]) -> tuple[Message, ...]:
    """The turns, where user and assistant alternate from a user to an assistant and no answer is empty."""
    first = 1 if turns and turns[0].role is Role.SYSTEM else 0
    talk = turns[first:]
    if not talk:
        raise DataError(where, "has no messages", "Give a question and its answer, or remove the record.")
    for number, turn in enumerate(talk, start=1):
        expected = Role.USER if number % 2 else Role.ASSISTANT
        if turn.role is not expected:
            what = f"turn {number} is the {turn.role}'s (needed the {expected}'s: user and assistant alternate, the user first)"
            raise DataError(where, what, "Join neighbours of one role, or remove the record.")
        if turn.role is Role.ASSISTANT and not turn.content.strip():
            raise DataError(where, f"turn {number}, the assistant's, is empty", "Give the answer to learn, or remove the record.")
    if len(talk) % 2:
        pairs = {"chosen", "rejected"} <= set(value)
        todo = "These are preference pairs; append the chosen answer to each." if pairs else "Give the answer, or remove the question."
        raise DataError(where, "ends with a question that has no answer", todo)
    return tuple(turns)


def text_record(row: Row, mapper: Mapper) -> Record:
    """A plain document, learned whole."""
    text = mapper.text(row.value, "text", row.where, needed=True)
    if not text.strip():
        raise DataError(row.where, f"{mapper.shown('text')} is empty", "Give the text, or remove the record.")
    return Record(row.where, text=text)


def transcript_line(row: Row, mapper: Mapper) -> Line:
    """A row of name and line; another value of `scene`, where there is one, begins another scene."""
    name, text = (mapper.text(row.value, ours, row.where, needed=True) for ours in ("name", "line"))
    return Line(row.where, name, text, str(row.value.get(mapper.name("scene"), "")))


def add_transcripts(scenes: list[tuple[Path, Scenes]], persona: str | None, reading: Reading) -> None:
    """Scenes of all transcripts as records of the persona."""
    for _, found in scenes:
        reading.speakers += found.speakers
    records, passed = persona_records(scenes, persona, reading.speakers)
    reading.records += records
    reading.rows += sum(len(found.scenes) for _, found in scenes)
    reading.passed += passed
    reading.notices += [f"{path}: {notice}" for path, found in scenes for notice in found.notices]


def note_oddities(reading: Reading) -> None:
    """Say where U+FFFD stands, the mark that an earlier wrong decoding left, and where a placeholder was never filled in."""
    damaged, unfilled = list[str](), list[str]()
    for record in reading.records:
        broken, placeholder = False, None
        for part in (m.content for m in record.messages) if record.text is None else record.blocks():
            broken = broken or "\ufffd" in part
            placeholder = placeholder or PLACEHOLDER.search(part)
        damaged += [record.id] * broken
        unfilled += [] if placeholder is None else [placeholder.group()]
    if damaged:
        reading.notices.append(f"{len(damaged)} records hold U+FFFD, left by an earlier wrong decoding (first: {damaged[0]})")
    if unfilled:
        reading.notices.append(f"{len(unfilled)} records hold placeholders such as {unfilled[0]}, which are learned as they stand")
