"""SIGTERM and Ctrl-C while training: the first asks, the second ends."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While it is entered, the first signal only sets `requested`; a second one ends the process at once, which harms no file.

    Before `ready()` nothing is worth saving: a signal ends the process as it would without us.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.waits = False
        self.before: dict[int, Any] = {}

    def ready(self) -> None:
        """From now on a signal lets the step be finished and saved."""
        self.waits = True

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None or not self.waits:
            # os._exit: neither a library nor a finally clause may delay or catch it; saving is staged, so no half checkpoint is left
            sys.stderr.flush()
            os._exit(128 + number)
        self.requested = number
        os.write(2, b"\nstopping: the step is finished and saved first (once more: at once)\n")

    def asked(self) -> bool:
        """Whether to stop."""
        return self.requested is not None

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.requested or 0)
