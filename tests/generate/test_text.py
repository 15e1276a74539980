from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tnl.generate.text import TextStream, overlap, whole_characters
from tnl.model.load import BaiChuanTokenizer

TOKENIZER = BaiChuanTokenizer.from_pretrained(Path(__file__).parents[1] / "golden" / "tokenizer")
BYTES = [TOKENIZER.sp_model.piece_to_id(f"<0x{b:02X}>") for b in range(256)]

LETTERS = st.one_of(st.sampled_from("甄嬛 你好ab\n\t 👩‍👩‍👧é😀𠮷〇，"), st.characters(exclude_categories=["Cs"]))


def stream(ids: list[int], *stop: str) -> list[str]:
    text = TextStream(TOKENIZER, stop)
    return [*(text.push(i) for i in ids), text.finish()]


def test_a_character_comes_whole() -> None:
    ids = [*TOKENIZER.sp_model.encode("a"), *(BYTES[b] for b in "😀".encode())]
    assert stream(ids) == [*[""] * (len(ids) - 5), "a", "", "", "", "😀", ""]


def test_a_broken_character_is_shown_at_the_end() -> None:
    assert "".join(stream([BYTES[0xF0], BYTES[0x9F]])) == "\ufffd\ufffd"
    assert "".join(stream([BYTES[0xE4], *TOKENIZER.sp_model.encode("b")])) == "\ufffd b"


@given(st.text(alphabet=LETTERS, min_size=1, max_size=20), st.integers(1, 9))
def test_a_text_that_goes_on_with_another_keeps_its_first_blank(text: str, at: int) -> None:
    ids = TOKENIZER.sp_model.encode("起" + text)
    stream = TextStream(TOKENIZER, goes_on=True)
    rest = "".join(stream.push(i) for i in ids[at:]) + stream.finish()
    first = TOKENIZER.sp_model.decode(ids[:at])
    assume("\ufffd" not in first + rest)  # cut within a character
    assert first + rest == TOKENIZER.sp_model.decode(ids)


def test_rows_of_a_padded_vocabulary_have_no_text() -> None:
    ids = TOKENIZER.sp_model.encode("ab")
    assert "".join(stream([63999, *ids, 63999])) == "ab"


@given(st.lists(st.one_of(st.integers(0, 5999), st.sampled_from(BYTES), st.just(TOKENIZER.sp_model.piece_to_id("▁"))), max_size=30))
def test_any_ids_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(stream(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(
    st.text(alphabet=st.one_of(st.sampled_from("甄嬛 你好ab\n\t 👩‍👩‍👧é😀𠮷〇，"), st.characters(exclude_categories=["Cs"])), max_size=30)
)
def test_any_text_gives_what_decoding_it_at_once_gives(text: str) -> None:
    ids = TOKENIZER.sp_model.encode(text)
    pieces = stream(ids)
    assert "".join(pieces) == TOKENIZER.sp_model.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.binary(max_size=12), st.integers(0, 12))
def test_bytes_cut_anywhere_decode_alike(data: bytes, at: int) -> None:
    head, rest = whole_characters(data[:at])
    tail, waiting = whole_characters(rest + data[at:])
    assert "".join(stream([BYTES[b] for b in data])) == head + tail + "\ufffd" * len(waiting)


@pytest.mark.parametrize("stop", ["<|im_end|>", "停", "a停b"])
def test_a_stop_string_never_shows(stop: str) -> None:
    ids = TOKENIZER.sp_model.encode(f"你好世界{stop}再说")
    text = TextStream(TOKENIZER, [stop])
    shown: list[str] = []
    for i in ids:
        shown.append(text.push(i))
        assert not any("".join(shown).endswith(stop[:n]) for n in range(1, len(stop)))
    assert "".join(shown) + text.finish() == "你好世界"
    assert text.stopped


def test_what_only_looked_like_a_stop_string_comes_out() -> None:
    ids = TOKENIZER.sp_model.encode("你好<|im_en")
    assert "".join(stream(ids, "<|im_end|>")) == "你好<|im_en"


def test_the_first_of_two_stop_strings_counts() -> None:
    assert "".join(stream(TOKENIZER.sp_model.encode("one two three"), "three", "two")) == "one "


def test_overlap() -> None:
    assert [overlap(text, "aab") for text in ("", "b", "a", "aa", "baa", "aab")] == [0, 0, 1, 2, 2, 0]
