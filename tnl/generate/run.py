"""`tnl generate`: answer one question, or each line of a file, and end."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from tnl import paths
from tnl.data.messages import Message, Role
from tnl.data.template import encode_prompt, stop_ids
from tnl.errors import DataError, NumbersError, RecipeError
from tnl.generate.conversation import stop_texts
from tnl.generate.engine import Engine
from tnl.generate.request import Request, Ticket
from tnl.generate.resolve import Options, Talker, resolve
from tnl.generate.terminal import Screen

SLOTS = 16
"""Questions of a file that are answered at a time."""


def run(model_or_run: str, prompt: str | None = None, file: Path | None = None, **options: Unpack[Options]) -> None:
    """Print the answer of one prompt as it comes; of a file of prompts, one a line, print one JSON object an answer.

    Every question is one of its own, begun from the same seed. Raises RecipeError, DataError, NumbersError and what `resolve` raises.
    """
    if prompt is not None and not prompt.strip():
        prompt = None
    if (prompt is None) == (file is None):
        what = "both PROMPT and --file are given" if file is not None else "there is no question"
        raise RecipeError("command line", what, "Give one PROMPT, or a file of questions with --file")
    questions = [prompt] if prompt is not None else read_questions(file or Path())
    talker = resolve(model_or_run, options)
    screen = Screen()
    for notice in talker.notices:
        print(screen.fit(notice), file=sys.stderr)
    if prompt is not None:
        for piece in talker.conversation().say(prompt):
            screen.write(piece)
        screen.line()
        return
    for line in answers(talker, questions):
        screen.line(json.dumps(line, ensure_ascii=screen.encoding.lower() != "utf-8"))


def answers(talker: Talker, questions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each answer and what it took, with the keys of a line of the output: in order, many drawn at a time. Raises NumbersError."""
    engine = Engine(talker.merged(), talker.tokenizer, slots=SLOTS, queue=SLOTS, prefix_bytes=0)
    asked: deque[tuple[str, Ticket]] = deque()
    left = iter(questions)
    while True:
        for question in islice(left, 2 * SLOTS - len(asked)):
            asked.append((question, engine.submit(request(talker, question))))
        if not asked:
            return
        question, ticket = asked[0]
        if not ticket.done.is_set():
            engine.step()
            continue
        asked.popleft()
        [found] = ticket.answers
        if found.finish == "error":
            raise NumbersError(
                f'answer to "{question[:40]}"', found.error, "Use dtype float32, or an adapter from before the loss went wrong"
            )
        took = {"prompt_tokens": len(ticket.request.ids), "tokens": found.tokens}
        yield {"prompt": question, "answer": found.text, "finish": found.finish, **took}


def request(talker: Talker, question: str) -> Request:
    """What asks for an answer as chat would ask."""
    ids = encode_prompt([Message(Role.USER, question)], talker.tokenizer, talker.template, system=talker.system)
    stops = stop_ids(talker.tokenizer)
    return Request(tuple(ids), talker.settings, stop_ids=tuple(stops), stop=stop_texts(talker.template), seed=talker.seed)


def read_questions(file: Path) -> list[str]:
    """The lines of a file that are not blank. Raises DataError."""
    if not file.is_file():
        paths.existing(file, DataError)
        raise DataError(file, "is no file", "Name a text file")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(file, f"is not UTF-8 (byte {error.start + 1})", "Convert it to UTF-8") from None
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise DataError(file, "holds no question (needed: one a line)", "Write one a line")
    return questions
