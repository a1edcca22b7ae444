"""A polite end: the first SIGTERM or Ctrl-C ends a run after the step it is in."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that ended between two steps, its state in a checkpoint.

    `number` is the signal that asked for it, None where its caller did.
    """

    def __init__(self, number: int | None, step: int):
        asked = "as asked" if number is None else f"by {signal.Signals(number).name}"
        super().__init__(f"stopped {asked} after step {step}")
        self.number, self.step = number, step

    @property
    def status(self) -> int:
        """What a shell expects of a process that a signal ended: 128 + its number."""
        return 0 if self.number is None else 128 + self.number


class Stop:
    """While entered, signals set `asked`; a second one ends the process at once.

    Outside the main thread, where Python allows no handlers, `asked` stays None.
    """

    def __init__(self):
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
