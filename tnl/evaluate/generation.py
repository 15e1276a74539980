"""Sample answers: the same questions before and after training, side by side."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from torch import nn

from tnl.data.template import Template, stop_ids
from tnl.errors import DataError
from tnl.evaluate.perplexity import IGNORED, evaluating
from tnl.generate.decode import generate_together
from tnl.generate.sampling import Settings
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.storage import write_text

COUNT = 4
LONGEST_ANSWER = 64
"""Tokens: enough to hear a voice."""
LONGEST_PASSAGE = 512
"""Tokens of a plain text that ask, and of an answer that are shown."""


@dataclass(frozen=True)
class Sample:
    """A question, what the records answer, and what the model did."""

    id: str
    question: str
    expected: str
    before: str | None = None
    after: str | None = None


def choose(
    records: Sequence[dict[str, Any]], tokenizer: BaiChuanTokenizer, template: Template, count: int = COUNT
) -> tuple[list[Sample], list[list[int]]]:
    """Questions for samples, and the ids that ask them: the first records with different questions, up to their first answer."""
    samples: list[Sample] = []
    prompts: list[list[int]] = []
    for record in records:
        ids = numpy.asarray(record["input_ids"])
        learned = numpy.asarray(record["labels"]) != IGNORED
        start = int(learned.argmax()) if learned.any() else len(ids)
        if start < 2:  # a plain text: its first half asks for the second, of a long one the beginning for what follows
            start = min((len(ids) + 1) // 2, LONGEST_PASSAGE)
        answer = learned[start : start + LONGEST_PASSAGE]
        end = start + (len(answer) if answer.all() else int(answer.argmin()))
        asked = ids[:start].tolist()
        if asked in prompts or start == len(ids):
            continue
        prompts.append(asked)
        question = template.question(decode(tokenizer, asked))
        samples.append(Sample(str(record["id"]), question, decode(tokenizer, ids[start:end].tolist())))
        if len(samples) == count:
            break
    return samples, prompts


def answer(
    model: nn.Module,
    tokenizer: BaiChuanTokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    seed: int,
    ended: Callable[[], bool] = lambda: False,
) -> list[str]:
    """An answer to each prompt, drawn together, until `ended` is true; by generators of its own: a run is the same with and without."""
    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, LONGEST_ANSWER))
    with evaluating(model):
        made = generate_together(model, prompts, settings, stop_ids=stop_ids(tokenizer), seed=seed, ended=ended)
    return [decode(tokenizer, ids) for ids in made]


def decode(tokenizer: BaiChuanTokenizer, ids: Sequence[int]) -> str:
    """The text of ids, control tokens left out; a vocabulary that is larger than the tokenizer has rows without a text."""
    known = [i if i < len(tokenizer) else tokenizer.unk_token_id for i in ids]
    return str(tokenizer.decode(known, skip_special_tokens=True)).strip()


def write(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object a line, replaced in one step. Raises StorageError."""
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def read(path: Path) -> list[Sample]:
    """The samples of a run; none where there is no file. Raises DataError where it is damaged."""
    if not path.exists():
        return []
    try:
        return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise DataError(path, f"cannot be read ({error})", "Remove it.") from None


def short(text: str | None, limit: int = 160) -> str:
    """A text for a table: its end, since a prompt ends in the question."""
    text = (text or "").strip()
    return text if len(text) <= limit else "..." + text[-limit:]
