"""What has been said on the page: turns with one answer, or two side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tnl.page.client import Answer


@dataclass
class Turn:
    """A question and its answers, one a model that was asked."""

    question: str
    answers: list[Answer] = field(default_factory=list)

    def said(self, model: str) -> str:
        """What the model remembers of having answered: its own words, else those that stood in the conversation."""
        own = [answer.text for answer in self.answers if answer.model == model and answer.text]
        return next(iter(own or [answer.text for answer in self.answers if answer.text]), "")


def messages(turns: Sequence[Turn], model: str, system: str = "") -> list[dict[str, str]]:
    """The conversation as the model sees it, up to the last question; turns without an answer are left out."""
    found = [{"role": "system", "content": system}] if system else []
    for turn in turns[:-1]:
        if answer := turn.said(model):
            found += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
    return [*found, {"role": "user", "content": turns[-1].question}] if turns else found


def request(turns: Sequence[Turn], model: str, system: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What asks a model for the last turn's answer."""
    return {"model": model, "messages": messages(turns, model, system), **sampling}


def export(turns: Sequence[Turn], system: str) -> str:
    """The conversation as records of messages, one a model that took part, which a recipe's data.train and /load read."""
    models = dict.fromkeys(answer.model for turn in turns for answer in turn.answers)
    records = []
    for model in models:
        last = [{"role": "assistant", "content": turns[-1].said(model)}]
        whole = [*messages(turns, model, system), *last] if last[0]["content"] else messages(turns, model, system)[:-1]
        records.append({"messages": whole})
    return json.dumps(records, ensure_ascii=False, indent=1)
