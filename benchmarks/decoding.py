"""Tokens a second of the engine: decoding, prompts, first tokens, prefixes, adapters; parity first, and no figure without it.

    python benchmarks/decoding.py                    the 7B, all parts
    python benchmarks/decoding.py --only deferred    some of: slots deferred first adapters prefill
    python benchmarks/decoding.py --search           times the blocks of tnl/kernels/skinny_linear.py against cuBLAS
    python benchmarks/decoding.py --overlap          kernels begin while the one before ends (Hopper)

Random weights of the real shapes, made on the device. "engine" is what a client of `Engine` gets, "graph" one CUDA graph replayed.
A part whose parity fails, or that fails itself, costs its own figures alone (`parts.py`).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import parts
import torch
from compile_ahead import ahead
from decoding_parity import Forms, all_of, far, greedy, output_error, texts
from random_model import TOKENIZER, in_memory, prompt, random_adapter
from search_products import search

from tnl.generate.adapters import Adapters
from tnl.generate.engine import Engine
from tnl.generate.request import Request
from tnl.kernels import skinny_linear
from tnl.kernels.deferred import EVERY
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

SLOTS = (1, 8, 32, 64, 128, 256)
LENGTHS = (2048, 8192, 32768, 131072, 1 << 20)
CHECKED = (1, 2, 16, 32, 64, 256)
GOALS = {  # figure -> goal, whether less is better
    "decode 1": (180, False),
    "decode 1, far": (180, False),
    "decode 1, far against near": (0.01, True),
    "decode 1, unmerged adapter": (170, False),
    "decode 32": (4600, False),
    "decode 128": (10500, False),
    "decode 256": (13500, False),
    "decode 32, deferred": (5200, False),
    "decode 256, deferred": (15000, False),
    "output error of deferred writes": (0.003, True),
    **{f"prefill {length}": (39500, False) for length in LENGTHS},
    "first token of a 200-token prompt, ms": (15, True),
    "first token after a cached prefix of 65,536, ms": (10, True),
    "8 adapters in 64 slots, share of one merged": (0.85, False),
}
"""Issue 6's, for one H100."""
COPY = 3.0e12
"""Bytes a second that an H100 copies (docs/performance.md)."""
Say = Callable[[str, Any], None]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def weight_bytes(model: Any) -> int:
    """Bytes of what a token multiplies by: every matrix once, the tied head once."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 2)


def begun(engine: Engine, slots: int, adapters: list[str | None]) -> Callable[[], None]:
    """Let `slots` answers run that do not end; returns what ends them. Up to 8 share a prompt, so that all are soon there."""
    each = min(8, slots)
    tickets = []
    for i, first in enumerate(range(0, slots, each)):
        request = Request(prompt(8, i), greedy(10**6), n=min(each, slots - first), adapter=adapters[i % len(adapters)])
        tickets.append(engine.submit(request))
    while engine.load["running"] < slots:
        if not engine.step():
            raise RuntimeError(f"answers ended early: {[ticket.answers[0].error for ticket in tickets]}")

    def end() -> None:
        wrong = [answer.error for ticket in tickets for answer in ticket.answers if answer.error]
        for ticket in tickets:
            ticket.cancel()
        while engine.step():
            pass
        if wrong:
            raise RuntimeError(f"answers failed: {wrong[:3]}")

    return end


def rate(engine: Engine, slots: int, seconds: float = 1.0, *, adapters: list[str] | None = None, position: int = 0) -> tuple[float, float]:
    """Tokens a second of `slots` answers: through the engine, and of its graph alone."""
    end = begun(engine, slots, list(adapters) if adapters else [None])
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
    end()
    return through, alone


class Bench:
    """The parts, and what they share, made when the first of them asks."""

    def __init__(self, options: argparse.Namespace, say: Say) -> None:
        self.size, self.check, self.counts, self.longest = options.model, not options.no_parity, tuple(options.slots), options.longest
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.say = say
        self._engine: tuple[str, Engine] | None = None
        self.tokenizer = BaiChuanTokenizer.from_pretrained(TOKENIZER)

    @cached_property
    def forms(self) -> Forms:
        return Forms(self.size, self.device, self.tokenizer)

    @cached_property
    def model(self) -> Any:
        return in_memory(self.size, self.device, torch.bfloat16 if self.device == "cuda" else torch.float32, backend="triton")

    def engine(self, writes: str | None = None) -> Engine:
        """All slots, without prefixes; the last one is kept, and is as good as any where nothing is asked of its writes."""
        if self._engine is not None and writes in (None, self._engine[0]):
            return self._engine[1]
        self._engine, writes = None, writes or "each-step"
        gc.collect()  # engines and graphs hold one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        engine = Engine(self.model, self.tokenizer, slots=max(self.counts), prefix_bytes=0, queue=1024, state_writes=writes)
        self._engine = writes, engine
        begin = time.monotonic()
        engine.warm()
        print(f"every graph is there after {time.monotonic() - begin:.0f} s", flush=True)
        return engine

    def hold(self, *checks: Callable[[], list[str]]) -> None:
        """Raise where anything disagrees with the references."""
        complaints = [complaint for check in checks if self.check for complaint in check()]
        gc.collect()
        if complaints:
            raise RuntimeError("PARITY FAILS, no figure of this part: " + "; ".join(complaints))

    # ---------------------------------------------------------------- parts

    def slots(self) -> None:
        """Decoding at several numbers of slots, and far into a text."""
        self.hold(lambda: self.forms.slots(self.checked), lambda: far(self.device), lambda: texts(self.device))
        engine = self.engine("each-step")
        weights, state = weight_bytes(self.model), engine.slots.num_bytes / len(engine.slots)
        print(f"{weights / 1e9:.2f} GB of weights, {state / 1e6:.1f} MB of state a slot\n")
        self.rates(engine, self.counts, weights, 2 * state)
        near, _ = rate(engine, 1)
        distant, _ = rate(engine, 1, position=10**6)
        print(f"at position 1,000,000: {distant:.1f} tok/s, near the beginning {near:.1f}", flush=True)
        self.say("decode 1, far", distant)
        self.say("decode 1, far against near", abs(distant / near - 1))

    def deferred(self) -> None:
        """The same with states that are written every 24th token."""
        outputs: list[float] = []
        self.hold(
            lambda: self.forms.slots(self.checked, "deferred", 60),
            lambda: far(self.device, "deferred"),
            lambda: texts(self.device, "deferred"),
            lambda: output_error(self.device, outputs),
        )
        if outputs:
            self.say("output error of deferred writes", max(outputs))
        engine = self.engine("deferred")
        state = 2 * sum(one.nbytes for one in engine.slots.states) / len(engine.slots)
        print(f"{engine.slots.num_bytes / len(engine.slots) / 1e6:.1f} MB a slot\n")
        # a copy of half the bytes is read; 23 tokens wait, 12 on the average; every 24th reads and writes the state, and writes the copy
        tokens = 2 * sum(one.nbytes for layer in engine.slots.deferred for one in (layer.k, layer.v)) / len(engine.slots) / (2 * EVERY)
        self.rates(
            engine,
            tuple(n for n in self.counts if n >= 32) or self.counts,
            weight_bytes(self.model),
            state / 4 + tokens * 12 + state * 1.25 / EVERY,
            ", deferred",
        )

    @property
    def checked(self) -> tuple[int, ...]:
        """Numbers of slots that are held against the references."""
        return tuple(count for count in CHECKED if count <= max(self.counts))

    def rates(self, engine: Engine, counts: tuple[int, ...], weights: float, traffic: float, name: str = "") -> None:
        """Print and keep the speed at so many slots; traffic: bytes that a slot's step reads and writes."""
        print("| slots | engine tok/s | graph tok/s | byte limit | share |\n|---|---|---|---|---|")
        for count in counts:
            through, alone = rate(engine, count)
            limit = count / ((weights + traffic * count) / COPY)
            print(f"| {count} | {through:.0f} | {alone:.0f} | {limit:.0f} | {through / limit:.0%} |", flush=True)
            self.say(f"decode {count}{name}", through)
            self.say(f"decode {count}{name}, graph", alone)

    def first(self) -> None:
        """Time from submitting to the first token on the host."""
        self.hold(lambda: self.forms.prompts((5, 200)))
        engine = self.engine()

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
        for name, times in (("of a 200-token prompt", plain), ("after a cached prefix of 65,536", found)):
            print(f"first token {name}: {statistics.median(times):.1f} ms, worst {max(times):.1f}", flush=True)
            self.say(f"first token {name}, ms", statistics.median(times))

    def adapters(self) -> None:
        """One adapter on one slot, and eight mixed in 64 slots, rank 8 on every projection."""
        self.hold(lambda: self.forms.adapters((1, 16, 64)))
        engine = self.engine("each-step")
        bank: Adapters = engine.adapters
        keys = [bank.add(random_adapter(self.model, seed)) for seed in range(8)]
        merged = rate(engine, 64)[0]
        one, one_alone = rate(engine, 1, adapters=keys[:1])
        mixed, mixed_alone = rate(engine, 64, adapters=keys)
        print(f"one adapter, unmerged, batch 1: {one:.0f} tok/s (graph {one_alone:.0f})")
        print(f"8 adapters in 64 slots: {mixed:.0f} tok/s (graph {mixed_alone:.0f}), {mixed / merged:.0%} of one merged ({merged:.0f})")
        self.say("decode 1, unmerged adapter", one)
        self.say("8 adapters in 64 slots", mixed)
        self.say("8 adapters in 64 slots, share of one merged", mixed / merged)

    def prefill(self) -> None:
        """Prompts, read by chunks."""
        self.hold(lambda: self.forms.prompts((5, 200, 2048, 5000)))
        engine = self.engine()
        steps, chunk = engine.steps, engine.chunk
        for length in [length for length in LENGTHS if length <= self.longest]:
            ids, times = prompt(length, length), []
            for _ in range(3 if length < 100_000 else 1):
                states = steps.begin(None, None)
                synchronize()
                start = time.perf_counter()
                with torch.inference_mode():
                    for at in range(0, length, chunk):
                        logits, states = steps.read(ids[at : at + chunk], states, at, 0)
                synchronize()
                times.append(time.perf_counter() - start)
                assert bool(logits.isfinite().all())
            print(f"prompt of {length}: {length / min(times):.0f} tok/s", flush=True)
            self.say(f"prefill {length}", length / min(times))


PARTS = ("slots", "first", "adapters", "deferred", "prefill")


def child(options: argparse.Namespace) -> int:
    """Run parts in this process; 3 where the card is in error."""
    skinny_linear.overlap = options.overlap
    log = parts.read(options.out)

    def say(name: str, value: Any) -> None:
        log["figures"][name] = value
        parts.write(options.out, log)

    bench = Bench(options, say)
    card = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    log["machine"] = f"{card}, torch {torch.__version__}"
    return 0 if parts.run({name: getattr(bench, name) for name in options.only}, log, options.out) else 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="a size of random_model.py")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--slots", nargs="+", type=int, default=list(SLOTS))
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="the longest prompt")
    parser.add_argument("--search", action="store_true", help="time the products' blocks, and nothing else")
    parser.add_argument("--overlap", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--no-parity", action="store_true", help="figures only, for tuning: they are not to be published")
    parser.add_argument("--seconds", type=float, default=300, help="when to stop, whatever is left")
    parser.add_argument("--out", type=Path, help="a JSON file for every figure, written as they come; it is made anew")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if options.child:
        return child(options)
    if options.search:
        log: dict[str, Any] = {}
        search(log)
        if options.out:
            parts.write(options.out, log)
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "figures.json"
        out.unlink(missing_ok=True)
        if torch.cuda.device_count():
            ahead(options.model, ("each-step", *(kind for kind in ("adapters", "deferred") if kind in options.only)), options.overlap)
        given = [word for word in ("--overlap", "--no-parity") if getattr(options, word[2:].replace("-", "_"))]
        given += ["--model", options.model, "--longest", str(options.longest), "--slots", *map(str, options.slots)]
        log = parts.supervise([sys.executable, __file__, *given], options.only, out, options.seconds - (time.monotonic() - start))
    print(f"\n{log.get('machine', '')}; {time.monotonic() - start:.0f} s in all\n")
    print(parts.table(log["figures"], GOALS))
    return 0 if all(state == "done" for state in log["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
