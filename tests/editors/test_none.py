"""Without edits, a run measures the unedited model. With a model that somebody else edited, it
measures that model with the telemetry of the weights that differ, and refuses what is no edited
version of the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.editors.none import NoEditor
from editkit.errors import ConfigError
from editkit.evaluation.editing import EditingEvaluator
from editkit.model.editable import EditableModel
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.runner.session import run
from editkit.types import EvalRecord, StepRecord
from tests.support.fakes import trajectory
from tests.support.helpers import KINDS, Kind, requests, tiny_model, tiny_tokenizer


def saved(model: EditableModel, folder: Path, *, tokenizer: bool = True) -> Path:
    model.network.save_pretrained(folder)
    if tokenizer:
        model.tokenizer.save_pretrained(folder)
    return folder


def base_in(folder: Path, kind: Kind) -> EditableModel:
    """A model with files, so that its tokenizer has a place."""
    model = tiny_model(kind)
    saved(model, folder)
    model.tokenizer.name_or_path = str(folder)
    return model


def changed_parameters(model: EditableModel) -> list[str]:
    """A matrix, an embedding that is tied to the head, a norm, and a bias where there is one."""
    names = [name for name, _ in model.network.named_parameters()]
    norm = next(name for name in names if "ln_1.weight" in name or "input_layernorm" in name)
    biases = [name for name in names if name.endswith("bias")]
    matrix = f"{model.down_projections([1])[0]}.weight"
    return sorted({names[0], matrix, norm, *biases[:1]}, key=names.index)


def edited_elsewhere(kind: Kind, folder: Path) -> tuple[EditableModel, list[str]]:
    other = tiny_model(kind)
    names = changed_parameters(other)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            parameter = other.network.get_parameter(name)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    saved(other, folder)
    return other, names


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_become_those_of_the_edited_model_with_the_telemetry_of_each(
    kind: Kind, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", kind)
    other, names = edited_elsewhere(kind, tmp_path / "edited")
    editor = NoEditor(name="none", edited=str(tmp_path / "edited"))
    modules = editor.modules(base)
    matrix = base.down_projections([1])[0]
    assert list(modules) == [matrix if name == f"{matrix}.weight" else name for name in names]
    job = replace(
        trajectory(base, requests(3), editor=editor, milestones=(0, 3), batch_size=3),
        evaluators={},
    )
    first, last = [event for event in run_edits(job) if isinstance(event, StepRecord)]
    # float32 holds W_0 + (W - W_0) with one rounding
    torch.testing.assert_close(
        base.network.state_dict(), other.network.state_dict(), rtol=0, atol=2e-7
    )
    for module in modules:
        before, after = tiny_model(kind).weight(module), other.weight(module)
        figures = last.modules[module]
        moved = torch.linalg.matrix_norm((after - before).double())
        assert figures["total_frobenius"] == pytest.approx(float(moved), rel=1e-5)
        assert figures["l1_norm"] == pytest.approx(float(after.abs().sum()), rel=1e-5)
        for model, record in ((before, first), (after, last)):
            values = torch.linalg.svdvals(model.double())
            told = record.modules[module]
            assert told["sigma_max"] == pytest.approx(float(values[0]), rel=1e-3)
            if len(values) > 1:
                expected = float(values[0] / values[-1])
                assert told["condition_number"] == pytest.approx(expected, rel=1e-3)
            else:
                assert "condition_number" not in told
    assert editor.provenance()["edited"]["differs_in"] == list(modules)  # type: ignore[index]


def test_without_edits_every_milestone_is_the_unedited_model() -> None:
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    evaluator = EditingEvaluator(protocols=("probability", "argmax"), tokens_per_batch=2048)
    job = replace(
        trajectory(model, requests(4), milestones=(0, 2, 4)),
        editor=NoEditor(name="none", edited=None),
        evaluators={"editing": evaluator.prepare(model)},
    )
    events = list(run_edits(job))
    assert all(not event.modules for event in events if isinstance(event, StepRecord))
    records = [event for event in events if isinstance(event, EvalRecord)]
    unedited, last = (
        {
            (each.measurement.metric, each.measurement.protocol): each.measurement.value
            for each in records
            if each.step == step and not each.measurement.is_part and not each.measurement.task
        }
        for step in (0, 4)
    )
    assert unedited == last and len(last) > 4
    assert all(torch.equal(value, before[n]) for n, value in model.network.state_dict().items())


def other_tokenizer(folder: Path) -> None:
    tiny_tokenizer("gpt2", bos=True).save_pretrained(folder)


def other_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_head": 2}))


def other_depth(folder: Path) -> None:
    saved(tiny_model("gpt2", num_layers=2), folder)


def other_family(folder: Path) -> None:
    saved(tiny_model("llama"), folder)


def unchanged(folder: Path) -> None:
    saved(tiny_model("gpt2"), folder)


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (other_tokenizer, "the tokenizer is another than that of tiny-gpt2"),
    (other_head, r"its config.json is another \(got 'n_head=2'; expected n_head=4\)"),
    (other_depth, r"its config.json is another \(got 'n_layer=2'; expected n_layer=3\)"),
    (other_family, "got 'model_type=llama'; expected model_type=gpt2"),
    (unchanged, "all weights are those of tiny-gpt2"),
    (damaged, "the model cannot be loaded from"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED, ids=[c.__name__ for c, _ in REFUSED])
def test_what_is_no_edited_version_of_the_base_is_one_message(
    tmp_path: Path, change: Callable[[Path], None], expected: str
) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    edited_elsewhere("gpt2", tmp_path / "edited")
    change(tmp_path / "edited")
    editor = NoEditor(name="none", edited=str(tmp_path / "edited"))
    with pytest.raises(ConfigError, match=expected) as raised:
        editor.modules(base)
    (problem,) = raised.value.problems
    assert problem.startswith("editor.edited: ") and "\n" not in problem


def test_a_folder_without_a_tokenizer_is_measured_with_that_of_the_base(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "gpt2")
    _, names = edited_elsewhere("gpt2", tmp_path / "edited")
    for path in (tmp_path / "edited").glob("*token*"):
        path.unlink()
    editor = NoEditor(name="none", edited=str(tmp_path / "edited"))
    assert len(editor.modules(base)) == len(names)


def test_a_missing_folder_and_a_small_batch_are_reported_before_the_model_loads(
    tmp_path: Path,
) -> None:
    missing = str(tmp_path / "missing")
    composed = compose(["editor=none", f"editor.edited={missing}", "edits=3", "suite=none"])
    with pytest.raises(ConfigError) as raised:
        build(composed.config, choices=composed.choices)
    batch, folder = raised.value.problems
    assert "all edits at once (got 1; expected edits=3 or more). Fix: set batch_size=3" in batch
    assert folder.startswith("editor.edited: the folder does not exist")


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_measurement_resumes_to_the_same_records_and_wants_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = tmp_path / "edited"
    other = build_other(edited)

    def experiment(outputs: str) -> Any:
        return build(
            compose(
                [
                    *("editor=none", f"editor.edited={edited}", "edits=1"),
                    *("suite=none", "tracker=none", "evaluation.protocols=[argmax]"),
                    f"paths.outputs={tmp_path / outputs}",
                ]
            ).config
        )

    monkeypatch.setattr("editkit.runner.session.draw_figures", lambda _: None)
    whole, cut = experiment("whole"), experiment("cut")
    assert run(whole) == 0

    def killed_after_the_first_checkpoint(*arguments: Any) -> Iterator[Any]:
        for event in run_edits(*arguments):
            yield event
            if isinstance(event, RunState):
                raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("editkit.runner.session.run_edits", killed_after_the_first_checkpoint)
        run(cut)
    with torch.no_grad():
        other.network.get_parameter("transformer.ln_f.bias").add_(1)
    saved(other, edited)
    with pytest.raises(ConfigError, match=r"editor\.edited: .* is not the model that this run"):
        run(experiment("cut"))
    build_other(edited)
    assert run(experiment("cut")) == 0
    for name in ("evals.jsonl", "provenance.json"):
        contents = [json.loads(line) for line in _lines(whole.folder / name)]
        resumed = [json.loads(line) for line in _lines(cut.folder / name)]
        if name == "evals.jsonl":
            assert contents == resumed
        else:
            assert contents[0]["editor"] == resumed[0]["editor"]
    assert (cut.folder / "DONE").exists()
    assert run(experiment("cut")) == 0  # done already
    saved(other, edited)
    with pytest.raises(ConfigError, match=r"editor\.edited: the files of .* that were measured"):
        run(experiment("cut"))


def _lines(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def build_other(folder: Path) -> EditableModel:
    """The bundled GPT-2 with one changed matrix, as somebody else's folder."""
    from editkit.model.load import ModelConfig

    model = ModelConfig(id="asset:tiny-gpt2").load()
    with torch.no_grad():
        model.network.get_parameter("transformer.h.1.mlp.c_proj.weight").mul_(1.5)
    saved(model, folder)
    return model
