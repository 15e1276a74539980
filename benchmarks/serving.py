"""What HTTP and scheduling cost: 128 streams through the server against the engine alone, and the gaps between tokens.

    python benchmarks/serving.py

The server is `tnl serve`'s, in this process; the clients are another process with plain sockets. Random weights of the 7B's shapes,
greedy answers without end; states are written as `tnl serve` chooses. No figure unless the engine says in full batches what the
references say (`--no-parity` for tuning).
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from decoding import rate
from decoding_parity import Forms, texts
from parts import table
from random_model import TOKENIZER, in_memory, prompt

from tnl.data.template import TEMPLATES
from tnl.generate.adapters import Adapters
from tnl.generate.engine import Engine
from tnl.model.tokenization_baichuan import BaiChuanTokenizer
from tnl.serve.app import Service, create_app
from tnl.serve.catalog import Catalog, Served
from tnl.serve.gate import Limits
from tnl.serve.metrics import Metrics
from tnl.serve.run import SWITCH_SECONDS, Server, listen
from tnl.serve.runs import Runs

MOST = 1_000_000
"""Tokens an answer may have: more than are drawn here."""


async def stream(port: int, seed: int, until: float, times: list[float]) -> None:
    """One client: notes when each piece of its answer comes."""
    body = {"model": "bench", "prompt": list(prompt(16, seed)), "max_tokens": MOST, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(status.decode() + (await reader.read(500)).decode())
    while time.time() < until:
        part = await asyncio.wait_for(reader.read(1 << 16), 60)
        if not part:
            raise RuntimeError("the answer ended early")
        times += [time.time()] * part.count(b"data: ")
    writer.close()


def clients(port: int, streams: int, seconds: float, queue: Any) -> None:
    """All clients, in a process of their own; puts every stream's times into the queue."""

    async def all_of_them() -> list[list[float]]:
        times: list[list[float]] = [[] for _ in range(streams)]
        until = time.time() + seconds
        await asyncio.gather(*(stream(port, seed, until, one) for seed, one in enumerate(times)))
        return times

    try:
        queue.put(asyncio.run(all_of_them()))
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def served(engine: Engine, streams: int, seconds: float) -> tuple[float, list[list[float]], tuple[float, float]]:
    """Tokens a second that the engine drew while the server ran, the times at the clients, and the window they count in."""
    catalog = Catalog(Served("bench", TEMPLATES["chatml"]), engine.adapters)
    limits = Limits(max_tokens=MOST)
    service = Service(engine, catalog, Runs(None), Metrics(engine), limits)
    listening = listen("127.0.0.1", 0)
    server = Server(create_app(service, local=True), service, "127.0.0.1")
    sys.setswitchinterval(SWITCH_SECONDS)  # as `tnl serve` does
    engine.start()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    client = context.Process(target=clients, args=(listening.getsockname()[1], streams, seconds, queue))
    client.start()
    give_up = time.time() + 120
    while engine.load["running"] < streams:
        time.sleep(0.05)
        if time.time() > give_up or not client.is_alive():
            raise RuntimeError(f"only {engine.load} came: {queue.get(timeout=5)}")
    time.sleep(1)
    steps, begin = engine.counts.steps, time.time()
    while client.is_alive() and time.time() < begin + seconds / 2 and engine.load["running"] == streams:
        time.sleep(0.01)
    drawn, end = (engine.counts.steps - steps) * streams, time.time()
    times = queue.get(timeout=seconds + 60)
    client.join()
    server.should_exit = True
    engine.close()
    if isinstance(times, str):
        raise RuntimeError(times)
    return drawn / (end - begin), times, (begin, end)


GOALS = {"lost to HTTP and scheduling, 128 streams": (0.05, True)}
"""Issue 6's, for one H100."""


def alone(engine: Engine, options: argparse.Namespace, say: Callable[..., None]) -> None:
    """The engine without a server."""
    through, graph = rate(engine, options.streams, 3.0)
    print(f"engine alone {through:.0f} tok/s (graph {graph:.0f})")
    say(engine=through, graph=graph)


def through_the_server(engine: Engine, options: argparse.Namespace, say: Callable[..., None]) -> None:
    """The same through HTTP, and what clients see of it."""
    through, times, (begin, end) = served(engine, options.streams, options.seconds)
    print(f"served {through:.0f} tok/s")
    gaps = sorted(b - a for one in times for a, b in pairwise(one) if begin <= a and b <= end)
    heard = sum(begin <= one <= end for stream in times for one in stream) / (end - begin)
    p99 = gaps[int(len(gaps) * 0.99)] * 1e3
    print(f"clients heard {heard:.0f} pieces a second (a character of several bytes is one piece)")
    print(f"gap between a stream's pieces: median {statistics.median(gaps) * 1e3:.1f} ms, p99 {p99:.1f} ms, worst {gaps[-1] * 1e3:.1f} ms")
    say(served=through, heard=heard, p99_ms=p99)


PARTS = {"alone": alone, "served": through_the_server}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="a size of random_model.py")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="what is lost needs both")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20, help="how long the clients listen, their coming included")
    parser.add_argument("--no-parity", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures, written as they come")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, {options.streams} streams")
    tokenizer = BaiChuanTokenizer.from_pretrained(TOKENIZER)
    if not options.no_parity:
        print("is what the engine says in full batches what the references say?")
        complaints = Forms(options.model, device, tokenizer).slots((options.streams,), "auto", 60) + texts(device)
        if complaints:
            print("PARITY FAILS; no figure is printed:", *complaints, sep="\n  ")
            return 1
    gc.collect()  # graphs and engines of the parity check, which hold one another
    print(f"random weights of the {options.model}, an engine of {options.streams} slots")
    model = in_memory(options.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    engine = Engine(model, tokenizer, adapters=Adapters(model), slots=options.streams, prefix_bytes=0, queue=2 * options.streams)
    engine.warm()
    figures: dict[str, float] = {}

    def say(**found: float) -> None:
        figures.update(found)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")

    for name in sorted(options.only):  # the server ends the engine
        PARTS[name](engine, options, say)
    if {"engine", "served"} <= figures.keys():
        say(lost=1 - figures["served"] / figures["engine"])
        print(f"lost {figures['lost']:.1%}")
        if options.streams == 128:
            print(table({next(iter(GOALS)): figures["lost"]}, GOALS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
