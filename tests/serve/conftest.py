"""A tiny random model, two adapters of it, and servers in this process on ports of their own."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.load import load_model
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.serve.app import Service, create_app
from tnl.serve.gate import Limits
from tnl.serve.run import Server, Serving, listen, prepare

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 6,000 pieces, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=6000,
        decoder_embed_dim=32,
        hidden_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        glu_dim=48,
        linear_use_lrpe_list=[1, 0],
    )
    model = TransnormerForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, folder)
    return folder


def make_adapter(folder: Path, base: Path, seed: int, r: int = 4) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=r, target_modules=["qkvu_proj", "l3"], task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    model = get_peft_model(load_model(base, device="cpu"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapter "one", a run whose adapter is "two", a broken one, and what must not be served."""
    root = tmp_path_factory.mktemp("served") / "adapters"
    make_adapter(root / "one", base, 1)
    make_adapter(root / "two" / "adapter", base, 2, r=8)
    shutil.copytree(root / "one", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    outside = make_adapter(root.parent / "adapters_evil", base, 3)
    (root / "link").symlink_to(outside)
    shutil.copytree(root / "one", root / ".hidden")
    return root


@dataclass
class Live:
    """A running server."""

    url: str
    service: Service
    server: Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def settled(self, seconds: float = 5) -> bool:
        """Whether every slot is free again within the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = self.service.engine.load
            if load["free"] == load["slots"] and not load["waiting"] and not load["reading"]:
                return True
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        self.server.drain()
        self.thread.join(30)
        self.service.engine.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Live]]:
    """start(model, serving, **options) -> Live; all are stopped at the end."""
    started: list[Live] = []

    def begin(model: Path | str, serving: Serving | None = None, **options: Any) -> Live:
        serving = serving or Serving()
        socket = listen("127.0.0.1", 0)
        service, _ = prepare(str(model), serving, options)
        app = create_app(service, api_key=serving.api_key, local=True)
        server = Server(app, service, "127.0.0.1")
        service.engine.start()
        thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
        thread.start()
        live = Live(f"http://127.0.0.1:{socket.getsockname()[1]}", service, server, thread)
        started.append(live)
        while not server.started:
            time.sleep(0.01)
        return live

    yield begin
    for live in started:
        if live.thread.is_alive():
            live.stop()


@pytest.fixture(scope="session")
def live(start: Callable[..., Live], base: Path, adapters: Path) -> Live:
    """The base and its adapters, with small limits."""
    return start(base, Serving(adapters=adapters, limits=Limits(max_tokens=64, prompt=4096, read_seconds=3)))
