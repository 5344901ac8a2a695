"""Signals that ask a run to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

# What people and schedulers send: Ctrl-C; kill, and Slurm at a pre-emption; Slurm's --signal by our
# presets (submitit's own is USR2).
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """Work that keeps what it has done was asked to stop."""


@dataclass
class Received:
    """The signal that asked the run to stop, once one did."""

    number: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Received]:
    """Turns the first of `ASKING` into a request to save and stop after the edit at hand; a second
    Ctrl-C stops at once.
    """
    received = Received()

    def note(number: int, _frame: object) -> None:
        if received.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.number = (
            received.number or number
        )  # the first is why: later ones are the scheduler losing patience

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers signals to the main thread alone
        yield received
        return
    former = {number: signal.signal(number, note) for number in ASKING}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
