"""Every configuration file in conf/: it composes, its class accepts its options, and its first
comment describes it.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from editkit.config.build import build
from editkit.config.compose import Option, compose, conf_folder, first_comment, options
from editkit.config.parts import PARTS
from editkit.config.schema import Problems, construct
from editkit.editors.base import AbstractAnyEditor
from tests.support.helpers import real_model_id

OPTIONS = list(options())
VALUE = re.compile(r"\s*\w+: *\S")
FILES = sorted(conf_folder().rglob("*.yaml"))


def of(*groups: str) -> list[Option]:
    return [option for option in OPTIONS if option.group in groups]


def label(option: Option) -> str:
    return f"{option.group}={option.name}"


def name(path: Path) -> str:
    return str(path.relative_to(conf_folder()))


@pytest.mark.parametrize("option", of(*PARTS), ids=label)
def test_every_option_is_taken_by_its_class(option: Option) -> None:
    node = compose([label(option)]).config.get(option.group, {})
    nodes = (
        {f"restraint.{key}": item for key, item in node.items()}
        if option.group == "restraint"
        else {option.group: node}
    )
    problems = Problems()
    for key, item in nodes.items():
        construct(item, key, PARTS[option.group], problems)
    assert not problems.messages


@pytest.mark.parametrize("option", of("restraint"), ids=label)
def test_every_restraint_stands_under_its_own_name_so_that_several_stack(option: Option) -> None:
    node = OmegaConf.load(conf_folder() / "restraint" / f"{option.name}.yaml")
    assert [name for name in node if name != "defaults"] == (
        [] if option.name == "none" else [option.name]
    )


def recipes() -> list[object]:
    """All of them; those that only point at another recipe's values are left to the slow run:
    composing takes most of this file's time.
    """

    def points(option: Option) -> bool:
        return "\ndefaults:" in (conf_folder() / "recipe" / f"{option.name}.yaml").read_text()

    return [
        pytest.param(recipe, marks=[pytest.mark.slow] if points(recipe) else [], id=label(recipe))
        for recipe in of("recipe")
    ]


@pytest.mark.parametrize("option", recipes())
def test_every_recipe_completes_its_pair_and_is_chosen_automatically_for_its_model(
    option: Option,
) -> None:
    editor, name = option.name.split("/")
    models = {model.name for model in of("model")}
    model = max(
        (model for model in models if name == model or name.startswith(f"{model}-")), key=len
    )  # llama3-8b-x: a variant for llama3-8b
    composed = compose(
        [
            f"model={model}",
            f"editor={editor}",
            *([] if name == model else [f"recipe={option.name}"]),
        ]
    )
    assert composed.config["recipe"].keys() == {"provenance", "source"}
    assert composed.config["recipe"]["provenance"] in ("published", "copied", "untuned", "tuned")
    problems = Problems()
    assert (
        construct(composed.config["editor"], "editor", AbstractAnyEditor, problems) is not None
    ), problems


@pytest.mark.parametrize("option", of("restraint_recipe"), ids=label)
def test_every_restraint_recipe_is_chosen_automatically_and_overridden_by_the_command_line(
    option: Option,
) -> None:
    # a model, editor/model, or editor/model/dataset
    restraint, *chosen_by = option.name.split("/")
    if len(chosen_by) == 1:
        chosen_by = ["memit", *chosen_by]
    editor, model, dataset = (*chosen_by, "world")[:3]
    path = conf_folder() / "restraint_recipe" / f"{option.name}.yaml"
    values = yaml.safe_load(path.read_text())["restraint"][restraint]
    chosen = [f"model={model}", f"editor={editor}", f"restraint=[rect,{restraint}]"]
    chosen.append(f"dataset={dataset}")
    assert {name: compose(chosen).config["restraint"][restraint][name] for name in values} == values
    name, former = next(iter(values.items()))
    assert (
        compose([*chosen, f"restraint.{restraint}.{name}={former + 1}"]).config["restraint"][
            restraint
        ][name]
        == former + 1
    )


@pytest.mark.parametrize(
    ("model", "dataset", "rome", "memit", "mu"),
    [
        ("gpt2-xl", "zsre", 80, 80, 0.5),
        ("gpt2-xl", "counterfact", 85, 85, 0.5),
        ("llama3-8b", "zsre", 90, 95, 1e-3),
        ("llama3-8b", "counterfact", 95, 95, 1e-3),
    ],
)
def test_eac_has_the_papers_percentile_and_mu_for_its_models_and_datasets(
    model: str, dataset: str, rome: float, memit: float, mu: float
) -> None:
    for editor, gamma in (("rome", rome), ("memit", memit)):
        chosen = [f"model={model}", f"dataset={dataset}", f"editor={editor}", "restraint=eac"]
        options = compose(chosen).config["restraint"]["eac"]
        assert (options["gamma"], options["l2"]) == (gamma, mu)
        assert options["source"].startswith("published: Table 2 and appendix C.5")


def test_alphaedit_means_the_same_by_either_name() -> None:
    names = (["editor=alphaedit"], ["editor=memit", "restraint=alphaedit"])
    by_editor, by_restraint = (compose(["model=tiny-llama", *chosen]).config for chosen in names)
    assert by_editor["restraint"] == by_restraint["restraint"]
    assert by_editor["restraint"]["alphaedit"]["l2"] == 1


# The papers' presets, which want the papers' data, are checked in test_experiments.py.
@pytest.mark.parametrize(
    "option", [option for option in of("experiment", "debug") if "/" not in option.name], ids=label
)
def test_every_overlay_builds(option: Option) -> None:
    composed = compose([label(option)])
    if composed.config["model"]["id"].startswith("package:"):
        real_model_id()  # skips without the package
    build(composed.config, choices=composed.choices)


@pytest.mark.parametrize("option", OPTIONS, ids=label)
def test_the_first_comment_of_every_option_describes_it(option: Option) -> None:
    assert len(option.about) > 10
    assert "\t" not in option.about


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != conf_folder()], ids=name)
def test_the_first_comment_of_an_option_is_whole_on_its_line(path: Path) -> None:
    first, lines = f"# {first_comment(path)}", path.read_text().splitlines()
    following = next((two for one, two in pairwise(lines) if one == first), "")
    goes_on = following.startswith("# ") and following[2:3].islower()
    assert first.endswith(".") or not goes_on, following


def test_every_value_at_the_root_is_explained() -> None:
    body = (conf_folder() / "config.yaml").read_text().partition("\nname:")[2]
    lines = ("name:" + body).splitlines()
    values = [(above, line) for above, line in pairwise(["", *lines]) if VALUE.match(line)]
    assert values
    explained = [" # " in line or above.strip().startswith("# ") for above, line in values]
    assert all(explained), values


def test_an_experiment_that_changes_the_pair_gets_the_recipe_of_the_new_pair(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\n# Mine\ndefaults:\n  - override /model: gpt2-xl\n  - override /restraint: [prune]\n"
        "editor:\n  target:\n    lr: 0.25\n"
    )
    config = compose(["experiment=mine"], config_dir=tmp_path).config
    assert config["editor"]["layers"] == [17]
    assert config["editor"]["target"]["lr"] == 0.25, (
        "an experiment's own values win over the recipe's"
    )
    assert list(config["restraint"]) == ["prune"]


def test_a_value_on_the_command_line_wins_over_recipe_and_experiment() -> None:
    assert compose(["experiment=demo", "edits=7", "editor.layers=[3]"]).config["editor"][
        "layers"
    ] == [3]


def test_a_model_without_a_recipe_can_take_that_of_another() -> None:
    config = compose(["model=hf", "model.id=somewhere", "recipe=rome/gpt2-xl"]).config
    assert config["editor"]["layers"] == [17]


def test_nothing_of_hydra_writes_log_files() -> None:
    for path in FILES:
        assert "FileHandler" not in path.read_text(), name(path)
