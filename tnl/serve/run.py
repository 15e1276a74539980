"""`tnl serve`: a model, and adapters beside it, behind OpenAI's API."""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import uvicorn

from tnl import hub, paths
from tnl.adapter.metadata import Metadata, tokenizer_hash
from tnl.data.template import TEMPLATES
from tnl.errors import RecipeError
from tnl.generate.adapters import Adapters
from tnl.generate.engine import STATE_WRITES, Engine
from tnl.generate.resolve import Options, choose_settings, resolve
from tnl.serve.app import Service, create_app
from tnl.serve.catalog import NAME, RULE, Catalog, Served
from tnl.serve.gate import Limits
from tnl.serve.metrics import Metrics
from tnl.serve.protocol import bounded
from tnl.serve.runs import Runs

log = logging.getLogger("tnl.serve")
SWITCH_SECONDS = 2e-4
"""How long Python's threads wait for one another. The engine's asks for the interpreter some twenty times a step, which is short on a
GPU: at the default of 5 ms the loop that writes to the clients would hold it up."""

BYTES = 16
"""Of a body for each token that a prompt may have."""


@dataclass(frozen=True)
class Serving:
    """How a server is set up, beside what it serves."""

    adapters: Path | None = None
    """A folder whose sub-folders are adapters or runs, served by their names beside the base."""
    runs: Path | None = None
    """A folder of runs that GET /v1/runs shows."""
    merge: bool = True
    """A single adapter is merged into its base; False serves both, the adapter beside the base."""
    api_key: str | None = None
    """Whoever asks must give it; None lets everybody."""
    slots: int = 8
    """Answers that run at a time."""
    state_writes: str = "auto"
    """When their states are written: auto, each-step or deferred (`Engine`)."""
    queue: int = 64
    """Requests that may wait."""
    prefix_bytes: int = 1 << 30
    """Host memory for the states of prompts' beginnings, and as much again of a GPU's."""
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Serving:
        """From options by their names, max_tokens and max_prompt for the limits; None is the default, those of `resolve` are left out.

        Raises RecipeError for a value that cannot be.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if (word := given.get("state_writes", "auto")) not in STATE_WRITES:
            raise RecipeError("--state-writes", f'"{word}" is none', f"Give one of {', '.join(STATE_WRITES)}")
        if given.get("api_key") == "":
            raise RecipeError("--api-key", "is empty", "Give a key (or set TNL_API_KEY), or leave it out to let everybody ask")
        bounds = {"max_tokens": "max_tokens", "max_prompt": "prompt"}
        limits = Limits(**{own: given[name] for name, own in bounds.items() if name in given})
        limits = replace(limits, body=max(limits.body, BYTES * limits.prompt))
        names = {one.name for one in fields(cls)} - {"limits"}
        return cls(**{name: value for name, value in given.items() if name in names}, limits=limits)


def run(model_or_run: str, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve until SIGTERM or SIGINT, then end what runs and return. options: those of `Serving.of` and of `resolve`.

    Raises RecipeError where the address is taken or an option cannot apply, what `resolve` raises, and RuntimeError where the
    engine died.
    """
    serving = Serving.of(options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    listening = listen(host, port)
    with contextlib.closing(listening):
        service, notices = prepare(model_or_run, serving, options)
        for notice in notices:
            log.info(notice)
        local = is_loopback(host)
        if not local and not serving.api_key:
            log.warning("everybody who reaches %s:%d can use this server: give it an API key", host, port)
        app = create_app(service, api_key=serving.api_key, local=local)
        server = Server(app, service, host)
        names = ", ".join(card.id for card in service.catalog.cards())
        shown_host = f"[{host}]" if ":" in host else host
        log.info("http://%s:%d/v1 serves %s", shown_host, listening.getsockname()[1], names)
        service.engine.warm()
        sys.setswitchinterval(SWITCH_SECONDS)
        # what is there now stays: the collector, which a body of many small objects wakes, need not look at it again
        gc.collect()
        gc.freeze()
        service.engine.start()
        try:
            server.run([listening])
        finally:
            service.engine.close()
    if service.engine.error is not None:
        raise RuntimeError("the engine died") from service.engine.error


def prepare(model_or_run: str, serving: Serving, options: Mapping[str, Any]) -> tuple[Service, list[str]]:
    """Load what is served. Raises what `resolve` raises."""
    for name, folder in (("--adapters", serving.adapters), ("--runs", serving.runs)):
        if folder is not None and not folder.is_dir():
            paths.existing(folder, RecipeError)
            raise RecipeError(folder, f"is no folder, as {name} needs", "Name a folder")
    wanted = Options(**{name: value for name, value in options.items() if name in Options.__annotations__})  # type: ignore[typeddict-item]
    talker = resolve(model_or_run, wanted)
    beside = talker.adapter is not None and (serving.adapters is not None or not serving.merge)
    model: Any = talker.model.unload().eval() if beside else talker.merged()
    base = served_name(model_or_run)
    served = Served(base, talker.template, talker.system, talker.settings)
    weights = hub.DEMO if model.name_or_path == "demo" else Path(model.name_or_path)
    if beside:
        base = served_name("demo" if weights == hub.DEMO else str(weights))
        # the adapter's own ways of asking are its own; the base is asked as a base
        template = TEMPLATES[wanted.get("template") or "chatml"]
        served = Served(base, template, wanted.get("system"), choose_settings(Metadata(), weights))
    bank = Adapters(model)
    engine = Engine(
        model,
        talker.tokenizer,
        adapters=bank,
        slots=serving.slots,
        state_writes=serving.state_writes,
        prefix_bytes=serving.prefix_bytes,
        queue=serving.queue,
    )
    catalog = Catalog(served, bank, root=serving.adapters, tokenizer=tokenizer_hash(weights))
    if beside and talker.adapter is not None:
        catalog.extra[served_name(model_or_run)] = talker.adapter
    return Service(engine, catalog, Runs(serving.runs), Metrics(engine), serving.limits), talker.notices


def served_name(word: str) -> str:
    """The name that clients use. Raises RecipeError where a folder's name cannot be one."""
    name = Path(word).resolve().name if paths.looks_like_path(word) and word != "demo" else word.rpartition("/")[2]
    if not NAME.fullmatch(name):
        raise RecipeError(word, "its name cannot be a model's", f"{RULE}: rename the folder")
    return name


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RecipeError where the address is taken or is none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RecipeError("--host", f"{host} is no address of this machine ({error.strerror})", "Use 127.0.0.1, or 0.0.0.0") from None
    try:
        if os.name != "nt":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise RecipeError("--port", f"{host}:{port} cannot be used ({error.strerror})", "Stop what uses it, or take another port") from None
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """uvicorn's, but a signal ends it well: nothing new is taken, what runs ends within the limit, and the exit code is 0."""

    def __init__(self, app: Any, service: Service, host: str) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                http=bounded(limits),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=round(limits.drain_seconds) + 1,
            )
        )
        self.engine, self.limits = service.engine, limits
        self.engine.on_death = self._dead

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain; a second signal does not wait."""
        if self.should_exit:
            self.force_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Take nothing new, and give what runs its time."""
        self.engine.closed = self.should_exit = True
        timer = threading.Timer(self.limits.drain_seconds, self.engine.close)
        timer.daemon = True
        timer.start()

    def _dead(self) -> None:
        """Say so on /health for a moment, then end: whoever watches the process starts another."""
        timer = threading.Timer(2.0, self.drain)
        timer.daemon = True
        timer.start()
