"""Times every block of a list for the products of few rows, beside cuBLAS: `python benchmarks/decoding.py --search`."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnl.kernels.skinny_linear import Plan, plan, skinny_linear

SHAPES = {  # N, K, a pair of matrices
    "qkvu": (16384, 4096, False),
    "out": (4096, 4096, False),
    "l1 l2": (11008, 4096, True),
    "l3": (4096, 11008, False),
    "head": (64000, 4096, False),
}
ROWS = (1, 16, 32, 64)
BYTES = 500e6
"""Matrices are taken in turn until this much is read, so that the L2 holds none."""


def candidates(M: int, pair: bool) -> list[Plan]:
    """Blocks worth a try."""
    if M == 1:
        blocks = [(4, 512), (8, 256), (8, 512), (16, 256), (4, 1024), (2, 1024), (1, 2048), (2, 2048), (16, 128)]
        return [Plan(1, n, k, warps, 1) for n, k in blocks for warps in (2, 4, 8) if 8 <= n * k // (warps * 32) <= (32 if pair else 64)]
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    found = []
    for n, k, warps, stages in (
        (16, 256, 4, 4), (16, 512, 4, 3), (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (32, 256, 4, 4), (32, 256, 8, 4),
        (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 8, 4), (128, 64, 4, 4), (128, 64, 8, 5), (128, 128, 8, 3),
    ):  # fmt: skip
        shared = (block_m + n * (1 + pair)) * k * 2 * stages
        if shared <= 200 * 1024:
            found.append(Plan(block_m, n, k, warps, stages))
    return found


def inputs(M: int, N: int, K: int, pair: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """x [M, K] and enough matrices (pairs of them) to read BYTES."""
    count = max(2, round(BYTES / (N * K * 2 * (1 + pair))))

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    return rand(M, K), [(rand(N, K), rand(N, K) if pair else None) for _ in range(count)]


def compiled(job: tuple[int, int, int, bool, Plan]) -> None:
    """Compile one configuration, in a process of its own: the cache on the disk has it then."""
    M, N, K, pair, cut = job
    x, w = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((M, K), (N, K)))
    # a configuration that the card cannot hold is left out when it is timed
    try:
        skinny_linear(x, w, w if pair else None, eps=None if K > 4096 else 1e-6, cut=cut)
    except Exception as error:
        print(f"  {cut}: {type(error).__name__}", flush=True)


def timed(call: Callable[[int], Any], count: int) -> float:
    """Microseconds of one call, `count` different ones in a CUDA graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[2:])


def search(log: dict[str, Any]) -> None:
    """Print the three best blocks of each shape, the default's time and cuBLAS's."""
    jobs = [(M, N, K, pair, cut) for M in ROWS for N, K, pair in SHAPES.values() for cut in candidates(M, pair)]
    begin = time.time()
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compiled, jobs, chunksize=2)
    print(f"{len(jobs)} configurations compiled in {time.time() - begin:.0f} s")
    for name, (N, K, pair) in SHAPES.items():
        for M in ROWS:
            x, matrices = inputs(M, N, K, pair)
            size = N * K * 2 * (1 + pair)
            eps = None if K > 4096 else 1e-6

            def ours(i: int, cut: Plan, x: Tensor = x, matrices: Any = matrices, eps: Any = eps) -> Tensor:
                return skinny_linear(x, *matrices[i], eps=eps, cut=cut)

            def cublas(i: int, x: Tensor = x, matrices: Any = matrices) -> Any:
                return [x @ w.T for w in matrices[i] if w is not None]

            times = {}
            for cut in {plan(M, N, 2, pair), *candidates(M, pair)}:
                try:
                    times[cut] = timed(lambda i, cut=cut: ours(i, cut), len(matrices))  # type: ignore[misc]
                except Exception as error:
                    print(f"  {name} {M} {tuple(cut)}: {type(error).__name__}")
            best = sorted(times, key=times.__getitem__)
            rival = timed(cublas, len(matrices))
            default = times.get(plan(M, N, 2, pair), float("nan"))
            speed = size / times[best[0]] / 1e6
            shown = ", ".join(f"{times[cut]:.1f} {tuple(cut)}" for cut in best[:3])
            print(
                f"{name:6} {M:3} rows: cuBLAS {rival:.1f} us, default {default:.1f}, best {shown}; {speed:.2f} TB/s",
                flush=True,
            )
            log[f"{name} {M}"] = {"cublas": rival, "plans": [(tuple(cut), times[cut]) for cut in best]}
