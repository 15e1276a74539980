"""Tokens a second of the engine: decoding, prompts, first tokens, prefixes, adapters; parity first, and no figure without it.

    python benchmarks/decoding.py                    the 7B, all parts
    python benchmarks/decoding.py --only slots       some of: slots adapters prefill first
    python benchmarks/decoding.py --search           times the blocks of tnl/kernels/skinny_linear.py against cuBLAS
    python benchmarks/decoding.py --overlap          kernels begin while the one before ends (Hopper)

Random weights of the real shapes, made on the device. "engine" is what a client of `Engine` gets, "graph" one CUDA graph replayed.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_model import PIECES, TOKENIZER, in_memory
from search_products import search
from torch import Tensor

from tnl.generate.adapters import LAYER, Adapters
from tnl.generate.engine import Engine
from tnl.generate.request import Request, Ticket
from tnl.generate.sampling import Settings
from tnl.generate.slots import forward, head
from tnl.kernels import draw, skinny_linear
from tnl.model.layer import Rows
from tnl.model.load import load_model, load_tokenizer
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

SLOTS = (1, 8, 32, 64, 128, 256)
LENGTHS = (2048, 8192, 32768, 131072, 1 << 20)
GOALS = {1: 180, 32: 4600, 128: 10500, 256: 13500}
COPY = 3.0e12
"""Bytes a second that an H100 copies (docs/performance.md)."""
Say = Callable[[str, Any], None]


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Random ids, no two prompts alike."""
    return tuple(torch.randint(3, PIECES, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def greedy(tokens: int) -> Settings:
    return Settings(do_sample=False, max_new_tokens=tokens)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- parity


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def decoded(engine: Engine, ids: Tensor) -> Tensor:
    """Logits [size, V] after the engine's own step has read ids [size, T] one by one, whatever it would have drawn."""
    steps: Any = engine.steps
    size = len(ids)
    for _ in range(size):
        engine.slots.take()
    with torch.inference_mode():
        key = steps._step(size, False)
        steps.control.zero_()
        steps.control[:size, draw.LIVE] = 1
        for t in range(ids.shape[1]):
            engine.slots.ids[:size, 0] = ids[:, t]
            logits = steps.graphs.run(key)
    logits = logits.float().clone()
    for slot in range(size):
        engine.slots.release(slot)
    return logits


@torch.inference_mode()
def at_once(model: Any, ids: Tensor, cut: int = 4096) -> Tensor:
    """Logits [B, V] after ids [B, T], read by the model's own forms."""
    states: list[Tensor | None] = [None] * model.config.decoder_layers
    for start in range(0, ids.shape[1], cut):
        part = ids[:, start : start + cut]
        positions = torch.arange(start, start + part.shape[1], device=ids.device).expand(len(ids), -1)
        hidden, after = forward(model, part, states, Rows(positions))
        states = list(after)
    return head(model, hidden[:, -1])


def parity(size: str, device: str, tokenizer: Any) -> list[str]:
    """What disagrees with the float32 and float64 references; prints what it has measured."""
    complaints = []

    def hold(name: str, value: float, bound: float) -> None:
        print(f"  {name}: {value:.1e}, at most {bound:.0e}", flush=True)
        if not value <= bound:
            complaints.append(f"{name}: {value:.1e}")

    model = in_memory(size, device, torch.bfloat16, layers=3)
    exact = in_memory(size, device, torch.float32, layers=3, backend="reference")
    plain = in_memory(size, device, torch.bfloat16, layers=3, backend="reference")
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    plain.load_state_dict(model.state_dict())
    V = model.config.vocab_size
    engine = Engine(model, tokenizer, slots=256, prefix_bytes=0)
    for slots in (1, 2, 16, 32, 64, 256):
        ids = torch.randint(3, V, (slots, 12), device=device)
        expected = at_once(exact, ids)
        drift = error(at_once(plain, ids), expected)
        hold(f"logits of {slots} slots after 12 tokens (bfloat16 reference form: {drift:.1e})", error(decoded(engine, ids), expected), 3e-2)
    for length in (5, 200, 2048, 5000):
        ids = torch.randint(3, V, (1, length), device=device)
        steps = engine.steps
        states = steps.begin(None, None)
        with torch.inference_mode():
            for start in range(0, length, engine.chunk):
                logits, states = steps.read(ids[0, start : start + engine.chunk].tolist(), states, start, 0)
        hold(f"logits after a prompt of {length}", error(logits.float(), at_once(exact, ids)), 3e-2)
    complaints += far(device)
    complaints += texts(device)
    return complaints


def far(device: str, tokens: int = 32768) -> list[str]:
    """32k tokens decoded one by one against one float64 pass of the bundled demo model."""
    exact, complaints = load_model("demo", device=device, dtype="float64", backend="reference"), []
    ids = torch.randint(3, exact.config.vocab_size, (1, tokens), device=device)
    expected = at_once(exact, ids)
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 5e-2)):
        model = load_model("demo", device=device, dtype=dtype)
        found = error(decoded(Engine(model, load_tokenizer("demo"), slots=8, prefix_bytes=0), ids), expected)
        print(f"  logits after {tokens} decoded tokens, {dtype}: {found:.1e}, at most {bound:.0e}", flush=True)
        if not found <= bound:
            complaints.append(f"{tokens} tokens in {dtype}: {found:.1e}")
    return complaints


def texts(device: str) -> list[str]:
    """What the demo model says in full batches, against the float32 reference on the CPU."""
    tokenizer = load_tokenizer("demo")
    ours = Engine(load_model("demo", device=device, dtype="float32"), tokenizer, slots=16)
    theirs = Engine(load_model("demo", device="cpu", dtype="float32"), tokenizer, slots=16)
    requests = [Request(prompt(3 + 17 * i, i), greedy(24)) for i in range(16)]
    requests += [Request(prompt(40, i), Settings(max_new_tokens=24, temperature=0.8, top_p=0.9, top_k=50), seed=i) for i in range(8)]
    found, expected = (all_of(engine, requests) for engine in (ours, theirs))
    alike = sum(mine.answers[0].ids == other.answers[0].ids for mine, other in zip(found, expected))
    print(f"  texts equal to the reference's: {alike} of {len(requests)}", flush=True)
    # two best tokens closer than float32's rounding may change places
    return [] if alike >= len(requests) - 1 else [f"{len(requests) - alike} texts differ from the reference's"]


def all_of(engine: Engine, requests: list[Request]) -> list[Ticket]:
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return tickets


# ---------------------------------------------------------------- figures


def weight_bytes(model: Any) -> int:
    """Bytes of what a token multiplies by: every matrix once, the tied head once."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 2)


def rate(engine: Engine, slots: int, seconds: float = 1.2, *, adapters: list[str] | None = None, position: int = 0) -> tuple[float, float]:
    """Tokens a second of `slots` answers: through the engine, and of its graph alone."""
    names: list[str | None] = list(adapters) if adapters else [None]
    tickets = [engine.submit(Request(prompt(8, i), greedy(10**6), adapter=names[i % len(names)])) for i in range(slots)]
    while engine.load["running"] < slots:
        if not engine.step():
            raise RuntimeError(f"answers ended early: {[ticket.answers[0].error for ticket in tickets]}")
    if position:
        engine.slots.seen.fill_(position)
    for _ in range(4):
        engine.step()
    synchronize()
    start = time.perf_counter()
    engine.step()
    synchronize()
    count = max(10, int(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        engine.step()
    synchronize()
    through = slots * count / (time.perf_counter() - start)
    steps: Any = engine.steps
    with torch.inference_mode():
        key = steps._step(engine.slots.bucket(), adapters is not None)
        start = time.perf_counter()
        for _ in range(count):
            steps.graphs.run(key)
        synchronize()
    alone = slots * count / (time.perf_counter() - start)
    assert all(not ticket.answers[0].error for ticket in tickets)
    for ticket in tickets:
        ticket.cancel()
    while engine.step():
        pass
    return through, alone


def decoding(engine: Engine, slots: tuple[int, ...], say: Say) -> None:
    weights, state = weight_bytes(engine.model), engine.slots.num_bytes / len(engine.slots)
    print(f"\n{weights / 1e9:.2f} GB of weights, {state / 1e6:.1f} MB of state a slot\n")
    print("| slots | engine tok/s | graph tok/s | goal | byte limit | share |\n|---|---|---|---|---|---|")
    for count in slots:
        through, alone = rate(engine, count)
        limit = count / ((weights + 2 * state * count) / COPY)
        print(f"| {count} | {through:.0f} | {alone:.0f} | {GOALS.get(count, '')} | {limit:.0f} | {through / limit:.0%} |", flush=True)
        say(f"decode {count}", (through, alone))
    if 1 in slots:
        through, alone = rate(engine, 1, position=10**6)
        print(f"| 1, at position 1,000,000 | {through:.0f} | {alone:.0f} | 180, within 1% | | |", flush=True)
        say("decode 1 far", (through, alone))


def adapters(engine: Engine, say: Say) -> None:
    """One adapter on one slot, and eight mixed in 64 slots, rank 8 on every projection."""
    bank: Adapters = engine.adapters
    model = engine.model
    keys = []
    for seed in range(8):
        generator = torch.Generator("cpu").manual_seed(seed)
        matrices = {}
        for layer in range(model.config.decoder_layers):
            for name, part in LAYER.items():
                module = f"model.layers.{layer}.{part}.{name}"
                N, K = model.get_submodule(module).weight.shape
                matrices[module] = tuple(torch.randn(shape, generator=generator) * 0.01 for shape in ((8, K), (N, 8)))
        keys.append(bank.add(matrices))  # type: ignore[arg-type]
    merged = rate(engine, 64)[0]
    one, one_alone = rate(engine, 1, adapters=keys[:1])
    mixed, mixed_alone = rate(engine, 64, adapters=keys)
    print(f"\none adapter, unmerged, batch 1: {one:.0f} tok/s (graph {one_alone:.0f}); goal 170")
    print(
        f"8 adapters in 64 slots: {mixed:.0f} tok/s (graph {mixed_alone:.0f}), {mixed / merged:.0%} of one merged ({merged:.0f}); goal 85%"
    )
    say("adapters", {"batch 1": (one, one_alone), "8 in 64": (mixed, mixed_alone), "merged 64": merged})


def prefill(engine: Engine, lengths: tuple[int, ...], say: Say) -> None:
    print("\n| prompt | tok/s | goal |\n|---|---|---|")
    steps = engine.steps
    for length in lengths:
        ids = prompt(length, length)
        times = []
        for _ in range(3 if length < 100_000 else 1):
            states = steps.begin(None, None)
            synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                for at in range(0, length, engine.chunk):
                    logits, states = steps.read(ids[at : at + engine.chunk], states, at, 0)
            synchronize()
            times.append(time.perf_counter() - start)
            assert bool(logits.isfinite().all())
        print(f"| {length} | {length / min(times):.0f} | 39,500 |", flush=True)
        say(f"prefill {length}", length / min(times))


def first(engine: Engine, say: Say) -> None:
    """Time from submitting to the first token on the host."""

    def waited(ids: tuple[int, ...]) -> float:
        ticket = engine.submit(Request(ids, greedy(2)))
        while not ticket.done.is_set():
            engine.step()
        assert ticket.started is not None
        return (ticket.started - ticket.submitted) * 1e3

    plain = [waited(prompt(200, 1000 + i)) for i in range(12)][2:]
    long = prompt(65536, 5)
    engine.prefixes.budget = 1 << 30
    all_of(engine, [Request(long, greedy(1))])
    hits = engine.prefixes.hits
    found = [waited((*long, *prompt(20, 2000 + i))) for i in range(8)][2:]
    assert engine.prefixes.hits == hits + 8
    engine.prefixes.budget = 0
    for name, times, goal in (("a 200-token prompt", plain, 15), ("20 tokens after a cached prefix of 65,536", found, 10)):
        print(f"first token of {name}: {statistics.median(times):.1f} ms, worst {max(times):.1f}; goal {goal}", flush=True)
        say(f"first token, {name}", (statistics.median(times), max(times)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="a size of random_model.py")
    parser.add_argument("--only", nargs="+", default=["slots", "adapters", "prefill", "first"])
    parser.add_argument("--slots", nargs="+", type=int, default=list(SLOTS))
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="the longest prompt")
    parser.add_argument("--search", action="store_true", help="time the products' blocks, and nothing else")
    parser.add_argument("--overlap", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--no-parity", action="store_true", help="figures only, for tuning: they are not to be published")
    parser.add_argument("--out", type=Path, help="a JSON file for every figure")
    options = parser.parse_args()
    log: dict[str, Any] = {}
    begin = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    skinny_linear.overlap = options.overlap
    if options.search:
        search(log)
    else:
        tokenizer = BaiChuanTokenizer.from_pretrained(TOKENIZER)
        if not options.no_parity and (complaints := parity(options.model, device, tokenizer)):
            print("PARITY FAILS; no figure is printed:", *complaints, sep="\n  ")
            return 1
        gc.collect()  # graphs and engines of the parity check, which hold one another
        print(f"parity took {time.time() - begin:.0f} s", flush=True)
        model = in_memory(options.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
        engine = Engine(model, tokenizer, slots=max(options.slots), prefix_bytes=0, queue=1024)
        engine.warm()
        print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, {model.backend}")
        print(f"ready after {time.time() - begin:.0f} s", flush=True)
        parts: dict[str, Callable[[], None]] = {
            "slots": lambda: decoding(engine, tuple(options.slots), log.__setitem__),
            "adapters": lambda: adapters(engine, log.__setitem__),
            "prefill": lambda: prefill(engine, tuple(n for n in LENGTHS if n <= options.longest), log.__setitem__),
            "first": lambda: first(engine, log.__setitem__),
        }
        for name in options.only:
            parts[name]()
    print(f"{time.time() - begin:.0f} s in all")
    if options.out:
        options.out.write_text(json.dumps(log, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
