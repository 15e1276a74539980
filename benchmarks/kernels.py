"""Times of the Triton kernels on this card, after a check that they compute what the reference form does.

    python3 benchmarks/kernels.py            parity, then the table
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
from typing import Any, NamedTuple

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


class Case(NamedTuple):
    """One comparison with the reference."""

    B: int
    T: int
    H: int
    layer: int = 15
    dtype: torch.dtype = torch.bfloat16
    K: int = 128
    V: int = 128
    sequences: int = 0  # 0: not packed
    first: int = -1  # what the first sequence of a packed row names: -1 (it came in) or 0
    states: bool = True  # an initial state and a restart state
    silu: bool = False
    fused: bool = False  # q, k, v are views into one projection
    plans: tuple[Plan, Plan] | None = None  # forward, backward; None: the defaults


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
        norm = want.norm().item()
        if got is None or twin is None:  # nothing restarts
            result[name] = norm
            continue
        error = ((got.double() - want).norm() / norm).item() if norm else got.double().norm().item()
        result[name] = error if torch.equal(got, twin) else float("nan")
    return result


def parity_cases() -> list[Case]:
    """The issue's cases: lengths, heads, packing, decays, dtypes, dims, views."""
    half, full = torch.float16, torch.float32
    lengths = (1, 15, 63, 64, 65, 127, 500, 2049)
    several = [(T, H, packed) for H in (32, 6, 1) for T in lengths for packed in (False, True)]
    cases = [
        Case(2, T, H, layer, sequences=max(1, T // 25) * packed, states=packed)
        for (T, H, packed), layer in zip(several, itertools.cycle((0, 0, 15, 15, 29, 29)))
    ]
    cases += [Case(1, 2048, 32, layer, sequences=20, first=0, states=False) for layer in (0, 15, 29)]
    cases += [Case(1, T, 6, layer, full, sequences=n) for T, layer, n in ((65, 0, 3), (2049, 0, 0), (2049, 15, 9), (2049, 29, 0))]
    dims = ((256, 128), (128, 256), (16, 16), (80, 48), (192, 96))
    cases += [Case(1, 333, 4, K=K, V=V, sequences=5) for K, V in dims]
    cases += [Case(1, 333, 4, dtype=half, sequences=5), Case(1, 333, 2, dtype=full, K=256, sequences=5)]
    cases += [Case(1, 1000, 32, sequences=7, silu=True), Case(1, 1024, 32, silu=True, fused=True)]
    cases += [Case(2, T, 32, 15, sequences=n, silu=True, states=n > 0) for T in (65, 500, 2049) for n in (0, 4)]
    return cases + [Case(1, 131072, 2, layer) for layer in (0, 29)]


def check_case(case: Case) -> dict[str, float] | str:
    """The errors of a case, or what was raised."""
    try:
        x = inputs(case.B, case.T, case.H, case.K, case.V, case.dtype, case.states)
        if case.fused:
            fused = torch.randn(case.B, case.T, 4, case.H, case.K, device=DEVICE).to(case.dtype)
            x |= dict(zip("qkv", fused.unbind(2)))
        g = decay_of(case.layer)[torch.linspace(0, 31, case.H).long()].contiguous()
        start = starts(case.B, case.T, case.sequences, case.first) if case.sequences else None
        return errors(x, g, start, case.silu, case.plans)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-200:]}"


def complaint(case: Case, found: dict[str, float] | str) -> str:
    """Empty where every error is within the bound."""
    name = ", ".join(f"{n} {v}" for n, v in case._asdict().items() if v != case._field_defaults.get(n))
    if isinstance(found, str):
        return f"{name}: {found}"
    if all(e < BOUND[case.dtype] for e in found.values()):
        return ""
    return f"{name}: " + ", ".join(f"{n} {e:.1e}" for n, e in found.items())


def check_attention(pool: Any) -> list[str]:
    """Complaints; empty where every case is within its bound. The cases run in processes: most of their time is compilation."""
    cases = parity_cases()
    found = pool.map(check_case, cases, 1)
    for dtype in BOUND:
        some = [e for c, f in zip(cases, found) if c.dtype == dtype and isinstance(f, dict) for e in f.values()]
        print(f"attention against float64, {dtype}: largest of {len(some)} relative errors {max(some, default=float('nan')):.1e}")
    return [c for c in map(complaint, cases, found) if c]


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
CUTS += [(32, 64, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2)]


def candidates(programs: int, T: int) -> list[Plan]:
    """Plans worth a try where batch x heads = programs."""
    plans = []
    for cut, segments in itertools.product(CUTS, (1, 2, 4, 8, 16)):
        total = programs * (128 // cut[1]) * segments
        if not ((segments > 1 and total > 800) or total < 100 or T // segments < 2 * cut[0]):
            plans.append(Plan(*cut, segments))
    return plans


def search(pool: Any, clock: Clock, log: dict[str, Any]) -> None:
    """Time every candidate that computes the right thing at four shapes; print the best of each."""
    kinds = sorted({p._replace(segments=min(p.segments, 2)) for n in (32, 128, 512) for p in candidates(n, 2048)})
    cases = [Case(1, 1024, 32, states=False, plans=(kind, kind)) for kind in kinds]
    refused = {kind: c for kind, c in zip(kinds, map(complaint, cases, pool.map(check_case, cases, 1))) if c}
    print(f"{len(refused)} of {len(kinds)} plans cannot run:", *[f"  {tuple(k)} {c[-90:]}" for k, c in refused.items()][:12], sep="\n")
    for B, T in ((1, 2048), (16, 512), (4, 2048), (1, 8192)):
        ahead, back, _ = calls(B, T, decay_of(29), None)
        for name, call in ((f"{B} x {T} forward", ahead), (f"{B} x {T} backward", back)):
            plans = [p for p in candidates(32 * B, T) if p._replace(segments=min(p.segments, 2)) not in refused]
            times = {plan: clock(call, plan, replays=7) for plan in plans}
            best = sorted(times, key=times.__getitem__)
            log[name] = [(tuple(p), times[p]) for p in best]
            print(name, f"({len(best)} plans)", *(f"{times[p]:.4f} {tuple(p)}" for p in best[:6]), sep="\n  ")


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
    print(f"{'':26} {'fwd':>8} {'fwd+bwd':>8}  goal           limit", flush=True)
    for B, T in SHAPES:
        for layer in (29, 15):
            g = decay_of(layer)
            ahead, _, both = calls(B, T, g, None)
            one, two = clock(ahead), clock(both)
            tensor = B * T * 32 * 128 * 2 / 3.0e9  # ms to move one of the tensors at 3.0 TB/s
            goal = GOALS.get((B, T), GOAL_8K)
            limit = f"{4 * tensor:.3f} / {11 * tensor:.3f}"
            print(f"{f'{B} x {T} layer {layer}':26} {one:8.4f} {two:8.4f}  {goal[0]} / {goal[1]}  {limit}", flush=True)
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
        print(f"{name:26} {ms:8.4f}  {tensors * o.nbytes / ms / 1e9:.2f} TB/s", flush=True)


def rival(clock: Clock, log: dict[str, Any]) -> None:
    """fla's times at the same shapes; it compiles many configurations for each, so it comes last."""
    for B, T in SHAPES:
        if (calls_of := fla_calls(B, T, decay_of(29))) is not None:
            log[f"fla {B} x {T}"] = one, two = clock(calls_of[0]), clock(calls_of[1])
            print(f"{f'fla {B} x {T}':26} {one:8.4f} {two:8.4f}", flush=True)


PARTS = {"ours": table, "fla": rival}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="time every plan of a list too")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="ours, and fla in the same call")
    parser.add_argument("--out", type=Path, help="a JSON file for every time")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    log: dict[str, Any] = {}
    begin = time.time()
    print("kernels against float64, which compiles them")
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        complaints = check_attention(pool) + check_others()
        print(f"parity took {time.time() - begin:.0f} s", flush=True)
        clock = Clock()
        if options.search:
            search(pool, clock, log)
            print(f"search ended at {time.time() - begin:.0f} s", flush=True)
    if complaints:
        print("PARITY FAILS; no table is printed:", *complaints[:20], sep="\n  ")
        return 1
    for name in options.only:
        PARTS[name](clock, log)
        if options.out:
            options.out.write_text(json.dumps(log), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
