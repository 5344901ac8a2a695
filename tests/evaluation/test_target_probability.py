"""The probability of each edit's target, noted right after its edit and measured later."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.base import Moment, Samples
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.evaluation.target_probability import SAMPLES, TargetProbability
from editkit.linalg.lowrank import LowRank
from editkit.records.find import load_runs
from editkit.records.writer import save_samples
from editkit.report.compare.subjects import measured
from editkit.report.figures.target_probability import target_probabilities
from editkit.types import Probe, SampleRecord
from tests.support.helpers import tiny_model, world_requests
from tests.support.sweeps import add_run, config_of, evals_of

EVALUATOR = TargetProbability(name=SAMPLES, tokens_per_batch=512, every=1)


def test_it_is_the_length_normalised_probability_of_the_target_then_and_now() -> None:
    model, asked = tiny_model(), world_requests(3)
    (module,) = model.down_projections([1])
    model.edit([module])
    probes = [Probe(prompt=request.full_prompt, answer=request.target) for request in asked]

    def expected() -> list[float]:
        scores = score(model, probes, tokens_per_batch=512)
        return [math.exp(scores[probe].mean_log_prob) for probe in probes]

    before = expected()
    notes = EVALUATOR.note(model, asked[:2], {}, {}, Moment(view="v", positions=(1, 2)))
    rows, columns = model.weight(module).shape
    model.apply(module, LowRank(torch.ones(rows, 1), torch.ones(columns, 1)))
    notes = EVALUATOR.note(model, asked[2:], {}, notes, Moment(view="v", positions=(3,)))
    (samples,) = EVALUATOR.measure(model, asked, {}, notes, Moment(view="v", positions=(1, 2, 3)))
    assert isinstance(samples, Samples)
    after = expected()
    assert [row["position"] for row in samples.rows] == [1, 2, 3]
    assert [row["after_edit"] for row in samples.rows] == pytest.approx([*before[:2], after[2]])
    assert [row["now"] for row in samples.rows] == pytest.approx(after)
    assert before[0] != pytest.approx(after[0])


def test_before_the_first_edit_there_is_nothing_and_without_notes_only_the_present() -> None:
    model, asked = tiny_model(), world_requests(2)
    moment = Moment(view="v", positions=(1, 2), is_before=True)
    assert EVALUATOR.measure(model, asked, {}, {}, moment) == []
    (samples,) = EVALUATOR.evaluate(model, asked, {})
    assert isinstance(samples, Samples)
    assert [row["after_edit"] for row in samples.rows] == [None, None]


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens_per_batch: out of range"):
        TargetProbability(name=SAMPLES, tokens_per_batch=0, every=1)


def test_the_figure_has_a_line_for_each_subject_at_the_last_milestone(tmp_path: Path) -> None:
    for editor in ("rome", "memit"):
        config = config_of(0, restraint={}, editor=editor)
        folder = add_run(tmp_path, config, evals_of(efficacy={"unrestrained": 0.5}))
        for step, now in ((1, 0.1), (2, 0.2)):
            rows = tuple(
                {"request": f"r{place}", "position": place, "after_edit": 0.9, "now": now}
                for place in (1, 2)
            )
            record = SampleRecord(step=step, view="unrestrained", name=SAMPLES, rows=rows)
            save_samples(record, folder / "samples")
    subjects, _ = measured(load_runs([tmp_path]))
    (sheet,) = target_probabilities(subjects)
    assert [panel.title for panel in sheet.panels] == [
        "P(target) right after its own edit",
        "P(target) at the last milestone",
    ]
    assert {line.label for panel in sheet.panels for line in panel.lines} == {"rome", "memit"}
    assert [line.at for line in sheet.panels[0].lines] == [(1, 2), (1, 2)]
    assert [panel.lines[0].mean for panel in sheet.panels] == [(0.9, 0.9), (0.2, 0.2)]
