"""Whole requests against a running server: answers, models, adapters, streams, limits."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tnl.data.messages import Message, Role
from tnl.data.template import TEMPLATES, encode_prompt
from tnl.generate.engine import Engine
from tnl.generate.request import Request
from tnl.generate.resolve import resolve
from tnl.generate.sampling import Settings
from tnl.serve.gate import Limits
from tnl.serve.run import Serving

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "你是谁？"}
ASK = {"model": "tiny-base", "messages": [QUESTION], "temperature": 1, "top_k": 0, "seed": 5, "max_tokens": 12}


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) if line != "data: [DONE]" else None for line in text.split("\n\n") if line]


def test_a_chat_is_what_the_engine_says(live: Any) -> None:
    engine = live.service.engine
    ids = tuple(encode_prompt([Message(Role.USER, "你是谁？")], engine.tokenizer, TEMPLATES["chatml"]))
    request = Request(ids, Settings(max_new_tokens=12), stop_ids=(2,), seed=5)
    expected = Engine(engine.model, engine.tokenizer).generate(request)[0]
    with live.client() as client:
        reply = client.post(CHAT, json=ASK)
    assert reply.status_code == 200 and len(reply.headers["x-request-id"]) == 16
    found = reply.json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-") and found["model"] == "tiny-base"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(ids), 12, len(ids) + 12)


def test_a_stream_says_the_same(live: Any) -> None:
    with live.client() as client:
        whole = client.post(CHAT, json={**ASK, "n": 2, "seed": 3, "temperature": 1.2}).json()
        asked = {**ASK, "n": 2, "seed": 3, "temperature": 1.2, "stream": True, "stream_options": {"include_usage": True}}
        reply = client.post(CHAT, json=asked)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(reply.text)
    assert done is None and usage["choices"] == []
    assert {**usage["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in mine) == whole["choices"][index]["message"]["content"]
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == [whole["choices"][index]["finish_reason"]]
    assert whole["choices"][0] != whole["choices"][1]


def test_plain_completions(live: Any) -> None:
    ask = {"model": "tiny-base", "temperature": 0, "max_tokens": 5}
    with live.client() as client:
        one = client.post("/v1/completions", json={**ask, "prompt": "曹操"}).json()
        ids = live.service.engine.tokenizer.sp_model.encode("曹操")
        assert client.post("/v1/completions", json={**ask, "prompt": ids}).json()["choices"] == one["choices"]
        many = client.post("/v1/completions", json={**ask, "prompt": ["曹操", "hello"], "n": 2}).json()
        assert (
            client.post("/v1/completions", json={**ask, "prompt": [ids, ids[:1]]}).json()["choices"][0]["text"] == one["choices"][0]["text"]
        )
        reply = client.post("/v1/completions", json={**ask, "prompt": "曹操", "stream": True})
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in many["choices"][:2]] == [one["choices"][0]["text"]] * 2
    assert many["choices"][2]["text"] != one["choices"][0]["text"] and many["usage"]["completion_tokens"] == 20
    assert one["object"] == "text_completion" and one["usage"]["prompt_tokens"] == len(ids)
    *chunks, _ = events(reply.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == one["choices"][0]["text"]


def test_logprobs(live: Any) -> None:
    greedy = {**ASK, "temperature": 0}
    with live.client() as client:
        chat = client.post(CHAT, json={**greedy, "logprobs": True, "top_logprobs": 3}).json()["choices"][0]
        text = client.post(
            "/v1/completions", json={"model": "tiny-base", "prompt": "曹操", "max_tokens": 4, "logprobs": 2, "seed": 1}
        ).json()
        streamed = events(client.post(CHAT, json={**greedy, "logprobs": True, "top_logprobs": 3, "stream": True}).text)
    content = chat["logprobs"]["content"]
    assert len(content) == 12 and all(len(one["top_logprobs"]) == 3 for one in content)
    assert b"".join(bytes(one["bytes"]) for one in content).decode("utf-8", "replace").strip() == chat["message"]["content"].strip()
    assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0 for one in content)
    told = [one for chunk in streamed[:-1] if chunk["choices"][0]["logprobs"] for one in chunk["choices"][0]["logprobs"]["content"]]
    assert told == content
    plain = text["choices"][0]["logprobs"]
    assert all(len(top) == 2 for top in plain["top_logprobs"])
    assert len(plain["tokens"]) == len(plain["token_logprobs"]) == len(plain["text_offset"]) == 4 and plain["text_offset"][0] == 0


def test_a_text_goes_on_with_its_blank_and_offsets_point_into_it(live: Any) -> None:
    ask = {"model": "tiny-base", "prompt": "曹操", "max_tokens": 6, "logprobs": 0, "temperature": 2, "top_k": 0, "n": 8}
    with live.client() as client:
        choices = [one for seed in range(0, 64, 8) for one in client.post("/v1/completions", json={**ask, "seed": seed}).json()["choices"]]
    tokens = [
        (choice, token, at) for choice in choices for token, at in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"])
    ]
    assert any(at == 0 and token.startswith(" ") for _, token, at in tokens)
    assert all(choice["text"][at:].startswith(token) for choice, token, at in tokens if not token.startswith("bytes:"))
    halves = [token for _, token, _ in tokens if token.startswith("bytes:")]
    assert halves and all(len(token) == len("bytes:\\xe4") for token in halves)


def test_what_nobody_foresaw_is_an_error_like_others(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.service.runs, "all", lambda: 1 / 0)
    with live.client() as client:
        reply = client.get("/v1/runs")
        assert client.get("/health").status_code == 200
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error" and "division" not in reply.text


def test_stop_texts_and_ids(live: Any) -> None:
    with live.client() as client:
        free = client.post(CHAT, json=ASK).json()["choices"][0]["message"]["content"]
        cut = client.post(CHAT, json={**ASK, "stop": free[4:6]}).json()["choices"][0]
        assert cut["message"]["content"] == free[: free.index(free[4:6])] and cut["finish_reason"] == "stop"
        first = live.service.engine.tokenizer.sp_model.encode("曹操")
        drawn = (
            Engine(live.service.engine.model, live.service.engine.tokenizer)
            .generate(Request(tuple(first), Settings(do_sample=False, max_new_tokens=1)))[0]
            .ids[0]
        )
        ask = {"model": "tiny-base", "prompt": first, "temperature": 0, "stop_token_ids": [drawn], "max_tokens": 5}
        ended = client.post("/v1/completions", json=ask).json()
    assert ended["choices"][0]["text"] == "" and ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 0


def test_the_tutorials_route(live: Any) -> None:
    with live.client() as client:
        reply = client.post("/", json={"prompt": "你好"}).json()
    assert set(reply) == {"response", "status", "time"} and reply["status"] == 200 and reply["response"]
    time.strptime(reply["time"], "%Y-%m-%d %H:%M:%S")


def test_models_and_adapters(live: Any, base: Path, adapters: Path) -> None:
    with live.client() as client:
        cards = client.get("/v1/models").json()
        assert cards["object"] == "list" and [card["id"] for card in cards["data"]] == ["tiny-base", "broken", "one", "two"]
        assert client.get("/v1/models/two").json()["root"] == "tiny-base"
        texts = {name: client.post(CHAT, json={**ASK, "model": name}).json()["choices"][0]["message"]["content"] for name in ("one", "two")}
        for name, folder in (("one", adapters / "one"), ("two", adapters / "two" / "adapter")):
            talker = resolve(str(folder), {"base": str(base), "temperature": 1.0, "max_new_tokens": 12, "seed": 5})
            talker.settings = replace(talker.settings, top_k=0)
            assert texts[name] == "".join(talker.conversation().say("你是谁？"))
        assert client.get("/v1/models/one").json()["loaded"] is True
        assert client.post("/v1/models/one/unload").json()["loaded"] is False
        assert client.post("/v1/models/one/load").json()["loaded"] is True
        assert client.post("/v1/models/tiny-base/unload").status_code == 400
        broken = client.post(CHAT, json={**ASK, "model": "broken"})
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "adapter_refused"
    assert str(adapters) not in broken.text and '"broken"' in broken.json()["error"]["message"]


@pytest.mark.parametrize(
    "name", ["nobody", "link", ".hidden", "../adapters_evil", "one/", "/etc/passwd", "one\0", "", "adapters", "😀", "one" * 66]
)
def test_other_names_are_404_and_say_the_same(live: Any, name: str) -> None:
    with live.client() as client:
        reply = client.post(CHAT, json={**ASK, "model": name})
    error = reply.json()["error"]
    assert reply.status_code == 404 and error["param"] == "model" and error["code"] == "model_not_found"
    assert error["message"].startswith('no model is called "') and error["message"].endswith("here (GET /v1/models lists them)")


def test_an_adapter_in_use_is_not_unloaded(live: Any) -> None:
    with (
        live.client() as client,
        client.stream("POST", CHAT, json={**ASK, "model": "two", "stream": True, "max_tokens": 64, "n": 8}) as stream,
    ):
        next(stream.iter_lines())
        with live.client() as other:
            refused = other.post("/v1/models/two/unload")
    if refused.status_code != 200:  # the answer may be over already
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "adapter_in_use"
    assert live.settled()


def test_a_replaced_adapter_serves_on_until_it_is_loaded_anew(
    start: Callable[..., Any], base: Path, adapters: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(adapters / "one", root / "mine")
    live = start(base, Serving(adapters=root))
    ask = {**ASK, "model": "mine"}
    with live.client() as client:

        def text() -> str:
            return str(client.post(CHAT, json=ask).json()["choices"][0]["message"]["content"])

        old = text()
        shutil.rmtree(root / "mine")
        shutil.copytree(adapters / "two" / "adapter", root / "mine")
        assert text() == old
        client.post("/v1/models/mine/load")
        new = text()
        assert new != old
        shutil.rmtree(root / "mine")
        assert client.post(CHAT, json=ask).status_code == 404
    live.stop()


def test_a_single_adapter_is_merged(start: Callable[..., Any], base: Path, adapters: Path) -> None:
    merged = start(adapters / "one", base=str(base))
    beside = start(adapters / "one", Serving(merge=False), base=str(base))
    with merged.client() as client, beside.client() as other:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["one"]
        assert [card["id"] for card in other.get("/v1/models").json()["data"]] == ["tiny-base", "one"]
        ask = {**ASK, "model": "one"}
        assert client.post(CHAT, json=ask).json()["choices"] == other.post(CHAT, json=ask).json()["choices"]
        assert other.post(CHAT, json=ASK).json()["choices"] != other.post(CHAT, json=ask).json()["choices"]
    merged.stop()
    beside.stop()


def test_the_queue_gives_429_at_once_and_all_that_were_taken_finish(start: Callable[..., Any], base: Path) -> None:
    live = start(base, Serving(queue=3, limits=Limits(max_tokens=512)))
    statuses: list[tuple[int, float, Any]] = []

    def one() -> None:
        with live.client() as client:
            begun = time.monotonic()
            reply = client.post(CHAT, json={**ASK, "max_tokens": 128, "n": 8})
            statuses.append((reply.status_code, time.monotonic() - begun, reply))

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    served = [reply for status, _, reply in statuses if status == 200]
    refused = [(seconds, reply) for status, seconds, reply in statuses if status == 429]
    assert len(served) >= 3 and refused and len(served) + len(refused) == 16
    assert all(len(reply.json()["choices"]) == 8 for reply in served)
    assert all(reply.headers["retry-after"] == "2" and reply.json()["error"]["code"] == "queue_full" for _, reply in refused)
    assert live.settled()
    live.stop()


def test_health_and_metrics(live: Any) -> None:
    with live.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        client.post(CHAT, json=ASK)
        page = client.get("/metrics").text
    for name in (
        "tnl_queue_waiting",
        "tnl_slots_free 8.0",
        "tnl_generated_tokens_total",
        "tnl_first_token_seconds_bucket",
        "tnl_prefix_hits_total",
    ):
        assert name in page
    assert 'tnl_requests_total{route="/v1/chat/completions",status="200"}' in page


def test_the_system_prompt_and_settings_it_was_taught_with(start: Callable[..., Any], base: Path) -> None:
    live = start(base, system="你是甄嬛。", temperature=0.0, max_new_tokens=7)
    ask = {"model": "tiny-base", "messages": [QUESTION]}
    with live.client() as client:
        own = client.post(CHAT, json=ask).json()
        given = client.post(CHAT, json={**ask, "messages": [{"role": "system", "content": "你是甄嬛。"}, QUESTION]}).json()
        other = client.post(CHAT, json={**ask, "messages": [{"role": "system", "content": "别的"}, QUESTION]}).json()
    assert own["choices"] == given["choices"] and own["usage"]["completion_tokens"] == 7
    assert other["usage"]["prompt_tokens"] != own["usage"]["prompt_tokens"]
    live.stop()


def test_many_streams_at_once_are_what_they_are_alone(live: Any) -> None:
    asks = [
        {**ASK, "model": ("tiny-base", "one", "two")[i % 3], "temperature": (0, 1.0)[i % 2], "seed": i, "max_tokens": 8 + i, "stream": True}
        for i in range(18)
    ]
    with live.client() as client:
        expected = [client.post(CHAT, json={**ask, "stream": False}).json() for ask in asks]
    found: dict[int, list[Any]] = {}

    def one(i: int) -> None:
        with live.client() as client:
            found[i] = events(client.post(CHAT, json=asks[i]).text)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, whole in enumerate(expected):
        *chunks, done = found[i]
        assert done is None and [chunk["choices"][0]["finish_reason"] for chunk in chunks].count(None) == len(chunks) - 1
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole["choices"][0]["message"]["content"]
    assert live.settled()
