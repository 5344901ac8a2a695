"""The check at the beginning of a run or a session: is every shortcut right for this network?

The check reads the model and a few short texts. It sets `EditableModel.shortcuts`, which a run
keeps in its state: a resumed run takes the same paths and ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from editkit.editors.base import AbstractAnyEditor
from editkit.model.self_check import compare_generation, compare_scoring, require_own_logits
from editkit.model.shortcuts import Comparison
from editkit.model.tokens import encode
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def check_reading(model: EditableModel, text: str) -> list[str]:
    """Compares scoring and generation on a text. Returns a warning for each shortcut that is not
    taken.

    Raises:
        ConfigError: the module names are wrong: the network computes other logits.
    """
    [encoded] = encode(model.tokenizer, [text], chat=model.chat)
    require_own_logits(model, encoded.ids)
    found = [compare_scoring(model, encoded.ids), compare_generation(model, encoded.ids)]
    return _noted(model, (each for each in found if each is not None))


def check_editing(
    model: EditableModel, editor: AbstractAnyEditor[Any], request: EditRequest
) -> list[str]:
    """Compares the shortcuts of the editor on a request. Returns a warning for each shortcut that
    is not taken.
    """
    return _noted(model, editor.self_check(model, request))


def _noted(model: EditableModel, comparisons: Iterable[Comparison]) -> list[str]:
    before = model.shortcuts
    model.shortcuts = before.with_comparisons(comparisons)
    name, family = model.name, str(model.network.config.model_type)
    known = before.warnings(name, family)
    return [text for text in model.shortcuts.warnings(name, family) if text not in known]
