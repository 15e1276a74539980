"""Several processes that train together, each with its own arguments or faults, as on machines that differ."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMELESS = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens")


def command(arguments: Sequence[str], before: str = "") -> list[str]:
    """tnl with these arguments, after some code."""
    return [sys.executable, "-c", f"{before}\nimport sys; sys.argv = ['tnl', *{list(arguments)!r}]; from tnl.cli import main; main()"]


def environment(**more: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**found, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **more}


def tnl(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(arguments), env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=timeout)


def together(commands: Sequence[list[str]], nodes: bool = False, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run one command a process; nodes: each on a machine of its own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank, words in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": "0" if nodes else str(rank), "LOCAL_WORLD_SIZE": "1" if nodes else str(len(commands))}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        running.append(subprocess.Popen(words, env=environment(**common, **place), **pipes))
    done = []
    for process in running:
        out, err = process.communicate(timeout=timeout)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def errors(done: Sequence[subprocess.CompletedProcess[str]]) -> list[str]:
    """What all of them said went wrong."""
    return [line for one in done for line in one.stderr.splitlines() if line.startswith("error: ")]


def metrics(run: Path) -> list[dict[str, float]]:
    """The numbers of a run that do not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in ("step", *TIMELESS) if name in line} for line in lines]


def assert_same_run(mine: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    """The same numbers at the same steps; the norm of the gradients, in which rounding adds up, within ten times the tolerance."""
    one, other = metrics(mine), metrics(theirs)
    assert [sorted(line) for line in one] == [sorted(line) for line in other] and one
    for a, b in zip(one, other):
        for name in a:
            allowed = 0 if name == "tokens" else 10 * tolerance * max(1, b[name]) if name == "grad_norm" else tolerance
            assert abs(a[name] - b[name]) <= allowed, (a, b)
