"""Questions about a whole chain are asked only where one model holds all of it."""

from __future__ import annotations

from editkit.datasets.base import LoadedDataset
from editkit.datasets.groups import LEFT_OUT, asked_in_one_batch
from editkit.types import EditRequest, Probe


def chains(*sizes: int) -> LoadedDataset:
    """Chains of so many facts, each with two multi-hop questions, a question of another kind, and a
    hop, at its last fact.
    """
    requests = []
    for chain, size in enumerate(sizes):
        for fact in range(size):
            is_last = fact == size - 1
            probe = Probe(prompt=f"{chain}?", answer="x")
            requests.append(
                EditRequest(
                    id=f"{chain}/{fact}",
                    prompt="{} is",
                    subject="a",
                    target="b",
                    group=str(chain),
                    portability={"multi_hop": (probe, probe), "alias": (probe,)} if is_last else {},
                    hops=(probe,) if is_last else (),
                )
            )
    return LoadedDataset(
        name="chains", requests=tuple(requests), digest="d", origin="here", left_out={"other": 2}
    )


def asked(data: LoadedDataset) -> list[str]:
    """The chains that are asked about as a whole."""
    assert all(bool(each.hops) == ("multi_hop" in each.portability) for each in data.requests)
    return [str(each.group) for each in data.requests if each.hops]


def test_chains_that_a_batch_holds_whole_keep_their_questions_and_the_others_are_counted() -> None:
    data = chains(2, 3, 1, 2)  # in batches of 4: 0 0 1 1 | 1 2 3 3
    found = asked_in_one_batch(data, batch_size=4)
    assert asked(found) == ["0", "2", "3"]
    assert found.left_out == {"other": 2, LEFT_OUT: 3}
    assert [each.id for each in found.requests] == [each.id for each in data.requests]
    assert all(
        "alias" in each.portability
        for each in found.requests
        if each.id in ("0/1", "1/2", "2/0", "3/1")
    )


def test_single_edits_are_asked_about_chains_of_one_fact_alone() -> None:
    assert asked(asked_in_one_batch(chains(2, 1, 4), batch_size=1)) == ["1"]


def test_a_batch_of_all_edits_leaves_nothing_out() -> None:
    data = chains(2, 3)
    assert asked_in_one_batch(data, batch_size=5) is data
