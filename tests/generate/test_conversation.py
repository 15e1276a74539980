import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tnl.adapter.load import load_adapter
from tnl.data.formats import read_records
from tnl.data.messages import Message, Role
from tnl.data.template import TEMPLATES, encode_conversation, encode_prompt
from tnl.errors import DataError, ModelError, NumbersError
from tnl.generate import conversation as module
from tnl.generate.conversation import Conversation, stop_texts
from tnl.generate.decode import generate_ids, new_cache, prefill
from tnl.generate.prefixes import HEADER
from tnl.generate.sampling import Settings
from tnl.model.load import load_model

GREEDY = Settings(do_sample=False, max_new_tokens=8)


class Script:
    """Answers that are written here instead of drawn; the state is read for real."""

    def __init__(self, tokenizer: Any, *answers: list[int]) -> None:
        self.answers, self.tokenizer, self.read = list(answers), tokenizer, []

    def __call__(self, model: Any, ids: Sequence[int], settings: Settings, *, cache: Any, **_: Any) -> Iterator[int]:
        self.read.append(list(ids))
        prefill(model, ids, cache)
        for token in self.answers.pop(0):
            yield token
            prefill(model, [token], cache)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_turn_reads_only_what_is_new(name: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = TEMPLATES[name]
    answers = ["我是甄嬛。", "I am here, 在此 😀", "再见\n"]
    script = Script(tokenizer, *(tokenizer.sp_model.encode(text) for text in answers))
    monkeypatch.setattr(module, "generate_ids", script)
    talk = Conversation(model, tokenizer, template, "你是甄嬛")
    asked = ["你是谁？", "Where are you?", "那好"]
    for question, answer in zip(asked, answers):
        assert "".join(talk.say(question)) == answer
    turns = [m for q, a in zip(asked, answers) for m in (Message(Role.USER, q), Message(Role.ASSISTANT, a))]
    assert talk.messages == turns
    whole = encode_conversation(turns, tokenizer, template, system="你是甄嬛")
    # what was read, with the answers in between: the very ids that are trained, end tokens included
    spoken = [i for part, text in zip(script.read, answers) for i in (*part, *tokenizer.sp_model.encode(text))]
    assert [*spoken, tokenizer.eos_token_id] == whole.input_ids.tolist()
    assert [part[0] for part in script.read[1:]] == [tokenizer.eos_token_id] * 2
    fresh = new_cache(model)
    prefill(model, spoken, fresh)
    for mine, expected in zip(talk._state.cache.states, fresh.states):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_an_answer_drawn_in_other_ids_than_its_text_is_read_anew(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sp = tokenizer.sp_model
    odd = [sp.piece_to_id("▁"), *(sp.piece_to_id(f"<0x{b:02X}>") for b in "我".encode())]
    assert sp.encode("我") != odd and sp.decode(odd) == "我"
    script = Script(tokenizer, odd, sp.encode("好"))
    monkeypatch.setattr(module, "generate_ids", script)
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"])
    list(talk.say("一"))
    list(talk.say("二"))
    turns = [Message(Role.USER, "一"), Message(Role.ASSISTANT, "我"), Message(Role.USER, "二")]
    assert script.read[1] == encode_prompt(turns, tokenizer, TEMPLATES["chatml"])


def test_drawn_answers_go_on_as_if_all_were_read_again(model: Any, tokenizer: Any) -> None:
    settings = Settings(temperature=1.3, max_new_tokens=6, repetition_penalty=1.1)
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], "系统", settings, seed=4)
    for question in ("你好", "再说", "还有呢"):
        turns = [*talk.messages, Message(Role.USER, question)]
        generator = torch.Generator()
        generator.set_state(talk._generator.get_state())
        ids = encode_prompt(turns, tokenizer, TEMPLATES["chatml"], system="系统")
        expected = list(generate_ids(model, ids, settings, stop_ids=[2], seed=generator))
        assert "".join(talk.say(question)) == tokenizer.decode(expected, skip_special_tokens=True)
        assert talk.seen == len(ids) + len(expected)
        assert talk.last is not None and talk.last.tokens == len(expected)


def test_the_state_does_not_grow(model: Any, tokenizer: Any) -> None:
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=GREEDY)
    list(talk.say("短"))
    size, seen = talk.state_bytes, talk.seen
    list(talk.say("长" * 300))
    assert talk.state_bytes == size == sum(2 * (32 if lrpe else 16) * 16 * 4 for lrpe in (1, 0)) and talk.seen > seen + 300


def test_a_seed_makes_a_conversation_repeat(model: Any, tokenizer: Any) -> None:
    def answers(seed: int | None) -> list[str]:
        talk = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=Settings(max_new_tokens=6, temperature=2.0), seed=seed)
        return ["".join(talk.say(text)) for text in ("一", "二")]

    assert answers(1) == answers(1) != answers(2)
    assert answers(None) != answers(None)
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=Settings(max_new_tokens=6, temperature=2.0), seed=1)
    first = "".join(talk.say("一"))
    talk.reset()
    assert not talk.messages and talk.seen == 0
    assert "".join(talk.say("一")) == first


@pytest.mark.parametrize("how", ["closed", "Ctrl-C"])
def test_a_stopped_answer_stays_as_far_as_it_was_given(how: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[int]:
        for count, token in enumerate(generate_ids(*arguments, **options)):
            if count == 3 and how == "Ctrl-C":
                raise KeyboardInterrupt
            yield token

    expected = list(generate_ids(model, encode_prompt([Message(Role.USER, "一")], tokenizer, TEMPLATES["chatml"]), GREEDY, stop_ids=[2]))[
        :3
    ]
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=GREEDY)
    monkeypatch.setattr(module, "generate_ids", interrupted)
    said = ""
    if how == "closed":
        pieces = talk.say("一")
        while len(said) < len(tokenizer.decode(expected)):
            said += next(pieces)
        pieces.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            for piece in talk.say("一"):
                said += piece
    assert said and talk.messages[-1].content == said and talk.last is not None and talk.last.finish == "interrupted"
    monkeypatch.undo()
    again = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=GREEDY)
    again.messages = list(talk.messages)
    assert "".join(talk.say("二")) == "".join(again.say("二"))


def test_after_an_error_the_conversation_is_as_before(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=GREEDY)
    list(talk.say("一"))
    before, expected = list(talk.messages), talk.seen

    def broken(*arguments: Any, **options: Any) -> Iterator[int]:
        yield next(generate_ids(*arguments, **options))
        raise NumbersError("", "not finite")

    monkeypatch.setattr(module, "generate_ids", broken)
    with pytest.raises(NumbersError):
        list(talk.say("二"))
    assert talk.messages == before and talk.seen == expected
    monkeypatch.undo()
    other = Conversation(model, tokenizer, TEMPLATES["chatml"], settings=GREEDY)
    list(other.say("一"))
    assert "".join(talk.say("二")) == "".join(other.say("二"))


def test_a_model_that_opens_the_next_turn_itself_is_stopped(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop_texts(TEMPLATES["alpaca"]) == ("### Instruction:\n",)
    for name, text in (("chatml", "好<|im_start|>user\n再"), ("human-assistant", "好\nHuman:\n再")):
        script = Script(tokenizer, tokenizer.sp_model.encode(text), tokenizer.sp_model.encode("是"))
        monkeypatch.setattr(module, "generate_ids", script)
        talk = Conversation(model, tokenizer, TEMPLATES[name])
        assert "".join(talk.say("一")).strip() == "好"
        assert talk.last is not None and talk.last.finish == "stop"
        list(talk.say("二"))
        # the turn that the model invented is no part of the state
        assert script.read[1] == encode_prompt(talk.messages[:3], tokenizer, TEMPLATES[name])


def test_what_is_saved_is_loaded_and_can_be_trained_on(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], "系统", GREEDY)
    list(talk.say("你好"))
    talk.save(tmp_path / "talk.json")
    other = Conversation(model, tokenizer, TEMPLATES["chatml"], None, GREEDY)
    other.load(tmp_path / "talk.json")
    assert (other.system, other.messages) == ("系统", talk.messages)
    assert "".join(other.say("再")) == "".join(talk.say("再"))
    [record] = read_records(tmp_path / "talk.json")
    assert [m.role.value for m in record.messages] == ["system", "user", "assistant"]
    (tmp_path / "two.json").write_text(json.dumps(json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) * 2), encoding="utf-8")
    with pytest.raises(DataError, match="2 conversations"):
        other.load(tmp_path / "two.json")
    assert len(other.messages) == 4


ASKED = ("你好", "再说", "还有呢", "Where?")


def talked(model: Any, tokenizer: Any, *questions: str, settings: Settings = GREEDY) -> Conversation:
    talk = Conversation(model, tokenizer, TEMPLATES["chatml"], "系统", settings, seed=2)
    for question in questions:
        list(talk.say(question))
    return talk


@pytest.mark.parametrize("settings", [GREEDY, Settings(temperature=1.3, max_new_tokens=8)])
def test_a_kept_state_goes_on_without_reading_anew(model: Any, tokenizer: Any, tmp_path: Path, settings: Settings) -> None:
    talk = talked(model, tokenizer, *ASKED[:3], settings=settings)
    talk.save(tmp_path / "talk.safetensors")
    later = Conversation(model, tokenizer, TEMPLATES["chatml"], None, GREEDY)
    later.load(tmp_path / "talk.safetensors")
    assert (later.system, later.messages, later.state_bytes) == ("系统", talk.messages, talk.state_bytes)
    assert later.seen == len(encode_conversation(talk.messages, tokenizer, TEMPLATES["chatml"], system="系统").input_ids)
    expected = Conversation(model, tokenizer, TEMPLATES["chatml"], "系统", GREEDY)
    expected.messages = list(talk.messages)
    assert "".join(later.say(ASKED[3])) == "".join(expected.say(ASKED[3]))
    assert later.last is not None and expected.last is not None
    assert later.last.read == expected.last.read - len(later._before.ids) < 40


def test_a_copy_of_the_file_is_a_branch(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    talk = talked(model, tokenizer, "你好")
    talk.save(first)
    one, two = (Conversation(model, tokenizer, TEMPLATES["chatml"], None, GREEDY) for _ in range(2))
    one.load(first)
    one.save(second)
    assert second.read_bytes() == first.read_bytes()
    list(one.say("左"))
    one.save(first)
    two.load(second)
    assert two.messages == talk.messages and one.messages[:2] == talk.messages
    assert "".join(two.say("右")) == "".join(talk.say("右"))


def test_a_stopped_answer_is_kept_as_far_as_it_was_given(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    talk = talked(model, tokenizer, "你好")
    answer = talk.say("再说")
    next(answer)
    answer.close()
    talk.save(tmp_path / "talk.safetensors")
    later = Conversation(model, tokenizer, TEMPLATES["chatml"], None, GREEDY)
    later.load(tmp_path / "talk.safetensors")
    assert later.messages == talk.messages and len(later.messages) == 4
    assert "".join(later.say("还有呢")) == "".join(talk.say("还有呢"))


def test_a_state_of_nothing_is_not_kept(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing has been said yet"):
        talked(model, tokenizer).save(tmp_path / "talk.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["adapter", "base", "template", "turns", "role", "system", "shape"])
def test_a_state_of_another_model_or_conversation_is_refused(
    model: Any, tokenizer: Any, base: Path, adapter: Path, tmp_path: Path, other: str
) -> None:
    path = tmp_path / "talk.safetensors"
    talked(model, tokenizer, "你好").save(path)
    mine, template, what = model, "chatml", "holds another conversation"
    tensors, about = load_file(path), json.loads(safe_open(path, "pt").metadata()[HEADER])
    match other:
        case "adapter":
            mine, what = load_adapter(load_model(base, device="cpu"), adapter), "another model or adapter"
        case "base":
            mine, what = load_model(base, device="cpu"), "another model or adapter"
            mine.model.layers[0].state_dict()["token_mixer.out_proj.weight"].mul_(1.01)
        case "template":
            template, what = "alpaca", 'not saved with the template "alpaca"'
        case "turns":
            about["about"]["messages"][1]["content"] += "!"
        case "role":
            about["about"]["messages"][0]["role"] = "tool"
        case "system":
            about["about"]["system"] = None
        case "shape":
            about["about"]["messages"] = [7]
    save_file(tensors, path, metadata={HEADER: json.dumps(about)})
    talk = Conversation(mine, tokenizer, TEMPLATES[template], "mine", GREEDY)
    with pytest.raises(ModelError, match=what):
        talk.load(path)
    assert (talk.system, talk.messages) == ("mine", [])
