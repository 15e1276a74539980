"""Scripts and exported chats: who says what, in which scene, and records that teach one of the speakers.

Three forms are read. Scripts: `name: line` (or `name：line`), a blank line between scenes; a line without a name goes on with the one
before; a line in brackets is a stage direction. Chats with everything on one line: `[2024/1/2, 12:33:44] name: text` (WhatsApp and
its like). Chats with a head line of time and name, in either order, and the text below it (QQ, WeChat). Chats break into scenes where
the day changes or an hour passes.

Every line is counted: in a record, or passed over with its reason.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from tnl.data.messages import Message, Record, Role
from tnl.errors import DataError
from tnl.paths import nearest

PAUSE = 60
"""Minutes of silence after which a chat begins another scene."""

# every repetition is bounded or cannot overlap its neighbour, so that no line takes more than linear time
DATE = r"(?:\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}日?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})"
CLOCK = r"(?:[上下]午|凌晨|早上|中午|晚上)?\s?\d{1,2}:\d{2}(?::\d{2})?(?:[\s\u202f][AaPp]\.?[Mm]\.?)?"
WHEN = rf"[\[(【]?(?P<date>{DATE})?(?:,|T|\s){{0,3}}(?:星期.|周.)?\s{{0,3}}(?P<clock>{CLOCK})[\])】]?"
INLINE = re.compile(rf"{WHEN}\s{{0,3}}(?:-\s)?(?P<name>[^:：]{{1,40}}?)[:：]\s*(?P<text>.*)")
TIME_FIRST = re.compile(rf"{WHEN}\s{{1,3}}(?P<name>[^\s:：][^:：]{{0,39}})(?P<text>)")
NAME_FIRST = re.compile(rf"(?P<name>[^\s:：][^:：]{{0,39}}?)(?:,|\s|—){{1,3}}{WHEN}(?P<text>)")
STAMPED = re.compile(rf"{WHEN}(?:\s|$)")

SPOKEN = re.compile(r"(?P<name>[^:：]{1,30})[:：](?!//)\s*(?P<text>.*)")
NO_NAME = re.compile(r"[。！？!?，,；;“”\"…、《》/\\=]|^\W*\d[\d\W]*$")
STAGE = re.compile(r"[（(【\[][^）)】\]]*[）)】\]]")
RULE = re.compile(r"[-—–*=_~#·\s]{3,}")
BREAK = re.compile(rf"{RULE.pattern}|#.*|第.{{1,5}}[场幕集章回折](?:\s.*)?")
HEADINGS = frozenset(["场景", "时间", "地点", "人物", "景别", "备注", "scene", "time", "place", "setting", "characters"])
"""What stands before a colon and is no speaker."""
DAY = re.compile(rf"[-—–=*#\s]{{2,}}(?P<date>{DATE})[-—–=*#\s]{{2,}}")
MEDIA = re.compile(
    r"[\[<【(](?:图片|表情|动画表情|语音|视频|文件|位置|红包|转账|链接|名片|media omitted|photo|video|sticker|voice message)[\]>】)]"
    r"|(?:image|video|audio|sticker|gif|document) omitted",
    re.IGNORECASE,
)
RECALLED = re.compile(
    r"(?:你|[\"“「]?.{1,40}?[\"”」]?)\s?撤回了一条消息\s*(?:重新编辑)?|\[?(?:消息已撤回|已撤回)\]?"
    r"|You deleted this message\.?|This message was deleted\.?|.{1,40} (?:has )?(?:recalled|unsent) a message\.?"
)
"""A whole line that says a message is gone."""
EDITED = re.compile(r"<This message was edited>")
MARKS = dict.fromkeys(map(ord, "\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069\ufeff"))


@dataclass(frozen=True, slots=True)
class Line:
    """What one speaker says without a break. `where` is its place; `scene` tells scenes apart."""

    where: str
    name: str
    text: str
    scene: str = ""


@dataclass
class Scenes:
    """A transcript: scenes of lines, its speakers by number of lines, and what was passed over."""

    scenes: list[list[Line]] = field(default_factory=list)
    speakers: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)


def parse_transcript(text: str) -> Scenes:
    """The scenes of a script or an exported chat; which of the forms it is, its lines decide."""
    lines = [line.translate(MARKS).strip() for line in text.split("\n")]
    passed: Counter[str] = Counter()
    written = sum(1 for line in lines if line)
    heads = max((INLINE, TIME_FIRST, NAME_FIRST), key=lambda form: sum(1 for line in lines if form.fullmatch(line)))
    stamped = sum(1 for line in lines if heads.fullmatch(line))
    chat = stamped >= 2 and stamped * 10 >= written
    scenes = group_scenes(with_words(chat_lines(lines, heads, passed) if chat else script_lines(lines, passed), passed))
    notices: list[str] = []
    if not chat and len(scenes) > 3 and sum(len(scene) == 1 for scene in scenes) * 5 >= len(scenes) * 4:
        # double-spaced: a blank line after every line, so a scene ends where two or more are blank
        notices.append("almost every line stands alone between blank lines, so a scene ends at two blank lines")
        passed.clear()
        scenes = group_scenes(with_words(script_lines(lines, passed, blanks=2), passed))
    return summary(scenes, passed, notices)


def summary(scenes: list[list[Line]], passed: Counter[str], notices: list[str]) -> Scenes:
    """The scenes with their speakers counted; MARA and Mara are one, by the spelling that is used most."""
    spelled: dict[str, Counter[str]] = {}
    for scene in scenes:
        for line in scene:
            spelled.setdefault(line.name.casefold(), Counter())[line.name] += 1
    names = {folded: counts.most_common(1)[0][0] for folded, counts in spelled.items()}
    scenes = [[replace(line, name=names[line.name.casefold()]) for line in scene] for scene in scenes]
    return Scenes(scenes, Counter(line.name for scene in scenes for line in scene), passed, notices)


def scenes_of_rows(lines: list[Line]) -> Scenes:
    """A transcript from rows that name speaker, line and scene."""
    passed: Counter[str] = Counter()
    return summary(group_scenes(with_words((replace(line, name=plain_name(line.name)) for line in lines), passed)), passed, [])


def with_words(lines: Iterable[Line], passed: Counter[str]) -> list[Line]:
    """The lines in which something is said; the others are counted."""
    kept = []
    for line in lines:
        if line.text.strip():
            kept.append(line)
        else:
            passed["lines without words"] += 1
    return kept


def group_scenes(lines: list[Line]) -> list[list[Line]]:
    """Neighbouring lines of one scene together."""
    return [list(group) for _, group in groupby(lines, key=lambda line: line.scene)]


def script_lines(lines: list[str], passed: Counter[str], blanks: int = 1) -> Iterator[Line]:
    """`name: line`; scenes end at so many blank lines, at a rule, or at a heading."""
    scene, empty = 0, 0
    current: Line | None = None
    for number, line in enumerate(lines, start=1):
        if not line:
            empty += 1
            continue
        if empty >= blanks or BREAK.fullmatch(line):
            scene += 1
            if current:
                yield current
            current = None
        empty = 0
        spoken = SPOKEN.fullmatch(line)
        name = plain_name(spoken["name"]) if spoken else ""
        if BREAK.fullmatch(line) or name.casefold() in HEADINGS:
            passed["headings and rules"] += 1
        elif STAGE.fullmatch(line):
            passed["stage directions"] += 1
        elif spoken and name and not NO_NAME.search(name) and len(name.split()) <= 4:
            if current:
                yield current
            current = Line(f"line {number}", name, spoken["text"].strip(), str(scene))
        elif current:
            current = replace(current, text=f"{current.text}\n{line}".strip())
        else:
            passed["lines without a speaker"] += 1
    if current:
        yield current


def chat_lines(lines: list[str], heads: re.Pattern[str], passed: Counter[str]) -> Iterator[Line]:
    """Messages under heads that carry a time; what has a time and no name is the program's own notice."""
    scene, last = 0, ("", -1)
    current: Line | None = None
    for number, line in enumerate(lines, start=1):
        head = heads.fullmatch(line)
        if head:
            if current:
                yield spoken_text(current)
            # a day's own line (above) stands in for the date of the heads below it
            when = (head["date"] or last[0], minutes(head["clock"]))
            if last[1] >= 0 and (when[0] != last[0] or not 0 <= when[1] - last[1] <= PAUSE):
                scene += 1
            last = when
            current = Line(f"line {number}", plain_name(head["name"]), head["text"].strip(), str(scene))
        elif day := DAY.fullmatch(line):
            passed["headings and rules"] += 1
            if current:
                yield spoken_text(current)
            current, scene, last = None, scene + 1, (day["date"], -1)
        elif line and RULE.fullmatch(line):
            passed["headings and rules"] += 1
        elif line and (stamp := STAMPED.match(line)) and (stamp["date"] or not last[0]):
            passed["notices of the chat program"] += 1
            if current:
                yield spoken_text(current)
            current = None
        elif current:
            current = replace(current, text=f"{current.text}\n{line}".strip())
        elif line:
            passed["lines before the first message"] += 1
    if current:
        yield spoken_text(current)


def spoken_text(line: Line) -> Line:
    """The line without pictures and the like, and without what the chat program says of messages that are gone."""
    kept = [part for part in line.text.split("\n") if not RECALLED.fullmatch(part.strip())]
    return replace(line, text=EDITED.sub("", MEDIA.sub("", "\n".join(kept))).strip())


def minutes(clock: str) -> int:
    """Minutes since midnight, as nearly as pauses need it."""
    hour, minute = map(int, re.findall(r"\d+", clock)[:2])
    late = re.search(r"下午|晚上|[Pp]\.?[Mm]", clock)
    return (hour % 12 + 12 if late else hour) * 60 + minute


def plain_name(name: str) -> str:
    """A speaker's name without stage directions, bold marks, and the number that QQ appends."""
    name = unicodedata.normalize("NFKC", name[:100])
    name = re.sub(r"\([^)]*\)\s*$|\[[^\]]*\]\s*$|<[^>]*>\s*$", "", name)
    return name.strip().strip("*_~ ").strip()


def persona_records(scenes: list[tuple[Path, Scenes]], persona: str | None, speakers: Counter[str]) -> tuple[list[Record], Counter[str]]:
    """One record a scene in which the persona speaks, and what was passed over.

    The persona's lines are the assistant's and alone are learned; consecutive lines of one speaker are one turn. All others together are
    the user; where a scene has two or more of them, each of their lines begins with its speaker's name. A persona that opens a scene
    answers nothing but the system text. Raises DataError where no persona is named or it never speaks, with the speakers there are.
    """
    wanted = plain_name(persona or "").casefold()
    shown = ", ".join(f"{name} {count}" for name, count in speakers.most_common(12)) or "none"
    where = scenes[0][0]
    if not wanted and speakers:
        raise DataError(where, f"a transcript needs data.persona (speakers: {shown})", "Name the speaker to learn.")
    if not speakers:
        todo = "Write `name: line`, with an empty line between scenes, or set data.format: text."
        raise DataError(where, "nobody speaks (needed: lines of the form `name: line`, or an exported chat)", todo)
    if not any(name.casefold() == wanted for name in speakers):
        near = next((name for name in speakers if wanted in name.casefold()), None) or nearest(wanted, list(speakers))
        todo = f"Did you mean {near}?" if near else "Name one of them."
        raise DataError(where, f"data.persona: {persona!r} never speaks (speakers: {shown})", todo)
    records: list[Record] = []
    passed: Counter[str] = Counter()
    for path, found in scenes:
        passed += found.passed
        for scene in found.scenes:
            own = [i for i, line in enumerate(scene) if line.name.casefold() == wanted]
            if not own:
                passed["scenes without the persona"] += 1
                continue
            passed["lines after the persona's last"] += len(scene) - 1 - own[-1]
            place = scene[0].where if scene[0].where.startswith(str(path)) else f"{path}:{scene[0].where}"
            records.append(Record(place, tuple(turns_of(scene[: own[-1] + 1], wanted)), scene=True))
    return records, +passed


def turns_of(scene: list[Line], persona: str) -> Iterator[Message]:
    """The scene's turns, the persona's as the assistant's."""
    others = {line.name for line in scene if line.name.casefold() != persona}
    for is_persona, group in groupby(scene, key=lambda line: line.name.casefold() == persona):
        lines = list(group)
        if is_persona:
            yield Message(Role.ASSISTANT, "\n".join(line.text for line in lines))
        elif len(others) == 1:
            yield Message(Role.USER, "\n".join(line.text for line in lines))
        else:
            runs = [(name, "\n".join(line.text for line in run)) for name, run in groupby(lines, key=lambda line: line.name)]
            yield Message(Role.USER, "\n".join(f"{name}{': ' if name.isascii() else '：'}{text}" for name, text in runs))


def windows(record: Record, size: Callable[[tuple[Message, ...]], int], max_length: int | None) -> tuple[list[Record], int]:
    """A scene in records of at most max_length tokens, each of the persona's turns learned once; and how many lines were lost.

    A later window opens with the turns before it, up to a quarter of its tokens, as context that is not learned. A question that is too
    long loses its first lines; an answer that is too long is left to truncation. `size` counts the tokens of messages.
    """
    if max_length is None or size(record.messages) <= max_length:
        return [record], 0
    whole = exchanges(record.messages)
    pairs = [shortened(pair, size, max_length) for pair in whole]
    lost = sum(pair[0].content.count("\n") for pair in whole) - sum(pair[0].content.count("\n") for pair in pairs)
    sizes = [size(pair) for pair in pairs]
    result: list[Record] = []
    start = 0
    while start < len(pairs):
        first, total = start, sizes[start]
        while first > 0 and (total - sizes[start]) + sizes[first - 1] <= max_length // 4 and total + sizes[first - 1] <= max_length:
            first -= 1
            total += sizes[first]
        end = start + 1
        while end < len(pairs) and total + sizes[end] <= max_length:
            total += sizes[end]
            end += 1
        context = tuple(replace(message, train=False) for pair in pairs[first:start] for message in pair)
        learned = tuple(message for pair in pairs[start:end] for message in pair)
        result.append(Record(f"{record.id} window {len(result) + 1}", context + learned, scene=True))
        start = end
    return result, lost


def exchanges(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Turns up to and with each of the assistant's."""
    result: list[tuple[Message, ...]] = []
    pending: list[Message] = []
    for message in messages:
        pending.append(message)
        if message.role is Role.ASSISTANT:
            result.append(tuple(pending))
            pending = []
    return result


def shortened(pair: tuple[Message, ...], size: Callable[[tuple[Message, ...]], int], max_length: int) -> tuple[Message, ...]:
    """The exchange within max_length, if dropping the first lines of its question is enough."""
    while len(pair) == 2 and size(pair) > max_length and "\n" in pair[0].content:
        lines = pair[0].content.split("\n")
        kept = lines[max(len(lines) // 4, 1) :]
        pair = (replace(pair[0], content="\n".join(kept)), pair[1])
    return pair
