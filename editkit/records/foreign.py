"""Results of other programs as records: a foreign run.

A folder of MEMIT's `case_*.json`, or a `*_results.json` of EasyEdit, is one foreign run. Nothing is
measured again. Its status is "foreign", and every number has the program as its variant. The files
do not tell whether edits add up or are taken back one by one, so their numbers have no timing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from editkit.datasets.strict_json import BadJson, parse
from editkit.errors import ConfigError, message
from editkit.records.layouts import EASYEDIT, MEMIT, Column, Layout, LayoutError, mapping
from editkit.records.means import harmonic_mean, mean_and_stderr
from editkit.records.reader import RunRecords
from editkit.records.views import UNRESTRAINED
from editkit.types import EvalRecord, Measurement, StepRecord

CASE = re.compile(r"(?:\d+_edits-)?case_[\w-]+\.json")
LIST = re.compile(r"(?:.*[_-])?results\.json")
FOREIGN = "measured by"  # begins the variant of every number, before the name of the program
FILES = "MEMIT's case_*.json or EasyEdit's *_results.json"
MOST_PROBLEMS = 8  # of one foreign run that a message lists
HEADLINES = ("efficacy", "generalization", "locality")  # whose harmonic mean is the score
UNBOUNDED = ("_magnitude", "_bits", "consistency")  # metrics that are no shares of successes
PARAMETERS = "params.json"
NO_ANSWER = "<|endoftext|>"  # the true answer of a zsRE record in MEMIT's code
Case = tuple[Path, Mapping[str, Any]]


def foreign_runs(path: Path) -> list[Path]:
    """The foreign runs at or below a path: folders of MEMIT's files, and files of EasyEdit. Below a
    folder of MEMIT's files there are none.
    """
    if path.is_file():
        return [path] if path.suffix == ".json" else []
    if not path.is_dir():
        return []
    inside = sorted(path.iterdir())
    if any(CASE.fullmatch(each.name) for each in inside):
        return [path]
    files = [each for each in inside if LIST.fullmatch(each.name) and each.is_file()]
    return [*files, *(run for each in inside if each.is_dir() for run in foreign_runs(each))]


def load_foreign(path: Path) -> RunRecords:
    """The records of a foreign run.

    Raises:
        ConfigError: files are malformed or have another layout; with file and field.
    """
    layout, cases, problems = _cases(path)
    scores: list[Mapping[Column, float]] = []
    for file, case in cases if not problems else ():
        try:
            scores.append(layout.scores(case))
        except LayoutError as error:
            problems.append(_problem(file, layout, error))
    if not problems and len(sizes := {str(case.get("num_edits")) for _, case in cases}) > 1:
        got = ", ".join(sorted(sizes))
        problems.append(message(str(path), "the files differ in num_edits", got=got))
    if problems:
        more = len(problems) - MOST_PROBLEMS
        also = [f"{path}: {more} more problems of this kind"] if more > 0 else []
        raise ConfigError([*problems[:MOST_PROBLEMS], *also])
    ids = [str(case.get("case_id", place)) for place, (_, case) in enumerate(cases)]
    seconds = _seconds([case for _, case in cases]) if layout is MEMIT else None
    about = {"layout": layout.name, "path": str(path)}
    return RunRecords(
        folder=path,
        steps=(
            StepRecord(step=0),
            StepRecord(
                step=1,
                requests=tuple(ids),
                seconds={} if seconds is None else {"edit": seconds},
            ),
        ),
        evals=tuple(_evaluations(scores, layout)),
        config={"foreign": about, **_named(path, layout, cases)},
        provenance={"foreign": about | {"edits": len(cases)}},
        status="foreign",
    )


def _cases(path: Path) -> tuple[Layout, list[Case], list[str]]:
    """The layout, the edits with their files, and the problems of reading them."""
    problems: list[str] = []
    if path.is_dir():
        files = [each for each in path.iterdir() if CASE.fullmatch(each.name)]
        files.sort(key=lambda file: (len(file.name), file.name))  # by number
        read = [(file, _read(file, problems)) for file in files]
        return MEMIT, _objects(read, MEMIT, problems), problems
    content = _read(path, problems)
    if isinstance(content, list):
        if not content:
            problems.append(message(str(path), "the list has no edits", expected=FILES))
        return EASYEDIT, _objects([(path, each) for each in content], EASYEDIT, problems), problems
    return MEMIT, _objects([(path, content)], MEMIT, problems), problems


def _read(file: Path, problems: list[str]) -> Any:
    """The JSON value of a file; None after adding to `problems`."""
    try:
        return parse(file.read_bytes())
    except BadJson as error:
        place = f"{file}, line {error.line}, column {error.column}"
        problems.append(message(place, error.told))
    except OSError as error:
        problems.append(message(str(file), f"cannot be read ({error.strerror})"))
    return None


def _objects(read: Sequence[tuple[Path, Any]], layout: Layout, problems: list[str]) -> list[Case]:
    cases: list[Case] = []
    for file, value in read:
        if value is None and problems:
            continue
        try:
            case = mapping(value, "the edit")
            mapping(_first(case.get("requested_rewrite")), "requested_rewrite")
            cases.append((file, case))
        except LayoutError as error:
            problems.append(_problem(file, layout, error))
    return cases


def _problem(file: Path, layout: Layout, error: LayoutError) -> str:
    shown = str(error.got) if len(str(error.got)) <= 80 else f"{str(error.got)[:80]}..."
    problem = f"not the layout of {layout.name}: {error.field} {error.problem}"
    return message(str(file), problem, got=shown)


def _first(value: Any) -> Any:
    """AlphaEdit's code keeps several rewrites of one record in a list."""
    return value[0] if isinstance(value, list) and value else value


def _named(path: Path, layout: Layout, cases: Sequence[Case]) -> dict[str, Any]:
    """What the names of folders and files tell: editor, model and dataset, in the places of a run's
    configuration.
    """
    parameters = _parameters(path / PARAMETERS) if path.is_dir() else {}
    editor = path.parent.name if path.is_dir() else re.sub(r"[_-]?results\.json$", "", path.name)
    editor = str(parameters.get("alg_name") or editor.removesuffix(".json") or path.parent.name)
    model = parameters.get("model_name")
    return {
        "editor": {"name": f"{editor} (foreign, {layout.name})"},
        "model": {"name": str(model)} if model else {},
        "dataset": {"name": _dataset(cases) if layout is MEMIT else "?"},
        "seed": 0,
    }


def _parameters(file: Path) -> Mapping[str, Any]:
    problems: list[str] = []
    content = _read(file, problems) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _dataset(cases: Sequence[Case]) -> str:
    """In MEMIT's code, zsRE's records have no true answer, and CounterFact's have a Wikidata
    relation.
    """
    rewrite = _first(cases[0][1].get("requested_rewrite"))
    answer = rewrite.get("target_true")
    if isinstance(answer, Mapping) and answer.get("str") == NO_ANSWER:
        return "zsre"
    return "counterfact" if re.fullmatch(r"P\d+", str(rewrite.get("relation_id"))) else "?"


def _seconds(cases: Sequence[Mapping[str, Any]]) -> float | None:
    """The seconds of all batches; the edits of a batch repeat its time. None if they are not
    told.
    """
    by_batch: dict[str, float] = {}
    for case in cases:
        time = case.get("time")
        if not isinstance(time, int | float) or not math.isfinite(time):
            return None
        by_batch[str(case.get("grouped_case_ids", case.get("case_id")))] = float(time)
    return math.fsum(by_batch.values())


def _evaluations(scores: Sequence[Mapping[Column, float]], layout: Layout) -> Iterator[EvalRecord]:
    """The means over the edits that have a number, and the score where it has a definition."""
    columns = dict.fromkeys(column for of_edit in scores for column in of_edit)
    means: dict[Column, float | None] = {}
    for column in sorted(columns, key=lambda column: column.phase != "pre"):
        values = [of_edit[column] for of_edit in scores if column in of_edit]
        measurement = _measurement(column, values, layout)
        means[column] = measurement.value
        yield _record(column, measurement)
    for phase in dict.fromkeys(column.phase for column in columns):
        parts = [means.get(Column(phase, metric, "probability")) for metric in HEADLINES]
        known = [part for part in parts if part is not None]
        if len(known) == len(HEADLINES):
            column = Column(phase, "score", "probability")
            score = _measurement(column, [harmonic_mean(known)], layout)
            # Its standard error would need the covariance of its parts.
            yield _record(column, replace(score, n=len(scores)))


def _measurement(column: Column, values: Sequence[float], layout: Layout) -> Measurement:
    """The mean by request. A share that is not finite counts as a failure."""
    num_lost = sum(not math.isfinite(value) for value in values)
    is_share = not column.metric.endswith(UNBOUNDED)
    if is_share:
        values = [value if math.isfinite(value) else 0.0 for value in values]
    mean, stderr = mean_and_stderr(values)
    return Measurement(
        kind="editing",
        metric=column.metric,
        protocol=column.protocol,
        task=column.task,
        value=mean,
        stderr=stderr,
        n=len(values),
        nonfinite=num_lost,
        **_about(column, layout),
    )


def _about(column: Column, layout: Layout) -> dict[str, Any]:
    return {
        "timing": "before" if column.phase == "pre" else None,
        "aggregation": "request",
        "variant": f"{FOREIGN} {layout.name}",
    }


def _record(column: Column, measurement: Measurement) -> EvalRecord:
    step = 0 if column.phase == "pre" else 1
    return EvalRecord(step=step, view=UNRESTRAINED, measurement=measurement)
