import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tnl.data.guard import Guard, encode_inside, spell
from tnl.data.messages import Message, Role
from tnl.data.template import TEMPLATES, encode_conversation
from tnl.errors import ModelError
from tnl.model.load import load_tokenizer

MARKERS = ["<|im_start|>", "<|im_end|>", "### Instruction:", "### Input:", "### Response:", "Human:", "Assistant:"]
TEXT = [
    "How are you today? I am well, thank you, and you?",
    "你是谁？我是甄嬛。<b>bold</b> a<b c>d x|y << >> |> <|",
    "The quick brown fox; jumps over: the lazy dog!",
]
# every marker in many settings, so that the trainer makes pieces of whole markers and of markers with their neighbours
MARKED = [f"{left}{marker}{right}" for marker in MARKERS for left in ("", "a", "a ", "x<", "\n") for right in ("\n", "b", " b", "<")] * 4


def trained(lines: list[str], **settings: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    usual = {"model_type": "bpe", "vocab_size": 500, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2}
    usual |= {"normalization_rule_name": "identity", "split_by_unicode_script": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(usual | settings))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


class Tokenizer:
    eos_token_id = 2

    def __init__(self, sp: Any) -> None:
        self.sp_model = sp


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"lines": TEXT + MARKERS, "vocab_size": 360},
    "markers are pieces": {"lines": TEXT + MARKED},
    "no dummy prefix": {"lines": TEXT + MARKED, "add_dummy_prefix": False},
    "blanks kept": {"lines": TEXT + MARKED, "remove_extra_whitespaces": False},
    "normalised": {"lines": TEXT + MARKED, "normalization_rule_name": "nmt_nfkc"},
    "markers are symbols": {"lines": TEXT + MARKERS, "vocab_size": 370, "user_defined_symbols": MARKERS},
}
TOKENIZERS = {name: Tokenizer(trained(**kind)) for name, kind in KINDS.items()}
FRAGMENTS = [
    *MARKERS,
    *(m[:4] for m in MARKERS),
    *(m[4:] for m in MARKERS),
    "<",
    "<|",
    "|",
    ">",
    "a",
    " ",
    "\n",
    "▁",
    "＜",
    "你",
    "</s>",
    "\u200b",
]
CONTENT = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join)
OWN = {"chatml": 8, "chatml-tutorial": 8, "alpaca": 5, "human-assistant": 4}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(CONTENT, min_size=6, max_size=6))
def test_no_tokenizer_lets_content_forge_a_marker(kind: str, name: str, texts: list[str]) -> None:
    tokenizer, template = TOKENIZERS[kind], TEMPLATES[name]
    guard = template.guard(tokenizer.sp_model)
    system, instruction, extra, first, question, second = texts
    messages = [Message(Role.USER, instruction, input=extra), Message(Role.ASSISTANT, first)]
    messages += [Message(Role.USER, question), Message(Role.ASSISTANT, second)]
    ids = encode_conversation(messages, tokenizer, template, system=system).input_ids.tolist()
    assert guard.count(ids) == OWN[name]
    assert ids.count(2) == 2 and not {0, 1} & set(ids)
    for text in texts:
        sp = tokenizer.sp_model
        assert sp.decode(guard.encode_content(text)) == sp.decode(sp.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_inside_of_a_text_has_no_dummy_prefix_and_keeps_its_blanks(kind: str) -> None:
    sp = TOKENIZERS[kind].sp_model
    assert sp.decode([*sp.encode("how"), *encode_inside(sp, " are "), *encode_inside(sp, "you")]) == "how are you"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_nothing_but_markers_takes_time_in_proportion(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    guard = TEMPLATES["chatml"].guard(tokenizer.sp_model)
    ids = tokenizer.sp_model.encode("<|im_end|>" * 2000)
    seen, real = [0], Guard.find

    def counted(self: Guard, given: list[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        seen[0] += len(given)
        return real(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "find", counted)
        spelled = guard.spelled(ids)
    assert guard.count(spelled) == 0 and tokenizer.sp_model.decode(spelled) == "<|im_end|>" * 2000
    assert seen[0] < 20 * len(ids)


def test_a_hundred_thousand_markers_take_less_than_a_second() -> None:
    tokenizer = load_tokenizer("demo")
    guard = TEMPLATES["chatml"].guard(tokenizer.sp_model)
    text = "<|im_end|>" * 100_000
    began = time.process_time()  # of this process alone: other processes of a busy machine do not count
    ids = guard.encode_content(text)
    assert time.process_time() - began < 1
    assert guard.count(ids) == 0 and tokenizer.sp_model.decode(ids) == text


def test_a_piece_is_spelled_by_characters_and_a_character_by_bytes() -> None:
    sp = TOKENIZERS["plain"].sp_model
    assert spell(sp, sp.piece_to_id("▁a")) == [sp.piece_to_id("▁"), sp.piece_to_id("a")]
    assert spell(sp, sp.piece_to_id("|")) == [sp.piece_to_id("<0x7C>")]
    bare = trained(TEXT, vocab_size=120, byte_fallback=False)
    with pytest.raises(ModelError, match="no second spelling"):
        spell(bare, bare.piece_to_id("|"))
    with pytest.raises(ModelError, match="no second spelling"):
        spell(sp, sp.piece_to_id("<0x7C>"))
