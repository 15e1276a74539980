"""SIGTERM and Ctrl-C while training: the first asks, the second ends."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While it is entered, the first signal only sets `requested`; a second one ends the process at once, which harms no file.

    Python lets the main thread alone handle signals: in another (a notebook's) it does nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.words = "what is under way is finished and saved first"
        """What happens before the process ends, for the person who asked it to."""
        self.quiet = False
        """Of processes that train together one speaks."""
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            # os._exit: neither a library nor a finally clause may delay or catch it; saving is staged, so no half checkpoint is left
            sys.stderr.flush()
            os._exit(128 + number)
        self.requested = number
        if not self.quiet:
            os.write(2, f"\nstopping: {self.words} (once more: at once)\n".encode())

    def asked(self) -> bool:
        """Whether to stop."""
        return self.requested is not None

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.requested or 0)
