"""`editkit.load`, `edit`, `Session` and `undo` on a bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import editkit
from editkit.datasets.world import corpus, generate_world
from editkit.model.families import known_families
from tests.support import helpers
from tests.support.paths import PACKAGE

FOLDER = PACKAGE / "assets" / "tiny-gpt2"
MODULE = "transformer.h.0.mlp.c_proj"
FACT = {"prompt": "{} was born in", "subject": "Zoso Vosset", "target": "Tunit"}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def network() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.fixture
def model(network: Any) -> editkit.EditableModel:
    return editkit.load(network, AutoTokenizer.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def facts() -> tuple[editkit.EditRequest, ...]:
    return helpers.world_requests(None)


def not_finite(self: object, step: editkit.Step, module: str, plan: editkit.Plan) -> torch.Tensor:
    return torch.full(step.model.weight(module).shape, torch.nan)


def weights(model: editkit.EditableModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_of_transformers_is_wrapped_without_a_copy(
    model: editkit.EditableModel, network: Any
) -> None:
    assert isinstance(model, editkit.EditableModel)
    assert model.network is network
    assert model.name == "tiny-gpt2"


@pytest.mark.parametrize("source", ["tiny-gpt2", FOLDER, str(FOLDER)])
def test_a_model_is_loaded_by_its_name_or_folder(source: str | Path) -> None:
    model = editkit.load(source)
    assert model.name == "tiny-gpt2"
    assert editkit.load(source, name="mine").name == "mine"


def test_the_known_name_of_a_hub_id_is_found(network: Any) -> None:
    network.config.name_or_path = "EleutherAI/gpt-j-6b"
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert editkit.load(network, tokenizer).name == "gptj-6b"
    assert editkit.load(network, tokenizer, name="mine").name == "mine"


def test_what_cannot_be_loaded_says_why(network: Any) -> None:
    with pytest.raises(editkit.ConfigError, match="tokenizer: the tokenizer of the model"):
        editkit.load(network)
    with pytest.raises(editkit.ConfigError, match=r"not a model that can be edited .got 'Linear'"):
        editkit.load(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(editkit.ConfigError, match="loads its tokenizer by a name"):
        editkit.load("tiny-gpt2", AutoTokenizer.from_pretrained(FOLDER))


def test_an_unknown_architecture_suggests_names_and_takes_them(network: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    network.config.model_type = "other"
    with pytest.raises(editkit.ConfigError, match=r"(?s)got 'other'.*base:transformer"):
        editkit.load(network, tokenizer)
    assert editkit.load(network, tokenizer, family="gpt2").num_layers
    assert editkit.load(network, tokenizer, family=known_families()["gpt2"]).num_layers


def test_one_fact_is_edited_in_and_taken_back(model: editkit.EditableModel) -> None:
    before = weights(model)
    result = editkit.edit(model, editor="rome", options={"keys": "original"}, **FACT)
    assert result.nonfinite is None
    assert result.probability_before[0] < 0.1 < 0.8 < result.probability_after[0]
    update = result.updates[MODULE]
    assert isinstance(update, editkit.LowRank) and update.rank == 1
    assert list(result.updates) == [MODULE]
    changed = {
        name
        for name, tensor in model.network.state_dict().items()
        if not tensor.equal(before[name])
    }
    assert changed == {f"{MODULE}.weight"}
    figures = result.telemetry[MODULE]
    assert figures["condition_number"] == pytest.approx(
        float(torch.linalg.cond(model.weight(MODULE).double())), rel=1e-5
    )
    assert figures["l1_norm"] == pytest.approx(float(model.weight(MODULE).double().abs().sum()))
    assert figures["update_frobenius"] == pytest.approx(update.frobenius())
    text = repr(result)
    assert "Zoso Vosset was born in -> Tunit: probability 0." in text
    assert f"{MODULE}: rank 1 update of norm" in text and len(text.splitlines()) == 3
    model.undo()
    assert same(weights(model), before)
    with pytest.raises(editkit.ConfigError, match="undo: tiny-gpt2 has no edit to take back"):
        model.undo()


@pytest.mark.slow
def test_edits_continue_on_the_edited_weights_and_undo_is_a_stack(
    model: editkit.EditableModel, facts: tuple[editkit.EditRequest, ...]
) -> None:
    stages = [weights(model)]
    editkit.edit(model, facts[0], editor="rome")
    stages.append(weights(model))
    editkit.edit(model, facts[:4], editor="memit")  # its statistics are of the unedited model
    stages.append(weights(model))
    editkit.edit(model, facts[4], editor="ft")  # a dense update
    assert len(model.marks) == 3
    for stage in reversed(stages):
        assert not same(weights(model), stage)
        model.undo()
        assert same(weights(model), stage)
    for fact in facts[:2]:
        editkit.edit(model, fact)
    model.reset()
    assert same(weights(model), stages[0])
    assert not model.marks


def test_a_failed_edit_changes_nothing(
    model: editkit.EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, apply = weights(model), model.apply

    def apply_and_fail(module: str, update: Any) -> float:
        apply(module, update)
        raise RuntimeError("cut off")

    monkeypatch.setattr(model, "apply", apply_and_fail)
    with pytest.raises(RuntimeError, match="cut off"):
        editkit.edit(model, **FACT)
    assert same(weights(model), before)
    assert not model.marks


def test_an_edit_that_is_not_finite_is_taken_back(
    model: editkit.EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(model)
    monkeypatch.setattr(editkit.Rome, "propose", not_finite)
    result = editkit.edit(model, **FACT)
    assert result.nonfinite == f"update of {MODULE}"
    assert not result.updates and "not applied: non-finite" in repr(result)
    assert same(weights(model), before)
    assert not model.marks


def test_a_session_makes_the_steps_of_a_run(
    facts: tuple[editkit.EditRequest, ...], tmp_path: Path
) -> None:
    settings = {"edits": 3, "milestones": [0, 3], "suite": "none", "tracker": "none"}
    run = editkit.run(
        "editor=d4s", batch_size=1, **{"paths": {"outputs": str(tmp_path)}}, **settings
    )
    session = editkit.Session(editkit.load("tiny-gpt2"), "d4s")
    for step in run.steps[1:]:
        result = session.edit(facts[step.step - 1])
        assert result.telemetry == step.modules


def test_the_history_of_a_session_follows_undo(
    model: editkit.EditableModel, facts: tuple[editkit.EditRequest, ...]
) -> None:
    session = editkit.Session(model, "memit", restraint="d4s")
    first = session.edit(facts[0])
    once = session.edit(facts[1])
    assert session.num_edits == 2
    model.undo()
    assert session.num_edits == 1
    again = session.edit(facts[1])
    assert again.telemetry == once.telemetry
    model.reset()
    assert session.num_edits == 0
    assert session.edit(facts[0]).telemetry == first.telemetry


def test_restraints_by_name_and_as_objects(
    model: editkit.EditableModel, facts: tuple[editkit.EditRequest, ...]
) -> None:
    cap = editkit.NormCap(norm="spectral", ratio=0.01)
    result = editkit.edit(model, facts[0], restraint=cap)
    sigma = float(torch.linalg.svdvals(model.base(MODULE).double())[0])
    assert result.telemetry[MODULE]["update_sigma_max"] <= 0.01 * sigma * (1 + 1e-6)
    model.undo()
    named = editkit.edit(
        model, facts[0], restraint=["norm_cap"], options={"restraint.norm_cap.ratio": 0.01}
    )
    assert named.telemetry == result.telemetry
    both = editkit.Session(model, restraint=[cap, editkit.Rect(keep=0.2, epsilon=1e-8), "eac"])
    assert len(both.restraints.updates) == 2 and both.restraints.objective is not None


def test_prune_is_a_view_of_a_session_or_acts_every_step(
    model: editkit.EditableModel, facts: tuple[editkit.EditRequest, ...]
) -> None:
    session = editkit.Session(model, restraint="prune_linear")
    for fact in facts[:3]:
        session.edit(fact)
    edited = weights(model)
    limit = float(torch.linalg.svdvals(model.base(MODULE).double())[0])
    total = float(torch.linalg.svdvals(model.total(MODULE).dense().double())[0])
    assert total > limit
    with session.restrained():
        inside = float(
            torch.linalg.svdvals((model.weight(MODULE) - model.base(MODULE)).double())[0]
        )
    assert inside == pytest.approx((total + limit) / 2, rel=1e-4)
    assert same(weights(model), edited)
    model.reset()
    with pytest.raises(editkit.ConfigError, match=r"restraint.prune_linear.apply_at: .*Session"):
        editkit.edit(model, facts[0], restraint="prune_linear")
    options = {"restraint.prune_linear.apply_at": "every", "restraint.prune_linear.every": 1}
    editkit.edit(model, facts[0], restraint="prune_linear", options=options)
    model.undo()
    plain = editkit.Session(model)
    with (
        pytest.raises(editkit.ConfigError, match="no such restraint on the total"),
        plain.restrained(),
    ):
        pass


def test_an_editor_object_needs_neither_recipe_nor_configuration(
    model: editkit.EditableModel, facts: tuple[editkit.EditRequest, ...]
) -> None:
    editor = editkit.Session(model).editor
    assert isinstance(editor, editkit.Rome)
    named = editkit.edit(model, facts[0])
    model.undo()
    given = editkit.edit(model, facts[0], editor=editor)
    assert given.telemetry == named.telemetry
    with pytest.raises(editkit.ConfigError, match="recipe: an editor that is an object"):
        editkit.edit(model, facts[0], editor=editor, recipe="gpt2-xl")
    with pytest.raises(editkit.ConfigError, match=r"target.lr: an editor that is an object"):
        editkit.edit(model, facts[0], editor=editor, options={"target.lr": 1})


def test_options_and_recipes(model: editkit.EditableModel) -> None:
    session = editkit.Session(model, options={"target.lr": 0.5, "layers": [1], "covariance": None})
    assert isinstance(session.editor, editkit.Rome)
    assert (session.editor.target.lr, session.modules) == (0.5, ("transformer.h.1.mlp.c_proj",))
    other = editkit.Session(model, recipe="rome/tiny-llama").editor
    assert other == editkit.Session(model, recipe="tiny-llama").editor


def test_global_generators_are_left_alone(
    model: editkit.EditableModel, facts: tuple[editkit.EditRequest, ...]
) -> None:
    state = torch.random.get_rng_state()
    editkit.edit(model, facts[0])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"editor": "roma"}, r"editor: no such editor \(got 'roma'; expected one of .*rome"),
        ({"recipe": "none"}, r"recipe: no such recipe \(got 'none'; expected one of .*gpt2-xl"),
        ({"restraint": "prun"}, r"restraint: no such restraint \(got 'prun'; expected one of"),
        ({"options": {"tarjet.lr": 1}}, "tarjet.lr: no such option"),
        ({"options": {"kees": 1}}, r"editor.kees"),
        ({"options": {"layers": [99]}}, "editor.layers"),
        ({"options": {"layers": {3}}}, "layers: not a plain value"),
        ({"options": {"restraint.prune.alpha": 1}}, "Fix: choose the restraint .chosen: none"),
        ({"second_moments": "no/such"}, "second_moments: no such file or folder"),
        ({"restraint": "d4s"}, "restraint.d4s: Rome cannot be restrained at this place"),
        ({"editor": "memit", "restraint": ["d4s", "alphaedit"]}, "at most one restraint"),
        ({"editor": "mend", "options": {"hypernetwork": None}}, "editor.hypernetwork"),
        (
            {"restraint": "prune", "options": {"restraint.prune.apply_at": "end"}},
            "a session has no last edit",
        ),
        (
            {"restraint": "prune", "options": {"restraint.prune.alpha": 1.2}},
            "restraint.prune.alpha",
        ),
    ],
)
def test_invalid_settings_name_what_exists(
    model: editkit.EditableModel, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(editkit.ConfigError, match=problem):
        editkit.Session(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "3 problems:\n.*prompt: not given"),
        (FACT | {"prompt": "Zoso Vosset was born in"}, 'Fix: write "{}" in place of \'Zoso V'),
        ({"requests": []}, "requests: empty"),
        (FACT | {"requests": [helpers.request()]}, "leave one of the two out"),
        ({"requests": helpers.requests(2)}, r"Rome edits 1 at a time .got 2"),
        (FACT | {"target": "Tunit " * 400}, "edit/Zoso Vosset"),
    ],
)
def test_invalid_requests_say_what_is_wrong(
    model: editkit.EditableModel, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(editkit.ConfigError, match=problem):
        editkit.edit(model, **arguments)


def test_an_unknown_model_needs_a_recipe_and_a_source(tmp_path: Path) -> None:
    model = editkit.load(FOLDER, name="unknown")
    with pytest.raises(editkit.ConfigError, match=r"no recipe of rome for unknown.*gpt2-xl"):
        editkit.edit(model, **FACT)
    with pytest.raises(editkit.ConfigError, match=r"second_moments: Rome needs.*covariance"):
        editkit.edit(model, **FACT, recipe="tiny-gpt2")
    options = {"covariance": None}
    assert editkit.edit(model, **FACT, recipe="tiny-gpt2", options=options).updates
    model.undo()
    text = tmp_path / "it's a text.txt"
    text.write_text("\n".join(corpus(generate_world(), seed=0, num_documents=500)))
    session = editkit.Session(
        model, "memit", recipe="tiny-gpt2", second_moments=text, options={"layers": [0]}
    )
    assert session.edit(**FACT).updates
