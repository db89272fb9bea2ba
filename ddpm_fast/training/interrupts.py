"""Ctrl-C and SIGTERM let a step end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun hands on the Ctrl-C that the terminal has sent to all processes already.
_REPEATED_WITHIN_SECONDS = 3.0
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # in the environment of its processes


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is noted, and a second SIGINT interrupts at once.

    Attributes:
        signal: the number of the one that came, or 0.
        talkative: say on stderr what happens.
    """

    def __init__(self, talkative: bool = True) -> None:
        self.signal = 0
        self.talkative = talkative
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
            if self.talkative:  # not print: a signal may come in the middle of one
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                if _TORCHRUN in os.environ:
                    again += "; torchrun kills what has not ended after 30 s"
                os.write(2, f"\nfinishing the step and saving{again}\n".encode())
        elif number == signal.SIGINT:
            if _TORCHRUN in os.environ and now - self._since < _REPEATED_WITHIN_SECONDS:
                return
            raise KeyboardInterrupt
