"""Whether the requests fit into the model's positions: asked of all of them before anything is
computed.

An editor runs a prompt with its target in every context, and can leave nothing away. A question
that only judges an edit loses its beginning where it is too long; its answer cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from editkit.datasets.fields import shortened
from editkit.errors import ConfigError
from editkit.model.tokens import PLACE, encode, encode_with_targets, fill
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def require_room(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    questions: Iterable[Iterable[Probe]],
) -> None:
    """Raises ConfigError for requests that are longer than the model's positions: all of them, by
    their ids.

    Args:
        contexts: templates that an editor puts prompts into.
        questions: what is scored of each request.
    """
    problems = list(_too_long(model, requests, contexts))
    refused = {request.id for request, _ in problems}
    for request, of_one in zip(requests, questions, strict=True):
        if request.id not in refused:
            problems += ((request, problem) for problem in _answers(model, of_one))
    if problems:
        limit = f"{model.name} has {model.max_length} positions"
        found = [f"{request.id}: {problem}; {limit}." for request, problem in problems]
        raise ConfigError(
            [
                *found[:-1],
                f"{found[-1]} Leave such requests out of the dataset, or take a model with more "
                "positions.",
            ]
        )


def _too_long(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str]
) -> Iterator[tuple[EditRequest, str]]:
    pairs = [(request.full_prompt, request.target) for request in requests]
    lengths = [
        len(sequence.ids) - 1 for sequence in encode_with_targets(model.tokenizer, pairs)
    ]  # nothing is read from the last token
    around = max(
        (
            len(encoded.ids)
            for encoded in encode(model.tokenizer, [text.replace(PLACE, "") for text in contexts])
        ),
        default=0,
    )
    for request, alone in zip(requests, lengths, strict=True):
        if alone > model.max_length:
            yield request, f"prompt and target have {alone} tokens without the last"
        elif alone + around > model.max_length:  # only these are worth the exact count
            texts = [
                fill(request.prompt, request.subject, context=context).text for context in contexts
            ]
            longest = max(
                len(each.ids) - 1
                for each in encode_with_targets(
                    model.tokenizer, [(text, request.target) for text in texts]
                )
            )
            if longest > model.max_length:
                yield (
                    request,
                    f"prompt and target have {longest} tokens without the last in the longest of "
                    "the editor's contexts",
                )


def _answers(model: EditableModel, questions: Iterable[Probe]) -> Iterator[str]:
    """Answers with more tokens than the model has positions; no token stands for less than half a
    byte.
    """
    long = dict.fromkeys(
        each
        for each in questions
        if 2 * len(each.answer.encode("utf-8", "surrogatepass")) > model.max_length
    )
    for probe, sequence in zip(
        long,
        encode_with_targets(model.tokenizer, [(each.prompt, each.answer) for each in long]),
        strict=True,
    ):
        if len(sequence.target_ids) > model.max_length:
            answer, prompt = shortened(probe.answer), shortened(probe.prompt)
            yield f"the answer {answer} of {prompt} has {len(sequence.target_ids)} tokens"
