"""The machine's part of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from editkit.errors import OptionError, message


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, threads and memory. They change rounding at most.

    Raises:
        OptionError: an option is out of range.
    """

    device: str  # cpu, cuda, cuda:<number> or mps
    threads: int | None  # of torch on the CPU; None: torch's own choice
    memory_gb: float | None = None  # of the device; None: what is free there
    # Where second moments and their factors lie.
    statistics: Literal["device", "cpu", "disk"] = "device"
    base: Literal["device", "cpu"] = "device"  # where W_0 of the edited matrices lies

    def __post_init__(self) -> None:
        problems = unknown_device(self.device, key="device")
        if self.threads is not None and self.threads < 1:
            expected = "at least 1, or null for torch's own choice"
            problems.append(message("threads", "out of range", got=self.threads, expected=expected))
        if self.memory_gb is not None and not self.memory_gb > 0:
            expected = "more than 0, or null for the free memory of the device"
            problems.append(
                message("memory_gb", "out of range", got=self.memory_gb, expected=expected)
            )
        if problems:
            raise OptionError(problems)

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def statistics_at(self) -> str:
        """On a CPU everything is on the device."""
        return self.statistics if self.is_gpu else "device"

    @property
    def base_at(self) -> str:
        return self.base if self.is_gpu else "device"


def unknown_device(device: str, *, key: str) -> list[str]:
    """The message for a device that torch has no name for; `key` names the option."""
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        return []
    expected = "cpu, cuda, cuda:<number> or mps"
    return [message(key, "unknown device", got=device, expected=expected)]
