"""The engine with the Triton forms says what it says with the reference forms: in Triton's interpreter, and on a GPU by its graphs."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

from tnl.generate.adapters import Adapters
from tnl.generate.draft import NOT_FINITE
from tnl.generate.engine import Engine
from tnl.generate.request import Answer, Request
from tnl.generate.sampling import Settings
from tnl.kernels import step_ops
from tnl.model.load import load_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = Settings(do_sample=False, max_new_tokens=6)
REQUESTS = [
    Request((5, 9, 700), GREEDY, logprobs=2),
    Request(tuple(range(40, 110)), GREEDY),
    Request((3,), Settings(max_new_tokens=5, temperature=0.8, top_p=0.9), seed=3),
    Request((8, 8, 8, 9), Settings(max_new_tokens=5, top_k=7, repetition_penalty=1.3), seed=4, logprobs=0),
    Request(tuple(range(3, 36)), Settings(max_new_tokens=4, min_p=0.02, presence_penalty=0.5, frequency_penalty=0.3), seed=5, n=2),
]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the wide products, unless a test wants ours: in the interpreter each of theirs takes seconds."""
    if DEVICE == "cpu":
        monkeypatch.setattr(step_ops, "MOST", 0)


@pytest.fixture(scope="module")
def fused(base: Path) -> Any:
    """The tiny model with the Triton forms."""
    return load_model(base, device=DEVICE, dtype="float32", backend="triton")


def poisoned(*arguments: Any, **options: Any) -> Engine:
    """An engine whose freed states are NaN."""
    engine = Engine(*arguments, **options)
    engine.slots.poison()
    return engine


def run(engine: Engine, *requests: Request) -> list[list[Answer]]:
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [ticket.answers for ticket in tickets]


def same(found: list[list[Answer]], expected: list[list[Answer]]) -> None:
    """Texts, ids and ends are equal, log-probabilities close."""
    for mine, theirs in zip(chain(*found), chain(*expected), strict=True):
        assert (mine.text, mine.ids, mine.tokens, mine.finish) == (theirs.text, theirs.ids, theirs.tokens, theirs.finish)
        assert len(mine.logprobs) == len(theirs.logprobs)
        for one, other in zip(mine.logprobs, theirs.logprobs):
            assert one.id == other.id and one.value == pytest.approx(other.value, abs=1e-3)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]


def test_answers_are_those_of_the_reference(model: Any, fused: Any, tokenizer: Any) -> None:
    expected = run(Engine(model, tokenizer), *REQUESTS)
    engine = poisoned(fused, tokenizer)
    assert engine.steps.ahead
    same(run(engine, *REQUESTS), expected)
    assert engine.load == {"waiting": 0, "reading": 0, "running": 0, "free": 8, "slots": 8}
    same(run(engine, REQUESTS[1]), expected[1:2])  # slots and settings are as new
    assert engine.counts.generated_tokens == sum(one.tokens for answers in expected for one in answers) + 6


def test_deferred_state_writes_say_the_same(model: Any, fused: Any, tokenizer: Any) -> None:
    """Answers longer than what waits, at all times of life; and what is kept of a slot goes on as if everything had been read anew."""
    requests = [Request((5, 9, 700), Settings(do_sample=False, max_new_tokens=26)), Request((8, 9), GREEDY, n=2)]
    expected = run(Engine(model, tokenizer), *requests)
    engine = poisoned(fused, tokenizer, slots=4, state_writes="deferred")
    same(run(engine, *requests), expected)
    for answers, request in zip(expected, requests):
        following = (*request.ids, *answers[0].ids, 50, 51)
        ticket = engine.submit(Request(following, GREEDY))
        while engine.step():
            pass
        assert ticket.cached_tokens == len(following) - 3  # all that the slot had read: the last token was drawn alone
        same([ticket.answers], run(Engine(model, tokenizer), Request(following, GREEDY)))


def test_few_rows_take_our_products(model: Any, fused: Any, tokenizer: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_ops, "MOST", 32)
    answers = []
    for one in (model, fused):
        bank = Adapters(one, capacity=2)
        key = bank.load(adapter)
        requests = [Request((5, 9, 700), Settings(do_sample=False, max_new_tokens=3), adapter=name) for name in (key, None)]
        answers.append(run(Engine(one, tokenizer, adapters=bank), *requests))
    same(answers[1], answers[0])


def test_adapters_share_a_batch(model: Any, fused: Any, tokenizer: Any, adapter: Path) -> None:
    answers = []
    for one in (model, fused):
        bank = Adapters(one, capacity=2)
        key = bank.load(adapter)
        requests = [Request((5, 9, 700), GREEDY, adapter=name) for name in (key, None, key)]
        requests.append(Request(tuple(range(3, 60)), GREEDY, adapter=key))
        answers.append(run(Engine(one, tokenizer, adapters=bank), *requests))
        assert bank.users(key) == 0
    same(answers[1], answers[0])
    assert answers[1][0][0].ids != answers[1][1][0].ids


def test_a_stop_id_is_read_and_the_state_kept_says_so(model: Any, fused: Any, tokenizer: Any) -> None:
    free = run(Engine(model, tokenizer), Request((8, 9), GREEDY))[0][0]
    stop = free.ids[3]
    engine = Engine(fused, tokenizer)
    ended = run(engine, Request((8, 9), GREEDY, stop_ids=(stop,)))[0][0]
    assert ended.finish == "stop" and ended.ids == free.ids[: free.ids.index(stop)]
    following = (8, 9, *ended.ids, stop, 77, 78)
    ticket = engine.submit(Request(following, GREEDY))
    while engine.step():
        pass
    assert ticket.cached_tokens == len(following) - 2
    same([ticket.answers], run(Engine(model, tokenizer), Request(following, GREEDY)))


def test_prefixes_conversations_and_cancelling(model: Any, fused: Any, tokenizer: Any, tmp_path: Path) -> None:
    system = tuple(range(100, 170))
    requests = [Request((*system, 300 + i), GREEDY) for i in range(3)]
    expected = [run(Engine(model, tokenizer, prefix_bytes=0), request)[0] for request in requests]
    engine = Engine(fused, tokenizer)
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        while engine.step():
            pass
    assert [ticket.cached_tokens for ticket in tickets] == [0, 0, 64]
    same([ticket.answers for ticket in tickets], expected)
    engine.save_state(tmp_path / "kept.state", system)
    later = Engine(fused, tokenizer)
    later.load_state(tmp_path / "kept.state")
    going, ticket = later.submit(Request((5,), Settings(max_new_tokens=1000))), later.submit(requests[0])
    for _ in range(5):
        later.step()
    going.cancel()
    while later.step():
        pass
    assert ticket.cached_tokens == len(system) and going.answers[0].finish == "cancelled"
    same([ticket.answers], expected[:1])


def test_a_row_that_is_not_finite_fails_alone(fused: Any, tokenizer: Any) -> None:
    requests = [Request((i + 3, 50), Settings(do_sample=False, max_new_tokens=8)) for i in range(3)]
    expected = run(Engine(fused, tokenizer), *requests)
    engine = Engine(fused, tokenizer)
    tickets = [engine.submit(request) for request in requests]
    while engine.load["running"] < 3:
        engine.step()
    engine.slots.states[1][1] = torch.nan
    while engine.step():
        pass
    answers = [ticket.answers for ticket in tickets]
    assert answers[1][0].error == NOT_FINITE
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert not any(bool(one.isnan().any()) for state in engine.prefixes._states.values() for one in state.states)


@pytest.mark.gpu
def test_prefixes_pushed_out_to_the_host_give_the_same_answers(base: Path, tokenizer: Any) -> None:
    fused = load_model(base, device="cuda", dtype="float32", backend="triton")
    one = sum(state[0].nbytes for state in Engine(fused, tokenizer).slots.states) + 4 * 100
    engine = Engine(fused, tokenizer, prefix_bytes=2 * one)
    prompts = [tuple(range(10 * i + 3, 10 * i + 93)) for i in range(4)]
    answers = run(engine, *(Request(prompt, Settings(do_sample=False, max_new_tokens=1)) for prompt in prompts))
    assert len(engine.prefixes) == 4 and engine.prefixes.demoted_bytes > 0
    fresh = Engine(fused, tokenizer, prefix_bytes=0)
    for prompt, (answer,) in zip(prompts, answers):
        more = (*prompt, *answer.ids, 5, 6)
        ticket = engine.submit(Request(more, GREEDY))
        while engine.step():
            pass
        assert ticket.cached_tokens >= len(prompt)
        same([ticket.answers], run(fresh, Request(more, GREEDY)))


@pytest.mark.gpu
@pytest.mark.parametrize("writes", ["each-step", "deferred"])
def test_bfloat16_graphs_say_what_the_reference_forms_say(base: Path, tokenizer: Any, writes: str) -> None:
    """On a GPU: two graphs' sizes, reading and decoding; where bfloat16 could turn a choice, log-probabilities are compared instead."""
    model, fused = (load_model(base, device="cuda", dtype="bfloat16", backend=backend) for backend in ("reference", "triton"))
    engine = Engine(fused, tokenizer, slots=4, state_writes=writes)
    engine.warm()
    warm = len(engine.steps.graphs.known)  # type: ignore[attr-defined]
    requests = [Request(tuple(range(3, 3 + n)), GREEDY, logprobs=0) for n in (1, 64, 65, 200)]
    found, expected = run(engine, *requests), run(Engine(model, tokenizer, slots=4), *requests)
    for (mine,), (theirs,) in zip(found, expected):
        same_so_far = 0
        while same_so_far < 6 and mine.ids[same_so_far] == theirs.ids[same_so_far]:
            same_so_far += 1
        for one, other in list(zip(mine.logprobs, theirs.logprobs))[: same_so_far + 1]:
            assert one.value == pytest.approx(other.value, abs=0.15)
        assert same_so_far >= 1
    assert len(engine.steps.graphs.known) == warm  # type: ignore[attr-defined]
    again = run(engine, *requests)  # from the prefixes that were kept: within rounding
    assert [answer.logprobs[0].value for (answer,) in again] == pytest.approx([answer.logprobs[0].value for (answer,) in found], abs=0.05)
