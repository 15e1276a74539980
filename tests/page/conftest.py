"""The demo base and an adapter of it in a run's folder, served by this process; and the page in Debian's Chromium."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tnl import hub
from tnl.adapter.metadata import describe, write_metadata
from tnl.data.template import TEMPLATES
from tnl.model.load import load_model
from tnl.serve.app import Service, create_app
from tnl.serve.run import Server, Serving, listen, prepare

LONG = 2000
"""Tokens of an answer of the adapter, unless others are asked for."""
SYSTEM = "你是茶馆里的说书人。"
PICTURE = '![x](http://192.0.2.1/x.png) <img src="http://192.0.2.1/y.png"> <script>fetch("http://192.0.2.1/z")</script>'
"""What a model may say; 192.0.2.1 is nobody's address."""


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder: "teahouse" with an adapter, metrics and samples, and "new_run" with none of them yet.

    The adapter's answers are long: see `Live`.
    """
    root = tmp_path_factory.mktemp("page") / "output"
    torch.manual_seed(0)
    model: Any = load_model(hub.DEMO, device="cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["out_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    folder = root / "teahouse" / "adapter"
    model.save_pretrained(str(folder))
    generation = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": LONG}
    write_metadata(folder, describe(folder, "demo", template=TEMPLATES["chatml"], system=SYSTEM, generation=generation))
    metrics: list[dict[str, Any]] = [{"step": step, "loss": 4 - step / 20, "tokens_per_second": 3000.0} for step in range(10, 60, 10)]
    metrics.append({"step": 50, "eval_loss": 2.25})
    sample = {"question": "你是谁？", "expected": PICTURE, "before": "<b>**粗**</b>", "after": "在下小明。"}
    run = root / "teahouse"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    (run / "run.json").write_text('{"status": "finished"}', encoding="utf-8")
    (root / "new_run").mkdir()
    (root / "new_run" / "run.json").write_text('{"status": "unfinished"}', encoding="utf-8")
    return root


class Live:
    """A server in this process. What may be long goes on to its last token, so that tests can stop it."""

    def __init__(self, model: str, serving: Serving) -> None:
        listening = listen("127.0.0.1", 0)
        self.service: Service = prepare(model, serving, {"device": "cpu"})[0]
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = Server(create_app(self.service, api_key=serving.api_key, local=True), self.service, "127.0.0.1")
        engine = self.service.engine
        submit = engine.submit

        def endless(request: Any, deliver: Any) -> Any:
            return submit(replace(request, stop_ids=(), stop=()) if request.settings.max_new_tokens == LONG else request, deliver)

        engine.submit = endless  # type: ignore[method-assign]
        engine.start()
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def settled(self, seconds: float = 10) -> bool:
        """Whether every slot is free again within the time."""
        return within(seconds, lambda: self.service.engine.load["free"] == self.service.engine.load["slots"])

    def stop(self) -> None:
        self.server.drain()
        self.service.engine.close()
        self.thread.join(30)


@pytest.fixture(scope="session")
def live(output: Path) -> Iterator[Live]:
    """The demo base with the adapter beside it, and the runs folder."""
    found = Live(str(output / "teahouse"), Serving(runs=output, merge=False, api_key="the-key"))
    yield found
    found.stop()


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
