"""Parts of a benchmark, one after another in a child process: what one has found is kept, whatever becomes of the others.

A part that fails, by an exception, a card in error or a crash, loses its own figures alone: the parts after it run in a new child.
"""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Log = dict[str, Any]
"""{"parts": part -> begun, done or what went wrong; "figures": name -> value}"""


def supervise(command: Sequence[str], parts: Sequence[str], out: Path, seconds: float) -> Log:
    """Run `command --child --only PART ... --out OUT` until every part has had its turn, or the time is up; what they have found."""
    end = time.monotonic() + seconds
    left = list(parts)
    while left and time.monotonic() < end:
        child = subprocess.Popen([*command, "--child", "--only", *left, "--out", str(out)])
        try:
            child.wait(end - time.monotonic())
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        begun = [name for name in left if name in read(out)["parts"]]
        if not begun:
            break  # a child that cannot begin will not begin the next time either
        left = left[left.index(begun[-1]) + 1 :]
    log = read(out)
    for name in parts:
        if (told := log["parts"].setdefault(name, "not begun")) == "begun":
            log["parts"][name] = "ended in the middle: no time was left, or the process died"
        if log["parts"][name] != "done":
            print(f"{name}: {log['parts'][name] if told == 'begun' else told}")
    write(out, log)
    return log


def run(parts: Mapping[str, Callable[[], None]], log: Log, out: Path) -> bool:
    """The child's side; False where the card is in error and the parts that are left want a new process."""
    for name, part in parts.items():
        log["parts"][name] = "begun"
        write(out, log)
        print(f"\n== {name}", flush=True)
        begin = time.monotonic()
        try:
            part()
            log["parts"][name] = "done"
        except Exception as error:
            traceback.print_exc()
            log["parts"][name] = f"{type(error).__name__}: {str(error)[:300]}"
        write(out, log)
        print(f"{name} took {time.monotonic() - begin:.0f} s", flush=True)
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


def read(out: Path) -> Log:
    """What is there so far."""
    found: Log = json.loads(out.read_text(encoding="utf-8")) if out.is_file() and out.stat().st_size else {"parts": {}, "figures": {}}
    return found


def write(out: Path, log: Log) -> None:
    out.write_text(json.dumps(log, indent=1), encoding="utf-8")


def table(figures: Mapping[str, Any], goals: Mapping[str, tuple[float, bool]]) -> str:
    """The figures that have a goal (value, whether less is better), beside it."""
    lines = ["| work | measured | goal | |", "|---|---|---|---|"]
    for name, (goal, less) in goals.items():
        value = figures.get(name)
        bound = f"{'at most ' * less}{goal:,g}"
        if value is None:
            lines.append(f"| {name} | | {bound} | not measured |")
        else:
            lines.append(f"| {name} | {value:,.4g} | {bound} | {'met' if (value <= goal if less else value >= goal) else 'missed'} |")
    return "\n".join(lines)
