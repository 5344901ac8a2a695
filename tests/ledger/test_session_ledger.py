"""A session's edits are in its ledger, and those that were taken back are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import editkit
from editkit.errors import ConfigError
from editkit.ledger.revert import revert
from editkit.records.ledger import read_ledger
from tests.support.helpers import world_requests


def test_a_ledger_of_a_session_is_its_model(tmp_path: Path) -> None:
    first, second, third = world_requests(3)
    options = {"steps": 2}
    session = editkit.Session(editkit.load("tiny-llama"), "ft", options=options)
    session.keep_ledger(tmp_path / "kept", author="me")
    session.edit(first, note="as the customer asked")
    session.edit(second)
    session.undo()
    session.edit(third)
    ledger = read_ledger(tmp_path / "kept")
    assert [(block.id, block.author, block.note) for block in ledger.blocks] == [
        (1, "me", "as the customer asked"),
        (3, "me", None),
    ]
    assert ledger.undone == (2,) and ledger.requests == (first, third)
    made = revert(tmp_path / "kept", ["3"])
    session.undo()
    for module in session.modules:
        assert torch.equal(made.model.weight(module), session.model.weight(module))
    with pytest.raises(ConfigError, match="was taken back by its session"):
        revert(tmp_path / "kept", ["2"])
    problems = r"2 problems[\s\S]*kept exists and is not empty[\s\S]*has edits that this ledger"
    with pytest.raises(ConfigError, match=problems):
        session.keep_ledger(tmp_path / "kept")
