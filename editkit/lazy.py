"""torch, imported when it is first used.

Importing torch takes seconds, and `editkit ls`, `--help`, `--cfg job` and `validate` read only the
fields of the configurable classes. So every file says `from editkit.lazy import torch`; nothing may
touch an attribute of it while being imported: no decorators, no bases.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # the next access costs nothing
            return value

    torch = _Torch()


def missing_packages(names: Iterable[str]) -> list[str]:
    """The names that cannot be imported, in the given order. Imports nothing."""
    return [name for name in names if importlib.util.find_spec(name) is None]
