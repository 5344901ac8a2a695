"""The layouts of other programs' results, one edit at a time.

MEMIT's code (and that of ROME and AlphaEdit, which have the same) writes a file for each edit:

    case_id, num_edits, requested_rewrite, time, post and sometimes pre, each with
    <prompts>_probs      [{target_new, target_true}]: mean negative log-likelihoods of the tokens
    <prompts>_correct    [bool]: beside probabilities a prompt's answer as a whole; alone (zsRE) one
                         token each
    ngram_entropy, reference_score

EasyEdit writes one list of edits: case_id, requested_rewrite, pre and post with

    rewrite_acc, rephrase_acc    shares of tokens under teacher forcing, unless `metric_meta` or the
                                 generated texts say otherwise
    locality, portability        {<kind>_acc}; locality also as {<kind>_output} of pre and post
    fluency                      {ngram_entropy}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TEXT = "text"
PHASES = ("pre", "post")
# The metric that each kind of MEMIT's prompts stands for, and the answer that should win.
PROMPTS = {
    "rewrite": ("efficacy", "target_new"),
    "paraphrase": ("generalization", "target_new"),
    "neighborhood": ("locality", "target_true"),
    "attribute": ("attribute", "target_new"),
}
OTHER_ANSWER = {"target_new": "target_true", "target_true": "target_new"}
TEXT_METRICS = {"ngram_entropy": "fluency_bits", "reference_score": "consistency"}
ACCURACIES = {"rewrite": "efficacy", "rephrase": "generalization"}
TEACHER_FORCED = ("decoder_only_teacher_forcing", "seq2seq_teacher_forcing")


class Layout(NamedTuple):
    """A layout by its name, and the reader of one edit."""

    name: str
    scores: Callable[[Mapping[str, Any]], dict[Column, float]]


class Column(NamedTuple):
    """What a number is about."""

    phase: str  # of PHASES
    metric: str
    protocol: str
    task: str | None = None


@dataclass(frozen=True)
class LayoutError(Exception):
    """A field is not what the layout has there."""

    field: str
    problem: str
    got: object


def memit_scores(case: Mapping[str, Any]) -> dict[Column, float]:
    """The scores of one of MEMIT's files. Raises LayoutError."""
    return dict(_of_phases(case, _memit_phase))


def easyedit_scores(case: Mapping[str, Any]) -> dict[Column, float]:
    """The scores of one entry of EasyEdit's list. Raises LayoutError."""
    scores = dict(_of_phases(case, _easyedit_phase))
    before, after = (_section(case.get(phase, {}), "locality", phase) for phase in PHASES)
    for name in after.keys() & before.keys():
        kind = name.removesuffix("_output")
        if kind != name:
            outputs = [
                _numbers(section[name], f"{phase}.locality.{name}")
                for phase, section in zip(PHASES, (before, after), strict=True)
            ]
            if len(outputs[0]) != len(outputs[1]):
                problem = "has another number of tokens than before the edit"
                raise LayoutError(f"post.locality.{name}", problem, len(outputs[1]))
            same = [float(one == other) for one, other in zip(*outputs, strict=True)]
            scores[Column("post", "locality", "token", kind.lower())] = _mean(same)
    return scores | dict(_of_all_kinds(scores))


MEMIT = Layout("MEMIT", memit_scores)
EASYEDIT = Layout("EasyEdit", easyedit_scores)


def mapping(value: Any, field: str) -> Mapping[str, Any]:
    """The value, if it is a JSON object. Raises LayoutError."""
    if not isinstance(value, Mapping):
        raise LayoutError(field, "is no JSON object", value)
    return value


def _of_phases(
    case: Mapping[str, Any],
    read: Callable[[str, Mapping[str, Any]], Iterator[tuple[Column, float]]],
) -> Iterator[tuple[Column, float]]:
    if "post" not in case:
        raise LayoutError("post", "is missing", ", ".join(map(str, list(case)[:8])))
    for phase in PHASES:
        if phase in case:
            section = mapping(case[phase], phase)
            found = list(read(phase, section))
            if phase == "post" and not found:
                names = ", ".join(map(str, list(section)[:8])) or "nothing"
                raise LayoutError(phase, "has no metric of this layout", names)
            yield from found


def _memit_phase(phase: str, section: Mapping[str, Any]) -> Iterator[tuple[Column, float]]:
    has_probabilities = any(name.endswith("_prompts_probs") for name in section)
    for prompts, (metric, winner) in PROMPTS.items():
        name = f"{prompts}_prompts_probs"
        pairs = _pairs(section.get(name, []), f"{phase}.{name}", winner)
        if pairs:
            won = [float(right < wrong) for right, wrong in pairs]
            moved = [math.exp(-right) - math.exp(-wrong) for right, wrong in pairs]
            yield Column(phase, metric, "probability"), _mean(_failed_if_lost(won, moved))
            yield Column(phase, f"{metric}_magnitude", "probability"), _mean(moved)
        name = f"{prompts}_prompts_correct"
        if correct := _numbers(section.get(name, []), f"{phase}.{name}"):
            # MEMIT asks here whether the true answer is right, whatever the unedited model says.
            metric = "specificity" if prompts == "neighborhood" else metric
            yield Column(phase, metric, "argmax" if has_probabilities else "token"), _mean(correct)
    yield from _texts(phase, section, "")


def _easyedit_phase(phase: str, section: Mapping[str, Any]) -> Iterator[tuple[Column, float]]:
    meta = _section(section, "metric_meta", phase)
    for name, metric in ACCURACIES.items():
        if values := _numbers(section.get(f"{name}_acc", []), f"{phase}.{name}_acc"):
            yield Column(phase, metric, _protocol(name, section, meta, phase)), _mean(values)
    for metric in ("locality", "portability"):
        for name, value in _section(section, metric, phase).items():
            kind = name.removesuffix("_acc")
            if kind != name and (values := _numbers(value, f"{phase}.{metric}.{name}")):
                yield Column(phase, metric, "token", kind.lower()), _mean(values)
    yield from _texts(phase, _section(section, "fluency", phase), ".fluency")


def _protocol(name: str, section: Mapping[str, Any], meta: Mapping[str, Any], phase: str) -> str:
    """The protocol of an accuracy. Newer versions of EasyEdit name it."""
    field = f"{phase}.metric_meta.{name}"
    told = mapping(meta[name], field).get("protocol") if name in meta else None
    if told is None:
        return "EasyEdit generation" if f"{name}_gen_content" in section else "token"
    return "token" if told in TEACHER_FORCED else f"EasyEdit {told}"


def _of_all_kinds(scores: Mapping[Column, float]) -> Iterator[tuple[Column, float]]:
    """Locality and portability over all kinds of prompts together."""
    for phase in PHASES:
        for metric in ("locality", "portability"):
            kinds = [
                value
                for column, value in scores.items()
                if (column.phase, column.metric) == (phase, metric) and column.task is not None
            ]
            if kinds:
                yield Column(phase, metric, "token"), _mean(kinds)


def _texts(phase: str, section: Mapping[str, Any], under: str) -> Iterator[tuple[Column, float]]:
    for name, metric in TEXT_METRICS.items():
        if values := _numbers(section.get(name, []), f"{phase}{under}.{name}"):
            yield Column(phase, metric, TEXT), _mean(values)


def _pairs(value: Any, field: str, winner: str) -> list[tuple[float, float]]:
    """The two mean negative log-likelihoods of each prompt, that of the winner first."""
    if not isinstance(value, list):
        raise LayoutError(field, "is no list", value)
    pairs = []
    for place, entry in enumerate(value):
        at = f"{field}[{place}]"
        both = mapping(entry, at)
        numbers = []
        for name in (winner, OTHER_ANSWER[winner]):
            if name not in both:
                raise LayoutError(f"{at}.{name}", "is missing", ", ".join(map(str, both)))
            numbers.append(_number(both[name], f"{at}.{name}"))
        pairs.append((numbers[0], numbers[1]))
    return pairs


def _section(section: Any, name: str, phase: str) -> Mapping[str, Any]:
    inner = mapping(section, phase).get(name)
    return {} if inner is None else mapping(inner, f"{phase}.{name}")


def _numbers(value: Any, field: str) -> list[float]:
    """The numbers of a list, which may be nested, or a single number."""
    if isinstance(value, list):
        return [
            number
            for place, entry in enumerate(value)
            for number in _numbers(entry, f"{field}[{place}]")
        ]
    return [_number(value, field)]


def _number(value: Any, field: str) -> float:
    if not isinstance(value, bool | int | float):
        raise LayoutError(field, "is no number", value)
    try:
        return float(value)
    except OverflowError:
        raise LayoutError(field, "is no number that fits", "an integer of many digits") from None


def _failed_if_lost(won: Sequence[float], moved: Sequence[float]) -> list[float]:
    """The successes; nan where a likelihood was nan."""
    return [math.nan if math.isnan(by) else success for success, by in zip(won, moved, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
