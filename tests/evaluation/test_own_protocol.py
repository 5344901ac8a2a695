"""A protocol of one's own is one file and one yaml; it freezes under names of its own, and its
distributions do not disturb those of the shipped protocol.
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

from editkit.errors import OptionError
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.base import AbstractProtocol, Frozen, Questions, Said, Verdicts
from editkit.evaluation.protocols.distribution import Distribution
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
    frozen: ClassVar[tuple[str, ...]] = ("margin_before",)
    scale: float

    def probes(self, asked):
        return asked.new["efficacy", None]

    def freeze(self, asked, said):
        return {"margin_before": torch.tensor([said.scores[p].mean_log_prob for p in self.probes(asked)])}

    def assess(self, asked, said, frozen):
        return Verdicts(tallies(self.name, [
            {("efficacy", None): [
                Outcome(self.scale * (said.scores[probe].mean_log_prob - float(before)))
                for probe, before in zip(self.probes(each), tensors["margin_before"], strict=True)
            ]}
            for each, tensors in zip(asked, frozen, strict=True)
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
    """A second protocol that needs distributions, over more tokens."""

    name: ClassVar[str] = "wide"
    frozen: ClassVar[tuple[str, ...]] = ("wide_top", "wide_log_probs", "wide_sizes")

    def closer_look(self, asked: Sequence[Questions], frozen: Sequence[Frozen] | None):
        return super().closer_look(asked, frozen if frozen is None else list(map(inner, frozen)))

    def freeze(self, asked: Questions, said: Said) -> Frozen:
        return {f"wide_{name}": tensor for name, tensor in super().freeze(asked, said).items()}

    def assess(self, asked: Sequence[Questions], said: Said, frozen: Sequence[Frozen]) -> Verdicts:
        return super().assess(asked, said, list(map(inner, frozen)))


def inner(frozen: Frozen) -> Frozen:
    return {
        name.removeprefix("wide_"): tensor
        for name, tensor in frozen.items()
        if name.startswith("wide_")
    }


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
class Thief(AbstractProtocol):
    """Freezes under a name that another protocol owns."""

    name: ClassVar[str] = "thief"
    frozen: ClassVar[tuple[str, ...]] = ("greedy",)

    def assess(self, asked: Sequence[Questions], said: Said, frozen: Sequence[Frozen]) -> Verdicts:
        return Verdicts({})


def test_a_frozen_name_has_one_owner() -> None:
    with pytest.raises(OptionError, match="Thief and AbstractTeacherForced both freeze 'greedy'"):
        EditingEvaluator(protocols=("thief",), tokens_per_batch=64, own=(Thief(),))
