"""The clients that people have: openai (sync, async, streams), LangChain, curl."""

import asyncio
import json
import subprocess
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

MESSAGES: list[Any] = [{"role": "system", "content": "你是甄嬛。"}, {"role": "user", "content": "你是谁？"}]


@pytest.fixture
def client(live: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_a_reply_goes_back_as_it_came(client: openai.OpenAI) -> None:
    """As everybody writes it: the message of the reply is the next request's."""
    whole = client.chat.completions.create(model="one", messages=MESSAGES, max_tokens=4)
    message = whole.choices[0].message
    for back in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        again = client.chat.completions.create(model="one", messages=[*MESSAGES, back, MESSAGES[1]], max_tokens=4)  # type: ignore[list-item]
        assert again.usage is not None and whole.usage is not None and again.usage.prompt_tokens > whole.usage.prompt_tokens


def test_openai(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-base", "broken", "one", "two"]
    assert client.models.retrieve("one").id == "one"
    whole = client.chat.completions.create(model="one", messages=MESSAGES, max_tokens=10, temperature=1, seed=3, n=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"] and whole.choices[0].message.role == "assistant"
    assert whole.usage is not None and whole.usage.completion_tokens == 20
    stream = client.chat.completions.create(
        model="one", messages=MESSAGES, max_completion_tokens=10, temperature=1, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 10
    more = client.chat.completions.create(
        model="one", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, extra_body={"top_k": 5, "repetition_penalty": 1.1}
    )
    told = more.choices[0].logprobs
    assert told is not None and told.content is not None and [len(one.top_logprobs) for one in told.content] == [2] * 4
    plain = client.completions.create(model="tiny-base", prompt="曹操", max_tokens=5, stop=["。"], presence_penalty=0.5, top_p=0.9)
    assert plain.choices[0].finish_reason in ("length", "stop")


def test_openai_asynchronous(live: Any) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="two", messages=MESSAGES, max_tokens=8, seed=seed, temperature=1, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(one(seed % 5) for seed in range(10))))

    texts = asyncio.run(talk())
    assert texts[:5] == texts[5:] and len(set(texts)) == 5


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model="one", messages=MESSAGES, temperature=3)
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="one", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])


def test_leaving_a_stream_early_frees_the_slot(live: Any, client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="one", messages=MESSAGES, max_tokens=64, n=8, stream=True) as stream:
        next(iter(stream))
    assert live.settled(1)


def test_langchain(live: Any) -> None:
    model = ChatOpenAI(base_url=f"{live.url}/v1", api_key="none", model="two", temperature=1, seed=4, max_tokens=9)  # type: ignore[arg-type,call-arg]
    messages = [SystemMessage("你是甄嬛。"), HumanMessage("你是谁？")]
    answer = model.invoke(messages)
    assert isinstance(answer.content, str) and answer.content and answer.usage_metadata["output_tokens"] == 9  # type: ignore[attr-defined]
    assert "".join(str(chunk.content) for chunk in model.stream(messages)) == answer.content
    assert asyncio.run(model.ainvoke(messages)).content == answer.content
    assert [one.content for one in model.batch([messages, messages])] == [answer.content] * 2


def test_curl(live: Any) -> None:
    def curl(*arguments: str) -> str:
        return subprocess.run(["curl", "-sS", *arguments], capture_output=True, check=True, timeout=60).stdout.decode("utf-8")

    ask = json.dumps({"model": "tiny-base", "messages": MESSAGES, "max_tokens": 5, "stream": True})
    assert json.loads(curl(f"{live.url}/health")) == {"status": "ok"}
    stream = curl("-N", f"{live.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", ask)
    assert stream.startswith("data: {") and stream.endswith("data: [DONE]\n\n")
    plain = curl("-X", "POST", live.url, "-H", "Content-Type: application/json", "-d", '{"prompt": "你好"}')
    assert json.loads(plain)["status"] == 200
