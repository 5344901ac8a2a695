"""The result of one edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from editkit.linalg.lowrank import LowRank
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update

SHOWN = 5  # requests and matrices in the text of a result


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class EditResult:
    """What one batch of edits changed.

    Probabilities are geometric means over the tokens of a target, in [0, 1], one for each request.
    """

    requests: tuple[EditRequest, ...]
    updates: Mapping[str, Update] = field(default_factory=dict)  # by module, (d_out, d_in)
    # By module, the figures of `modules` in steps.jsonl: condition_number, l1_norm, ...
    telemetry: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # The figures of `side` in steps.jsonl: entries, bytes, ...; None: the weights were edited.
    side: Mapping[str, float] | None = None
    probability_before: tuple[float, ...]
    probability_after: tuple[float, ...]
    seconds: Mapping[str, float]  # by phase: target, solve, apply, restrain, telemetry
    nonfinite: str | None = None  # the number that was not finite; then nothing was changed
    broken: tuple[Probe, ...] = ()  # the canaries that the edit changed; then it was taken back

    def __repr__(self) -> str:
        number = len(self.requests)
        head = f"EditResult: {number} request{'s' if number > 1 else ''}, "
        head += f"{sum(self.seconds.values()):.2f} s"
        if self.nonfinite is not None:
            head += f", not applied: non-finite {self.nonfinite}"
        if self.broken:
            head += f", taken back: it changes {len(self.broken)} canaries"
        lines = [head, *(f"  {probe.prompt} -> {probe.answer}" for probe in self.broken[:SHOWN])]
        rows = zip(self.requests, self.probability_before, self.probability_after, strict=True)
        for request, before, after in list(rows)[:SHOWN]:
            change = f"probability {before:.4f} -> {after:.4f}"
            lines.append(f"  {request.full_prompt} -> {request.target}: {change}")
        for module, update in list(self.updates.items())[:SHOWN]:
            figures = self.telemetry[module]
            kind = f"rank {update.rank}" if isinstance(update, LowRank) else "dense"
            lines.append(
                f"  {module}: {kind} update of norm {figures['update_frobenius']:.4g}, "
                f"condition number {figures['condition_number']:.4g}"
            )
        if self.side is not None:
            counts = [
                f"{self.side[name]:.0f} {name}"
                for name in ("entries", "ranks")
                if name in self.side
            ]
            size = f"{self.side['bytes'] / 1e6:.3g} MB"
            lines.append(f"  beside the weights: {', '.join([*counts, size])}")
        hidden = max(number, len(self.updates)) - SHOWN
        return "\n".join([*lines, *(["  ..."] if hidden > 0 else [])])
