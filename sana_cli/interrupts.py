"""Signal handlers, from the start of a process to a clean stop.

Until torch is loaded, a signal ends the process at once (`end_at_once`). While a command works,
it raises `Asked` (`raise_asked`). Training finishes the micro-batch, saves and stops (`Stop`).

SIGINT is Ctrl-C. SIGTERM and SIGUSR1 come from schedulers; Slurm sends SIGUSR1 as a warning.
SIGHUP means that the terminal is closed. SIGHUP and SIGUSR1 stay ignored if they were, since
nohup ignores SIGHUP.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]  # Windows has the first two
SECONDS_TO_PASS_ON = 5.0  # torchrun forwards a signal that the terminal has sent already


class Asked(BaseException):
    """A signal asked for an end. Not an `Exception`: a library under import may swallow one."""

    def __init__(self, number: int) -> None:
        self.number = number


_asked: list[int] = []


def raise_asked(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by raising `Asked`."""
    _asked.append(number)
    raise Asked(number)


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by printing one line and ending the process."""
    os.write(2, f"error: {word_for(number)}\n".encode())
    os._exit(128 + number)


def word_for(number: int) -> str:
    """The message for a command that a signal ended."""
    return "interrupted" if number == signal.SIGINT else "terminated"


def attentive(steps: Iterator[Any]) -> Iterator[Any]:
    """Yield the same steps. Between them, raise an `Asked` that a library has swallowed."""
    for step in steps:
        if _asked:
            raise Asked(_asked[0])
        yield step


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send `SIGNALS` to `handler`, except SIGHUP and SIGUSR1 where they are ignored."""
    kept = (signal.SIGINT, signal.SIGTERM)
    numbers = [
        number for number in SIGNALS if number in kept or signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = [signal.signal(number, handler) for number in numbers]
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(
            unraisable.exc_value, Asked
        ):  # raised in a callback of Python's: `attentive` sees it
            report(unraisable)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, old in zip(numbers, previous, strict=True):
            signal.signal(number, old)


class Stop:
    """Remember a signal for a command that finishes its work. A second one ends the process."""

    def __init__(self, first_signal: Callable[[], None], by_torchrun: bool = False) -> None:
        """`first_signal` is called on the first one. torchrun sends each signal twice."""
        self.number: int | None = None
        self._tell, self._by_torchrun, self._since = first_signal, by_torchrun, 0.0

    def __call__(self) -> int | None:
        """The number of the first signal, or None."""
        return self.number

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            self._tell()
        elif not self._by_torchrun or now - self._since > SECONDS_TO_PASS_ON:
            os._exit(128 + number)

    def during(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Yield the same steps. A signal before the first one ends the command."""
        first = next(attentive(steps))
        with handling(self._handle):
            yield first
            yield from steps
