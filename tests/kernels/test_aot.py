"""Every kernel in every configuration compiles for the cards people own, and fits in their shared memory; no card is needed.

Run as a program (in a process where Triton does not interpret), it compiles for the capabilities given and prints a line of JSON.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CARDS = {80: (108, 163), 86: (82, 99), 89: (128, 99), 90: (132, 227), 120: (170, 99)}  # multiprocessors, KB of shared memory a program
HALF_AND_SINGLE = (torch.bfloat16, torch.float32)
SMALL, LONG = (4, 512), (1, 8192)  # batch, tokens: with 32 heads one fills a card, the other is cut into segments


def configurations(thorough: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that launch every form of every kernel: dtypes, dims, packed, restart, SiLU, with and without segments."""
    from tnl.kernels import lightning_chunk as lc
    from tnl.kernels.lightning_step import lightning_step
    from tnl.kernels.silu import silu, silu_backward
    from tnl.kernels.simple_rms_norm import norm_gate, simple_rms_norm

    bf, half, full = torch.bfloat16, torch.float16, torch.float32

    def both(size: tuple[int, int], K: int, V: int, dtype: torch.dtype, *, packed: bool, states: bool, silu: bool, H: int = 32) -> None:
        B, T = size
        q, k, v = (torch.empty(B, T, H, d, dtype=dtype) for d in (K, K, V))
        start = torch.empty(B, T, dtype=torch.int32) if packed else None
        initial, restart = (torch.empty(B, H, K, V), torch.empty(H, K, V)) if states else (None, None)
        args = q, k, v, torch.empty(H), start, initial, restart, silu
        lc.forward(*args)
        lc.backward(v.clone(), initial, *args)

    def prompt(K: int, V: int, H: int = 32) -> None:
        """A row's first 41 tokens, and its packed records from the state after them."""
        first, rest = ([torch.empty(1, T, H, d, dtype=bf) for d in (K, K, V)] for T in (41, 1051))
        g, state, start = torch.empty(H), torch.empty(1, H, K, V), torch.empty(1, 1051, dtype=torch.int64)
        for qkv, d_final, begins in ((first, state, (None, None, None)), (rest, None, (start, None, state[0]))):
            args = *qkv, g, *begins, False
            lc.forward(*args)
            lc.backward(qkv[2].clone(), d_final, *args)

    def attention(dtype: torch.dtype, K: int, V: int, size: tuple[int, int], all_of_it: bool) -> tuple[str, Callable[[], Any]]:
        flags = dict.fromkeys(("packed", "states", "silu"), all_of_it)
        return f"{dtype} K {K} V {V} B x T {size} {flags}", lambda: both(size, K, V, dtype, **flags)

    yield attention(bf, 128, 128, SMALL, False)
    yield attention(bf, 128, 128, LONG, True)
    yield "shared prompt", lambda: prompt(128, 128)
    yield attention(bf, 256, 128, SMALL, False)
    yield attention(full, 128, 128, SMALL, False)
    if thorough:
        yield "shared prompt with LRPE", lambda: prompt(256, 128)
        yield attention(bf, 256, 128, LONG, True)
        yield attention(bf, 80, 48, LONG, True)
        yield attention(half, 128, 128, SMALL, False)
        yield attention(bf, 16, 256, LONG, True)
        yield "packed row", lambda: both((1, 2048), 128, 128, bf, packed=True, states=False, silu=True)
        yield "few heads", lambda: both((1, 2048), 128, 128, bf, packed=True, states=False, silu=True, H=8)
        yield attention(half, 128, 128, LONG, True)
        yield attention(full, 128, 128, LONG, True)
        yield attention(full, 256, 256, SMALL, False)
        yield attention(full, 256, 256, LONG, True)
    for dtype, K, V in ((bf, 128, 128), (bf, 256, 128), (full, 256, 256)):
        args = *(torch.empty(2, 4, d, dtype=dtype) for d in (K, K, V)), torch.empty(4), torch.empty(2, 4, K, V)
        yield f"step {dtype} K {K} V {V}", lambda a=args: lightning_step(*a, silu=True)
    for R, p, dtype in ((8, 0.1, bf), (64, 0.1, full), (256, 0.0, full), *(((256, 0.1, bf), (32, 0.1, full)) if thorough else ())):
        yield f"LoRA rank {R} {dtype}", lambda R=R, p=p, dtype=dtype: projections(R, p, dtype, thorough)
    yield "SiLU", lambda: silu_backward(silu(torch.empty(2, 8192, dtype=bf)), torch.empty(2, 16384, dtype=bf)[:, :8192])
    for D, dtype in ((4096, bf), (16384, full)):
        x = torch.empty(2, D, dtype=dtype, requires_grad=True)
        u = torch.empty(2, D, dtype=dtype)
        yield f"norm {D} {dtype}", lambda x=x: simple_rms_norm(x).sum().backward()
        yield f"norm gate {D} {dtype}", lambda x=x, u=u: norm_gate(x, u).sum().backward()
    yield from decoding(thorough)


def decoding(thorough: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The kernels of a decoding step: every number of rows that has a plan of its own, adapters, LRPE, drawing."""
    from tnl.kernels import draw, skinny_linear
    from tnl.kernels.deferred import EVERY, Deferred
    from tnl.kernels.lightning_step_gate import lightning_fold, lightning_step_gate
    from tnl.kernels.skinny_linear import LowRank, expand_, shrink

    def products(M: int, dtype: torch.dtype) -> None:
        D, G, R = 4096, 11008, 8
        x, glu = torch.empty(M, D, dtype=dtype), torch.empty(M, G, dtype=dtype)
        w, l1, l3 = (torch.empty(n, k, dtype=dtype) for n, k in ((4 * D, D), (G, D), (D, G)))
        rows, a = torch.empty(M), torch.empty(3, R, D, dtype=dtype)
        h, h2 = shrink(x, a, rows, a)
        low, other = (LowRank(one, torch.empty(3, G, R, dtype=dtype), rows) for one in (h, h2))
        skinny_linear.skinny_linear(x, w, eps=1e-6)
        skinny_linear.skinny_linear(x, l1, l1, eps=1e-6, low=low, other_low=other)
        skinny_linear.skinny_linear(x, l1, l1, eps=1e-6)
        skinny_linear.skinny_linear(x, w[:D], eps=1e-6, sums=torch.empty(M, 64), residual=x)
        skinny_linear.skinny_linear(glu, l3, residual=x)
        expand_(glu, low)

    def step(N: int, lrpe: bool, gate: bool, dtype: torch.dtype | None) -> None:
        K, turn, g = 256 if lrpe else 128, torch.empty(N, 32, 128), torch.empty(32)
        state: Any = torch.empty(N, 32, K, 128)
        if dtype is not None:
            k, v = (torch.empty(N, 32, EVERY - 1, dim, dtype=torch.bfloat16) for dim in (K, 128))
            state = Deferred(state, state.to(dtype), k, v, torch.empty(N, dtype=torch.long))
            lightning_fold(state, g, torch.empty(1, dtype=torch.long))
        qkvu = torch.empty(N, 4 * 4096, dtype=torch.bfloat16)
        lightning_step_gate(qkvu, state, g, torch.empty(N), (turn, turn) if lrpe else None, gate=gate)

    def drawing(dtype: torch.dtype, history: bool) -> None:
        ids = torch.empty(2, dtype=torch.long)
        counts = torch.empty(2, 64000, dtype=torch.int32) if history else None
        draw.draw_(torch.empty(2, 64000, dtype=dtype), torch.empty(2, draw.COLUMNS), ids, ids, history=counts, advance=not history)

    for M, dtype in ((1, torch.bfloat16), (16, torch.bfloat16)) if not thorough else itertools.product((1, 16, 32, 64), HALF_AND_SINGLE):
        yield f"products {M} {dtype}", lambda M=M, dtype=dtype: products(M, dtype)
    for N, lrpe, gate in ((1, False, True), (1, True, True), (64, False, False)):
        for dtype in (None, torch.bfloat16, *([torch.float32] if thorough else [])):
            yield f"step and gate {N} lrpe {lrpe} copy {dtype}", lambda a=(N, lrpe, gate, dtype): step(*a)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"drawing {dtype}", lambda dtype=dtype: drawing(dtype, dtype == torch.float32)


def projections(R: int, p: float, dtype: Any, thorough: bool) -> None:
    """LoRA's kernels around a norm with two adapters, which needs most; a gated norm, a product, an input without gradient."""
    from tnl.kernels.lora_input import Source, Thin, input_gradients, make_input
    from tnl.kernels.lora_output import expand, output_gradients

    T, D = 512, 4096
    x, u, keys = torch.empty(T, D, dtype=dtype), torch.empty(T, 2 * D, dtype=dtype)[:, D:], torch.empty(T, dtype=torch.int32)
    thin, b = Thin(torch.empty(R, D), p, 1), torch.empty(D, R)
    cases = (Source(x, None, 1e-6), (thin, thin)), (Source(x, u, 1e-6), (thin, None)), (Source(x, u, None), (thin, None))
    for source, adapters in cases if thorough or R == 8 else cases[:1]:
        _, rstd, hidden = make_input(source, adapters, keys)
        expand(hidden[0], b, 1.0, x, dtype)
        g = [output_gradients(x, h, b, 1.0)[0] for h in hidden if h is not None]
        for dz in (x, None) if thorough or R == 8 else (x,):
            input_gradients(source, rstd, adapters, keys, hidden, [*g, None], dz, None if u is source.u else x)


def compile_for(capability: int, thorough: bool) -> dict[str, Any]:
    """Compile the configurations for a card and report each kernel's shared memory, or what went wrong.

    Not thorough: as far as PTX, where the shared memory is known; ptxas would take half of the time.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tnl.kernels import lightning_chunk as lc

    class Card:
        """Triton's driver as far as compiling asks it."""

        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    multiprocessors, kilobytes = CARDS[capability]
    card = lc.Device(multiprocessors, kilobytes * 1024)
    lc.device_of = lambda x: card
    driver.set_active(Card())
    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        key = f"{self.__name__}: {name}"
        shared[key] = max(kernel.metadata.shared, shared.get(key, 0))

    JITFunction.run = compile_only
    if not thorough:
        CUDABackend.make_cubin = lambda *a, **k: b""
    refused = {}
    for name, call in configurations(thorough):
        try:
            call()
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {str(error)[-300:]}"
    return {"shared": shared, "refused": refused}


def check(capability: int, cache: Path, *options: str) -> None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    command = [sys.executable, __file__, str(capability), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["refused"]
    assert len(found["shared"]) >= 20
    limit = CARDS[capability][1] * 1024
    assert not {name: size for name, size in found["shared"].items() if size > limit}


@pytest.mark.parametrize("capability", CARDS)
def test_configurations_fit(capability: int, tmp_path: Path) -> None:
    check(capability, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", CARDS)
def test_every_configuration_fits(capability: int, tmp_path: Path) -> None:
    check(capability, tmp_path, "thorough")


if __name__ == "__main__":
    print(json.dumps(compile_for(int(sys.argv[1]), "thorough" in sys.argv)))
