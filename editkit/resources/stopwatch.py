"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from editkit.lazy import torch
from editkit.resources.peak_memory import Peaks

PHASE = "editkit."  # what the names of phases begin with in a profile


def measured(name: str) -> AbstractContextManager[object]:
    """Gives a part of a step a name in torch's profile (`editkit bench --profile`); microseconds
    where none is taken.
    """
    return torch.profiler.record_function(PHASE + name)


class Stopwatch:
    """Adds up the wall time of named phases; waits for the GPU at a phase's end, so that work is
    charged to the phase that asked for it.
    """

    def __init__(self, device: torch.device, peaks: Peaks | None = None) -> None:
        self._device, self._peaks = device, peaks or Peaks()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with self._peaks.phase(name), measured(name):
            try:
                yield
            finally:
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
