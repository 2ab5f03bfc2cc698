"""Stopping a run between two steps instead of within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """Notes that a run has been asked to stop, by SIGTERM or by Ctrl-C.

    The second Ctrl-C interrupts at once. Use it as a context; outside it, and in threads other
    than the main one, signals do what they always do.

    Attributes:
        signal: number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None was not set from Python, and cannot be put back
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def leave(self) -> None:
        """Does what the signal asked for, once all is safe."""
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
