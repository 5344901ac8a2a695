"""Synthetic models, requests, texts and second moments with fixed seeds. Only their sizes matter.

A word is one token. Sequence lengths are close to those of CounterFact's first 600 records under
GPT-2's tokenizer: on average 8.5 tokens per prompt with 3.4 of them after the subject, 1.0 per
target, 19.1 per paraphrase and 8.2 per neighbour. As in CounterFact, records of a relation share
neighbour prompts: 10,100 of the 13,000 prompts of 1,000 records are distinct. Shared prefixes leave
74 % of their tokens to compute.

Shape letters: I d_in, R rank.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.bench.shapes import Shape
from editkit.lazy import torch
from editkit.model.editable import EditableModel
from editkit.model.families import family_of
from editkit.model.network import random_network
from editkit.stats.store import Moments, SecondMoment
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, SPECIAL = "<|endoftext|>", ("<|endoftext|>", ".", " is", " a")
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
NUM_PARAPHRASES, NUM_NEIGHBOURS = 2, 10  # of a CounterFact record
NUM_RELATIONS, NUM_SUBJECTS = 34, 90  # CounterFact's relations; subjects of a relation's neighbours
SUBJECT_AT = (5, 5, 4, 0)  # words before the subject in the wordings of a relation
SEED = 0


def model_of(shape: Shape, name: str, *, device: str, dtype: str) -> EditableModel:
    """A network with random weights, created on its device, and a tokenizer with a token for each
    row of the vocabulary.
    """
    from transformers import AutoConfig

    network = random_network(
        AutoConfig.for_model(shape.kind, **shape.config()), device=device, dtype=dtype
    )
    return EditableModel(
        network, tokenizer(shape.vocabulary), name=name, family=family_of(shape.kind)
    )


def words(count: int) -> list[str]:
    """Distinct words of at least two syllables."""
    combinations = (
        "".join(parts)
        for length in itertools.count(2)
        for parts in itertools.product(SYLLABLES, repeat=length)
    )
    return list(itertools.islice(combinations, count))


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word including its leading blank, like GPT-2's for frequent
    words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def piece(word: str) -> str:
        return word.replace(" ", "\u0120")  # the byte-level alphabet's blank

    pieces = [
        *map(piece, SPECIAL),
        *(piece(f" {word}") for word in words(vocabulary - len(SPECIAL))),
    ]
    backend = Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=END)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END
    )


def requests_for(shape: Shape, count: int) -> tuple[EditRequest, ...]:
    """Requests of CounterFact's size, with 2 paraphrases, 10 neighbours and two targets. Every
    tenth new target has two tokens.
    """
    chance = random.Random(SEED)
    known = words(shape.vocabulary - len(SPECIAL))

    def phrase(length: int) -> str:
        return " ".join(chance.choices(known, k=length))

    relations = [
        (
            [(phrase(before), phrase(5 - before)) for before in SUBJECT_AT],
            [phrase(3) for _ in range(NUM_SUBJECTS)],
        )
        for _ in range(NUM_RELATIONS)
    ]

    def neighbour(index: int) -> str:
        wordings, subjects = relations[index % NUM_RELATIONS]
        before, after = chance.choice(wordings)
        return f"{before} {chance.choice(subjects)} {after}".strip()

    requests = []
    for index in range(count):
        subject, old, new = phrase(3), phrase(1), phrase(2 if index % 10 == 9 else 1)
        requests.append(
            EditRequest(
                id=f"bench/{index}",
                prompt=f"{phrase(3)} {{}} {phrase(3 + index % 2)}",
                subject=subject,
                target=new,
                target_old=old,
                paraphrases=tuple(
                    f"{phrase(11)}. {subject} {phrase(4)}" for _ in range(NUM_PARAPHRASES)
                ),
                neighbours=tuple(
                    Probe(prompt=neighbour(index), answer=old) for _ in range(NUM_NEIGHBOURS)
                ),
            )
        )
    return tuple(requests)


def texts_for(shape: Shape, *, documents: int, longest: int) -> tuple[str, ...]:
    """Documents of varied lengths, up to `longest` tokens."""
    chance = random.Random(SEED)
    known = words(shape.vocabulary - len(SPECIAL))
    return tuple(
        " ".join(chance.choices(known, k=chance.randint(longest // 8, longest)))
        for _ in range(documents)
    )


def moments_for(model: EditableModel, modules: Sequence[str]) -> Moments:
    """Second moments in float64 with large eigenvalues in a quarter of the dimensions. All modules
    have the same.
    """
    size = model.weight(modules[0]).shape[1]
    generator = torch.Generator().manual_seed(SEED)
    rank = size // 4
    used_IR = torch.randn(size, rank, generator=generator) * torch.logspace(0, -1, rank)
    used_IR = used_IR.to(model.device).double()
    matrix_II = used_IR @ used_IR.T / rank
    matrix_II.diagonal().add_(0.01)
    moments = Moments({module: SecondMoment(module, matrix_II, 10 * size) for module in modules})
    for module in modules:
        moments.factorise(module)  # once per run, so it is not part of an edit's time
    return moments
