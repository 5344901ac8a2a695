"""Token sequences as prefix trees, so that common prefixes run once.

A tree is one row of a batch. A mask replaces the causal one: each token attends only to its
ancestors, and it has its position in its own sequence. The hidden states therefore equal those of
separate sequences up to rounding. A batch of trees has little padding. CounterFact's first 1,000
records need 26 % fewer tokens than their distinct sequences have.

Shape letters: B trees, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.architecture import sliding_window
from editkit.model.tokens import PADDING_ID, PromptBatch, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """Consecutive tokens `start` to `stop` of a tree. They follow the last token of `stem`."""

    stem: tuple[int, ...]  # indices of their ancestors, from the root on
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Tree:
    """Some sequences. `paths` holds, for each sequence, the indices of its tokens in the tree."""

    ids: Ids
    positions: tuple[int, ...]
    branches: tuple[Branch, ...]
    sequences: tuple[Ids, ...]
    paths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch(PromptBatch):
    """A batch of trees, run like any other batch; `first_B` is 0."""

    mask_B1TT: torch.Tensor  # 0 where a token attends, the dtype's lowest number elsewhere

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids_BT,
            "attention_mask": self.mask_B1TT,
            "position_ids": self.position_ids_BT,
        }


def build_trees(sequences: Sequence[Ids], *, limit: int) -> list[Tree]:
    """The distinct sequences as trees of at most `limit` tokens, the largest tree first.

    A longer sequence forms a tree alone. A sequence that is a prefix of another one belongs to the
    other's path, whatever the limit.
    """
    trees: list[Tree] = []
    # Sequences that are no prefix of another one, each with its prefixes among the sequences.
    gathered: list[tuple[Ids, list[Ids]]] = []
    # In lexicographic order, a sequence directly precedes all sequences of which it is a prefix. In
    # reverse order they have already been gathered.
    for ids in sorted(set(sequences), reverse=True):
        if gathered and gathered[-1][0][: len(ids)] == ids:
            gathered[-1][1].append(ids)
        else:
            gathered.append((ids, [ids]))
    chosen: list[tuple[Ids, list[Ids]]] = []
    size = 0
    last: Ids = ()
    for ids, prefixes in gathered:
        new = len(ids) - _common(last, ids)
        if chosen and size + new > limit:
            trees.append(_tree(chosen))
            chosen, size, new = [], 0, len(ids)
        chosen.append((ids, prefixes))
        size, last = size + new, ids
    if chosen:
        trees.append(_tree(chosen))
    return sorted(trees, key=lambda tree: len(tree.ids), reverse=True)


def _tree(chosen: Sequence[tuple[Ids, Sequence[Ids]]]) -> Tree:
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[Branch] = []
    sequences: list[Ids] = []
    paths: list[tuple[int, ...]] = []
    path: tuple[int, ...] = ()
    last: Ids = ()
    for ids, prefixes in chosen:
        shared = _common(last, ids)
        start, stop = len(tokens), len(tokens) + len(ids) - shared
        branches.append(Branch(path[:shared], start, stop))
        tokens += ids[shared:]
        positions += range(shared, len(ids))
        path, last = (*path[:shared], *range(start, stop)), ids
        sequences += prefixes
        paths += (path[: len(prefix)] for prefix in prefixes)
    return Tree(tuple(tokens), tuple(positions), tuple(branches), tuple(sequences), tuple(paths))


def _common(left: Ids, right: Ids) -> int:
    """The length of the common prefix."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def tree_batch(
    trees: Sequence[Tree], *, device: torch.device | str, dtype: torch.dtype
) -> PromptBatch:
    """The trees as one batch. If no tree branches, it is a plain batch with a causal mask."""
    if all(len(tree.branches) == 1 for tree in trees):
        return pad([tree.ids for tree in trees], device=device)
    width = max(len(tree.ids) for tree in trees)
    ids_BT = torch.full((len(trees), width), PADDING_ID)
    positions_BT = torch.zeros_like(ids_BT)
    own_TT = torch.ones(width, width, dtype=torch.bool).tril()
    # Padding attends to itself, because a softmax over no token is nan.
    attends_BTT = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        ids_BT[row, : len(tree.ids)] = torch.tensor(tree.ids)
        positions_BT[row, : len(tree.ids)] = torch.tensor(tree.positions)
        for branch in tree.branches:
            size = branch.stop - branch.start
            attends_BTT[row, branch.start : branch.stop, list(branch.stem)] = True
            attends_BTT[row, branch.start : branch.stop, branch.start : branch.stop] = own_TT[
                :size, :size
            ]
    mask_B1TT = torch.zeros(attends_BTT.shape, dtype=dtype).masked_fill_(
        ~attends_BTT, torch.finfo(dtype).min
    )[:, None]
    filled_BT = torch.tensor(
        [[1] * len(tree.ids) + [0] * (width - len(tree.ids)) for tree in trees]
    )
    return TreeBatch(
        ids_BT.to(device),
        filled_BT.to(device),
        positions_BT.to(device),
        torch.zeros(len(trees), dtype=torch.long),
        mask_B1TT.to(device),
    )


def supports_trees(model: EditableModel, *, longest: int) -> bool:
    """Whether the network honours an explicit attention mask for sequences of up to `longest`
    tokens.
    """
    if not (model.shortcuts.allows("scoring") and model.family.follows_position_ids):
        return False
    config = model.network.config.get_text_config()
    window = sliding_window(config)
    return config._attn_implementation in ("sdpa", "eager") and (
        window is None or longest <= window
    )
