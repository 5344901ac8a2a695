"""Batches of packed documents for pretraining the tiny models."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tiny_models import NUM_POSITIONS
from transformers import PreTrainedTokenizerBase

from editkit.datasets.world import Part, documents
from editkit.datasets.world_words import World


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents. All tensors have shape (size, length), except the mask of shape
    (size, 1, length, length), which hides the other documents of a row.
    """

    tokens: torch.Tensor
    next_tokens: torch.Tensor
    weights: torch.Tensor  # of the next tokens in the loss
    positions: torch.Tensor
    mask: torch.Tensor


Token = tuple[int, int, float, int, int]  # token, the next one, its weight, position, document


def packed_row(
    documents: Iterator[tuple[Part, ...]],
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    *,
    length: int,
    prompt_weight: float,
) -> list[Token]:
    """Documents until the row is full. The last one is truncated. A quarter of the documents starts
    at a random position, so that all learned positions are trained.
    """
    row: list[Token] = []
    while len(row) < length:
        parts = next(documents)
        is_answer = [flag for text, flag in parts for _ in text]
        encoded = tokenizer("".join(text for text, _ in parts), return_offsets_mapping=True)
        tokens = [*encoded["input_ids"], tokenizer.eos_token_id]
        weights = [
            1.0 if end and is_answer[end - 1] else prompt_weight
            for _, end in encoded["offset_mapping"]
        ] + [1.0]
        start = rng.randint(0, NUM_POSITIONS - len(tokens)) if rng.random() < 0.25 else 0
        document = len(row)  # a number that is unique in the row
        columns = zip(
            tokens[:-1],
            tokens[1:],
            weights[1:],
            itertools.count(start),
            itertools.repeat(document),
            strict=False,
        )
        row += columns
    return row[:length]


def batches(
    world: World, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[Batch]:
    """An infinite stream of batches of the corpus."""
    stream, rng = (
        documents(world, seed=args.seed, lookup_share=args.lookup_share),
        random.Random(args.seed),
    )
    causal = torch.ones(args.length, args.length, dtype=torch.bool).tril()
    while True:
        rows = [
            packed_row(stream, tokenizer, rng, length=args.length, prompt_weight=args.prompt_weight)
            for _ in range(args.batch_size)
        ]
        tokens, next_tokens, weights, positions, document = (
            torch.tensor(column)
            for column in zip(*(zip(*row, strict=True) for row in rows), strict=True)
        )
        visible = (document[:, :, None] == document[:, None, :]) & causal
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        yield Batch(tokens, next_tokens, weights, positions, mask[:, None])
