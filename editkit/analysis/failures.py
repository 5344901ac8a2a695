"""What a model says where an edit failed (survey of KnowEdit, Zhang et al. 2024, arXiv 2401.01286,
section 4.5 and Figure 5).

Each edit's prompt is continued greedily, by as many tokens as the longest answer has and a few
more. The survey gives its classes in words. Here they are rules, and the first that holds decides:

    edited       the text begins with the new answer
    old          it begins with the old answer
    meaningless  it has no letter and no digit, or repeats one word
    missing      it holds some words of the new answer, and no other word of the old one
    partial      it holds words of the new and of the old answer, or of the old one alone
    irrelevant   anything else

Words are compared without case and punctuation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.analysis.base import AbstractAnalysis, Subject, Table
from editkit.model.generate import generate_texts
from editkit.model.tokens import target_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = ("edited", "old", "meaningless", "missing", "partial", "irrelevant")
FURTHER = 4  # tokens beyond the longest answer
REPEATED = 3  # times that a word alone makes a text meaningless
COLOURS = ("#009E73", "#0072B2", "#000000", "#E69F00", "#CC79A7", "#999999")


class Failures(AbstractAnalysis):
    """See the module."""

    name = "failures"

    def measure(self, subject: Subject) -> dict[str, Any]:
        model, requests = subject.model, subject.requests
        longest = max(
            len(target_ids(model.tokenizer, request.full_prompt, answer))
            for request in requests
            for answer in (request.target, request.target_old)
            if answer
        )
        models = {}
        for name in subject.models():
            prompts = [request.full_prompt for request in requests]
            texts = generate_texts(model, prompts, max_new_tokens=longest + FURTHER)
            models[name] = [
                {
                    "id": request.id,
                    "text": text,
                    "class": class_of(text, request.target, request.target_old),
                }
                for request, text in zip(requests, texts, strict=True)
            ]
        return {"models": models}

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        rows = [
            (model, *(f"{100 * share:.0f}" for share in _shares(texts)))
            for model, texts in results["models"].items()
        ]
        title = "What the prompts of the edits are continued with (%)"
        return [Table(title=title, head=("model", *CLASSES), rows=tuple(rows))]

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        from editkit.report.figures.axes import grid, legend

        figure, (axis,) = grid(1, width=6.5, height=1.6)
        models = results["models"]
        left = [0.0] * len(models)
        for place, (name, colour) in enumerate(zip(CLASSES, COLOURS, strict=True)):
            shares = [100 * _shares(texts)[place] for texts in models.values()]
            axis.barh(list(models), shares, left=left, color=colour, label=name)
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("edits (%)", fontsize=9)
        axis.tick_params(labelsize=8)
        legend(figure, [axis])
        return figure


def class_of(text: str, target: str, old: str | None) -> str:
    """The class of a continuation, see the module."""
    said, new, before = _words(text), _words(target), _words(old or "")
    if new and said[: len(new)] == new:
        return "edited"
    if before and said[: len(before)] == before:
        return "old"
    if not said or (len(said) >= REPEATED and len(set(said)) == 1):
        return "meaningless"
    only_old = set(before) - set(new)
    if set(said) & only_old:
        return "partial"
    return "missing" if set(said) & set(new) else "irrelevant"


def _words(text: str) -> list[str]:
    letters = "".join(mark if mark.isalnum() else " " for mark in text.casefold())
    return letters.split()


def _shares(texts: Sequence[Mapping[str, Any]]) -> list[float]:
    counts = Counter(each["class"] for each in texts)
    return [counts[name] / len(texts) for name in CLASSES]
