"""A text that is encoded a piece at a time has the ids of the whole."""

import time
from itertools import chain
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.test_guard import TEXT, TOKENIZERS, trained
from tnl.data import pieces
from tnl.data.guard import encode_whole
from tnl.data.pieces import blocks_of, encode_blocks, fields, joints_of
from tnl.model.load import load_tokenizer

SP: dict[str, Any] = {name: tokenizer.sp_model for name, tokenizer in TOKENIZERS.items()}
SP["demo"] = load_tokenizer("demo").sp_model
SP["no bytes"] = trained(TEXT, vocab_size=120, byte_fallback=False)
SP["blanks behind"] = trained(TEXT, vocab_size=360, treat_whitespace_as_suffix=True)
SP["unigram"] = trained(TEXT, vocab_size=360, model_type="unigram")
CUT = {"plain", "markers are pieces", "no dummy prefix", "blanks kept", "markers are symbols", "demo", "no bytes"}
FRAGMENTS = [
    *("<|im_end|>", "<|im_start|>", "|im_", "Human:", "\n", "\n\n", " ", "  ", "\t", "\u3000", "\u2581", "\r\n", "\u00a0", "\x00"),
    *(
        "a",
        "the ",
        "you",
        "ing",
        "How are you today? ",
        "我",
        "你是谁？",
        "甄嬛",
        "。",
        "，",
        "🙂",
        "👨‍👩‍👧",
        "龘",
        "\u0301",
        "é",
        "ﬀ",
        "1",
        "2026",
    ),
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=40).map("".join)


def in_pieces(sp: Any, text: str, size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setattr(pieces, "PIECE", size)
    return list(encode_blocks(sp, [text[i : i + block] for i in range(0, len(text), block)]))


@pytest.mark.parametrize("kind", SP)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, size=st.integers(1, 12), block=st.integers(1, 9))
@example(text="", size=3, block=3)
@example(text="  a  b  ", size=1, block=1)
@example(text="\n\n 你是谁？ \n 我", size=1, block=1)
@example(text="龘龘🙂🙂 龘", size=1, block=1)
def test_the_ids_are_those_of_the_whole(kind: str, text: str, size: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = in_pieces(SP[kind], text, size, block, patch)
    assert list(chain.from_iterable(found)) == SP[kind].encode(text)


@pytest.mark.parametrize("kind", SP)
def test_what_can_be_cut_is_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "How are you today? 你是谁？我是甄嬛。\nThe quick brown fox; jumps over: the lazy dog!\n" * 20
    found = in_pieces(SP[kind], text, 60, 25, monkeypatch)
    assert list(chain.from_iterable(found)) == SP[kind].encode(text)
    assert (joints_of(SP[kind]) is not None) == (kind in CUT)
    assert len(found) > 15 if kind in CUT else len(found) == 1


def test_the_whole_is_encoded_where_everything_may_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aaaa" * 100
    sp = trained(["aaaa aaaaaaaa aa aaa"] * 9, vocab_size=270)
    assert not joints_of(sp).apart("a", "a")  # type: ignore[union-attr]
    assert in_pieces(sp, text, 10, 10, monkeypatch) == [sp.encode(text)]


def test_long_contents_are_encoded_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "你是谁？\n我 是\ud800甄嬛。" * 50
    expected = encode_whole(SP["demo"], text)
    monkeypatch.setattr("tnl.data.guard.PIECE", 30)
    monkeypatch.setattr(pieces, "PIECE", 30)
    assert encode_whole(SP["demo"], text) == expected


def test_time_is_in_proportion() -> None:
    text = "却说曹操自迎天子。The quick brown fox\n" * 20_000
    list(encode_blocks(SP["demo"], blocks_of(text[:1000])))
    seconds = []
    for part in (text[: len(text) // 4], text):
        began = time.process_time()
        list(encode_blocks(SP["demo"], blocks_of(part)))
        seconds.append(time.process_time() - began)
    assert seconds[1] < 8 * seconds[0]


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\x0a", b"\x0b\x01a", b"\x80" * 12])
def test_a_message_that_is_cut_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"protobuf|varint"):
        list(fields(data))
