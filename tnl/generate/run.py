"""`tnl generate`: answer one question, or each line of a file, and end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Unpack

from tnl import paths
from tnl.errors import DataError, RecipeError
from tnl.generate.resolve import Options, Talker, resolve
from tnl.generate.terminal import Screen


def run(model_or_run: str, prompt: str | None = None, file: Path | None = None, **options: Unpack[Options]) -> None:
    """Print the answer of one prompt as it comes; of a file of prompts, one a line, print one JSON object an answer.

    Every question is one of its own, begun from the same seed. Raises RecipeError, DataError and what `resolve` raises.
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
    for question in questions:
        screen.line(json.dumps(answer(talker, question or ""), ensure_ascii=screen.encoding.lower() != "utf-8"))


def answer(talker: Talker, question: str) -> dict[str, str | int]:
    """One answer and what it took, with the keys of a line of the output."""
    conversation = talker.conversation()
    text = "".join(conversation.say(question))
    last = conversation.last
    assert last is not None
    return {"prompt": question, "answer": text, "finish": last.finish, "prompt_tokens": last.read, "tokens": last.tokens}


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
