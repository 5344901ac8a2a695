"""The peak memory of each phase of a run: the resident set of the process on a CPU, the bytes
allocated by torch on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from editkit.lazy import torch

BETWEEN = "measuring"  # the time between phases: evaluation, and writing checkpoints


def reset_peak_memory(device: str) -> None:
    """Restarts the count of the peak, if the system allows it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")  # Linux: clears the high-water mark


def peak_memory(device: str) -> int:
    """Bytes; 0 if the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Twenty times a step: a part of the file, as bytes, takes a third of the time of its lines.
    with suppress(OSError), open("/proc/self/status", "rb", buffering=0) as file:
        _, _, after = file.read(4096).partition(b"VmHWM:")
        if after:
            return int(after.split(maxsplit=1)[0]) * 1024
    return 0


class Peaks:
    """Records the peak of each named phase. Phases do not nest. Without a device nothing is
    recorded.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._now = BETWEEN
        self._bytes: dict[str, int] = {}
        if device is not None:
            reset_peak_memory(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn(name)
        try:
            yield
        finally:
            self._turn(BETWEEN)

    @property
    def bytes(self) -> dict[str, int]:
        """The peaks so far, by phase."""
        self._turn(self._now)
        return dict(self._bytes)

    def _turn(self, name: str) -> None:
        if self._device is not None:
            self._bytes[self._now] = max(self._bytes.get(self._now, 0), peak_memory(self._device))
            reset_peak_memory(self._device)
            self._now = name
