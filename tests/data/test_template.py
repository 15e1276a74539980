import importlib.util
import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tnl.data.messages import Message, Role
from tnl.data.template import IGNORED, TEMPLATES, Encoded, encode_conversation, encode_document, encode_prompt, encode_text, fit, stop_ids
from tnl.errors import DataError
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tokenizer"
SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"
TOKENIZER = BaiChuanTokenizer.from_pretrained(GOLDEN)
CHATML = TEMPLATES["chatml"]


def tutorial_cells() -> dict[str, str]:
    """The tutorial's code, cell by cell."""
    spec = importlib.util.spec_from_file_location("tutorial", ROOT / "tests" / "journeys" / "tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CELLS


CELLS = tutorial_cells()


def user(text: str, extra: str = "") -> Message:
    return Message(Role.USER, text, input=extra)


def assistant(text: str, train: bool = True) -> Message:
    return Message(Role.ASSISTANT, text, train)


def golden_cases() -> list[dict]:
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["process_func"]


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["record"]["instruction"][:12])
def test_the_tutorials_ids_bit_for_bit(case: dict) -> None:
    record = case["record"]
    messages = [user(record["instruction"], record["input"]), assistant(record["output"])]
    tutorial = encode_conversation(messages, TOKENIZER, TEMPLATES["chatml-tutorial"], system=SYSTEM)
    for length, suffix in ((384, ""), (48, "_48")):
        cut = fit(tutorial, length)
        assert cut is not None
        assert listed(cut) == (case["input_ids" + suffix], case["labels" + suffix])
    ours = fit(encode_conversation(messages, TOKENIZER, CHATML, system=SYSTEM), 384)
    assert ours is not None and len(ours.input_ids) == len(case["input_ids"])
    assert ours.input_ids.tolist()[:-1] == case["input_ids"][:-1]
    assert ours.input_ids[-1] == ours.labels[-1] == 2


def test_the_tutorials_own_code_gives_the_same_ids() -> None:
    """Its preprocessing on the demo's 300 and more records, at its own length and at one that cuts most of them."""
    persona = json.loads((ROOT / "tnl" / "demo" / "persona.json").read_text(encoding="utf-8"))
    records = [{**record, "input": extra} for record, extra in zip(persona, cycle(["", "", "请用一句话。", "a b  c\n\n🙂"]))]
    cuts = 0
    for length in (384, 48):
        space: dict[str, Any] = {"tokenizer": TOKENIZER}
        # the padding token of the published tokenizer was </s> (golden/tokenizer); ours is <unk>
        code = CELLS["prompt"].replace("pad_token_id", "eos_token_id").replace("MAX_LENGTH = 384", f"MAX_LENGTH = {length}")
        exec(code, space)
        for record in records:
            theirs = space["process_func"](record)
            messages = [user(record["instruction"], record["input"]), assistant(record["output"])]
            ours = fit(encode_conversation(messages, TOKENIZER, TEMPLATES["chatml-tutorial"], system=SYSTEM), length)
            assert ours is not None and listed(ours) == (theirs["input_ids"], theirs["labels"])
            cuts += len(theirs["input_ids"]) == length
    assert len(records) >= 300 and cuts > 100


def listed(encoded: Encoded) -> tuple[list[int], list[int]]:
    return encoded.input_ids.tolist(), encoded.labels.tolist()


def decoded(ids: Sequence[int]) -> str:
    ids = [int(i) for i in ids]
    return TOKENIZER.sp_model.decode([i for i in ids if i != 2])


def test_each_template_writes_what_it_says() -> None:
    both, one = [user("I", "X"), assistant("O")], [user("Q"), assistant("O")]
    texts = {
        name: [decoded(encode_conversation(m, TOKENIZER, t, system=s).input_ids) for m, s in ((both, None), (one, None), (one, "S"))]
        for name, t in TEMPLATES.items()
    }
    start = "Below is an instruction that describes a task"
    assert texts["human-assistant"] == ["I\nHuman:\nX\nAssistant:\n O", "Human:\nQ\nAssistant:\n O", "S\nHuman:\nQ\nAssistant:\n O"]
    assert texts["alpaca"][0].startswith(start + ", paired with an input")
    assert texts["alpaca"][0].endswith("### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n O")
    assert texts["alpaca"][1].startswith(start + ". Write")
    assert texts["alpaca"][2] == "S\n\n### Instruction:\nQ\n\n### Response:\n O"
    assert texts["chatml"] == texts["chatml-tutorial"]
    assert texts["chatml"][2] == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n O"
    assert texts["chatml"][0] == "<|im_start|>user\nIX<|im_end|>\n<|im_start|>assistant\n O"


def test_a_later_turn_is_a_part_of_its_own() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    encoded = encode_conversation(messages, TOKENIZER, CHATML, system="S")
    sp = TOKENIZER.sp_model
    first = sp.encode("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    second = sp.encode("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert encoded.input_ids.tolist() == [*first, *sp.encode("b"), 2, *second, *sp.encode("d"), 2]
    assert [label for label in encoded.labels if label != IGNORED] == [*sp.encode("b"), 2, *sp.encode("d"), 2]


def test_a_masked_turn_is_context_only() -> None:
    masked = encode_conversation([user("a"), assistant("b", False), user("c"), assistant("d")], TOKENIZER, CHATML)
    plain = encode_conversation([user("a"), assistant("b"), user("c"), assistant("d")], TOKENIZER, CHATML)
    assert masked.input_ids.tolist() == plain.input_ids.tolist()
    assert [label for label in masked.labels if label != IGNORED] == [*TOKENIZER.sp_model.encode("d"), 2]


def test_a_records_own_system_turn_stands_before_the_recipes() -> None:
    own = [Message(Role.SYSTEM, "mine"), user("a"), assistant("b")]
    found = encode_conversation(own, TOKENIZER, CHATML, system="other")
    assert listed(found) == listed(encode_conversation(own[1:], TOKENIZER, CHATML, system="mine"))


def test_an_assistant_may_speak_first() -> None:
    encoded = encode_conversation([assistant("b"), user("c"), assistant("d")], TOKENIZER, CHATML, system="S")
    assert decoded(encoded.input_ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\n b")


def test_misplaced_turns_are_our_bug_and_raise() -> None:
    with pytest.raises(ValueError, match="assistant"):
        encode_conversation([user("a")], TOKENIZER, CHATML)
    with pytest.raises(ValueError, match="assistant"):
        encode_prompt([user("a"), assistant("b")], TOKENIZER, CHATML)
    with pytest.raises(ValueError, match="system"):
        encode_prompt([user("a"), Message(Role.SYSTEM, "s")], TOKENIZER, CHATML)


def test_the_chat_template_gives_the_prompts_ids() -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "你是谁？"}]
    prompt = encode_prompt([user("你是谁？")], TOKENIZER, CHATML, system=SYSTEM)
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER([text], add_special_tokens=False)["input_ids"] == [prompt]
    assert TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
    without_bos = BaiChuanTokenizer.from_pretrained(GOLDEN, add_bos_token=False)
    assert without_bos([text])["input_ids"] == [prompt]


FRAGMENTS = [
    *("<|im_start|>", "<|im_end|>", "<|im_", "end|>", "|im_end|", "<", ">", "|", "<|", "\n", "user", "assistant", "▁", " "),
    *("### Instruction:", "### Input:", "### Response:", "###", "Response:", "Human:", "Assistant:", " Human", ":", "#"),
    *("</s>", "<s>", "<unk>", "<0x0A>", "你是谁？", "a", "😀", "　", "\t", "\x00", "\x02", "<|IM_END|>", "＜|im_end|＞"),
]
CONTENT = st.one_of(st.lists(st.sampled_from(FRAGMENTS), min_size=0, max_size=8).map("".join), st.text(max_size=20))


def marker_texts(template_name: str) -> int:
    """How many markers the template itself writes for system, two turns and an input."""
    return {"chatml": 8, "chatml-tutorial": 8, "alpaca": 5, "human-assistant": 4}[template_name]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(CONTENT, min_size=6, max_size=6))
@example("chatml", ["<|im_end|> <", "a<", "<|im_start|>", "<|im_", "end|>", "</s><unk><s>"])
@example("human-assistant", ["Human:", " Human:", "\nHuman:", "Assistant:", "Human: a", "x"])
@example("alpaca", ["### Response:", "### Input:", "x\n\n### Response:\n", "###", " Response:", "### Instruction:"])
def test_content_can_never_forge_a_marker_or_a_control_id(name: str, texts: list[str]) -> None:
    template, guard = TEMPLATES[name], TEMPLATES[name].guard(TOKENIZER.sp_model)
    system, instruction, extra, first, question, second = texts
    messages = [user(instruction, extra or "x"), assistant(first), user(question), assistant(second)]
    encoded = encode_conversation(messages, TOKENIZER, template, system=system or "s")
    ids = encoded.input_ids.tolist()
    assert guard.count(ids) == marker_texts(name)
    assert ids.count(2) == 2 and not {0, 1} & set(ids)
    for text in texts:
        assert guard.count(guard.encode_content(text)) == 0
        assert TOKENIZER.sp_model.decode(guard.encode_content(text)) == TOKENIZER.sp_model.decode(TOKENIZER.sp_model.encode(text))
    for turns in (1, 3):
        prompt = encode_prompt(messages[:turns], TOKENIZER, template, system=system or "s")
        assert ids[: len(prompt)] == prompt and len(prompt) < len(ids)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_markers_in_content_keep_their_text(name: str) -> None:
    marker = {"chatml": "<|im_end|>", "chatml-tutorial": "<|im_start|>", "alpaca": "### Response:", "human-assistant": "Human:"}[name]
    for content in (f"a {marker} b", marker, f"{marker}<", f"x{marker}\n"):
        plain = encode_prompt([user("@@")], TOKENIZER, TEMPLATES[name], system="s")
        ids = encode_prompt([user(content)], TOKENIZER, TEMPLATES[name], system="s")
        assert decoded(ids) == decoded(plain).replace("@@", content)
        assert TEMPLATES[name].guard(TOKENIZER.sp_model).count(ids) == TEMPLATES[name].guard(TOKENIZER.sp_model).count(plain)


def test_half_a_surrogate_pair_is_no_crash() -> None:
    assert "\ufffd" in decoded(encode_prompt([user("a\ud800b")], TOKENIZER, CHATML))


def test_truncation_keeps_the_end_token() -> None:
    encoded = encode_conversation([user("问"), assistant("一二三四五六七八九十" * 5)], TOKENIZER, CHATML)
    cut = fit(encoded, 40)
    assert cut is not None and len(cut.input_ids) == 40
    assert cut.input_ids[-1] == cut.labels[-1] == 2 and cut.input_ids.tolist()[:39] == encoded.input_ids.tolist()[:39]
    assert fit(encoded, None) is encoded and fit(encoded, 10_000) is encoded


def test_truncation_drops_a_question_without_its_answer() -> None:
    encoded = encode_conversation([user("a"), assistant("b"), user("c" * 60), assistant("d")], TOKENIZER, CHATML)
    first = encode_conversation([user("a"), assistant("b")], TOKENIZER, CHATML)
    cut = fit(encoded, len(first.input_ids) + 8)
    assert cut is not None and listed(cut) == listed(first) and cut.end == 2


def test_truncation_within_the_prompt_leaves_nothing_supervised() -> None:
    cut = fit(encode_conversation([user("a" * 100), assistant("b")], TOKENIZER, CHATML), 20)
    assert cut is not None and cut.supervised == 0 and len(cut.input_ids) <= 20


def test_overlong_records_are_dropped_or_refused_as_asked() -> None:
    encoded = encode_conversation([user("a"), assistant("b" * 100)], TOKENIZER, CHATML)
    assert fit(encoded, 30, "drop") is None
    with pytest.raises(DataError, match="max_length"):
        fit(encoded, 30, "error")


def test_truncation_leaves_the_record_itself_as_it_is() -> None:
    encoded = encode_conversation([user("问"), assistant("一二三四五六七八九十" * 5)], TOKENIZER, CHATML)
    before = listed(encoded)
    fit(encoded, 40)
    assert listed(encoded) == before


@pytest.mark.parametrize("size", [7, 8, 1000, None])
def test_a_document_comes_in_stretches_and_nothing_is_lost(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "一二三四五六七八九十。" * 30
    whole = encode_text(text, TOKENIZER)
    ids, labels = listed(whole)
    assert ids == [*TOKENIZER.sp_model.encode(text), 2] and labels == [IGNORED, *ids[1:]]
    monkeypatch.setattr("tnl.data.pieces.PIECE", 20)
    stretches = list(encode_document([text[i : i + 13] for i in range(0, len(text), 13)], TOKENIZER, size))
    assert len(stretches) > 10 and [i for stretch in stretches for i in stretch.input_ids] == ids
    found = [label for stretch in stretches for label in stretch.labels]
    assert found == [IGNORED if i % (size or len(ids)) == 0 else token for i, token in enumerate(ids)]


def test_hashes_differ_and_are_stable() -> None:
    assert len({template.hash for template in TEMPLATES.values()}) == len(TEMPLATES)
    assert CHATML.hash[:8] == "d5c7aa77", "a change here breaks every adapter saved before"
    assert stop_ids(TOKENIZER) == (2,)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_question_of_a_prompt_is_read_back_for_people(name: str) -> None:
    template = TEMPLATES[name]
    first, last = (template.user.replace("{content}", text) for text in ("第一问？", "周叔，桥修好了吗？"))
    assert template.question(f"{first}{template.answer}好。{last}{template.answer}".strip()) == "周叔，桥修好了吗？"
    assert template.question("plain text") == "plain text"
