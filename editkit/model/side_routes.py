"""Which prompts are sent to what stands beside the weights.

Shape letters: B rows, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, AbstractUnroutedSide, Routing
from editkit.model.capture import capture
from editkit.model.stand_in import AbstractStandIn
from editkit.model.texts import AbstractTexts
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

TOKENS_AT_ONCE = 512
HALF = 0.5


def routed(model: EditableModel, prompts: Sequence[Sequence[int]]) -> list[bool]:
    """Whether each prompt is sent to one of the model's sides, gets a text beside the weights, or
    is answered by a stand-in for at least one half. A pass ends at the last side. With an unrouted
    one there is none: every prompt is.
    """
    sides = [side for side in model.sides if isinstance(side, AbstractSide)]
    if any(isinstance(side, AbstractUnroutedSide) for side in sides):
        return [True] * len(prompts)
    modules = list(dict.fromkeys(side.module for side in sides))
    read = model.reader.prompted(prompts, longest=model.max_length)
    found = [ids != tuple(prompt) for ids, prompt in zip(read, prompts, strict=True)]
    prompts = read
    for stand_in in [side for side in model.sides if isinstance(side, AbstractStandIn)]:
        answers = stand_in.answers([tuple(prompt) for prompt in prompts], model.tokenizer)
        for index, answered in enumerate(answers):
            found[index] |= answered is not None and answered.share >= HALF
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    while order and modules:
        rows = max(1, TOKENS_AT_ONCE // len(prompts[order[-1]]))
        chosen, order = order[-rows:], order[:-rows]
        texts = [prompts[index] for index in chosen]
        batch = pad(texts, device=model.device, prompts=[len(ids) for ids in texts])
        routing = Routing(batch.ends_BT)
        with model.routed(routing), torch.no_grad(), capture(model, outputs=modules):
            model.module(model.family.base)(**batch.arguments, use_cache=False)
        for choices_B in routing.chosen.values():
            for index, choice in zip(chosen, sent_to(choices_B), strict=True):
                found[index] |= choice != NONE
    return found


def sent_to(chosen_P: torch.Tensor) -> list[float]:
    """What each prompt is sent to, of a side's choices."""
    first_P: list[float] = (chosen_P if chosen_P.dim() == 1 else chosen_P[:, 0]).tolist()
    return first_P


def context_tokens(model: EditableModel, prompts: Sequence[Sequence[int]]) -> list[int] | None:
    """By prompt, the number of tokens that texts beside the weights add to it; None without any."""
    if not any(isinstance(side, AbstractTexts) for side in model.sides):
        return None
    read = model.reader.prompted(prompts, longest=model.max_length)
    return [len(ids) - len(prompt) for ids, prompt in zip(read, prompts, strict=True)]
