"""SIGTERM and Ctrl-C: the one place that handles them."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TerminatedError(SystemExit):
    """SIGTERM, as an exception, so that what is open is closed on the way out."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise TerminatedError in the block on SIGTERM, unless another handler is installed or in another thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def forward_signals(
    process: subprocess.Popen[str] | subprocess.Popen[bytes],
    numbers: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT),
) -> Iterator[list[signal.Signals]]:
    """Send signals on to a process instead of acting on them; yields those that came. For the main thread."""
    received: list[signal.Signals] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        process.send_signal(number)

    with handlers_restored(*numbers):
        for number in numbers:
            signal.signal(number, forward)
        yield received


@contextmanager
def handlers_restored(*numbers: signal.Signals) -> Iterator[None]:
    """Put the handlers of these signals back after the block, whatever a library installs in it."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
