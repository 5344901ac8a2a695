"""What every side has to do, whatever stands there: route each sequence by itself."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.editable import EditableModel
from editkit.model.generate import generate
from editkit.model.shortcuts import Comparison, Shortcuts
from editkit.model.side_routes import routed
from editkit.model.tokens import encode_prompts, pad
from editkit.types import Probe
from tests.support.helpers import requests

PLAIN = Shortcuts(
    comparisons=(Comparison(shortcut="generation", differences={"x": 1.0}, tolerance=0.0),)
)


def probes() -> list[Probe]:
    """Edited prompts, paraphrases, neighbours; and prompts that begin with an edited prompt or with
    a part of one.
    """
    found = []
    for each in requests(3):
        found += [each.probe(), each.probe(answer=str(each.target_old)), *each.neighbours]
        found += [each.probe(prompt=text) for text in each.paraphrases]
        found.append(each.probe(prompt=f"{each.full_prompt} not", answer="Rome"))
        found.append(Probe(prompt=each.full_prompt[:-3], answer="in Paris"))
        # the edited prompt in the middle of another one's text: the same tokens, another prompt
        found.append(Probe(prompt=each.full_prompt[: len(each.full_prompt) // 2], answer="is"))
    return found


def prompts(model: EditableModel) -> list[tuple[int, ...]]:
    """16 prompts of different lengths; some are edited."""
    rows = encode_prompts(model.tokenizer, [probe.prompt for probe in probes()][:16])
    random.Random(0).shuffle(rows)
    return rows


def assert_each_sequence_is_routed_by_itself(model: EditableModel) -> None:
    """Scores, generations and hidden states are the same in every batch, with padding on either
    side, with and without a cache, and the sides change some of them.
    """
    asked, rows, sides = probes(), prompts(model), model.sides
    together = score(model, asked, tokens_per_batch=512)
    for probe in asked:
        alone = score(model, [probe], tokens_per_batch=1)[probe]
        assert together[probe].log_probs == pytest.approx(alone.log_probs, abs=1e-4)
    new = functools.partial(generate, model, rows, max_new_tokens=5, ends=())
    of_sixteen, of_one = new(batch_size=16), new(batch_size=1)
    before, model.shortcuts = model.shortcuts, PLAIN
    assert of_sixteen == of_one == new(batch_size=16)
    model.shortcuts = before
    lengths = [len(row) for row in rows]
    last = []
    for side in ("left", "right"):
        batch = pad(rows, side=side, prompts=lengths)  # type: ignore[arg-type]
        with torch.no_grad():
            hidden_BTD = model.final_hidden(batch)
        columns_B = batch.columns([length - 1 for length in lengths])
        last.append(hidden_BTD[torch.arange(len(rows)), columns_B])
    assert torch.allclose(*last, atol=1e-4)
    own = [each.probe() for each in requests(3)]
    sent = routed(model, encode_prompts(model.tokenizer, [probe.prompt for probe in own]))
    assert any(sent)
    model.attach()
    unedited = score(model, asked, tokens_per_batch=512)
    model.attach(*sides)
    for probe, is_sent in zip(own, sent, strict=True):
        same = together[probe].log_probs == pytest.approx(unedited[probe].log_probs, abs=1e-4)
        assert same != is_sent
