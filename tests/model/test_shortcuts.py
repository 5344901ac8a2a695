"""In every family, and in its variants, each shortcut equals the plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.editable import EditableModel
from editkit.model.generate import generate
from editkit.model.self_check import compare_generation, compare_scoring, require_own_logits
from editkit.model.shortcuts import Comparison, Shortcuts
from editkit.targets.forwards import plain_forward
from editkit.targets.search import search_target, search_targets
from editkit.targets.self_check import compare_keys, compare_search, require_outputs
from editkit.targets.sequences import prepare
from editkit.types import Probe
from tests.support.families import CONFIGS, family_model
from tests.support.helpers import request, requests
from tests.support.searches import CONTEXTS, settings
from tests.support.tokenizers import STYLES, Style, styled_tokenizer

TEXT = "The mother tongue of Danielle Darrieux is French, and she was born in Bordeaux."
CLOSE = 1e-4
# Texts with ALiBi are scored in rows of their own: a tree has other columns than its texts.
WITHOUT_TREES = {"bloom", "mpt"}
Variant = tuple[str, dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-one-after-another": ("falcon", {"parallel_attn": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox-one-after-another": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gemma2-uncapped": ("gemma2", {"final_logit_softcapping": None}),
    "opt-norm-after": ("opt", {"do_layer_norm_before": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "bloom-norm-before": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama-with-pad-token": ("llama", {"pad_token_id": 0}),
    "gemma3-untied": ("gemma3_text", {"tie_word_embeddings": False}),
}
# Windows shorter than the texts.
WINDOWS: dict[str, Variant] = {
    "mistral": ("mistral", {"sliding_window": 6}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "qwen2": (
        "qwen2",
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "gemma2": ("gemma2", {"sliding_window": 6}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "sliding_window_pattern": 2}),
    "cohere2": ("cohere2", {"sliding_window": 6}),
    "exaone4": ("exaone4", {"sliding_window": 6}),
    "olmo3": ("olmo3", {"sliding_window": 6}),
    "gpt_neo": ("gpt_neo", {"window_size": 6}),
}


def comparisons(model: EditableModel) -> list[Comparison]:
    """Of every shortcut that the model takes."""
    ids = model.tokenizer(TEXT)["input_ids"]
    require_own_logits(model, ids)
    require_outputs(model, request(), model.family.mlp(1), model.family.down_projection(1))
    found = [
        *compare_search(model, request(), model.family.mlp(1)),
        *compare_search(model, request(), model.family.block(2)),
        *compare_search(model, request(), (model.family.attention(1), model.family.mlp(1))),
        compare_keys(model, request(), (0, 2, 3)),
        compare_keys(model, request(), (0, 2), model.family.mlp(2)),
        compare_scoring(model, ids),
        compare_generation(model, ids),
    ]
    return [each for each in found if each is not None]


def assert_close(found: list[Comparison]) -> None:
    for each in found:
        assert max(each.differences.values()) < CLOSE, each


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_shortcut_of_every_family_equals_the_plain_computation(kind: str) -> None:
    found = comparisons(family_model(kind))
    expected = ["search", "search", "search", "keys", "keys", "scoring", "generation"]
    if kind in WITHOUT_TREES:
        expected.remove("scoring")
    assert [each.shortcut for each in found] == expected
    assert_close(found)


@pytest.mark.parametrize("style", STYLES)
def test_the_shortcuts_are_right_with_every_style_of_tokenizer(style: Style) -> None:
    model = family_model("llama", tokenizer=styled_tokenizer(style))
    assert len(model.tokenizer) <= model.network.config.vocab_size
    found = comparisons(model)
    assert len(found) == 7
    assert_close(found)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_batches_and_padding_change_no_result_with_any_style_of_tokenizer(style: Style) -> None:
    batches_agree(family_model("gemma2", tokenizer=styled_tokenizer(style)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_of_a_family_take_their_shortcuts_rightly(name: str) -> None:
    kind, changes = VARIANTS[name]
    model = family_model(kind, **changes)
    found = comparisons(model)
    last = compare_search(model, request(), model.family.block(3))
    assert bool(last) == (model.family.final_norm is not None)
    assert_close([*found, *last])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WINDOWS))
def test_windows_shorter_than_the_text_change_no_result(name: str) -> None:
    kind, changes = WINDOWS[name]
    model, wide = family_model(kind, **changes), family_model(kind)
    found = comparisons(model)
    assert {each.shortcut for each in found} == {"keys", "generation"}, "the others are plain"
    assert_close(found)
    batches_agree(model)
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        narrow, full = (each.network(ids).logits for each in (model, wide))
    assert not torch.allclose(narrow, full, atol=1e-3), "the window is really shorter"


def batches_agree(model: EditableModel) -> None:
    """Batches of 1 and 16, and padding on either side, give the same results."""
    site, chosen = model.family.mlp(1), settings(steps=3)
    together = search_targets(
        model, requests(16), site=site, contexts=CONTEXTS[:2], settings=chosen
    )
    for index in (0, 7, 15):
        alone = search_target(
            model, request(index), site=site, contexts=CONTEXTS[:2], settings=chosen
        )
        error = torch.linalg.norm(together[index].delta_O - alone.delta_O)
        assert error < 10 * CLOSE * torch.linalg.norm(alone.delta_O)
        assert together[index].loss == pytest.approx(alone.loss, rel=CLOSE)
    texts = [request(index).full_prompt for index in range(3)]
    probes = [Probe(prompt=text, answer=word) for text in texts for word in ("Paris", "French")]
    wide, narrow = (score(model, probes, tokens_per_batch=tokens) for tokens in (512, 1))
    for probe in probes:
        assert wide[probe].log_probs == pytest.approx(narrow[probe].log_probs, abs=CLOSE)
    prompts = [tuple(model.tokenizer(text)["input_ids"]) for text in (TEXT, *texts)]
    by_size = [
        generate(model, prompts, max_new_tokens=5, ends=(), batch_size=size) for size in (1, 16)
    ]
    assert by_size[0] == by_size[1]
    sequences = prepare(model, request(), CONTEXTS, kl_position="subject_last")
    delta_1O = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        left, right = (
            plain_forward(model, site, [sequences], side=side)(delta_1O, None)
            for side in ("left", "right")
        )
    torch.testing.assert_close(left.log_p_NC, right.log_p_NC, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(left.log_p_NV, right.log_p_NV, rtol=CLOSE, atol=10 * CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_batches_and_padding_change_no_result(kind: str) -> None:
    batches_agree(family_model(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_model_whose_shortcuts_are_all_refused_gives_the_same_results(kind: str) -> None:
    model = family_model(kind)
    names: Any = ("search", "keys", "scoring", "generation")
    refused = Shortcuts(
        comparisons=tuple(
            Comparison(shortcut=name, differences={"hidden": 1.0}, tolerance=1e-3) for name in names
        )
    )
    prompts = [tuple(model.tokenizer(text)["input_ids"]) for text in (TEXT, "Paris is")]
    probes = [Probe(prompt=TEXT, answer=word) for word in ("Paris", "French food")]
    site: Any = {"site": model.family.mlp(2), "contexts": CONTEXTS, "settings": settings(steps=4)}
    results = []
    for shortcuts in (Shortcuts(), refused):
        model.shortcuts = shortcuts
        results.append(
            (
                generate(model, prompts, max_new_tokens=5, ends=()),
                score(model, probes, tokens_per_batch=512),
                search_target(model, request(), **site),
            )
        )
    (words, scores, target), (plain_words, plain_scores, plain_target) = results
    assert words == plain_words
    for probe in probes:
        assert scores[probe].log_probs == pytest.approx(plain_scores[probe].log_probs, abs=CLOSE)
    error = torch.linalg.norm(target.delta_O - plain_target.delta_O)
    assert error < 10 * CLOSE * torch.linalg.norm(plain_target.delta_O)


@pytest.mark.slow
def test_half_precision_keeps_its_shortcuts() -> None:
    for kind in ("llama", "gpt2", "gemma2", "falcon"):
        for dtype in ("bfloat16", "float16"):
            for each in comparisons(family_model(kind, dtype=dtype)):
                assert each.agrees, (kind, dtype, each)
