"""Building gives a checked experiment, or one error that names the key of every problem."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.experiment import Experiment
from editkit.config.identity import config_hash
from editkit.editors.rome import Rome
from editkit.errors import ConfigError

Change = Callable[[dict[str, Any]], object]


@functools.cache
def composed() -> dict[str, Any]:
    """The defaults, with a dataset that is read in no time."""
    few = {"_target_": "tests.support.build_parts.FewRequests", "name": "few", "size": 200}
    return compose(["tracker=none"]).config | {"dataset": few}


def config_with(*overrides: str, change: Change = lambda config: None) -> dict[str, Any]:
    """The defaults with values replaced as `key=value`, the value in yaml: composing anew for each
    would take a tenth of a second.
    """
    config = copy.deepcopy(composed())
    for override in overrides:
        key, _, value = override.partition("=")
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = yaml.safe_load(value)
    change(config)
    return config


def built(*overrides: str, change: Change = lambda config: None) -> Experiment:
    return build(config_with(*overrides, change=change))


def problems_of(*overrides: str, change: Change = lambda config: None) -> str:
    with pytest.raises(ConfigError) as raised:
        built(*overrides, change=change)
    return str(raised.value)


def problems_of_choices(*overrides: str) -> str:
    chosen = compose(overrides)
    with pytest.raises(ConfigError) as raised:
        build(chosen.config, choices=chosen.choices)
    return str(raised.value)


def add_prune(config: dict[str, Any]) -> None:
    config["restraint"] = compose(["restraint=prune"]).config["restraint"]


def test_the_defaults_build_without_loading_a_model() -> None:
    experiment = built()
    assert isinstance(experiment.editor, Rome)
    assert experiment.editor.layers == (0,), "the recipe's"
    assert experiment.schedule.milestones == (0, 10, 50, 100)
    assert experiment.evaluators.keys() == {"editing", "suite"}
    assert len(experiment.data.requests) >= experiment.edits


def test_a_built_configuration_builds_again_to_the_same_experiment() -> None:
    first = built("edits=20", change=add_prune)
    again = build(first.config)
    assert (again.folder, again.config, again.restraints) == (
        first.folder,
        first.config,
        first.restraints,
    )


def test_building_leaves_the_configuration_as_it_was() -> None:
    config = config_with("edits=20")
    before = copy.deepcopy(config)
    build(config)
    assert config == before


def test_all_problems_are_reported_together() -> None:
    def change(config: dict[str, Any]) -> None:
        config["editor"] |= {"cov_wieght": 1, "keys": "best"}
        config["editr"] = "rome"

    text = problems_of(
        "edits=5", "milestones=[0,6]", "editor.target.lr=big", "runtime.device=tpu", change=change
    )
    for part in (
        "editor.cov_wieght: unknown option of Rome (expected one of context_lengths, covariance,",
        "editor.keys: invalid value (got 'best'; expected 'averaged', 'original' or 'clean').",
        "editr: unknown option of the configuration (expected one of batch_size,",
        "Fix: did you mean editor?",
        "milestones: out of range (got [6]; expected numbers from 0 to edits=5).",
        "editor.target.lr: invalid value (got 'big'; expected a valid number).",
        "runtime.device: unknown device (got 'tpu'",
    ):
        assert part in text
    assert text.startswith("6 problems")


def test_a_misspelt_nested_key_is_answered_with_the_nearest_one() -> None:
    text = problems_of(change=lambda config: config["editor"]["target"].update(stepps=3))
    assert (
        "editor.target.stepps: unknown option of TargetSettings (expected one of clamp, " in text
        and text.endswith("). Fix: did you mean editor.target.steps?")
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed=true", "seed: invalid value (got True; expected a valid integer)."),
        ("seed=-1", "seed: out of range (got -1; expected at least 0)."),
        ("edits=0", "edits: out of range (got 0; expected at least 1)."),
        ("edits=1.5", "edits: invalid value (got 1.5; expected a valid integer)."),
        ("batch_size=0", "batch_size: out of range (got 0; expected at least 1)."),
        (
            "batch_size=2",
            "batch_size: editor=rome edits one request at a time (got 2; expected at most 1). "
            "Fix: set batch_size=1.",
        ),
        ("checkpoint.every=0", "checkpoint.every: out of range (got 0; expected at least 1)."),
        ("telemetry.every=-5", "telemetry.every: out of range (got -5; expected at least 1)."),
        (
            "milestones=[-1]",
            "milestones: out of range (got [-1]; expected numbers from 0 to edits=100).",
        ),
        ("milestones=10", "milestones: invalid value (got 10; expected a list)."),
        ("resume=maybe", "resume: invalid value (got 'maybe'; expected 'auto' or 'never')."),
        (
            "on_collapse=cry",
            "on_collapse: invalid value (got 'cry'; expected 'stop' or 'continue').",
        ),
        (
            "editor.layers=[true]",
            "editor.layers.0: invalid value (got True; expected a valid integer).",
        ),
        ("editor.target=3", "editor.target: invalid value (got 3; expected names and values)"),
        ("editor.target.lr=0", "editor.target.lr: must be positive (got 0.0)."),
        (
            "evaluation.protocols=[probability,guess]",
            "evaluation.protocols.1: invalid value (got 'guess';",
        ),
        ("runtime.threads=0", "runtime.threads: out of range (got 0"),
        ("name='a/b'", "name: not a folder name (got 'a/b';"),
        ("experiment_name=..", "experiment_name: not a folder name (got '..';"),
        (
            "stats.source=none",
            "stats: editor=rome needs second moments (got 'none'; expected world, facts, text, "
            "hub or imported).",
        ),
        (
            "edits=1000000",
            "edits: dataset=few has 200 requests (got 1000000; expected at most 200).",
        ),
        ("dataset.size=7", "edits: dataset=few has 7 requests (got 100; expected at most 7)."),
        ("editor._target_=nowhere.Rome", "editor._target_: cannot import nowhere.Rome"),
        ("editor._target_=Rome", "editor._target_: cannot import Rome"),
        (
            "editor._target_=editkit.config.schedule.Schedule",
            "editor._target_: wrong kind of class (got 'editkit.config.schedule.Schedule'; "
            "expected a subclass of AbstractAnyEditor).",
        ),
        (
            "editor._target_=editkit.editors.base.AbstractEditor",
            "editor._target_: AbstractEditor is abstract or not a dataclass (expected",
        ),
    ],
)
def test_each_kind_of_bad_value_names_its_key(override: str, problem: str) -> None:
    assert problem in problems_of(override)


def test_every_number_must_be_finite() -> None:
    def change(config: dict[str, Any]) -> None:
        config["restraint"] = {
            "norm_cap": {
                "_target_": "editkit.restraints.norm_cap.NormCap",
                "norm": "spectral",
                "ratio": math.inf,
            }
        }

    text = problems_of("editor.target.stop_loss=.nan", "editor.target.clamp=-.inf", change=change)
    for key, value in {
        "editor.target.stop_loss": "nan",
        "editor.target.clamp": "-inf",
        "restraint.norm_cap.ratio": "inf",
    }.items():
        assert f"{key}: invalid value (got {value}; expected a finite number)." in text


def test_each_fault_of_a_restraint_is_a_problem_of_its_own_under_the_key_that_it_stands_at() -> (
    None
):
    def change(config: dict[str, Any]) -> None:
        config["restraint"] = compose(["restraint=[eac,prune_linear]"]).config["restraint"]
        config["restraint"]["eac"] |= {"gamma": 100.0, "epsilon": 0.0}
        config["restraint"]["prune_linear"] |= {"alpha": 0.5, "every": 3}

    lines = problems_of(change=change).splitlines()
    assert lines[0] == "4 problems:"
    for key in ("eac.gamma", "eac.epsilon", "prune_linear.alpha", "prune_linear.every"):
        assert [line for line in lines if line.startswith(f"  - restraint.{key}: ")], key


def test_an_invalid_option_of_the_editor_does_not_hide_its_limits() -> None:
    def change(config: dict[str, Any]) -> None:
        config["restraint"] = {"mine": fake_restraint("SolveRestraint")}
        config["model"]["device_map"] = "auto"

    text = problems_of("editor.layers=[0,0]", "batch_size=2", change=change)
    for part in (
        "editor.layers: ",
        "batch_size: editor=rome edits one request at a time (got 2; expected at most 1). "
        "Fix: set batch_size=1.",
        "restraint.mine: editor=rome cannot be restrained at this place (got 'solve';",
    ):
        assert part in text
    assert "model.device_map" not in text, "ROME can"


def test_an_interpolation_that_leads_nowhere_is_named() -> None:
    with pytest.raises(ConfigError, match="Interpolation key 'nowhere' not found"):
        build(OmegaConf.create(config_with("editor.name=${nowhere}")))


def test_stats_are_not_missed_where_the_covariance_is_off() -> None:
    assert built("stats.source=none", "editor.covariance=null").stats.source == "none"


def test_a_pair_without_a_recipe_says_which_keys_to_set() -> None:
    text = problems_of_choices("model=hf", "editor=memit")
    assert "recipe: no recipe for editor=memit, model=hf. Fix: set editor.layers, " in text
    assert "model.id: mandatory value is not set. Fix: set model.id=<value>." in text


def test_a_misspelt_recipe_is_named() -> None:
    assert "recipe: no recipe rome/gpt3. Fix: set editor.layers" in problems_of_choices(
        "recipe=rome/gpt3"
    )


def test_a_value_set_to_nothing_is_no_missing_recipe() -> None:
    assert problems_of("editor.layers='???'") == (
        "editor.layers: mandatory value is not set. Fix: set editor.layers=<value>."
    )


def test_a_missing_dataset_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.json" in problems_of_choices(
        "dataset=counterfact", f"dataset.path={tmp_path}/none.json"
    )


def test_an_output_folder_below_a_file_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is not a folder" in problems_of(f"paths.outputs={tmp_path}/file/runs")
    built(f"paths.outputs={tmp_path}/runs")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fake_restraint(kind: str) -> dict[str, str]:
    return {"_target_": f"tests.support.build_parts.{kind}"}


def test_a_restraint_at_an_unsupported_place_is_refused_with_the_supported_places() -> None:
    text = problems_of(
        change=lambda config: config.update(restraint={"memory": fake_restraint("SolveRestraint")})
    )
    assert (
        text == "restraint.memory: editor=rome cannot be restrained at this place "
        "(got 'solve'; expected one of objective, update, total)."
    )


def test_two_restraints_on_the_solve_have_no_room() -> None:
    both = {"one": fake_restraint("SolveRestraint"), "two": fake_restraint("SolveRestraint")}
    assert (
        "restraint: one and two act on the solve (expected at most one restraint on the solve)."
        in problems_of(change=lambda config: config.update(restraint=both))
    )


def test_restraints_stack_each_at_its_place() -> None:
    def change(config: dict[str, Any]) -> None:
        add_prune(config)
        config["restraint"]["cap"] = fake_restraint("UpdateRestraint")

    experiment = built(change=change)
    assert len(experiment.restraints.updates) == 1
    assert list(experiment.restraints.totals) == ["prune"]
    assert experiment.name == "tiny-gpt2-rome-prune+cap"


def test_a_restraint_outside_a_mapping_of_names_is_refused() -> None:
    text = problems_of(
        change=lambda config: config.update(restraint=fake_restraint("UpdateRestraint"))
    )
    assert "restraint: the values of a restraint are not under its name" in text


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "name=other",
        "experiment_name=other",
        "paths.outputs=other",
        "checkpoint.every=7",
        "resume=never",
        "runtime.device=cuda",
    ],
)
def test_options_that_cannot_change_a_result_are_not_hashed(override: str) -> None:
    assert config_hash(built(override).config) == config_hash(built().config)


@pytest.mark.parametrize(
    "override",
    [
        "edits=50",
        "editor.keys=original",
        "editor.target.lr=0.2",
        "dataset.order=shuffled",
        "suite.limit=3",
    ],
)
def test_options_that_can_change_a_result_are_hashed(override: str) -> None:
    assert config_hash(built(override).config) != config_hash(built().config)


def test_the_hash_is_the_same_for_1_and_1_point_0() -> None:
    assert config_hash({"editor": {"lr": 1}}) == config_hash({"editor": {"lr": 1.0}})


def test_the_folder_is_outputs_experiment_name_hash_seed() -> None:
    experiment = built("experiment_name=paper", "name=cell", "seed=3", "paths.outputs=elsewhere")
    assert (
        experiment.folder
        == Path("elsewhere/paper") / f"cell-{config_hash(experiment.config)}" / "seed3"
    )
