"""The requests of CounterFact and zsRE records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.counterfact_files import (
    counterfact,
    flat,
    original,
    problems_of,
    question,
    write,
    zsre,
)


def test_both_counterfact_layouts_are_recognised_by_their_keys(tmp_path: Path) -> None:
    first, second = counterfact(write(tmp_path, [original(3), flat(5)])).load(0).requests
    assert (first.id, first.prompt, first.full_prompt) == (
        "counterfact/3",
        "The mother tongue of {} is",
        "The mother tongue of Ada is",
    )
    assert (first.target, first.target_old, first.paraphrases) == (
        "French",
        "Latin",
        ("x. Ada speaks",),
    )
    assert [(probe.prompt, probe.answer) for probe in first.neighbours] == [
        ("Bob speaks", "Latin"),
        ("Cy speaks", "Latin"),
    ]
    assert (second.id, second.prompt, second.target, second.target_old) == (
        "counterfact/5",
        first.prompt,
        "French",
        "Latin",
    )
    assert (second.paraphrases, second.neighbours[0].answer) == (("Ada speaks",), "Greek")


def test_counterfact_has_attribute_prompts_and_generation_prompts(
    tmp_path: Path,
) -> None:
    first, second = counterfact(write(tmp_path, [original(3), flat(5)])).load(0).requests
    assert [(probe.prompt, probe.answer) for probe in first.attribute_prompts] == [
        ("Flo speaks", "French")
    ]
    assert first.generation_prompts == (
        "Ada was born in",
        "Ada was born in",
    )  # as often as the file has them
    assert (second.attribute_prompts, second.generation_prompts, second.references) == ((), (), ())


def test_reference_texts_come_from_a_separate_file_by_relation_and_target(tmp_path: Path) -> None:
    snippets = tmp_path / "snippets.json"
    samples = [
        {
            "relation_id": "P103",
            "target_id": "Q1",
            "samples": [{"text": "French is spoken."}, {"text": "Paris."}],
        },
        {"relation_id": "P103", "target_id": "Q9", "samples": [{"text": "no"}]},
    ]
    snippets.write_text(json.dumps(samples))
    loaded = counterfact(write(tmp_path, [original(3), flat(5)]), snippets=str(snippets)).load(0)
    assert [request.references for request in loaded.requests] == [
        ("French is spoken.", "Paris."),
        (),
    ]
    assert loaded.variant == {"snippets": hashlib.sha256(snippets.read_bytes()).hexdigest()[:12]}
    snippets.write_text(json.dumps([{"relation_id": "P103", "samples": [{}]}]))
    problems = problems_of(counterfact(write(tmp_path, [original()]), snippets=str(snippets)))
    assert [problem.removeprefix(f"{snippets}, record 0: ") for problem in problems] == [
        "target_id: is missing (expected a text).",
        "samples[0].text: is missing (expected a text).",
    ]


def test_requests_that_overwrite_each_other_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [flat(0), flat(1), flat(2, target_new="Greek"), flat(3, subject="is", target_new="Greek")],
    )
    assert counterfact(path).load(0).remarks == {
        "requests that edit the prompt of an earlier one again, to the same target": 2,
        "requests that edit the prompt of an earlier one again, to another target": 1,
    }


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        (
            "Adam met Ada in Ada",
            "Ada",
            "Adam met {} in Ada",
        ),  # the first whole word; other occurrences stay
        ("Is C++ (1985) fast?", "C++ (1985)", "Is {} fast?"),  # no pattern
        ("{a} and } of Ada", "Ada", "{a} and } of {}"),  # single braces are text
        ("東京都の首都", "東京", "{}都の首都"),  # no blanks between words
        ("Ada's home", "Ada", "{}'s home"),
    ],
)
def test_the_slot_replaces_the_subject_and_the_filled_prompt_is_that_of_the_file(
    prompt: str, subject: str, template: str, tmp_path: Path
) -> None:
    (request,) = (
        counterfact(write(tmp_path, [flat(prompt=prompt, subject=subject)])).load(0).requests
    )
    assert request.prompt == template
    assert request.full_prompt == prompt


def test_zsre_has_the_alternative_or_the_true_answer_as_its_target(tmp_path: Path) -> None:
    path = write(tmp_path, [question(), question(alt="uniform", portability=None)])
    first, second = zsre(path).load(0).requests
    assert (first.id, first.prompt, first.target, first.target_old) == (
        "zsre/0",
        "What is made by {}?",
        "planes",
        "uniform",
    )
    assert first.paraphrases == ("What does UniFirst make?",)
    (unrelated,) = first.locality["out_of_distribution"]
    assert (unrelated.prompt, unrelated.answer, first.neighbours) == (
        "nq question: who wrote it?",
        "Walter",
        (),
    )
    assert first.portability["one_hop"][0].answer == "sky"
    assert (second.target_old, second.portability) == ("uniforms", {})
    corrected = zsre(path, target="answers").load(0).requests[0]
    # What follows from the alternative does not follow from the true answer.
    assert (corrected.target, corrected.target_old, corrected.portability) == ("uniform", None, {})
    # The results name the variant, since the two are not comparable.
    assert (zsre(path).load(0).label, zsre(path, target="answers").load(0).variant) == (
        "zsre target=alt",
        {"target": "answers"},
    )
    assert zsre(path).load(0).remarks["alt is one of the true answers"] == 1
