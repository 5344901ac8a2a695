"""Continuations equal those of transformers for every batch size. Contexts are clean and seeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.contexts import clean, sample_contexts
from editkit.model.editable import EditableModel
from editkit.model.generate import decode, end_ids, generate, generate_texts
from editkit.model.tokens import encode_prompts
from tests.support.helpers import KINDS, tiny_model

PROMPTS = [
    "The capital of France is",
    "Apple",
    "Danielle Darrieux's mother tongue is",
    "The Eiffel Tower is located in the city of",
    "What does",
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return tiny_model(request.param, seed=1)


def test_greedy_equals_transformers_generation_prompt_by_prompt(model: EditableModel) -> None:
    prompts = encode_prompts(model.tokenizer, PROMPTS)
    ours = generate(model, prompts, max_new_tokens=12)
    model.network.generation_config.pad_token_id = 0
    for ids, mine in zip(prompts, ours, strict=True):
        input_ids = torch.tensor([ids])
        plain = model.network.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=12
        )[0, len(ids) :]
        theirs = plain.tolist()
        assert mine == tuple(
            theirs[
                : next(
                    (place for place, token in enumerate(theirs) if token in end_ids(model)),
                    len(theirs),
                )
            ]
        )


def test_generation_ignores_the_sampling_of_the_checkpoint(model: EditableModel) -> None:
    prompts = encode_prompts(model.tokenizer, PROMPTS)
    before = generate(model, prompts, max_new_tokens=8)
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}.items():
        setattr(model.network.generation_config, name, value)
    assert generate(model, prompts, max_new_tokens=8) == before


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_batch_size_changes_nothing(
    model: EditableModel, sampled: bool, top_k: int | None
) -> None:
    prompts = encode_prompts(model.tokenizer, PROMPTS)
    runs = [
        generate(
            model,
            prompts,
            max_new_tokens=8,
            batch_size=size,
            top_k=top_k,
            generator=seeded() if sampled else None,
        )
        for size in (1, 2, 5)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_the_seed_decides_the_sample(model: EditableModel) -> None:
    prompts = encode_prompts(model.tokenizer, PROMPTS)
    first, again, other = (
        generate(model, prompts, max_new_tokens=8, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_samples_follow_the_models_probabilities() -> None:
    model = tiny_model("gpt2")
    (ids,) = encode_prompts(model.tokenizer, ["The capital of"])
    count = 4000
    drawn = torch.tensor(
        generate(
            model,
            [ids] * count,
            max_new_tokens=1,
            generator=seeded(),
            top_k=5,
            ends=(),
            batch_size=count,
        )
    ).flatten()
    values, tokens = model.network(torch.tensor([ids])).logits[0, -1].topk(5)
    shares = torch.stack([(drawn == token).float().mean() for token in tokens])
    assert shares.sum() == 1
    torch.testing.assert_close(
        shares, values.softmax(-1), rtol=0, atol=0.03
    )  # four standard errors


def test_banned_tokens_are_never_generated_and_end_tokens_end_a_row(model: EditableModel) -> None:
    prompts = encode_prompts(model.tokenizer, PROMPTS)
    free = generate(model, prompts, max_new_tokens=6, ends=())
    assert all(len(row) == 6 for row in free)
    third = free[0][2]
    assert (
        generate(model, prompts[:1], max_new_tokens=6, ends=[third])[0]
        == free[0][: free[0].index(third)]
    )
    assert all(
        third not in row
        for row in generate(model, prompts, max_new_tokens=6, ends=(), banned=[third])
    )
    together = generate(
        model, prompts, max_new_tokens=6, ends=[third]
    )  # a row that has ended does not disturb the others
    assert together == [row[: row.index(third)] if third in row else row for row in free]


def test_a_row_ends_at_the_last_position(model: EditableModel) -> None:
    longest = [5] * (model.max_length - 2)
    rows = generate(model, [longest, [5]], max_new_tokens=6, ends=())
    assert len(rows[0]) == 2
    assert rows[1] == generate(model, [[5]], max_new_tokens=6, ends=())[0]
    with pytest.raises(ValueError, match="positions"):
        generate(model, [[5] * model.max_length], max_new_tokens=1)


def test_texts_are_the_continuations_without_the_prompts(model: EditableModel) -> None:
    texts = generate_texts(model, PROMPTS, max_new_tokens=4)
    assert len(texts) == len(PROMPTS)
    assert not any(
        special in text for text in texts for special in model.tokenizer.all_special_tokens
    )
    assert generate_texts(model, [], max_new_tokens=4) == []


def test_contexts_begin_with_the_bare_prompt_and_hold_one_place_each(model: EditableModel) -> None:
    contexts = sample_contexts(model, lengths=[(3, 2), (8, 3)], generator=seeded())
    assert contexts[0] == "{}"
    assert len(contexts) == 6
    for context in contexts[1:]:
        assert context.endswith(". {}")
        assert context.count("{") == context.count("}") == 1
        assert not any(
            special in context for special in ("\n", "\ufffd", *model.tokenizer.all_special_tokens)
        )
    assert contexts == sample_contexts(model, lengths=[(3, 2), (8, 3)], generator=seeded())
    assert contexts != sample_contexts(model, lengths=[(3, 2), (8, 3)], generator=seeded(1))


def test_a_contexts_length_counts_its_start_token(model: EditableModel) -> None:
    single_tokens = {
        clean(text) for text in decode(model, [[token] for token in range(len(model.tokenizer))])
    }
    for context in sample_contexts(model, lengths=[(2, 8)], generator=seeded())[1:]:
        assert context.removesuffix(". {}") in single_tokens


@pytest.mark.parametrize("lengths", [[(1, 2)], [(5, -1)]])
def test_impossible_context_lengths_are_refused(lengths: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"editor\.context_lengths: .* expected at least 2 tokens"
    ):
        sample_contexts(tiny_model("gpt2"), lengths=lengths, generator=seeded())


def test_cleaning_leaves_one_line_without_braces() -> None:
    assert clean(" a {b}\n\n c\ufffd  d") == "a b c d"
