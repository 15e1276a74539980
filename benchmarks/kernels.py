"""Times of the Triton kernels on this card, after a check that they compute what the reference form does.

    python3 benchmarks/kernels.py            parity, then the table of issue and README
    python3 benchmarks/kernels.py --search   also times every plan of a list, to choose the defaults in tnl/kernels/lightning_chunk.py

A time is the median of replays of one CUDA graph: a read of 256 MB that empties the L2, an event, the call, an event. So neither
launches nor warm caches are in it. No figure is printed where parity fails. Needs one NVIDIA card; fla (0.6.0) is timed where installed.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnl.kernels import lightning_chunk as lc
from tnl.kernels import reference
from tnl.kernels.lightning_chunk import Plan
from tnl.kernels.lightning_step import lightning_step
from tnl.kernels.simple_rms_norm import norm_gate, simple_rms_norm

BOUND = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5}
SHAPES = [(1, 2048), (16, 512), (4, 2048), (1, 8192), (1, 32768), (1, 131072)]
GOALS = {(1, 2048): (0.055, 0.20), (1, 32768): (0.70, 2.4), (1, 131072): (2.8, 9.5)}  # ms forward, forward + backward
GOAL_8K = (0.18, 0.62)
DEVICE = "cuda"


def decay_of(layer: int, heads: int = 32, layers: int = 30) -> Tensor:
    """log_decay of a layer of the 7B (of as many heads as asked)."""
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return (-slope * (1 - layer / (layers - 1) + 1e-5)).float().to(DEVICE)


def starts(B: int, T: int, sequences: int, first: int = -1) -> Tensor:
    """A segment_start [B, T] of random cuts; `first`: what the first sequence of a row names (0 or -1)."""
    start = torch.full((B, T), first, dtype=torch.int64)
    for b in range(B):
        for cut in sorted(torch.randint(1, max(T, 2), (sequences - 1,)).tolist()):
            start[b, cut:] = cut
    return start.int().to(DEVICE)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that nothing writes shows."""
    empty = torch.empty

    def full_of_nan(*size: Any, **options: Any) -> Tensor:
        x = empty(*size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.empty = full_of_nan  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def inputs(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, states: bool) -> dict[str, Tensor | None]:
    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)

    return {
        "q": rand(B, T, H, K),
        "k": rand(B, T, H, K),
        "v": rand(B, T, H, V),
        "initial_state": rand(B, H, K, V, dtype=torch.float32) if states else None,
        "restart_state": rand(H, K, V, dtype=torch.float32) if states else None,
        "do": rand(B, T, H, V),
        "d_final": rand(B, H, K, V, dtype=torch.float32),
    }


Inputs = dict[str, Tensor | None]
Case = tuple[str, Inputs, Tensor, Tensor | None, bool, torch.dtype]


def errors(x: Inputs, g: Tensor, start: Tensor | None, silu: bool, cuts: tuple[Plan, Plan] | None = None) -> dict[str, float]:
    """||kernel - reference|| / ||reference|| of each output and gradient; NaN where something was not written or two runs differ."""
    leaves = {n: x[n].double().requires_grad_() for n in ("q", "k", "v", "initial_state", "restart_state") if x[n] is not None}  # type: ignore[union-attr]
    q, k = (torch.nn.functional.silu(leaves[n]) if silu else leaves[n] for n in "qk")
    states = {n: leaves.get(n) for n in ("initial_state", "restart_state")}
    o, final = reference.chunk_lightning_attention(q, k, leaves["v"], g.double(), segment_start=start, **states)
    grads = torch.autograd.grad([o, final], list(leaves.values()), [x["do"].double(), x["d_final"].double()], allow_unused=True)  # type: ignore[union-attr]
    expected = {"o": o, "final": final} | {"d " + n: d for n, d in zip(leaves, grads) if d is not None}

    args = (x["q"], x["k"], x["v"], g, start, x["initial_state"], x["restart_state"], silu)
    cut, back = cuts or (None, None)

    def run() -> dict[str, Tensor | None]:
        o, final = lc.forward(*args, cut=cut)  # type: ignore[arg-type]
        found = lc.backward(x["do"], x["d_final"], *args, cut=back)  # type: ignore[arg-type]
        return {"o": o, "final": final} | dict(zip(("d q", "d k", "d v", "d initial_state", "d restart_state"), found))

    with poisoned():
        found, again = run(), run()
    result = {}
    for name, want in expected.items():
        got, twin = found[name], again[name]
        assert got is not None and twin is not None
        norm = want.norm().item()
        error = ((got.double() - want).norm() / norm).item() if norm else got.double().norm().item()
        result[name] = error if torch.equal(got, twin) else float("nan")
    return result


def parity_cases() -> Iterator[Case]:
    """The issue's cases: lengths, heads, packing, decays, dtypes, dims, views."""
    bf, half, full = torch.bfloat16, torch.float16, torch.float32
    for T, H, layer in zip((1, 15, 63, 64, 65, 127, 500, 2049) * 3, (32,) * 8 + (6,) * 8 + (1,) * 8, itertools.cycle((0, 15, 29))):
        for packed in (False, True):
            g = decay_of(layer, 32)[:H].contiguous()
            start = starts(2, T, max(1, T // 25), -1) if packed else None
            yield f"T {T} H {H} layer {layer} packed {packed}", inputs(2, T, H, 128, 128, bf, packed), g, start, False, bf
    for layer in (0, 15, 29):
        yield (
            f"row of 2048, 20 sequences, layer {layer}",
            inputs(1, 2048, 32, 128, 128, bf, False),
            decay_of(layer),
            starts(1, 2048, 20, 0),
            False,
            bf,
        )
    for T, packed in ((65, True), (2049, False), (2049, True)):
        start = starts(1, T, 9) if packed else None
        yield f"float32 T {T}", inputs(1, T, 6, 128, 128, full, packed), decay_of(0)[5:11].contiguous(), start, False, full
    yield "float32 last layer", inputs(1, 2049, 6, 128, 128, full, True), decay_of(29)[5:11].contiguous(), None, False, full
    for dtype, K, V in ((bf, 256, 128), (half, 128, 128), (bf, 16, 16), (bf, 80, 48), (bf, 192, 96), (full, 256, 128), (bf, 128, 256)):
        yield (
            f"{dtype} K {K} V {V}",
            inputs(1, 333, 4, K, V, dtype, True),
            decay_of(15)[20:24].contiguous(),
            starts(1, 333, 5),
            False,
            dtype,
        )
    x = inputs(1, 1000, 32, 128, 128, bf, True)
    yield "SiLU", x, decay_of(15), starts(1, 1000, 7), True, bf
    fused = torch.randn(1, 1024, 4, 32, 128, device=DEVICE, dtype=bf)
    yield "SiLU, views into qkvu", x | dict(zip("qkv", fused.unbind(2)), do=torch.randn_like(fused[:, :, 0])), decay_of(15), None, True, bf
    for layer in (0, 29):
        yield f"T 131072 layer {layer}", inputs(1, 131072, 2, 128, 128, bf, True), decay_of(layer)[[0, 31]].contiguous(), None, False, bf


def check_attention() -> list[str]:
    """Complaints; empty where every case is within its bound."""
    complaints, worst = [], dict.fromkeys(BOUND, 0.0)
    for name, x, g, start, silu, dtype in parity_cases():
        try:
            found = errors(x, g, start, silu)
        except Exception as error:
            complaints.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        top = max(found.values(), key=lambda e: e if e == e else 1e9)
        worst[dtype] = max(worst[dtype], top)
        if not all(e < BOUND[dtype] for e in found.values()):
            complaints.append(f"{name}: " + ", ".join(f"{n} {e:.1e}" for n, e in found.items()))
    print("attention against float64, largest relative error:", ", ".join(f"{str(d)[6:]} {e:.1e}" for d, e in worst.items()))
    return complaints


def check_others() -> list[str]:
    """Step and norms against the reference in float64."""
    complaints = []

    def compare(name: str, got: Tensor, want: Tensor, bound: float) -> None:
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error < bound:
            complaints.append(f"{name}: {error:.1e}")

    for N, H, K, V, dtype in ((3, 32, 128, 128, torch.bfloat16), (5, 2, 80, 48, torch.float32), (2, 32, 256, 128, torch.float16)):
        q, k, v = (torch.randn(N, H, d, device=DEVICE).to(dtype) for d in (K, K, V))
        g, state = -torch.rand(H, device=DEVICE), torch.randn(N, H, K, V, device=DEVICE)
        wide = [y.double()[:, None] for y in (q, k, v)]
        o, final = reference.recurrent_lightning_attention(*wide, g.double(), initial_state=state.double())
        with poisoned():
            compare("step o", lightning_step(q, k, v, g, state), o[:, 0], BOUND[dtype])
        compare("step state", state, final, 1e-6)
    for D, dtype in ((4096, torch.bfloat16), (1024, torch.float32), (5120, torch.float16), (77, torch.float32)):
        wide = torch.randn(3, 17, 4 * D, device=DEVICE).to(dtype)
        o, u = wide[..., :D].contiguous().requires_grad_(), wide[..., 3 * D :].detach().requires_grad_()
        dy = torch.randn_like(o)
        a, b = (y.detach().double().requires_grad_() for y in (o, u))
        for name, got, want in (
            ("norm", simple_rms_norm(o), reference.simple_rms_norm(a)),
            ("norm gate", norm_gate(o, u), b * reference.simple_rms_norm(a)),
        ):
            leaves = [o, u][: 1 + ("gate" in name)]
            with poisoned():
                found = torch.autograd.grad(got, leaves, dy)
            compare(name, got, want, BOUND[dtype])
            for got_d, want_d in zip(found, torch.autograd.grad(want, [a, b][: len(leaves)], dy.double())):
                compare(name + " gradient", got_d, want_d, BOUND[dtype])
    return complaints


class Clock:
    """Milliseconds of one call, median over replays of a graph."""

    def __init__(self) -> None:
        self.evict = torch.ones(64 * 1024 * 1024, device=DEVICE)

    def __call__(self, call: Callable[..., Any], *args: Any, replays: int = 20) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(*args)
            call(*args)
        torch.cuda.current_stream().wait_stream(side)
        begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.evict.sum()
            begin.record()
            call(*args)
            end.record()
        times = []
        for _ in range(replays):
            graph.replay()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def calls(
    B: int, T: int, g: Tensor, start: Tensor | None, silu: bool = False, K: int = 128
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward alone and backward alone at the 7B's heads, as functions of a plan."""
    x = inputs(B, T, 32, K, 128, torch.bfloat16, False)
    args = (x["q"], x["k"], x["v"], g, start, None, None, silu)

    def ahead(cut: Plan | None = None) -> Any:
        return lc.forward(*args, cut=cut)  # type: ignore[arg-type]

    def back(cut: Plan | None = None) -> Any:
        return lc.backward(x["do"], None, *args, cut=cut)  # type: ignore[arg-type]

    return [ahead, back, lambda: (ahead(), back())]


CUTS = [(64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3)]
CUTS += [(128, 32, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2)]


def candidates(programs: int, T: int, backward: bool) -> list[Plan]:
    """Plans worth a try where batch x heads = programs."""
    plans = []
    for cut, tma, segments, together in itertools.product(CUTS, (True, False), (1, 2, 4, 8, 16), (True, False)):
        total = programs * (128 // cut[1]) * segments
        if (not together and not backward) or (segments > 1 and total > 800) or total < 100 or T // segments < 2 * cut[0]:
            continue
        if backward and cut[2] == 4 and cut[3] == 4:
            continue
        plans.append(Plan(*cut, segments, tma, together))
    return plans


def precompile(plan: tuple[Any, ...]) -> str:
    """In a process of its own: fill Triton's cache with one plan."""
    try:
        ahead, back, _ = calls(1, 1024, decay_of(15), None)
        cut = Plan(*plan)
        if cut.together:
            ahead(cut)
        back(cut)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{plan}: {type(error).__name__} {str(error)[:120]}"
    return ""


def search(clock: Clock, log: dict[str, Any]) -> None:
    """Time every candidate at four shapes; print the best of each."""
    begin = time.time()
    kinds = {p._replace(segments=min(p.segments, 2)) for n in (32, 128, 512) for b in (False, True) for p in candidates(n, 2048, b)}
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        refused = [e for e in pool.imap_unordered(precompile, sorted(tuple(k) for k in kinds)) if e]
    print(f"compiled {len(kinds)} plans in {time.time() - begin:.0f} s;", *refused[:8], sep="\n  ")
    g, x = decay_of(15), inputs(1, 1024, 32, 128, 128, torch.bfloat16, False)
    wrong = set()
    for kind in sorted(kinds):
        if any(e.startswith(str(tuple(kind))) for e in refused):
            wrong.add(kind)
            continue
        found = errors(x, g, None, False, (kind, kind))
        if not all(e < 5e-3 for e in found.values()):
            wrong.add(kind)
            print("WRONG", tuple(kind), {n: f"{e:.1e}" for n, e in found.items()})
    for B, T in ((1, 2048), (16, 512), (4, 2048), (1, 8192)):
        ahead, back, _ = calls(B, T, decay_of(29), None)
        for backward, call in ((False, ahead), (True, back)):
            times = {}
            for plan in candidates(32 * B, T, backward):
                if plan._replace(segments=min(plan.segments, 2)) not in wrong:
                    times[plan] = clock(call, plan, replays=7)
            best = sorted(times, key=times.__getitem__)
            name = f"{B} x {T} {'backward' if backward else 'forward'}"
            log[name] = [(tuple(p), times[p]) for p in best]
            print(name, f"({len(best)} plans)", *(f"{times[p]:.4f} {tuple(p)}" for p in best[:6]), sep="\n  ")
            for tma, together in itertools.product((True, False), repeat=2):
                some = [p for p in best if p.tma == tma and p.together == together]
                if some:
                    print(f"  best of tma {tma} together {together}: {times[some[0]]:.4f} {tuple(some[0])}")


def fla_calls(B: int, T: int, g: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """fla's chunk_simple_gla forward, and forward + backward, where it is installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.simple_gla import chunk_simple_gla  # optional: the rival

    x = inputs(B, T, 32, 128, 128, torch.bfloat16, False)
    leaves = [x[n].requires_grad_() for n in "qkv"]  # type: ignore[union-attr]

    def ahead() -> Tensor:
        with torch.no_grad():
            return chunk_simple_gla(*leaves, g_gamma=g, scale=1.0)[0]

    def both() -> Any:
        return torch.autograd.grad(chunk_simple_gla(*leaves, g_gamma=g, scale=1.0)[0], leaves, x["do"])

    return ahead, both


def table(clock: Clock, log: dict[str, Any]) -> None:
    """The issue's table with the default plans; last layer's decays (nothing to skip), and a middle layer's."""
    source = torch.empty(256 * 1024 * 1024, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / clock(target.copy_, source) / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy:.2f} TB/s; bfloat16, 32 heads of 128; ms")
    print(f"{'':26} {'fwd':>8} {'fwd+bwd':>8}  goal           limit          fla")
    for B, T in SHAPES:
        for layer in (29, 15):
            g = decay_of(layer)
            ahead, _, both = calls(B, T, g, None)
            one, two = clock(ahead), clock(both)
            tensor = B * T * 32 * 128 * 2 / 3.0e9  # ms to move one of the tensors at 3.0 TB/s
            goal = GOALS.get((B, T), GOAL_8K)
            rival = fla_calls(B, T, g)
            fla = "" if rival is None else f"{clock(rival[0]):.3f} / {clock(rival[1]):.3f}"
            print(
                f"{f'{B} x {T} layer {layer}':26} {one:8.4f} {two:8.4f}  {goal[0]} / {goal[1]}  {4 * tensor:.3f} / {11 * tensor:.3f}  {fla}"
            )
            log[f"{B} x {T} layer {layer}"] = (one, two)
    for name, case in {
        "2048, 20 sequences": (1, 2048, decay_of(29), starts(1, 2048, 20, 0)),
        "8192, 80 sequences": (1, 8192, decay_of(29), starts(1, 8192, 80, 0)),
        "8192, SiLU inside": (1, 8192, decay_of(29), None, True),
        "8192, K 256 (LRPE)": (1, 8192, decay_of(29), None, False, 256),
    }.items():
        ahead, _, both = calls(*case)  # type: ignore[arg-type]
        print(f"{name:26} {clock(ahead):8.4f} {clock(both):8.4f}")
    for N in (64, 128):
        q, k, v = (torch.randn(N, 32, 128, device=DEVICE).bfloat16() for _ in range(3))
        state, g = torch.zeros(N, 32, 128, 128, device=DEVICE), decay_of(15)
        ms = clock(lightning_step, q, k, v, g, state)
        print(f"step, {N} slots{ms:23.4f}  {2 * state.nbytes / ms / 1e9:.2f} TB/s, {2 * state.nbytes / ms / 1e9 / copy:.0%} of copy")
    wide = torch.randn(8192, 4 * 4096, device=DEVICE).bfloat16()
    o, u = wide[:, :4096].contiguous(), wide[:, 3 * 4096 :]
    ops = torch.ops.tnl
    for name, tensors, call, args in (
        ("norm 8192 x 4096", 2, ops.simple_rms_norm, (o,)),
        ("norm backward", 3, ops.simple_rms_norm_backward, (o.flip(0), o)),
        ("norm gate", 3, ops.norm_gate, (o, u)),
        ("norm gate backward", 5, ops.norm_gate_backward, (o.flip(0), o, u)),
    ):
        ms = clock(call, *args, 1e-6)
        print(f"{name:26} {ms:8.4f}  {tensors * o.nbytes / ms / 1e9:.2f} TB/s")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(int(time.time()))
    begin = time.time()
    complaints = check_attention() + check_others()
    print(f"parity took {time.time() - begin:.0f} s")
    if complaints:
        print("PARITY FAILS; no figure is printed:", *complaints[:40], sep="\n  ")
        if not options.search:
            return 1
    clock, log = Clock(), {}
    if options.search:
        search(clock, log)
    if not complaints:
        table(clock, log)
    out = os.environ.get("OUT")
    if out:
        (Path(out) / "kernels.json").write_text(json.dumps(log), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
