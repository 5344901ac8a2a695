"""Whether the requests fit into the model's context length, checked before anything is computed.

An editor processes a prompt with its target in every context template, and cannot truncate them. A
prompt that only measures an edit loses its beginning if it is too long. Its answer cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.datasets.fields import shortened
from editkit.errors import ConfigError, message
from editkit.model.tokens import PLACE, encode, encode_with_targets, fill
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def require_room(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    probes: Iterable[Iterable[Probe]],
    *,
    before: int = 0,
) -> None:
    """Checks that every request fits into the model's context length.

    Args:
        contexts: the editor's context templates.
        probes: the probes that each request is measured with.
        before: the largest number of tokens that the editor puts before a prompt.

    Raises:
        ConfigError: requests that do not fit, all of them, by their ids.
    """
    problems = list(_too_long(model, requests, contexts))
    refused = {problem.request.id for problem in problems}
    for request, questions in zip(requests, probes, strict=True):
        if request.id not in refused:
            own = list(questions)
            found = list(_long_answers(model, request, own))
            problems += found or _no_room_before(model, request, own, before)
    if problems:
        expected = f"at most {model.max_length} tokens, the context length of {model.name}"
        fix = "leave such requests out of the dataset, or choose a model with a longer context"
        if before:
            fix = f"set editor.demonstrations or editor.facts lower, {fix}"
        raise ConfigError(
            [
                message(
                    problem.request.id,
                    f"{problem.text} too long",
                    got=problem.num_tokens,
                    expected=expected,
                    fix=fix if problem is problems[-1] else None,
                )
                for problem in problems
            ]
        )


@dataclass(frozen=True)
class _Problem:
    request: EditRequest
    text: str  # without "too long"
    num_tokens: int


def _too_long(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str]
) -> Iterator[_Problem]:
    probes = [request.probe() for request in requests]
    # No position follows the last token, so it is not counted.
    lengths = [
        len(sequence.ids) - 1
        for sequence in encode_with_targets(model.tokenizer, probes, chat=model.chat)
    ]
    encoded = encode(model.tokenizer, [template.replace(PLACE, "") for template in contexts])
    around = max((len(template.ids) for template in encoded), default=0)
    sequence_are = "prompt and target, without the last token, are"
    room = model.max_length  # not asked again for each of many requests
    for request, alone in zip(requests, lengths, strict=True):
        if alone > room:
            yield _Problem(request, sequence_are, alone)
        elif alone + around > room:  # only these are worth the exact count
            texts = [
                fill(request.prompt, request.subject, context=context).text for context in contexts
            ]
            sequences = encode_with_targets(
                model.tokenizer, [request.probe(prompt=text) for text in texts], chat=model.chat
            )
            longest = max(len(sequence.ids) - 1 for sequence in sequences)
            if longest > room:
                text = f"in the editor's longest context template, {sequence_are}"
                yield _Problem(request, text, longest)


def _long_answers(
    model: EditableModel, request: EditRequest, probes: Iterable[Probe]
) -> Iterator[_Problem]:
    """Answers with more tokens than the context length."""
    # No token stands for less than half a byte, so that most answers need no tokenizer.
    room = model.max_length
    candidates = dict.fromkeys(
        probe for probe in probes if 2 * len(probe.answer.encode("utf-8", "surrogatepass")) > room
    )
    sequences = encode_with_targets(model.tokenizer, list(candidates), chat=model.chat)
    for probe, sequence in zip(candidates, sequences, strict=True):
        if len(sequence.target_ids) > room:
            text = f"the answer {shortened(probe.answer)} to {shortened(probe.prompt)} is"
            yield _Problem(request, text, len(sequence.target_ids))


def _no_room_before(
    model: EditableModel, request: EditRequest, probes: Sequence[Probe], before: int
) -> Iterator[_Problem]:
    """The longest of the probes, if it leaves no room for what the editor puts before it."""
    if not before:
        return
    asked = list(dict.fromkeys((request.probe(), *probes)))
    sequences = encode_with_targets(model.tokenizer, asked, chat=model.chat)
    longest = max(len(sequence.ids) - 1 for sequence in sequences)
    if longest + before > model.max_length:
        text = f"with {before} tokens of texts before it, the longest prompt with its answer is"
        yield _Problem(request, text, longest + before)
