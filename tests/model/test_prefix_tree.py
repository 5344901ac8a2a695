"""Trees of token sequences: the hidden states are those of the sequences run alone, and shared
beginnings run once.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editkit.model.prefix_tree import Tree, can_branch, grow, side_by_side
from editkit.model.tokens import PromptBatch
from tests.support.helpers import KINDS, Kind, tiny_model


def sequences(seed: int = 0, count: int = 40) -> list[tuple[int, ...]]:
    """Sequences that share beginnings of many lengths; some begin others, some occur twice."""
    rng = random.Random(seed)
    found: list[tuple[int, ...]] = [()]
    while len(found) < count:
        begin = rng.choice(found)
        found.append(
            (*begin[: rng.randint(0, len(begin))], *rng.choices(range(5), k=rng.randint(1, 6)))
        )
    return found[1:] + found[1:4]


def sees(tree: Tree) -> list[set[int]]:
    """Which tokens of the tree each of its tokens looks at."""
    (row,) = side_by_side([tree], device="cpu", dtype=torch.float32).arguments["attention_mask"]
    return [set(torch.nonzero(line == 0).flatten().tolist()) for line in row[0]]


@pytest.mark.parametrize("limit", [1, 7, 30, 10_000])
def test_every_sequence_lies_on_a_path_of_one_tree_and_sees_that_path_alone(limit: int) -> None:
    asked = sequences()
    trees = grow(asked, limit=limit)
    assert sorted(ids for tree in trees for ids in tree.sequences) == sorted(set(asked))
    assert all(len(tree.ids) <= limit or len(tree.branches) == 1 for tree in trees)
    assert [len(tree.ids) for tree in trees] == sorted(
        (len(tree.ids) for tree in trees), reverse=True
    )
    for tree in trees:
        looks = sees(tree) if len(tree.branches) > 1 else None
        for ids, path in zip(tree.sequences, tree.paths, strict=True):
            assert tuple(tree.ids[place] for place in path) == ids
            assert [tree.positions[place] for place in path] == list(range(len(ids)))
            if looks is not None:
                assert all(
                    looks[place] == set(path[: depth + 1]) for depth, place in enumerate(path)
                )


def test_a_tree_holds_every_beginning_once() -> None:
    asked = sequences(seed=1)
    beginnings = {ids[:length] for ids in asked for length in range(1, len(ids) + 1)}
    (tree,) = grow(asked, limit=10_000)
    assert len(tree.ids) == len(beginnings)


def test_sequences_that_share_nothing_make_a_plain_batch() -> None:
    batch = side_by_side(grow([(1, 2, 3), (2, 2)], limit=1), device="cpu", dtype=torch.float32)
    assert type(batch) is PromptBatch
    assert grow([], limit=5) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_in_a_tree_are_those_of_the_sequence_run_alone(
    kind: Kind, dtype: str
) -> None:
    model = tiny_model(kind, dtype=dtype)
    asked = sequences(count=25)
    tolerance = 1e-4 if dtype == "float32" else 0.15

    def hidden(trees: list[Tree]) -> dict[tuple[int, ...], torch.Tensor]:
        with torch.no_grad():
            found_BTD = model.final_hidden(
                side_by_side(trees, device="cpu", dtype=model.dtype)
            ).float()
        return {
            ids: found_BTD[row, list(path)]
            for row, tree in enumerate(trees)
            for ids, path in zip(tree.sequences, tree.paths, strict=True)
        }

    together = hidden(grow(asked, limit=40))
    for ids in set(asked):
        with torch.no_grad():
            base = model.module(model.family.base)
            plain_TD = (
                base(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].float()
            )
        torch.testing.assert_close(together[ids], plain_TD, atol=tolerance, rtol=tolerance)


def test_networks_that_attend_in_their_own_way_are_given_no_trees() -> None:
    def model(**config: Any) -> Any:
        return SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(**config)))

    assert can_branch(model(_attn_implementation="sdpa"), longest=500)
    assert not can_branch(model(_attn_implementation="flash_attention_2"), longest=5)
    assert can_branch(model(_attn_implementation="eager", sliding_window=64), longest=64)
    assert not can_branch(model(_attn_implementation="eager", sliding_window=64), longest=65)
