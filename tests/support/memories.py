"""Editors that put texts before prompts, without an encoder."""

from __future__ import annotations

from editkit.api.session import Session
from editkit.editors.in_context import InContext
from editkit.model.editable import EditableModel
from tests.support.helpers import Kind, requests, tiny_model

ICE = InContext(
    name="ice",
    retriever="bm25",
    facts=1,
    threshold=None,
    demonstrations=0,
    pool=10,
    fact="New Fact: {}\n",
    question="Prompt: {}",
    confirmation=None,
)


def remembering(kind: Kind, editor: InContext = ICE) -> EditableModel:
    """A model with three edits in its memory."""
    model = tiny_model(kind)
    session = Session(model, editor)
    for each in requests(3):
        session.edit(each)
    assert len(model.sides) == 1
    return model
