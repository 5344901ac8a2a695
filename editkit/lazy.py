"""torch, imported when it is first used.

Importing torch takes seconds, and `editkit ls`, `--help`, `--cfg job` and `validate` read only the
fields of the configurable classes. So every file says `from editkit.lazy import torch`; nothing may
touch an attribute of it while being imported: no decorators, no bases.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

WAIT_POLICY = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Lets torch's threads sleep while they wait for each other, unless the user chose otherwise.

    By default they spin. Beside other busy processes a thread then spins for one that is not
    running: a ROME edit of SmolLM2-135M took 240 s of a loaded machine with two cores instead of
    21 s. OpenMP reads the variable when torch is imported. It changes no result.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")


if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            wait_passively()
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # the next access costs nothing
            return value

    torch = _Torch()


def missing_packages(names: Iterable[str]) -> list[str]:
    """The names that cannot be imported, in the given order. Imports nothing."""
    return [name for name in names if importlib.util.find_spec(name) is None]
