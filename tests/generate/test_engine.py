import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tnl.data.messages import Message, Role
from tnl.data.template import TEMPLATES, encode_prompt, stop_ids
from tnl.generate import draft
from tnl.generate.conversation import Conversation
from tnl.generate.decode import generate_ids
from tnl.generate.engine import Engine, defers
from tnl.generate.request import Answer, Closed, Piece, QueueFull, Request, Ticket
from tnl.generate.sampling import Settings
from tnl.model.load import load_model, load_tokenizer
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
GREEDY = Settings(do_sample=False, max_new_tokens=24)
CHATML = TEMPLATES["chatml"]


def poisoned(*arguments: Any, **options: Any) -> Engine:
    """An engine whose freed states are NaN."""
    engine = Engine(*arguments, **options)
    engine.slots.poison()
    return engine


def run(engine: Engine, *requests: Request) -> list[Answer]:
    """The first answer of each, all at once."""
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [ticket.answers[0] for ticket in tickets]


@pytest.fixture
def engine(model: Any, tokenizer: Any) -> Engine:
    return poisoned(model, tokenizer)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu"), load_tokenizer("demo")


@pytest.mark.parametrize("name", ["base", "bias-elu", "long"])
def test_golden_answers(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")
    model = load_model(GOLDEN / name, device="cpu")
    engine = poisoned(model, BaiChuanTokenizer.from_pretrained(GOLDEN / "tokenizer"))
    answer = expected["greedy_ids"][0].tolist()
    request = Request(tuple(expected["prompt_ids"][0].tolist()), Settings(do_sample=False, max_new_tokens=len(answer)))
    others = [Request(tuple(row.tolist()), GREEDY) for row in expected["input_ids"]]
    assert run(engine, request)[0].ids == run(engine, *others, request, *others)[len(others)].ids == answer


def test_the_demo_model_says_in_a_full_batch_what_chat_says(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    engine = poisoned(model, tokenizer)
    questions = [
        "你是谁？",
        "曹操是谁？",
        "hello",
        "刘备和诸葛亮是什么关系？",
        "Who are you?",
        "天下大势",
        "讲个故事",
        "谢谢",
        "1+1=?",
        "再见",
    ]
    requests = [
        Request(tuple(encode_prompt([Message(Role.USER, text)], tokenizer, CHATML)), GREEDY, stop_ids(tokenizer), ("<|im_start|>user\n",))
        for text in questions
    ]
    for text, answer in zip(questions, run(engine, *requests)):
        conversation = Conversation(model, tokenizer, CHATML, settings=GREEDY)
        assert answer.text == "".join(conversation.say(text))
        assert conversation.last is not None and (answer.finish, answer.tokens) == (conversation.last.finish, conversation.last.tokens)
    assert len({answer.text for answer in run(engine, *requests)}) > 5


def test_answers_equal_generate_with_penalties(model: Any, engine: Engine) -> None:
    settings = Settings(do_sample=False, max_new_tokens=12, repetition_penalty=1.5)
    ids = (5, 9, 700, 9, 31)
    assert run(engine, Request(ids, settings))[0].ids == list(generate_ids(model, ids, settings, stop_ids=()))


SETTINGS = [
    Settings(max_new_tokens=10),
    Settings(max_new_tokens=10, temperature=1.7, top_k=50),
    Settings(max_new_tokens=10, temperature=0.7, top_p=0.9),
    Settings(max_new_tokens=10, min_p=0.02, repetition_penalty=1.2),
    Settings(max_new_tokens=10, presence_penalty=1.0, frequency_penalty=0.5),
]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits_alone_and_in_a_full_batch(model: Any, tokenizer: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        requests = [Request((i + 3, 50, 60 + i), SETTINGS[i % len(SETTINGS)], seed=i, logprobs=2) for i in range(12)]
        together = run(poisoned(model, tokenizer), *requests)
        assert together == [run(Engine(model, tokenizer), request)[0] for request in requests]
        assert len({tuple(answer.ids) for answer in together}) == 12
    finally:
        torch.set_num_threads(1)


def test_several_answers_are_those_of_following_seeds(engine: Engine) -> None:
    several = engine.generate(Request((3, 4), SETTINGS[0], seed=7, n=3))
    assert several == [engine.generate(Request((3, 4), SETTINGS[0], seed=7 + i))[0] for i in range(3)]
    assert engine.counts.prompt_tokens == 8  # read once for all three
    unseeded = engine.generate(Request((3, 4), SETTINGS[0], n=2))
    assert unseeded[0].ids != unseeded[1].ids


def test_stop_ids_and_texts(tokenizer: Any, engine: Engine) -> None:
    free = run(engine, Request((8, 9), GREEDY))[0]
    assert free.finish == "length" and free.tokens == len(free.ids) == 24
    stop = free.ids[5]
    ended = run(engine, Request((8, 9), GREEDY, stop_ids=(stop,)))[0]
    assert ended.ids == free.ids[: free.ids.index(stop)] and ended.finish == "stop" and ended.tokens == len(ended.ids)
    word = free.text[6:10]
    cut = run(engine, Request((8, 9), GREEDY, stop=(word,), logprobs=0))[0]
    assert cut.finish == "stop" and cut.text == free.text[: free.text.index(word)]
    assert cut.tokens > len(cut.ids) - 1 and len(cut.logprobs) == len(cut.ids)
    assert tokenizer.sp_model.decode(cut.ids).startswith(cut.text)


def test_the_end_token_may_come_first(engine: Engine) -> None:
    first = run(engine, Request((8, 9), GREEDY))[0].ids[0]
    answer = run(engine, Request((8, 9), GREEDY, stop_ids=(first,)))[0]
    assert (answer.text, answer.ids, answer.finish, answer.tokens) == ("", [], "stop", 0)
    assert engine.load["free"] == 8


def test_pieces_never_split_a_character(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    engine = Engine(model, tokenizer)
    for seed in range(3):
        pieces: list[Piece] = []
        ticket = engine.submit(Request((9, 10), Settings(max_new_tokens=80, temperature=3.0), seed=seed), pieces.append)
        while engine.step():
            pass
        ids = [token for piece in pieces for token in piece.ids]
        text = "".join(piece.text for piece in pieces)
        assert text == tokenizer.sp_model.decode(ids) == ticket.answers[0].text and len(ids) == 80
        assert len(pieces) > 40 and [piece.finish for piece in pieces].count("length") == 1
        whole = "".join(tokenizer.sp_model.decode(ids))
        assert text.count("\ufffd") == whole.count("\ufffd")


def test_logprobs_are_the_models_own(model: Any, engine: Engine) -> None:
    ids = [5, 6, 7]
    answer = run(engine, Request(tuple(ids), Settings(max_new_tokens=6, temperature=2.0, top_k=3), seed=1, logprobs=4))[0]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer.ids]])).logits[0, 2:-1].log_softmax(-1)
    for told, row in zip(answer.logprobs, logits):
        assert told.value == pytest.approx(float(row[told.id]), abs=1e-4)
        assert [value for _, value in told.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    assert [told.id for told in answer.logprobs] == answer.ids


def test_a_row_that_is_not_finite_fails_alone(model: Any, tokenizer: Any) -> None:
    requests = [Request((i + 3, 50), GREEDY) for i in range(5)]
    expected = run(Engine(model, tokenizer), *requests)
    engine = Engine(model, tokenizer)
    tickets = [engine.submit(request) for request in requests]
    while engine.load["running"] < 5:
        engine.step()
    engine.slots.states[1][2] = torch.nan
    while engine.step():
        pass
    answers = [ticket.answers[0] for ticket in tickets]
    assert answers[2].finish == "error" and "not finite" in answers[2].error
    assert [answer for i, answer in enumerate(answers) if i != 2] == [answer for i, answer in enumerate(expected) if i != 2]
    assert run(engine, requests[2]) == [expected[2]]
    assert not any(bool(one.isnan().any()) for state in engine.prefixes._states.values() for one in state.states)


@pytest.mark.parametrize("where", ["reading", "text", "drawing"])
def test_whatever_goes_wrong_in_one_request_stays_there(
    model: Any, tokenizer: Any, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    requests = [Request((i + 3, 50), Settings(do_sample=False, max_new_tokens=8 + i)) for i in range(4)]
    expected = run(Engine(model, tokenizer), *requests)
    engine = poisoned(model, tokenizer)
    tickets: list[Ticket] = []

    def fault(owner: Any, name: str, concerns: Any) -> None:
        original = getattr(owner, name)

        def broken(*args: Any, **kwargs: Any) -> Any:
            if concerns(*args):
                raise MemoryError("injected")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)

    if where == "reading":
        fault(engine, "_read_on", lambda reading: reading.ticket is tickets[1])
    elif where == "text":
        fault(draft.Draft, "push", lambda one, *_: one.ticket is tickets[1] and len(one.ids) == 3)
    else:
        fault(draft, "sample", lambda logits, settings, *_: settings.max_new_tokens == 9)
    tickets += [engine.submit(request) for request in requests]
    while engine.step():
        pass
    answers = [ticket.answers[0] for ticket in tickets]
    assert answers[1].finish == "error" and "MemoryError" in answers[1].error
    assert answers[0:1] + answers[2:] == expected[0:1] + expected[2:]
    assert engine.load == {"waiting": 0, "reading": 0, "running": 0, "free": 8, "slots": 8}


def test_cancelling_frees_the_slot_at_once(engine: Engine) -> None:
    long = Settings(do_sample=False, max_new_tokens=1000)
    running, reading, waiting = (engine.submit(Request(ids, long, n=n)) for ids, n in (((3, 4), 4), (tuple(range(3, 200)), 4), ((5,), 1)))
    engine.step()
    engine.step()
    assert engine.load == {"waiting": 1, "reading": 1, "running": 4, "free": 0, "slots": 8}
    for ticket in (waiting, reading, running):
        ticket.cancel()
        engine.step()
        assert ticket.done.is_set() and {answer.finish for answer in ticket.answers} == {"cancelled"}
    assert engine.load["free"] == 8 and not engine.step()
    assert engine.counts.finished == {"cancelled": 9}


def test_a_listener_that_fails_loses_its_own_request(engine: Engine) -> None:
    def broken(piece: Piece) -> None:
        raise RuntimeError("the client has gone")

    ticket = engine.submit(Request((3, 4), GREEDY), broken)
    other = engine.submit(Request((5, 6), GREEDY))
    while engine.step():
        pass
    assert ticket.done.is_set() and ticket.answers[0].finish == "cancelled" and other.answers[0].finish == "length"


def test_a_long_prompt_does_not_keep_a_short_one_waiting(engine: Engine) -> None:
    long = engine.submit(Request(tuple(range(3, 1000)), GREEDY))
    short = engine.submit(Request((3, 4, 5), Settings(do_sample=False, max_new_tokens=4)))
    for _ in range(8):
        engine.step()
    assert short.done.is_set() and not long.done.is_set()
    long.cancel()


def test_the_queue_is_bounded(model: Any, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, queue=3)
    for _ in range(3):
        engine.submit(Request((3,), GREEDY, n=8))
    engine.submit(Request((3,), GREEDY))
    with pytest.raises(QueueFull, match="3 requests wait already"):
        engine.submit(Request((3,), GREEDY))
    engine._sweep()
    engine._admit()
    with pytest.raises(QueueFull):
        engine.submit(Request((3,), GREEDY))
    while engine.load["waiting"] == 3:
        engine.step()
    engine.submit(Request((3,), GREEDY)).cancel()


def test_without_a_queue_what_finds_a_slot_is_taken(model: Any, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, queue=0)
    engine.submit(Request((3,), GREEDY, n=7))
    engine.submit(Request((3,), GREEDY))
    with pytest.raises(QueueFull):
        engine.submit(Request((3,), GREEDY))
    while engine.step():
        pass
    engine.submit(Request((3,), GREEDY, n=8))


@pytest.mark.parametrize(
    "request_",
    [Request(()), Request((-1,)), Request((6000,)), Request((3,), n=0), Request((3,), n=9), Request((3,), Settings(max_new_tokens=0))],
    ids=str,
)
def test_what_no_request_can_be(engine: Engine, request_: Request) -> None:
    with pytest.raises(ValueError, match="from"):
        engine.submit(request_)
    assert engine.load["waiting"] == 0


def test_when_states_are_written(model: Any, tokenizer: Any) -> None:
    def deferred(dtype: torch.dtype, backend: str, **options: Any) -> bool:
        weight = SimpleNamespace(dtype=dtype)
        fake = SimpleNamespace(backend=backend, model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight)))
        return defers(options.get("writes", "auto"), fake, options.get("slots", 64))

    assert deferred(torch.bfloat16, "triton") and not deferred(torch.bfloat16, "triton", slots=63)
    assert not deferred(torch.float32, "triton") and not deferred(torch.bfloat16, "reference")
    assert deferred(torch.float32, "reference", slots=1, writes="deferred") and not deferred(torch.bfloat16, "triton", writes="each-step")
    with pytest.raises(ValueError, match="there are auto, each-step, deferred"):
        Engine(model, tokenizer, state_writes="never")
    assert not Engine(model, tokenizer).slots.deferred


def test_prefixes_are_found_and_change_no_bit(model: Any, tokenizer: Any) -> None:
    system = tuple(range(100, 240))
    requests = [Request((*system, 300 + i, 301), GREEDY, logprobs=0) for i in range(4)]
    alone = Engine(model, tokenizer, prefix_bytes=0)
    expected = [run(alone, request)[0] for request in requests]
    engine = Engine(model, tokenizer)
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        while engine.step():
            pass
    assert [ticket.cached_tokens for ticket in tickets] == [0, 0, 128, 128]
    assert [ticket.answers[0] for ticket in tickets] == expected
    assert engine.counts.prompt_tokens == 142 * 4 - 256 and len(alone.prefixes) == 0


def test_the_next_turn_reads_only_what_is_new(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    engine = Engine(model, tokenizer)
    turns = [Message(Role.USER, "你是谁？")]
    for text in ("曹操是谁？", "谢谢你"):
        ids = tuple(encode_prompt(turns, tokenizer, CHATML))
        answer = run(engine, Request(ids, GREEDY, stop_ids(tokenizer)))[0]
        turns += [Message(Role.ASSISTANT, answer.text), Message(Role.USER, text)]
        following = tuple(encode_prompt(turns, tokenizer, CHATML))
        ticket = engine.submit(Request(following, GREEDY, stop_ids(tokenizer)))
        while engine.step():
            pass
        if answer.finish == "stop":
            assert ticket.cached_tokens == len(ids) + answer.tokens
        fresh = run(Engine(model, tokenizer, prefix_bytes=0), Request(following, GREEDY, stop_ids(tokenizer)))[0]
        assert ticket.answers[0].text == fresh.text
    assert engine.prefixes.hits >= 2


@pytest.mark.parametrize("writes", ["each-step", "deferred"])
def test_a_conversation_is_saved_resumed_and_branched(model: Any, tokenizer: Any, tmp_path: Path, writes: str) -> None:
    engine = Engine(model, tokenizer, state_writes=writes)
    said = Request(tuple(range(10, 60)), GREEDY)
    answer = run(engine, said)[0]
    ids = (*said.ids, *answer.ids[:-1])
    engine.save_state(tmp_path / "kept.state", ids, about={"messages": []})
    read = engine.counts.prompt_tokens
    engine.save_state(tmp_path / "read.state", (1, 2, 3))
    assert engine.counts.prompt_tokens == read + 3  # the first was kept, the second had to be read

    later = Engine(model, tokenizer)
    assert later.load_state(tmp_path / "kept.state").ids == ids
    branches = [Request((*ids, answer.ids[-1], 70 + i), GREEDY) for i in range(2)]
    tickets = [later.submit(request) for request in branches]
    while later.step():
        pass
    assert [ticket.cached_tokens for ticket in tickets] == [len(ids)] * 2
    assert [ticket.answers[0] for ticket in tickets] == [run(Engine(model, tokenizer, prefix_bytes=0), one)[0] for one in branches]


def test_on_its_own_thread(model: Any, tokenizer: Any) -> None:
    requests = [Request((i + 3, 50), SETTINGS[i % 5], seed=i) for i in range(20)]
    expected = run(Engine(model, tokenizer), *requests)
    engine = Engine(model, tokenizer)
    engine.start()
    found: dict[int, Answer] = {}
    threads = [
        threading.Thread(target=lambda i=i, request=request: found.update({i: engine.generate(request)[0]}))  # type: ignore[misc]
        for i, request in enumerate(requests)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(20)] == expected and engine.alive
    ticket = engine.submit(Request((3,), Settings(max_new_tokens=10**6)))
    engine.close()
    assert ticket.answers[0].finish == "error" and "stopped" in ticket.answers[0].error and not engine.alive
    with pytest.raises(Closed):
        engine.submit(Request((3,)))


def test_a_dead_engine_says_so_to_everybody(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    engine = Engine(model, tokenizer)
    died = threading.Event()
    engine.on_death = died.set
    monkeypatch.setattr(engine.slots, "step", lambda *_: 1 / 0)
    tickets = [engine.submit(Request((3, i + 4), GREEDY)) for i in range(12)]
    engine.start()
    assert died.wait(10)
    assert all(ticket.done.wait(5) and ticket.answers[0].finish == "error" for ticket in tickets)
    assert isinstance(engine.error, ZeroDivisionError) and not engine.alive
    with pytest.raises(Closed):
        engine.submit(Request((3,)))
    engine.close()
