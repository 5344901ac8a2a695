"""Which shortcuts are right for a network. Each is compared once with the plain computation.

editkit computes less than the whole network where it can: it continues from kept hidden states,
shares common prefixes, and caches keys and values. The shortcuts assume how a network is built. A
comparison on a short text tells whether the assumption holds. Where it does not, the model takes
the plain path, which is slower and assumes less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from editkit.errors import ConfigError
from editkit.lazy import torch

Results = TypeVar("Results")
Shortcut = Literal["search", "products", "keys", "scoring", "generation"]
PLAIN = {  # what takes the place of a shortcut
    "search": "target searches run the whole network in every step",
    "products": "target searches compute their products in float32",
    "keys": "the keys of every layer are computed from the first layer on",
    "scoring": "every text is scored in a row of its own",
    "generation": "every generated token runs the whole text again",
}
# Relative differences up to which two computations are the same up to rounding, by dtype. Half
# precision keeps 8 (bfloat16) or 11 (float16) bits, and every block rounds anew.
TOLERANCES = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A shortcut beside the plain computation: relative differences by quantity."""

    shortcut: Shortcut
    differences: Mapping[str, float]
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether all differences are small. Values that are not finite in both agree."""
        return all(value <= self.tolerance for value in self.differences.values())

    @property
    def problem(self) -> str:
        """What is wrong, as the end of a sentence."""
        largest = max(self.differences.values())
        if not math.isfinite(largest):
            return "fails in this network"
        return (
            f"gives other numbers (relative difference {largest:.2g}; at most {self.tolerance:g} "
            "is rounding)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """The shortcuts of a model, as far as they were compared. One without a comparison is taken."""

    comparisons: tuple[Comparison, ...] = ()

    def allows(self, shortcut: Shortcut) -> bool:
        """Whether a shortcut may be taken."""
        return all(each.agrees for each in self.comparisons if each.shortcut == shortcut)

    def with_comparisons(self, comparisons: Iterable[Comparison]) -> Shortcuts:
        """These and further comparisons. Of two comparisons of a shortcut, one that does not agree
        stays.
        """
        found = {each.shortcut: each for each in self.comparisons}
        for each in comparisons:
            if each.shortcut not in found or found[each.shortcut].agrees:
                found[each.shortcut] = each
        return Shortcuts(comparisons=tuple(found.values()))

    def warnings(self, model: str, family: str) -> list[str]:
        """A sentence for every shortcut that is not taken."""
        return [
            f"{model} ({family}): {PLAIN[each.shortcut]}, because the shortcut {each.problem}. "
            "The results are right, but the run takes longer."
            for each in self.comparisons
            if not each.agrees
        ]

    def report(self) -> dict[str, Any]:
        """Plain JSON values: the inverse of `from_report`. A difference of null is not finite."""
        return {
            each.shortcut: {
                "taken": each.agrees,
                "tolerance": each.tolerance,
                "differences": {
                    name: value if math.isfinite(value) else None
                    for name, value in each.differences.items()
                },
            }
            for each in self.comparisons
        }

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> Shortcuts:
        return cls(
            comparisons=tuple(
                Comparison(
                    shortcut=shortcut,  # type: ignore[arg-type] # the keys of `report`
                    tolerance=found["tolerance"],
                    differences={
                        name: math.inf if value is None else value
                        for name, value in found["differences"].items()
                    },
                )
                for shortcut, found in report.items()
            )
        )


def attempted(compute: Callable[[], Results]) -> Results | None:
    """The results of a shortcut; None if the network cannot be run in this way."""
    try:
        return compute()
    except (ConfigError, torch.OutOfMemoryError):
        raise
    # What networks raise for arguments, shapes or caches that they do not expect.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def compared(
    shortcut: Shortcut,
    ours: Mapping[str, torch.Tensor] | None,
    plain: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
) -> Comparison:
    """Compares tensors by quantity. `ours` is None if the shortcut cannot be taken at all."""
    return Comparison(
        shortcut=shortcut,
        differences={
            name: math.inf if ours is None else difference(ours[name], values)
            for name, values in plain.items()
        },
        tolerance=tolerance_of(dtype),
    )


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference that is taken for rounding."""
    return TOLERANCES[str(dtype).removeprefix("torch.")]


def difference(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """|ours - plain| / |plain|, in float64.

    It is 0 if both hold numbers that are not finite, where there is nothing to compare, and
    infinite if only one of them does.
    """
    ours, plain = ours.detach().double().flatten(), plain.detach().double().flatten()
    finite = [bool(torch.isfinite(values).all()) for values in (ours, plain)]
    if not all(finite):
        return 0.0 if not any(finite) else math.inf
    size = float(torch.linalg.vector_norm(plain))
    error = float(torch.linalg.vector_norm(ours - plain))
    return error / size if size else (math.inf if error else 0.0)
