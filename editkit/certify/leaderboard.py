"""Certificates as tables, one for each set of numbers that can be compared: the same model,
dataset, edits, protocol and the rest that a number is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.certify.certificate import Certificate, read_certificate
from editkit.certify.signature import fingerprint_of, problem_of
from editkit.errors import ConfigError, message
from editkit.files import write_atomically
from editkit.report.escape import escape

METRICS = ("efficacy", "generalization", "locality", "portability", "score")
PAGE, TEXT = "leaderboard.html", "leaderboard.txt"
STYLE = (
    "body{font-family:sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}caption{text-align:left;padding:1em 0}"
)


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """What the numbers of one table have in common."""

    model: str
    fingerprint: str
    dataset: str
    digest: str
    requests: str  # digest of the ids of the edits
    edits: int
    batch_size: int
    protocol: str
    timing: str
    aggregation: str
    context: str
    chat_template: str
    variant: str
    sampled: str
    rollback: bool

    def title(self) -> str:
        """In words, without what is as usual."""
        parts = [
            f"{self.model} ({self.fingerprint[:8]})",
            f"{self.dataset} ({self.digest[:8]})",
            f"{self.edits} edits ({self.requests})",
            f"batches of {self.batch_size}" if self.batch_size > 1 else "one at a time",
            f"protocol {self.protocol}",
            f"timing {self.timing}",
        ]
        for name in ("aggregation", "context", "chat_template", "variant", "sampled"):
            if value := getattr(self, name):
                parts.append(f"{name.replace('_', ' ')} {value}")
        return ", ".join([*parts, *(["each taken back"] if self.rollback else [])])


@dataclass(frozen=True, kw_only=True)
class Row:
    """The numbers of one view of one run."""

    editor: str
    restraint: str
    view: str
    seed: int
    signer: str  # or "not signed"
    digest: str  # of the certificate
    numbers: Mapping[str, Mapping[str, Any]]  # by metric


def leaderboard(files: Sequence[Path], to: Path) -> dict[Setting, list[Row]]:
    """Writes leaderboard.html and leaderboard.txt, and returns their tables.

    Raises:
        ConfigError: a file is no certificate, its chain is broken or its signature is wrong, or it
            has no editing metrics. All problems are reported together.
    """
    problems: list[str] = []
    certificates: list[Certificate] = []
    for path in files:
        try:
            certificate = read_certificate(path)
        except ConfigError as error:
            problems += error.problems
            continue
        broken, signature = certificate.broken_link, certificate.content.get("signature")
        if broken is not None:
            problem = f"its section {broken} is not what the chain of digests covers"
            problems.append(message(str(path), problem))
        elif signature is not None and (wrong := _wrong(signature, certificate.digest)):
            problems.append(message(str(path), f"its signature cannot be used, {wrong}"))
        else:
            certificates.append(certificate)
    if problems:
        raise ConfigError(problems)
    tables: dict[Setting, list[Row]] = {}
    seen: set[str] = set()
    for certificate in certificates:
        if certificate.digest in seen:
            continue  # the same file twice
        seen.add(certificate.digest)
        rows = list(_rows(certificate))
        if not rows:
            problem = "the run has no editing metrics at its end"
            problems.append(message(str(certificate.path), problem))
        for setting, row in rows:
            tables.setdefault(setting, []).append(row)
    if problems:
        raise ConfigError(problems)
    tables = {setting: _ranked(tables[setting]) for setting in sorted(tables)}
    write_atomically(to / PAGE, page_of(tables).encode())
    write_atomically(to / TEXT, text_of(tables).encode())
    return tables


def _wrong(signature: Any, digest: str) -> str | None:
    return problem_of(signature, digest, None) if isinstance(signature, Mapping) else "malformed"


def _rows(certificate: Certificate) -> list[tuple[Setting, Row]]:
    """The last editing metrics of each view, by what they can be compared with."""
    config = certificate.section("configuration")["config"]
    inputs, about = certificate.section("inputs"), certificate.section("about")
    signature = certificate.content.get("signature")
    last = about["steps"]
    found: dict[tuple[Setting, str], dict[str, Mapping[str, Any]]] = {}
    for number in certificate.section("numbers"):
        is_whole = number.get("block") is None and number.get("subset") is None
        if number["kind"] != "editing" or number["step"] != last or not is_whole:
            continue
        if number["metric"] in METRICS and number.get("timing") in ("milestone", "rollback"):
            setting = _setting(number, config, inputs)
            found.setdefault((setting, number["view"]), {})[number["metric"]] = number
    return [
        (
            setting,
            Row(
                editor=_name(config.get("editor")),
                restraint="+".join(config.get("restraint") or {}) or "none",
                view=view,
                seed=int(about["seed"] or 0),
                signer=fingerprint_of(signature) if signature else "not signed",
                digest=certificate.digest,
                numbers=numbers,
            ),
        )
        for (setting, view), numbers in found.items()
    ]


def _setting(
    number: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Setting:
    model, dataset = inputs.get("model") or {}, inputs.get("dataset") or {}

    def text(name: str) -> str:
        return str(number.get(name) or "")

    return Setting(
        model=str(model.get("name", "?")),
        fingerprint=str(model.get("fingerprint", "?")),
        dataset=str(dataset.get("name", "?")),
        digest=str(dataset.get("digest", "?")),
        requests=text("requests"),
        edits=int(config.get("edits") or 0),
        batch_size=int(config.get("batch_size") or 1),
        protocol=text("protocol"),
        timing=text("timing"),
        # Averages over requests and over prompts, and of other contexts, are other numbers.
        aggregation=text("aggregation"),
        context=text("context"),
        chat_template=text("chat_template"),
        variant=text("variant"),
        sampled=text("sampled_from"),
        rollback=bool(config.get("rollback")),
    )


def _name(node: Any) -> str:
    node = node or {}
    return str(node.get("name") or str(node.get("_target_", "?")).rpartition(".")[2].lower())


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """By score, then efficacy, best first; without them last."""

    def key(row: Row) -> tuple[float, float]:
        return tuple(-_value(row, name) for name in ("score", "efficacy"))  # type: ignore[return-value]

    return sorted(rows, key=key)


def _value(row: Row, metric: str) -> float:
    value = (row.numbers.get(metric) or {}).get("value")
    return float("-inf") if value is None else float(value)


def _cells(row: Row, metrics: Sequence[str]) -> list[str]:
    restraint = row.restraint if row.restraint == row.view else f"{row.restraint} ({row.view})"
    cells = [f"{row.editor}, {restraint}", str(row.seed)]
    for metric in metrics:
        number = row.numbers.get(metric)
        if number is None or number.get("value") is None:
            cells.append("-")
            continue
        spread = number.get("stderr")
        own = f"{100 * number['value']:.1f}"
        cells.append(own if spread is None else f"{own} ± {100 * spread:.1f}")
    return [*cells, row.signer, row.digest[:12]]


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    metrics = [name for name in METRICS if any(name in row.numbers for row in rows)]
    head = ["editor, restraint (view)", "seed", *(f"{name} %" for name in metrics)]
    return [*head, "signed by", "certificate"], [_cells(row, metrics) for row in rows]


NOTE = (
    "One table for each set of numbers that can be compared. Chains and signatures were checked; "
    "the runs' folders were not. ± is the standard error."
)


def text_of(tables: Mapping[Setting, Sequence[Row]]) -> str:
    """All tables as text."""
    parts = [NOTE]
    for setting, rows in tables.items():
        head, cells = _table(rows)
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *cells)
        ]
        parts.append("\n".join([setting.title(), "", *lines]))
    return "\n\n".join(parts) + "\n"


def page_of(tables: Mapping[Setting, Sequence[Row]]) -> str:
    """All tables as one page without scripts."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Leaderboard</title>"
        f"<style>{STYLE}</style><h1>Leaderboard</h1><p>{escape(NOTE)}</p>"
    ]
    for setting, rows in tables.items():
        head, cells = _table(rows)
        parts.append(f"<table><caption>{escape(setting.title())}</caption>")
        parts.append("<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>")
        for line in cells:
            parts.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>")
        parts.append("</table>")
    return "\n".join([*parts, "</html>", ""])
