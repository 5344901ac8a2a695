"""The card of a model that a ledger gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editkit.ledger.measure import PROTOCOL, Measured
from editkit.report.escape import escape_cell
from editkit.runner.card import base_name, factors_of, front, loading

if TYPE_CHECKING:
    from editkit.records.ledger import Ledger
    from editkit.runner.adapter import Adapter


def ledger_card(
    ledger: Ledger,
    adapter: Adapter | None,
    *,
    form: str,
    facts: Mapping[str, str],
    variants: Mapping[str, Measured],
    limits: Sequence[str],
) -> str:
    """The content of README.md.

    Args:
        adapter: the factors of the folder; None for a whole model.
        facts: what was reverted or merged, by its name.
        variants: the figures of the models that were compared.
        limits: what the model is not.
    """
    base = base_name({"model": ledger.head["model"]})
    editor = str((ledger.head.get("editor") or {}).get("name", "?"))
    shown = {
        "base model": base,
        "fingerprint of its weights": ledger.head["fingerprint"],
        "editor": editor,
        "restraint": ", ".join(ledger.head.get("restraint") or {}) or "none",
        **facts,
    }
    lines = [
        *front(str(ledger.head["model"]["id"]), form),
        "",
        f"# {escape_cell(base)}, edited",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {escape_cell(value)} |" for name, value in shown.items()),
        "",
        "## Measurements",
        "",
        *_measurements(variants),
        *([] if adapter is None else factors_of(adapter)),
        "## Limits",
        "",
        *(f"- {escape_cell(limit)}" for limit in limits),
        "",
        "## How to load it",
        "",
        "```python",
        loading(form, base, False),
        "```",
        "",
    ]
    return "\n".join(lines)


def _measurements(variants: Mapping[str, Measured]) -> list[str]:
    first = next(iter(variants.values()))
    rows = []
    for group, figures in first.groups.items():
        own = [each.groups[group] for each in variants.values()]
        rows.append((f"efficacy, {figures.n} {group}", [each.efficacy for each in own]))
        rows.append((f"as unedited, {figures.n} {group}", [each.unedited for each in own]))
    rows.append(
        (f"locality, {first.num_locality} prompts", [each.locality for each in variants.values()])
    )
    return [
        f"Protocol: {PROTOCOL}.",
        "",
        "| | " + " | ".join(variants) + " |",
        "|---|" + "---:|" * len(variants),
        *(f"| {name} | " + " | ".join(map(percent, values)) + " |" for name, values in rows),
        "",
    ]


def percent(value: float | None) -> str:
    """A share for a reader."""
    return "-" if value is None else f"{100 * value:.1f} %"
