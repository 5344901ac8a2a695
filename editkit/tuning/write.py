"""The files of a search: its table as markdown, CSV and JSON, and the best trial as recipes.

The recipes lie in a folder that `editkit run --config-dir` takes. They hold every value in which
the best trial differs from the plain editor or restraint.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.config.compose import compose, conf_folder
from editkit.config.identity import TARGET
from editkit.files import write_atomically
from editkit.sweeps.merge import literal
from editkit.tuning.prepare import GROUP, Tuning
from editkit.tuning.table import Number, Outcome, Row

AS_CONFIGURED = "as configured"
WIDTH = 96  # of the text of a recipe's source
# A model without numbers of its own, for the plain values of editors and restraints.
BARE = ("model=hf", "model.id=none", "~recipe")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A file with the best values of one editor or restraint."""

    path: Path
    where: str  # to copy it, so that it is chosen automatically
    use: tuple[str, ...]  # the arguments of `editkit run` that apply it


def command(tuning: Tuning) -> str:
    """The command of the search."""
    options = ["--config-dir", str(tuning.config_dir)] if tuning.config_dir else []
    return shlex.join(["editkit", GROUP, *options, *tuning.words])


def objective(tuning: Tuning, found: Outcome) -> str:
    """What the score is, in one sentence."""
    search = tuning.search
    parts = [f"{search.edits} single edits"] if search.edits else []
    if search.sequential:
        batches = f" in batches of {search.batch_size}" if search.batch_size > 1 else ""
        parts.append(f"a sequence of {search.sequential} edits{batches}")
    metrics = ", ".join(found.metrics) or "efficacy, generalization, locality"
    protocol = f" (protocol {found.protocol})" if found.protocol else ""
    return f"the harmonic mean of {metrics}{protocol}, over {' and '.join(parts)}"


def facts(tuning: Tuning) -> str:
    """Which facts the trials edited, and which runs edit others."""
    data, search = tuning.data, tuning.search
    most = max(search.edits, search.sequential)
    text = f"{tuning.order}: the first {most} of {len(data.requests)} in that order"
    if "reversed" in tuning.order and len(data.requests) > most:
        text += f"; a run in file order with at most {len(data.requests) - most} edits edits others"
    return text


def columns(tuning: Tuning) -> list[str]:
    """The searched keys that have several values."""
    return [each.key for each in tuning.dimensions if len(each.texts) != 1]


def cells(row: Row, tuning: Tuning, found: Outcome) -> dict[str, Any]:
    """A row of the table as names and values; fractions, None where nothing was measured."""
    values: dict[str, Any] = {"trial": row.trial.number}
    values |= {key: row.values[key] for key in columns(tuning)}
    numbers = {(number.arm, number.metric): number for number in row.numbers}
    for arm in tuning.arms:
        for metric in found.metrics:
            number = numbers.get((arm, metric))
            name = f"{metric} ({arm})" if len(tuning.arms) > 1 else metric
            values[name] = None if number is None else number.value
    values |= {"score": row.score, "stderr": row.stderr, "seconds an edit": row.seconds}
    return values | {"state": row.state if row.trial.overrides else f"{row.state}, {AS_CONFIGURED}"}


def shown(name: str, value: Any) -> str:
    """A value of the table as text: fractions in percent."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if name == "seconds an edit" else f"{100 * value:.1f}"
    return str(value)


def table_rows(tuning: Tuning, found: Outcome) -> tuple[list[str], list[list[str]]]:
    """Header and rows as texts."""
    rows = [cells(row, tuning, found) for row in found.rows]
    header = list(rows[0]) if rows else []
    shorter = {key: key.rpartition(".")[2] for key in columns(tuning)}
    if len(set(shorter.values())) < len(shorter):
        shorter = {}
    names = [f"{name} %" if name == "score" else shorter.get(name, name) for name in header]
    return names, [[shown(name, value) for name, value in row.items()] for row in rows]


def markdown(tuning: Tuning, found: Outcome, recipes: list[Recipe]) -> str:
    """The whole report of the search."""
    header, rows = table_rows(tuning, found)
    lines = [
        f"# {tuning.choices['editor']} on {tuning.label}",
        "",
        f"- Command: `{command(tuning)}`",
        f"- Score: {objective(tuning, found)}, in percent.",
        f"- Facts: {facts(tuning)} ({tuning.data.label}, {tuning.data.origin}).",
        *(f"- Recipe: `{recipe.path.relative_to(tuning.folder)}`" for recipe in recipes),
        "",
    ]
    for row in (header, ["---"] * len(header), *rows):
        lines.append(f"| {' | '.join(text.replace('|', ' ') for text in row)} |")
    return "\n".join(lines) + "\n"


def write(tuning: Tuning, found: Outcome) -> list[Recipe]:
    """Writes table.md, table.csv, table.json and, if every trial has ended, the recipes, each
    atomically. Returns the recipes.
    """
    best = found.best if found.is_complete else None
    recipes = _write_recipes(tuning, found, best) if best else []
    rows = [cells(row, tuning, found) for row in found.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    about = {
        "command": command(tuning),
        "score": objective(tuning, found),
        "protocol": found.protocol,
        "facts": facts(tuning),
        "dataset": tuning.data.provenance(),
        "recipes": [str(recipe.path.relative_to(tuning.folder)) for recipe in recipes],
        "trials": [_as_json(row) for row in found.rows],
    }
    write_atomically(tuning.folder / "table.md", markdown(tuning, found, recipes).encode())
    write_atomically(tuning.folder / "table.csv", text.getvalue().encode())
    write_atomically(tuning.folder / "table.json", json.dumps(about, indent=1).encode())
    return recipes


def _as_json(row: Row) -> dict[str, Any]:
    def number(each: Number) -> dict[str, Any]:
        return {name: getattr(each, name) for name in ("arm", "metric", "value", "stderr", "n")}

    return {
        "trial": row.trial.number,
        "overrides": list(row.trial.overrides),
        "state": row.state,
        "score": row.score,
        "stderr": row.stderr,
        "seconds_an_edit": row.seconds,
        "metrics": [number(each) for each in row.numbers],
    }


def _write_recipes(tuning: Tuning, found: Outcome, best: Row) -> list[Recipe]:
    """The best values, as recipes of the editor and of the restraints that were searched."""
    editor, model = str(tuning.choices["editor"]), str(tuning.choices["model"])
    restraints = dict(best.trial.config.get("restraint") or {})
    stack = f"restraint=[{','.join(restraints)}]" if restraints else "restraint=none"
    plain = compose([f"editor={editor}", *([] if editor in restraints else [stack]), *BARE]).config
    searched = {each.key.split(".")[0] for each in tuning.dimensions}
    names = {each.key.split(".")[1] for each in tuning.dimensions if each.key.count(".")}
    origin = source(tuning, found, best)
    recipes = []
    if "editor" in searched:
        name = _free_name("recipe", editor, model, tuning.label)
        values = changed(best.trial.config["editor"], plain["editor"])
        about = f"{editor} on {tuning.label}, tuned by `editkit {GROUP}`"
        note = {"recipe": {"provenance": "tuned", "source": origin}}
        path = _save(tuning, f"recipe/{editor}/{name}", about, {"editor": values} | note, [])
        where = f"conf/recipe/{editor}/{model}.yaml"
        recipes.append(Recipe(path=path, where=where, use=(f"recipe={editor}/{name}",)))
    for restraint in sorted(restraints.keys() & names if "restraint" in searched else ()):
        name = _free_name("restraint_recipe", restraint, model, tuning.label)
        plain_values = (plain.get("restraint") or {}).get(restraint) or {}
        values = changed(restraints[restraint], plain_values)
        at = model
        if "source" in plain_values:  # EAC: numbers of an editor, a model and a dataset
            dataset, values = tuning.choices["dataset"], values | {"source": "tuned"}
            name, at = f"{editor}/{name}/{dataset}", f"{editor}/{model}/{dataset}"
        about = f"{restraint} on {tuning.label}, tuned by `editkit {GROUP}`"
        content = {"restraint": {restraint: values}}
        path = _save(tuning, f"restraint_recipe/{restraint}/{name}", about, content, [origin])
        where = f"conf/restraint_recipe/{restraint}/{at}.yaml"
        use = tuple(f"restraint.{restraint}.{key}={literal(item)}" for key, item in values.items())
        recipes.append(Recipe(path=path, where=where, use=use))
    return recipes


def _place(restraint: str, choices: Mapping[str, Any]) -> str:
    """Where a restraint looks for its recipe, as its file says: by model, or by editor, model and
    dataset.
    """
    path = conf_folder() / "restraint" / f"{restraint}.yaml"
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"/restraint_recipe/{restraint}: (\S+)", text)
    place = found[1] if found else "${model}"
    return re.sub(r"\$\{(\w+)\}", lambda name: str(choices[name[1]]), place)


def source(tuning: Tuning, found: Outcome, best: Row) -> str:
    """Where the values come from, for a recipe."""
    stderr = "" if best.stderr is None else f" (standard error {100 * best.stderr:.1f})"
    numbers = ", ".join(
        f"{number.metric} {100 * number.value:.1f}"
        + (f" ({number.arm})" if len(tuning.arms) > 1 else "")
        for number in best.numbers
    )
    return (
        f"the best of {len(tuning.trials)} trials of `{command(tuning)}`: score"
        f" {100 * (best.score or 0):.1f}{stderr}, {objective(tuning, found)}; {numbers};"
        f" facts: {facts(tuning)}"
    )


def _free_name(group: str, method: str, model: str, label: str) -> str:
    """A file name that no shipped recipe has, as a shipped file hides one of the same name."""
    from editkit.config.build import folder_name

    shipped = conf_folder() / group / method / f"{model}.yaml"
    return f"{folder_name(label)}-tuned" if model == "hf" or shipped.exists() else model


def changed(values: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the plain ones, nested as they are."""
    different: dict[str, Any] = {}
    for name, value in values.items():
        before = plain.get(name)
        if name in (TARGET, "name") or value == before:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = changed(value, before)
        different[name] = value
    return different


def _save(
    tuning: Tuning, name: str, about: str, content: Mapping[str, Any], comments: list[str]
) -> Path:
    path = tuning.folder / "conf" / f"{name}.yaml"
    lines = ["# @package _global_", f"# {about}", *_commented(comments), *_yaml(content)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _commented(texts: list[str]) -> Iterator[str]:
    import textwrap

    for text in texts:
        yield from (f"# {line}" for line in textwrap.wrap(text, WIDTH, break_long_words=False))


def _yaml(content: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Block mappings with lists on one line. Long texts are folded."""
    import textwrap

    for name, value in content.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _yaml(value, f"{indent}  ")
        elif isinstance(value, str) and len(value) > 60:
            yield f"{indent}{name}: >-"
            lines = textwrap.wrap(value, WIDTH - len(indent), break_long_words=False,
                                  break_on_hyphens=False)  # fmt: skip
            yield from (f"{indent}  {line}" for line in lines)
        else:
            yield f"{indent}{name}: {json.dumps(value)}"
