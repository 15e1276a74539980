"""A conversation over one state: each turn reads only what is new, and the state is always that of reading all of it anew."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tnl.adapter.load import base_of
from tnl.data.formats import read_records
from tnl.data.messages import Message, Role
from tnl.data.template import Template, encode_conversation, encode_prompt, stop_ids
from tnl.errors import DataError, ModelError
from tnl.generate import prefixes
from tnl.generate.decode import generate_ids, new_cache, prefill
from tnl.generate.sampling import Settings, seeded
from tnl.generate.text import TextStream
from tnl.model.state import TransnormerCache
from tnl.storage import write_json

STATE = ".safetensors"
"""Ending of a file that keeps a conversation with its state."""


@dataclass(frozen=True)
class State:
    """A cache and the ids that it has read."""

    cache: TransnormerCache
    ids: tuple[int, ...] = ()

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether reading on from here can read ids, and something is left to read."""
        return len(self.ids) < len(ids) and tuple(ids[: len(self.ids)]) == self.ids


@dataclass(frozen=True)
class Spoken:
    """What an answer took."""

    read: int
    """Tokens of the prompt that were read in this turn."""
    tokens: int
    """Tokens of the answer."""
    seconds: float
    """From the first token of the answer to its end."""
    finish: Literal["stop", "length", "interrupted"]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer; the first token counts as reading."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


class Conversation:
    """Turns between a person and the model. Many conversations can share one model: the state is theirs.

    seed: the same seed and the same questions give the same answers; None draws anew each time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        template: Template,
        system: str | None = None,
        settings: Settings | None = None,
        seed: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.settings, self.seed = settings or Settings(), seed
        self.system = system
        self.messages: list[Message] = []
        self.last: Spoken | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages = []
        self.last = None
        self._generator = seeded(self.seed)
        self._seen = self._bytes = 0
        self._state = self._before = State(new_cache(self.model))

    def set_system(self, text: str | None) -> None:
        """Take another system prompt and begin anew: it stands before all turns."""
        self.system = text or None
        self.reset()

    @property
    def state_bytes(self) -> int:
        """Size of the state; the same from the first token on."""
        return self._bytes

    @property
    def seen(self) -> int:
        """Tokens of the conversation so far, answers included."""
        return self._seen

    def say(self, text: str) -> Generator[str, None, None]:
        """Ask, and yield the answer's text as it comes; `last` then says what it took.

        An answer that is stopped (the iterator closed, or Ctrl-C) stays in the history as far as it was given. After any other error
        the conversation is as before the question. Raises NumbersError.
        """
        turns = [*self.messages, Message(Role.USER, text)]
        ids = encode_prompt(turns, self.tokenizer, self.template, system=self.system)
        start = self._before = self._state = self._start(ids)
        working = start.cache.clone()
        stream, said = TextStream(self.tokenizer, stop_texts(self.template)), ""
        answer: list[int] = []
        first = time.perf_counter()
        finish: Literal["stop", "length", "interrupted"] = "interrupted"
        try:
            for token in generate_ids(
                self.model,
                ids[len(start.ids) :],
                self.settings,
                cache=working,
                stop_ids=stop_ids(self.tokenizer),
                seed=self._generator,
                before=start.ids,
            ):
                first = first if answer else time.perf_counter()
                answer.append(token)
                if piece := stream.push(token):
                    said += piece
                    yield piece
                if stream.stopped:
                    break
            if piece := stream.finish():
                said += piece
                yield piece
            self._state = State(working, tuple([*ids, *answer][: working.columns]))
            finish = "length" if len(answer) == self.settings.max_new_tokens and not stream.stopped else "stop"
        except (GeneratorExit, KeyboardInterrupt):
            if said:
                self._keep(turns, said, len(ids) + len(answer))
            raise
        else:
            self._keep(turns, said, len(ids) + len(answer))
        finally:
            self._bytes = working.num_bytes
            self.last = Spoken(len(ids) - len(start.ids), len(answer), time.perf_counter() - first, finish)

    def _start(self, ids: Sequence[int]) -> State:
        """The state from which ids are read on.

        An answer as it was drawn may differ from its text's ids; then the last turn is read anew, as it would be in training.
        """
        return next((state for state in (self._state, self._before) if state.begins(ids)), None) or State(new_cache(self.model))

    def _keep(self, turns: list[Message], answer: str, seen: int) -> None:
        self.messages = [*turns, Message(Role.ASSISTANT, answer)]
        self._seen = seen

    def save(self, path: Path) -> None:
        """Keep the conversation for `load`. Raises StorageError; DataError where there is no state to keep yet.

        A name that ends in .safetensors keeps the state too, so that nothing is read anew; any other is written as records of
        messages, which a recipe's data.train reads.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": message.role.value, "content": message.content} for message in self.messages]
        if path.suffix != STATE:
            write_json(path, [{"messages": [*system, *turns]}])
            return
        if not turns:
            raise DataError(path, "nothing has been said yet", "Ask something, then save")
        about = {"messages": turns, "system": self.system, "template": self.template.hash}
        prefixes.save_state(path, prefixes.State.of(*self._settled(), about), prefixes.model_key(self.model))

    def load(self, path: Path) -> None:
        """Take up what `save` kept, its system prompt included. Raises DataError where the file holds no conversation, or several.

        Raises ModelError where a state was kept with another base, adapter, tokenizer or template; the conversation is then as before.
        """
        if path.suffix == STATE:
            self._resume(path)
            return
        records = read_records([path], format="messages")
        if len(records) != 1:
            raise DataError(path, f"it holds {len(records)} conversations (needed: one)", "Name a file that /save wrote")
        turns = list(records[0].messages)
        system = turns.pop(0).content if turns and turns[0].role is Role.SYSTEM else None
        self.set_system(system)
        self.messages = turns

    def _settled(self) -> tuple[TransnormerCache, list[int]]:
        """A cache that has read the turns exactly as a next prompt begins, the last end token included; and those ids."""
        ids = encode_conversation(self.messages, self.tokenizer, self.template, system=self.system).input_ids.tolist()
        if self._state.ids == tuple(ids):
            return self._state.cache, ids
        start = self._start(ids)
        cache = start.cache.clone()
        prefill(self.model, ids[len(start.ids) :], cache)
        return cache, ids

    def _resume(self, path: Path) -> None:
        kept = prefixes.load_state(path, self.model, prefixes.model_key(self.model))
        if kept.about.get("template") != self.template.hash:
            raise ModelError(path, f'was not saved with the template "{self.template.name}"', "Take the --template that it was saved with")
        try:
            system = kept.about["system"] and str(kept.about["system"])
            turns = [Message(Role(turn["role"]), str(turn["content"])) for turn in kept.about["messages"]]
            sound = tuple(encode_conversation(turns, self.tokenizer, self.template, system=system).input_ids.tolist()) == kept.ids
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ModelError(
                path, "holds another conversation than its state has read", "Copy the file anew, or use this model's tokenizer"
            )
        self.set_system(system)
        self.messages, self._seen = turns, len(kept.ids)
        device = base_of(self.model).model.embed_tokens.weight.device
        self._state = self._before = State(kept.cache(device), kept.ids)
        self._bytes = self._state.cache.num_bytes


def stop_texts(template: Template) -> tuple[str, ...]:
    """Texts at which an answer ends although no end token came: a base that was never taught to stop opens the next turn itself."""
    return (template.user.partition("{")[0],)
