"""`tnl train --num-processes N`: the same command N times on this machine, as torchrun would start it. Imports no torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from tnl.errors import RecipeError

PATIENCE = 30.0
"""Seconds in which the others may end once one has ended badly."""


def start(count: int, arguments: Sequence[str]) -> int:
    """Run tnl with these arguments in `count` processes and return the exit code: 0, or that of the first that failed.

    Signals go to all. Raises RecipeError where a launcher has started this process itself.
    """
    if "RANK" in os.environ:
        raise RecipeError("command line", "--num-processes inside torchrun or accelerate launch", "Leave it out: they start the processes.")
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // count, 1))}
    command = [sys.executable, "-m", "tnl", *arguments]
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # a session of its own: Ctrl-C reaches the processes once, from here
            running.append(subprocess.Popen(command, env={**os.environ, **common, **threads, **place}, start_new_session=True))
        return wait(running)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(running: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait for all; where one fails, give the first a while to say why, then end all. Returns the first bad exit code, or 0."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in running]
        if any(codes) and not failed:
            failed = min(code for code in codes if code)  # one that was killed is why others failed
            deadline = time.monotonic() + PATIENCE
            if failed < 0:
                print(f"process {codes.index(failed)} of {len(running)} was ended by {signal.Signals(-failed).name}", file=sys.stderr)
        if None not in codes:
            return failed if failed >= 0 else 128 - failed
        if codes[0]:
            deadline = min(deadline, time.monotonic() + 2)
        if time.monotonic() > deadline:
            for process in running:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
