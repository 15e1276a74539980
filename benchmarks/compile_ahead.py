"""Compiles what a decoding benchmark launches in many processes at once: Triton's cache on the disk has it then."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import torch
from random_model import TOKENIZER, in_memory, random_adapter

from tnl.generate.adapters import Adapters
from tnl.generate.engine import Engine
from tnl.kernels import skinny_linear
from tnl.model.load import load_model, load_tokenizer
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Job = tuple[str, str, int]
"""Model, what is compiled ("each-step", "deferred", "adapters", "read"), slots or columns."""


def jobs(size: str, kinds: tuple[str, ...]) -> list[Job]:
    """All of them, the slow ones first."""
    reading = [(size, "read", columns) for columns in (2048, 1024, 512, 256, 64)]
    steps = [(size, kind, slots) for kind in kinds for slots in ((1, 64) if kind == "adapters" else BUCKETS)]
    demo = [(f"demo {dtype}", kind, 8) for dtype in ("float32", "bfloat16") for kind in ("read", *kinds) if kind != "adapters"]
    return [*reading, *steps, *demo]


def engine_for(job: Job) -> Engine:
    size, kind, slots = job
    if size.startswith("demo "):
        model, tokenizer = load_model("demo", device="cuda", dtype=size.split()[1], backend="triton"), load_tokenizer("demo")
    else:
        model = in_memory(size, "cuda", torch.bfloat16, layers=2, backend="triton")
        tokenizer = BaiChuanTokenizer.from_pretrained(TOKENIZER)
    bank = Adapters(model)
    if kind == "adapters":
        bank.add(random_adapter(model, 0))
    writes = "deferred" if kind == "deferred" else "each-step"
    return Engine(model, tokenizer, adapters=bank, slots=1 if kind == "read" else slots, prefix_bytes=0, state_writes=writes)


def set_up(overlap: bool) -> None:
    """A process as the benchmark's own."""
    skinny_linear.overlap = overlap


def compiled(job: Job) -> str:
    """Run what the job launches; what went wrong, or nothing: the part that needs it will say so again."""
    try:
        engine = engine_for(job)
        steps: Any = engine.steps
        with torch.inference_mode():
            if job[1] == "read":
                for size in [size for size in steps.sizes if size <= job[2]][-3:]:
                    steps._chunk(size, False, False)
                steps._chunk(steps.sizes[-1], True, False)
            else:
                steps._step(job[2], job[1] == "adapters")
                if job[1] == "deferred":
                    steps._settle()
    except Exception as error:
        return f"{job}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def ahead(size: str, kinds: tuple[str, ...], overlap: bool = False, seconds: float = 90) -> None:
    """Compile for all parts; what takes longer than the time is left to them."""
    begin = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(max(1, min(14, (os.cpu_count() or 1) - 1)), set_up, (overlap,)) as pool:
        try:
            told = pool.map_async(compiled, jobs(size, kinds), chunksize=1).get(seconds)
        except multiprocessing.TimeoutError:
            told = [f"not all was compiled in {seconds:.0f} s"]
    print(f"kernels compiled in {time.monotonic() - begin:.0f} s", *filter(None, told), sep="\n  ", flush=True)
