"""The configuration of a run: the four settings of the literature, the options of evaluation, and
combinations that are refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.experiment import Experiment
from editkit.errors import ConfigError
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.perplexity import Perplexity
from editkit.evaluation.protocols.judge import StringJudge


def built(*overrides: str) -> Experiment:
    composed = compose(["tracker=none", "suite=none", "edits=20", *overrides])
    return build(composed.config, choices=composed.choices)


@pytest.mark.parametrize(
    ("setting", "editor", "batch_size", "rollback"),
    [
        ("single", "rome", 1, True),
        ("batch", "memit", 100, True),
        ("sequential", "rome", 1, False),
        ("sequential_batch", "memit", 100, False),
    ],
)
def test_the_settings_of_the_literature_have_names(
    setting: str, editor: str, batch_size: int, rollback: bool
) -> None:
    experiment = built(f"setting={setting}", f"editor={editor}")
    assert (experiment.schedule.batch_size, experiment.rollback) == (batch_size, rollback)
    assert (
        built(f"setting={setting}", f"editor={editor}", "batch_size=1").schedule.batch_size == 1
    ), "a value of one's own wins"


def test_the_unedited_model_is_measured_whatever_the_milestones_are() -> None:
    experiment = built("setting=single", "milestones=[2,4]")
    assert experiment.schedule.milestones == (0, 2, 4) and experiment.schedule.is_measured(0)
    assert experiment.folder == built("setting=single", "milestones=[0,2,4]").folder, "the same run"


@pytest.mark.parametrize(
    ("given", "meant"), [("[5,2]", "[0,2,5]"), ("[1,1]", "[0,1]"), ("[]", "[0]"), ("[0]", "[]")]
)
def test_milestones_are_a_set_with_the_unedited_model(given: str, meant: str) -> None:
    one, other = built(f"milestones={given}"), built(f"milestones={meant}")
    assert one.schedule == other.schedule and one.folder == other.folder, "the same run"
    assert one.schedule.milestones[0] == 0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=9223372036854775808", r"^seed: out of range \(got 9223372036854775808; expected at most 9223372036854775807"),
        ("seed=-1", r"^seed: out of range \(got -1; expected at least 0\)"),
        ("edits=99999999999999999999", r"^edits: out of range .* at most 9223372036854775807"),
        ("milestones=[1,99999999999999999999]", r"^milestones\.1: out of range"),
        (f"dataset.path=/{'x' * 5000}", r"^dataset\.path: the text is too long \(got .{70,120} 5,003 characters; expected at most 4,095 bytes\)"),
        (f"name={'x' * 101}", r"^name: not a folder name .* at most 100 letters"),
        ('stats.folder="a\0b"', r"^stats\.folder: the text holds a NUL character"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_value_beyond_what_the_machine_takes_is_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        built("dataset=counterfact" if "path" in override else "dataset=world", override)


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    assert torch.Generator().manual_seed(built("seed=9223372036854775807").seed)


def test_rollback_leaves_no_trajectory_to_write_into() -> None:
    assert built("setting=single", "restraint=prune").rollback
    with pytest.raises(
        ConfigError,
        match=r"restraint\.prune\.apply_at: with rollback=true no total remains in the model \(got 'end';",
    ):
        built("setting=single", "restraint=prune", "restraint.prune.apply_at=end")


def test_the_default_judges_by_two_protocols_and_asks_for_nothing_more() -> None:
    experiment = built()
    assert experiment.evaluation.protocols == ("probability", "argmax")
    assert experiment.evaluators.keys() == {"editing", "suite"}
    assert not experiment.schedule.measures_last


def test_the_full_evaluation_asks_for_everything(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    experiment = built(
        "evaluation=full",
        f"evaluation.perplexity.path={tmp_path}",
        "evaluation.tokens_per_batch=100",
    )
    assert experiment.evaluation.protocols == (
        "probability",
        "argmax",
        "token",
        "generate",
        "distribution",
    )
    assert (
        experiment.measuring.timings == ("milestone", "immediate", "final")
        and experiment.schedule.measures_last
    )
    assert experiment.evaluation.generate.judge == StringJudge(words=12)
    fluency, perplexity = experiment.evaluators["fluency"], experiment.evaluators["perplexity"]
    assert isinstance(fluency, Fluency) and isinstance(perplexity, Perplexity)
    assert fluency.tokens_per_batch == perplexity.tokens_per_batch == 100
    assert build(experiment.config).evaluation == experiment.evaluation


def test_protocols_can_be_left_out_and_invalid_options_are_named() -> None:
    assert built("evaluation.protocols=[]").evaluators.keys() == {"suite"}
    with pytest.raises(ConfigError) as raised:
        built(
            "evaluation.protocols=[probability,guess]",
            "evaluation.timings=[later]",
            "evaluation.generate.judge._target_=editkit.evaluation.protocols.judge.NoJudge",
            "evaluation.perplexity.path=no/such/file",
        )
    for part in (
        r"protocols\.1: invalid value \(got 'guess';",
        r"timings\.0: invalid value \(got 'later';",
        r"generate\.judge\._target_: cannot import editkit\.evaluation\.protocols\.judge\.NoJudge",
        r"perplexity\.path: .*no/such/file",
    ):
        assert re.search(rf"evaluation\.{part}", str(raised.value)), part
    assert built("evaluation.generate.judge=null").evaluation.generate.judge is None


def test_thresholds_do_not_change_the_folder_of_a_run() -> None:
    assert built().folder == built("evaluation.thresholds.task=0.9").folder
    assert built().folder != built("evaluation.block_size=5").folder
