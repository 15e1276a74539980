"""Answers in the words of OpenAI's API: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from tnl.generate.engine import Engine
from tnl.generate.request import Answer, Logprob, Piece
from tnl.generate.text import BYTE, TextStream
from tnl.serve import schema
from tnl.serve.stream import Asked


class Writer:
    """One request's answers in one form; `ChatWriter` and `TextWriter` are the two."""

    prefix, kind = "", ""

    def __init__(self, engine: Engine, wanted: schema.Sampling, asked: Asked) -> None:
        self.tokenizer, self.asked, self.wanted = engine.tokenizer, asked, wanted
        self.usage_wanted = wanted.stream_options is not None and wanted.stream_options.include_usage
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": wanted.model,
            "system_fingerprint": f"fp_{engine.key[:10]}",
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply of a request that is no stream."""
        choices = [self.choice(i, answer) for i, answer in enumerate(answers)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.asked.usage()}

    def events(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        """The chunks that a piece of an answer is sent as."""
        if piece.text or piece.logprobs:
            yield self.chunk([self.part(index, piece)])
        if piece.finish is not None:
            yield self.chunk([self.end(index, piece)])

    def last(self) -> Iterable[dict[str, Any]]:
        """The chunk after all answers, where it is asked for."""
        if self.usage_wanted:
            yield {**self.chunk([]), "usage": self.asked.usage()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One chunk."""
        usage: dict[str, Any] = {"usage": None} if self.usage_wanted else {}
        return {**self.head, "object": self.kind, "choices": choices, **usage}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """What is new of an answer."""
        raise NotImplementedError

    def end(self, index: int, piece: Piece) -> dict[str, Any]:
        """That an answer has ended."""
        raise NotImplementedError


class ChatWriter(Writer):
    """chat.completion and chat.completion.chunk."""

    prefix, kind = "chatcmpl", "chat.completion"

    def __init__(self, engine: Engine, wanted: schema.ChatRequest, asked: Asked) -> None:
        super().__init__(engine, wanted, asked)
        self.top = wanted.top_logprobs or 0
        self._opened: set[int] = set()

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().chunk(choices), "object": "chat.completion.chunk"}

    def events(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        if index not in self._opened:
            self._opened.add(index)
            delta = {"role": "assistant", "content": ""}
            yield self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield from super().events(index, piece)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self.told(answer.logprobs), "finish_reason": answer.finish}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "delta": {"content": piece.text}, "logprobs": self.told(piece.logprobs), "finish_reason": None}

    def end(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish}

    def told(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        """Logprobs as chat completions have them."""
        if self.wanted.told is None:
            return None
        content = [{**self.token(one.id, one.value), "top_logprobs": [self.token(*top) for top in one.top[: self.top]]} for one in logprobs]
        return {"content": content, "refusal": None}

    def token(self, token_id: int, value: float) -> dict[str, Any]:
        """A token, its bytes and its logprob."""
        data = token_bytes(self.tokenizer, token_id)
        return {"token": token_name(self.tokenizer, token_id), "bytes": list(data), "logprob": value}


class TextWriter(Writer):
    """text_completion."""

    prefix, kind = "cmpl", "text_completion"

    def __init__(self, engine: Engine, wanted: schema.CompletionRequest, asked: Asked) -> None:
        super().__init__(engine, wanted, asked)
        self._said: dict[int, tuple[TextStream, int]] = {}
        """Each answer's text as far as logprobs were told of it, and its length."""

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {"index": index, "text": answer.text, "logprobs": self.told(index, answer.logprobs), "finish_reason": answer.finish}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "text": piece.text, "logprobs": self.told(index, piece.logprobs), "finish_reason": None}

    def end(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": piece.finish}

    def told(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        """Logprobs as plain completions have them."""
        if self.wanted.told is None:
            return None
        stream, said = self._said.get(index) or (TextStream(self.tokenizer, goes_on=True), 0)
        names, offsets = [token_name(self.tokenizer, one.id) for one in logprobs], []
        for name, one in zip(names, logprobs):
            text = stream.push(one.id)
            # behind the parts of a character that did not come whole
            offsets.append(said + len(text) - len(name) if text.endswith(name) else said)
            said += len(text)
        self._said[index] = stream, said
        return {
            "tokens": names,
            "token_logprobs": [one.value for one in logprobs],
            "top_logprobs": [{token_name(self.tokenizer, token_id): value for token_id, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }


def token_name(tokenizer: Any, token_id: int) -> str:
    """A token's text, or as OpenAI writes a part of a character: bytes:\\xe4."""
    data = token_bytes(tokenizer, token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """A token's text as bytes; a byte piece is one byte, and half a character. A padded vocabulary's further rows have none."""
    if token_id >= tokenizer.sp_model.get_piece_size():
        return b""
    piece = tokenizer.sp_model.id_to_piece(token_id)
    byte = BYTE.fullmatch(piece)
    return bytes.fromhex(byte.group(1)) if byte else piece.replace("▁", " ").encode("utf-8", "replace")
