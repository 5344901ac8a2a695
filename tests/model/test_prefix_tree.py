"""Prefix trees: the hidden states equal those of the sequences run alone, and shared prefixes run
once.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editkit.model.families import family_of
from editkit.model.prefix_tree import Tree, build_trees, supports_trees, tree_batch
from editkit.model.shortcuts import Shortcuts
from editkit.model.tokens import PromptBatch
from tests.support.helpers import KINDS, Kind, tiny_model


def sequences(seed: int = 0, count: int = 40) -> list[tuple[int, ...]]:
    """Sequences that share prefixes of many lengths. Some are prefixes of others, some
    occur twice.
    """
    rng = random.Random(seed)
    drawn: list[tuple[int, ...]] = [()]
    while len(drawn) < count:
        begin = rng.choice(drawn)
        drawn.append(
            (*begin[: rng.randint(0, len(begin))], *rng.choices(range(5), k=rng.randint(1, 6)))
        )
    return drawn[1:] + drawn[1:4]


def attended(tree: Tree) -> list[set[int]]:
    """By token of the tree, the tokens that it attends to."""
    (row,) = tree_batch([tree], device="cpu", dtype=torch.float32).arguments["attention_mask"]
    return [set(torch.nonzero(line == 0).flatten().tolist()) for line in row[0]]


@pytest.mark.parametrize("limit", [1, 7, 30, 10_000])
def test_every_sequence_is_a_path_of_one_tree_and_attends_only_to_that_path(limit: int) -> None:
    drawn = sequences()
    trees = build_trees(drawn, limit=limit)
    assert sorted(ids for tree in trees for ids in tree.sequences) == sorted(set(drawn))
    assert all(len(tree.ids) <= limit or len(tree.branches) == 1 for tree in trees)
    assert [len(tree.ids) for tree in trees] == sorted(
        (len(tree.ids) for tree in trees), reverse=True
    )
    for tree in trees:
        attends_to = attended(tree) if len(tree.branches) > 1 else None
        for ids, path in zip(tree.sequences, tree.paths, strict=True):
            assert tuple(tree.ids[place] for place in path) == ids
            assert [tree.positions[place] for place in path] == list(range(len(ids)))
            if attends_to is not None:
                assert all(
                    attends_to[place] == set(path[: depth + 1]) for depth, place in enumerate(path)
                )


def test_a_tree_holds_every_prefix_once() -> None:
    drawn = sequences(seed=1)
    prefixes = {ids[:length] for ids in drawn for length in range(1, len(ids) + 1)}
    (tree,) = build_trees(drawn, limit=10_000)
    assert len(tree.ids) == len(prefixes)


def test_sequences_that_share_nothing_make_a_plain_batch() -> None:
    batch = tree_batch(build_trees([(1, 2, 3), (2, 2)], limit=1), device="cpu", dtype=torch.float32)
    assert type(batch) is PromptBatch
    assert build_trees([], limit=5) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_in_a_tree_are_those_of_the_sequence_run_alone(
    kind: Kind, dtype: str
) -> None:
    model = tiny_model(kind, dtype=dtype)
    drawn = sequences(count=25)
    tolerance = 1e-4 if dtype == "float32" else 0.15

    def hidden(trees: list[Tree]) -> dict[tuple[int, ...], torch.Tensor]:
        with torch.no_grad():
            hidden_BTD = model.final_hidden(
                tree_batch(trees, device="cpu", dtype=model.dtype)
            ).float()
        return {
            ids: hidden_BTD[row, list(path)]
            for row, tree in enumerate(trees)
            for ids, path in zip(tree.sequences, tree.paths, strict=True)
        }

    together = hidden(build_trees(drawn, limit=40))
    for ids in set(drawn):
        with torch.no_grad():
            base = model.module(model.family.base)
            plain_TD = (
                base(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].float()
            )
        torch.testing.assert_close(together[ids], plain_TD, atol=tolerance, rtol=tolerance)


def test_networks_with_other_attention_do_not_support_trees() -> None:
    def model(**config: Any) -> Any:
        given = SimpleNamespace(**config)
        network = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: given))
        family = family_of("llama")
        return SimpleNamespace(network=network, shortcuts=Shortcuts(), family=family)

    assert supports_trees(model(_attn_implementation="sdpa"), longest=500)
    assert not supports_trees(model(_attn_implementation="flash_attention_2"), longest=5)
    assert supports_trees(model(_attn_implementation="eager", sliding_window=64), longest=64)
    assert not supports_trees(model(_attn_implementation="eager", sliding_window=64), longest=65)
