"""Questions about a whole chain are only kept if one model contains all edits of the chain."""

from __future__ import annotations

from editkit.datasets.base import LoadedDataset
from editkit.datasets.groups import LEFT_OUT, without_split_groups
from editkit.types import EditRequest, Probe


def chains(*sizes: int) -> LoadedDataset:
    """Chains with these numbers of facts. The last fact of a chain has two multi-hop questions, a
    question of another kind, and a hop.
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


def questioned(data: LoadedDataset) -> list[str]:
    """The chains with questions about the whole chain."""
    assert all(
        bool(request.hops) == ("multi_hop" in request.portability) for request in data.requests
    )
    return [str(request.group) for request in data.requests if request.hops]


def test_chains_within_a_batch_keep_their_questions_and_the_others_are_counted() -> None:
    data = chains(2, 3, 1, 2)  # in batches of 4: 0 0 1 1 | 1 2 3 3
    kept = without_split_groups(data, batch_size=4)
    assert questioned(kept) == ["0", "2", "3"]
    assert kept.left_out == {"other": 2, LEFT_OUT: 3}
    assert [request.id for request in kept.requests] == [request.id for request in data.requests]
    assert all(
        "alias" in request.portability
        for request in kept.requests
        if request.id in ("0/1", "1/2", "2/0", "3/1")
    )


def test_with_single_edits_only_chains_of_one_fact_keep_their_questions() -> None:
    assert questioned(without_split_groups(chains(2, 1, 4), batch_size=1)) == ["1"]


def test_a_batch_of_all_edits_leaves_nothing_out() -> None:
    data = chains(2, 3)
    assert without_split_groups(data, batch_size=5) is data
