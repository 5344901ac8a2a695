"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from editkit.lazy import torch
from editkit.resources.peak_memory import Peaks

PHASE = "editkit."  # prefix of the names of phases in a profile


def measured(name: str) -> AbstractContextManager[object]:
    """Names a part of a step in torch's profile (`editkit bench --profile`). It costs microseconds
    without a profiler.
    """
    return torch.profiler.record_function(PHASE + name)


class Stopwatch:
    """Adds up the wall time of named phases. It waits for the GPU at the end of a phase, so that
    work counts for the phase that launched it.
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
