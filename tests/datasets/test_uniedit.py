"""The requests of UniEdit, and the criteria of their questions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from editkit.types import EditRequest, Probe
from tests.support.datasets import construct_dataset, load, problems_of

EDITED = ["h_e", "r_e", "t_e"]


def hop(
    path: list[str], head: str, relation: str, tail: str | None, **further: Any
) -> dict[str, Any]:
    """A fact of a chain; without a tail's id it ends at a quantity."""
    end = {"datatype": "wikibase-item", "value": {"id": tail, "label": "Tamby", "aliases": []}}
    return {
        "path": path,
        "prompt": "x",
        "subject": "Lower Wold",
        "target": "Tamby",
        "head_entity": {"id": head, "label": "Lower Wold", "aliases": ["Wold"]},
        "property": {"id": relation},
        "tail_entity": end if tail else {"datatype": "quantity", "value": {"amount": "+3"}},
    } | further


ITS_FACT = hop(EDITED, "Q1", "P1", "Q2")


def single(paths: list[list[str]], hops: list[dict[str, Any]], **further: Any) -> dict[str, Any]:
    question = {"prompt": "The capital of the Wold is", "target": "Tamby"}
    return {"path_type": "single", "paths": paths, "one_hops": hops} | question | further


def double(*hops: dict[str, Any]) -> dict[str, Any]:
    paths = {f"single_path{number}": single([[]], [each]) for number, each in enumerate(hops, 1)}
    return {"path_type": "double", "prompt": "Are A and B the same?", "target": "Yes"} | paths


FORWARD = [[*EDITED, "f", "s"]]
REPHRASED = single(FORWARD, [ITS_FACT])
ELSEWHERE = single([["a", "r", "b", "f", "s"]], [hop(["a", "r", "b"], "Q7", "P7", None)])


def sample(generality: object = REPHRASED, locality: object = ELSEWHERE) -> dict[str, Any]:
    edit = ITS_FACT | {"prompt": "The capital of Lower Wold is"}
    return {"edit": edit, "generality": {"0": generality}, "locality": {"0": locality}}


def read(record: dict[str, Any], folder: Path) -> EditRequest:
    (request,) = load("uniedit", {"12": record}, folder).requests
    return request


def test_a_sample_is_a_request_with_the_name_of_its_discipline(tmp_path: Path) -> None:
    request = read(sample(), tmp_path)
    assert (request.id, request.prompt, request.subject, request.target) == (
        "uniedit/records/12",
        "The capital of {} is",
        "Lower Wold",
        "Tamby",
    )
    assert (request.paraphrases, request.portability) == (("The capital of the Wold is",), {})
    probe = Probe(prompt="The capital of the Wold is", answer="Tamby")
    assert request.locality == {"unrelated": (probe,)}


@pytest.mark.parametrize(
    ("chain", "kind"),
    [
        (double(ITS_FACT, hop([], "Q3", "P3", "Q2")), "same_entity"),
        (single([*FORWARD, ["t_e", "r_0", "e_0", "f", "s"]], [ITS_FACT]), "multi_hop"),
        (single([["t_e", "r_e", "h_e", "b", "m"]], [ITS_FACT]), "reversed"),
        (single(FORWARD, [ITS_FACT], target="T."), "alias"),
        (single(FORWARD, [ITS_FACT | {"subject": "Wold"}]), "alias"),
    ],
)
def test_a_question_that_depends_on_the_edit_has_the_first_criterion_that_holds(
    chain: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    request = read(sample(generality=chain), tmp_path)
    asked = chain["prompt"] + (" The answer is (Yes/No):" if kind == "same_entity" else "")
    assert request.portability == {kind: (Probe(prompt=asked, answer=chain["target"]),)}
    assert request.paraphrases == ()


@pytest.mark.parametrize(
    ("hops", "kind"),
    [
        ([hop([], "Q1", "P1", "Q9")], "forgetfulness"),
        ([hop([], "Q7", "P7", "Q1")], "same_subject"),
        ([hop([], "Q1", "P7", None)], "same_subject"),
        ([hop([], "Q7", "P1", "Q2")], "same_object"),
        ([hop([], "Q7", "P1", "Q9"), hop([], "Q9", "P7", None)], "same_relation"),
    ],
)
def test_a_question_whose_answer_stays_is_named_by_what_it_shares_with_the_edit(
    hops: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    assert list(read(sample(locality=single([[]], hops)), tmp_path).locality) == [kind]
    if len(hops) == 1:
        both = double(hops[0], hop([], "Q7", "P7", None))
        assert list(read(sample(locality=both), tmp_path).locality) == [kind]


def test_a_folder_holds_disciplines(tmp_path: Path) -> None:
    for name in ("math", "art"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"0": sample()}))
    loaded = construct_dataset("uniedit", path=str(tmp_path)).load(0)
    assert [request.id for request in loaded.requests] == ["uniedit/art/0", "uniedit/math/0"]


def without(record: dict[str, Any], path: str) -> dict[str, Any]:
    *parents, name = path.split(".")
    copied = node = copy.deepcopy(record)
    for parent in parents:
        node = node[parent]
    del node[name]
    return copied


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (without(sample(), "locality"), "locality: is missing (expected an object of chains)"),
        (without(sample(), "edit.target"), "edit.target: is missing (expected a text)"),
        (without(sample(), "generality.0.paths"), "generality.0.paths: is missing"),
        (sample(generality=7), "generality.0: is not an object with fields but of type int"),
        (
            sample(generality=single([[]], [], path_type="triple")),
            "generality.0.path_type: is no kind of chain (got 'triple'; expected single or double)",
        ),
        (
            sample(locality=single([[]], [without(ITS_FACT, "property.id")])),
            "locality.0.one_hops[0].property.id: is missing (expected a text)",
        ),
        (
            sample(locality=double(ITS_FACT)),
            "locality.0.single_path2: is not an object with fields but of type NoneType",
        ),
    ],
)
def test_a_problem_names_its_sample_and_field(
    record: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    problems = problems_of("uniedit", {"0": sample(), "12": record}, tmp_path)
    place = "record 12 (id records/12): "
    assert any(text.startswith(f"{place}{problem}") for text in problems), problems


def test_a_list_is_no_file_of_uniedit(tmp_path: Path) -> None:
    assert "the file has no object (got 'list'" in problems_of("uniedit", [sample()], tmp_path)[0]
