"""Standing probes and canaries of a session, `measure`, `undo` and `save`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import editkit
from editkit.evaluation.scoring.teacher_forcing import score

FACT = editkit.EditRequest(
    id="zoso",
    prompt="{} was born in",
    subject="Zoso Vosset",
    target="Tunit",
    paraphrases=("Zoso Vosset comes from",),
)
NEAR = editkit.Probe(prompt="Zoso Vosset was born in", answer="Krimus")  # the edit changes it
FAR = editkit.Probe(prompt="Kisi Stontan works for", answer="Bredet")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def session_of(**options: object) -> editkit.Session:
    return editkit.Session(editkit.load("tiny-llama"), "rome", **options)


def weights(model: editkit.EditableModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def same(model: editkit.EditableModel, before: dict[str, torch.Tensor]) -> bool:
    now = model.network.state_dict()
    return all(torch.equal(now[name], before[name]) for name in before)


def test_a_session_measures_its_edits_its_probes_and_its_matrices() -> None:
    session = session_of(probes=[NEAR, FAR, NEAR])
    assert session.measure().efficacy is None and session.measure().locality == 1.0
    session.edit(FACT)
    measures = session.measure()
    scores = score(
        session.model,
        [FACT.probe(), FACT.probe(prompt=FACT.paraphrases[0])],
        tokens_per_batch=512,
    )
    expected = [float(value.is_greedy) for value in scores.values()]
    assert [measures.efficacy, measures.generalization] == expected and expected[0] == 1.0
    assert NEAR in measures.changed
    assert measures.locality == 1 - len(measures.changed) / 2
    (module,) = session.modules
    weight = session.model.weight(module).double()
    singular = torch.linalg.svdvals(weight)
    figures = measures.telemetry[module]
    assert figures["condition_number"] == pytest.approx(float(singular[0] / singular[-1]), rel=1e-4)
    assert figures["l1_norm"] == pytest.approx(float(weight.abs().sum()), rel=1e-6)
    text = repr(measures)
    assert "efficacy 100.0 %" in text and f"changed: {NEAR.prompt} -> {NEAR.answer}" in text


def test_undo_takes_the_last_edit_of_the_session_back() -> None:
    session = session_of()
    before = weights(session.model)
    session.edit(FACT)
    assert not same(session.model, before)
    session.undo()
    assert same(session.model, before) and session.num_edits == 0
    assert session.measure().efficacy is None
    with pytest.raises(editkit.ConfigError, match=r"undo: .* is not one of this session"):
        session.undo()


def test_an_edit_that_changes_a_canary_is_taken_back_and_reported() -> None:
    session = session_of(canaries=[NEAR])
    before = weights(session.model)
    result = session.edit(FACT)
    assert result.broken == (NEAR,) and same(session.model, before) and session.num_edits == 0
    assert "taken back: it changes 1 canaries" in repr(result) and NEAR.prompt in repr(result)
    free = session_of(canaries=[FAR])
    kept = free.edit(FACT)
    assert kept.broken == () and free.num_edits == 1
    # An edit after one that was taken back is the same as without it.
    other = editkit.EditRequest(
        id="kisi", prompt="{} works for", subject="Kisi Stontan", target="Tunit"
    )
    session.edit(other)
    alone = session_of()
    alone.edit(other)
    assert same(session.model, weights(alone.model))


def test_a_saved_session_is_a_model_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    session = session_of()
    session.edit(FACT)
    session.save(tmp_path / "edited")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").state_dict()
    assert same(session.model, dict(loaded))
    with pytest.raises(editkit.ConfigError, match="cannot be written"):
        session.save(tmp_path / "edited")


@pytest.mark.parametrize("key", ["probes", "canaries"])
def test_a_blank_probe_is_refused(key: str) -> None:
    with pytest.raises(editkit.ConfigError, match=rf"{key}\[1\]: not a probe with a prompt"):
        session_of(**{key: [FAR, editkit.Probe(prompt="Kisi", answer=" ")]})
