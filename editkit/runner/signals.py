"""Signals that ask a session to save its state and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

# Ctrl-C sends INT. `kill`, and Slurm at a pre-emption, send TERM. Slurm's --signal sends USR1 with
# our presets, USR2 with submitit's own.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """Work that can be resumed was stopped on request."""


@dataclass
class Received:
    """The signal that asked the session to stop; None until one arrives."""

    number: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Received]:
    """Turns the first of these signals into a request to save and stop after the present step. A
    second Ctrl-C stops at once.
    """
    received = Received()

    def note(number: int, _frame: object) -> None:
        if received.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        # The first signal is the reason; a scheduler may send more.
        received.number = received.number or number

    # Python delivers signals to the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    former = {number: signal.signal(number, note) for number in ASKING}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
