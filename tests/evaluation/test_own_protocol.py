"""A protocol of one's own is one file and one yaml. Its frozen tensors and its distributions do not
disturb those of other protocols.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from editkit.evaluation.base import Moment
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Frozen,
    Questions,
    Verdicts,
    tallies,
)
from editkit.evaluation.protocols.distribution import Distribution
from editkit.evaluation.statistics.tally import Outcome
from tests.support.helpers import requests, tiny_model

YAML = """# @package evaluation.margin
# How much more probable the target is than the greedy choice
_target_: margin.Margin
scale: 2.0
"""
MODULE = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from editkit.evaluation.protocols.base import AbstractProtocol, Verdicts, tallies
from editkit.evaluation.statistics.tally import Outcome


@dataclass(frozen=True, kw_only=True)
class Margin(AbstractProtocol):
    name: ClassVar[str] = "margin"
    frozen: ClassVar[tuple[str, ...]] = ("before",)
    scale: float

    def probes(self, questions):
        return questions.expected["efficacy", None]

    def freeze(self, questions, answers):
        scores = [answers.scores[probe].mean_log_prob for probe in self.probes(questions)]
        return {"before": torch.tensor(scores)}

    def assess(self, batch, answers, frozen):
        return Verdicts(tallies(self.name, [
            {("efficacy", None): [
                Outcome(self.scale * (answers.scores[probe].mean_log_prob - float(before)))
                for probe, before in zip(self.probes(questions), tensors["before"], strict=True)
            ]}
            for questions, tensors in zip(batch, frozen, strict=True)
        ]))
"""


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "editkit", "run", "--config-dir", "conf", *overrides]
    more = ["edits=2", "milestones=[2]", "suite=none", "editor.covariance=null", "tracker=none"]
    return subprocess.run(
        [*command, *more], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "protocol").mkdir(parents=True)
    (tmp_path / "conf" / "protocol" / "margin.yaml").write_text(YAML)
    (tmp_path / "margin.py").write_text(MODULE)
    return tmp_path


@pytest.mark.slow
def test_a_sixth_protocol_is_one_file_and_one_yaml(folder: Path) -> None:
    done = run(folder, "+protocol=margin", "evaluation.protocols=[probability,margin]")
    assert done.returncode == 0, done.stderr
    (evals,) = folder.glob("outputs/default/*/seed0/evals.jsonl")
    lines = [json.loads(line) for line in evals.read_text().splitlines()]
    own = {
        line["step"]: line["value"]
        for line in lines
        if line.get("protocol") == "margin" and "subset" not in line
    }
    assert own[0] == pytest.approx(0.0, abs=1e-6), "the unedited model against itself"
    assert own[2] > 1.0, "an edit makes its target more probable"
    assert any(line.get("protocol") == "probability" for line in lines)


def test_a_protocol_that_is_not_chosen_is_not_known(folder: Path) -> None:
    done = run(folder, "evaluation.protocols=[probability,margin]")
    assert done.returncode == 2
    assert "evaluation.protocols.1: invalid value (got 'margin'; expected one of" in done.stderr


def test_an_option_of_ones_own_protocol_is_checked_by_its_key(folder: Path) -> None:
    done = run(
        folder, "+protocol=margin", "evaluation.margin.scale=big", "evaluation.protocols=[margin]"
    )
    assert done.returncode == 2
    assert "evaluation.margin.scale" in done.stderr


class Wide(Distribution):
    """A second protocol that needs distributions, over more tokens. It freezes under the names of
    the shipped one.
    """

    name: ClassVar[str] = "wide"


def values(protocols: tuple[str, ...]) -> dict[tuple[str | None, str, str | None], float | None]:
    unedited, edited, asked = tiny_model("gpt2"), tiny_model("gpt2", seed=1), requests()
    evaluator = EditingEvaluator(
        protocols=protocols,
        tokens_per_batch=512,
        distribution=Distribution(top_k=2, kept=4),
        own=(Wide(top_k=3, kept=40),),
    )
    measured = evaluator.evaluate(edited, asked, evaluator.baseline(unedited, asked))
    return {
        (each.protocol, each.metric, each.task): each.value
        for each in measured
        if getattr(each, "subset", "") is None
    }


def test_two_protocols_that_need_distributions_both_get_theirs() -> None:
    together = values(("distribution", "wide"))
    alone = values(("distribution",)) | values(("wide",))
    assert together == alone
    assert {name for name, _, _ in together} == {"distribution", "wide"}


@dataclass(frozen=True, kw_only=True)
class Namesake(AbstractProtocol):
    """Freezes the request's number under the names of everything else in a baseline."""

    name: ClassVar[str] = "namesake"
    frozen: ClassVar[tuple[str, ...]] = ("greedy", "before", "ids", "noted", "rows")

    def freeze(self, questions: Questions, answers: Answers) -> Frozen:
        number = float(questions.request.id.rpartition("/")[2])
        return {name: torch.tensor([number]) for name in self.frozen}

    def assess(
        self, batch: Sequence[Questions], answers: Answers, frozen: Sequence[Frozen]
    ) -> Verdicts:
        for questions, tensors in zip(batch, frozen, strict=True):
            expected = self.freeze(questions, answers)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        outcomes = [{("efficacy", None): [Outcome(1.0)]} for _ in batch]
        return Verdicts(tallies(self.name, outcomes))


def test_the_frozen_tensors_of_a_protocol_are_its_own() -> None:
    model, asked = tiny_model("gpt2"), requests()
    evaluator = EditingEvaluator(
        protocols=("token", "namesake"), tokens_per_batch=512, own=(Namesake(),)
    )
    baseline = evaluator.baseline(model, asked)
    moment = Moment(view="v", positions=tuple(range(1, len(asked) + 1)))
    notes = evaluator.note(model, asked, baseline, {}, moment)
    results = evaluator.measure(model, asked, baseline, notes, moment)
    values = {
        (each.protocol, each.metric): each.value
        for each in results
        if getattr(each, "subset", "") is None and each.timing is None and each.task is None
    }
    assert values["token", "locality"] == 1.0
    assert values["namesake", "efficacy"] == 1.0
    assert values["namesake", "efficacy_forgetting"] == 0.0
