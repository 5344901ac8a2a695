"""torch, imported when it is first used.

Importing torch takes seconds, and `editkit ls`, `--help`, `--cfg job` and `validate` of a sweep
read only the fields of the configurable classes. So every file says `from editkit.lazy import
torch`; nothing may touch an attribute of it while being imported: no decorators, no bases.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

WAIT_POLICY = "OMP_WAIT_POLICY"
SPIN_COUNT = "GOMP_SPINCOUNT"


def wait_briefly() -> None:
    """Lets torch's threads spin for about 0.1 ms when they wait for each other and then sleep,
    unless the user chose otherwise.

    By default they spin for milliseconds. Beside other busy processes a thread then spins for one
    that is not running. Threads that sleep at once lose on a quiet machine. Seconds of the same 60
    small forward and backward passes with two threads on two cores:

    ==================  =====  ==================  ============
    threads             quiet  one busy process    four
    ==================  =====  ==================  ============
    default             1.4    8.3 to 10           over 100
    sleep at once       2.3    5 to 10             35 to 43
    3,000 spins         1.4    4.8 to 10           34
    (one thread)        2.2    2.3 to 2.6          6.9
    ==================  =====  ==================  ============

    The number of threads is left alone, as it changes rounding: `runtime.threads=1` is the user's
    choice for a machine that is shared. OpenMP reads the variables when torch is imported. Only
    GNU's OpenMP, which torch's wheels bring, knows the second; the others sleep at once.
    """
    if WAIT_POLICY not in os.environ:
        os.environ[WAIT_POLICY] = "PASSIVE"
        os.environ.setdefault(SPIN_COUNT, "3000")


if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            wait_briefly()
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # the next access costs nothing
            return value

    torch = _Torch()


def missing_packages(names: Iterable[str]) -> list[str]:
    """The names that cannot be imported, in the given order. Imports nothing."""
    return [name for name in names if importlib.util.find_spec(name) is None]
