"""A child that does not outlive its parent, however that ends: `python -m tnl.page.leash MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS`.

The parent holds the other end of the standard input (`stdin=subprocess.PIPE`) and never writes. Whatever ends the parent, `kill -9`
included, closes it, and the child then ends as SIGTERM would end it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

SECONDS = 60
"""How long a child may take to end well."""


def hold(pipe: int, seconds: float = SECONDS) -> None:
    """Wait until nobody holds the pipe's other end, then end this process: by SIGTERM, and by force where that does not."""
    while os.read(pipe, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os._exit(1)


def main() -> None:
    """Take the pipe away from the standard input, watch it, and run the module."""
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=hold, args=(pipe,), name="leash", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
