"""The minimal preset takes as few texts as necessary, and its report agrees with dense algebra."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editkit.stats.build import build, statistics
from editkit.stats.compare import compare, compare_presets, sample_keys, table, write_report
from editkit.stats.corpus import fewest
from editkit.stats.store import Moments, SecondMoment
from tests.stats.test_parts import config
from tests.support.helpers import real_data, requests, tiny_model

LENGTHS = (3, 9, 1, 4, 7, 2, 8)
DOCUMENTS = ["x" * length for length in LENGTHS]


def random_moment(size: int, seed: int) -> SecondMoment:
    keys_MI = torch.randn(
        4 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return SecondMoment("m", keys_MI.T @ keys_MI / len(keys_MI), len(keys_MI))


def lengths(texts: object) -> list[int]:
    return [len(text) for text in texts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_tokens", [1, 10, 20, 34])
def test_as_few_documents_are_drawn_as_hold_the_tokens_and_they_keep_their_order(
    num_tokens: int,
) -> None:
    actual = fewest(DOCUMENTS, num_tokens=num_tokens, count_tokens=lengths, seed=1)
    assert sum(map(len, actual)) >= num_tokens
    assert sum(map(len, actual)) - max(map(len, actual)) < num_tokens
    assert [DOCUMENTS.index(text) for text in actual] == sorted(
        DOCUMENTS.index(text) for text in actual
    )
    assert actual == fewest(DOCUMENTS, num_tokens=num_tokens, count_tokens=lengths, seed=1)


def test_the_draw_follows_the_seed_and_a_short_corpus_is_taken_whole() -> None:
    draws = {
        tuple(fewest(DOCUMENTS, num_tokens=10, count_tokens=lengths, seed=seed))
        for seed in range(8)
    }
    assert len(draws) > 1
    assert fewest(DOCUMENTS, num_tokens=1000, count_tokens=lengths, seed=1) == DOCUMENTS


def test_minimal_statistics_hold_ten_vectors_for_each_dimension_and_not_many_more(
    tmp_path: Path,
) -> None:
    model = tiny_model("gpt2")
    [module] = model.down_projections((1,))
    moments = build(model, [module], config(tmp_path, preset="minimal", context_length=16))
    assert 10 * 128 <= moments.by_module[module].num_tokens < 10 * 128 + 16
    full = statistics(model, [module], config(tmp_path, context_length=16))
    few = statistics(model, [module], config(tmp_path, preset="minimal", context_length=16))
    assert set(few.documents) < set(full.documents)


def test_the_differences_are_those_of_dense_updates() -> None:
    size, weight = 12, 7.0
    full, few = random_moment(size, 0), random_moment(size, 1)
    keys_IN = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = compare(Moments({"m": full}), Moments({"m": few}), "m", keys_IN, weight=weight)

    def apart(make: object, columns_IN: torch.Tensor) -> float:
        one, other = (make(moment.matrix_II, columns_IN) for moment in (full, few))  # type: ignore[operator]
        return float((other - one).norm() / one.norm())

    residual_O = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def rome(matrix_II: torch.Tensor, key_I1: torch.Tensor) -> torch.Tensor:
        direction_I1 = torch.linalg.inv(matrix_II) @ key_I1
        return residual_O @ direction_I1.T / (key_I1 * direction_I1).sum()

    def memit(matrix_II: torch.Tensor, columns_IN: torch.Tensor) -> torch.Tensor:
        return columns_IN.T @ torch.linalg.inv(weight * matrix_II + columns_IN @ columns_IN.T)

    rome_singles = [apart(rome, keys_IN[:, [index]]) for index in range(3)]
    memit_singles = [apart(memit, keys_IN[:, [index]]) for index in range(3)]
    assert actual.matrix == pytest.approx(
        float((few.matrix_II - full.matrix_II).norm() / full.matrix_II.norm())
    )
    assert actual.rome_mean == pytest.approx(
        sum(rome_singles) / 3
    ) and actual.rome_max == pytest.approx(max(rome_singles))
    assert actual.memit_mean == pytest.approx(
        sum(memit_singles) / 3
    ) and actual.memit_max == pytest.approx(max(memit_singles))
    assert actual.memit_batch == pytest.approx(apart(memit, keys_IN))


def test_equal_moments_do_not_differ_and_without_a_weight_there_is_no_memit() -> None:
    moments = Moments({"m": random_moment(12, 0)})
    keys_IN = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = compare(moments, moments, "m", keys_IN, weight=None)
    assert actual.matrix == actual.rome_mean == actual.rome_max == 0
    assert actual.memit_mean is actual.memit_max is actual.memit_batch is None


def test_the_keys_are_those_at_the_subjects_last_token() -> None:
    from editkit.targets.keys import keys_and_outputs

    model = tiny_model("llama")
    modules = model.down_projections((0, 2))
    actual = sample_keys(model, modules, requests())
    for module in modules:
        expected_IN = torch.cat(
            [
                keys_and_outputs(model, request, module=module, contexts=("{}",))[0]
                for request in requests()
            ]
        ).T
        torch.testing.assert_close(actual[module], expected_IN, rtol=1e-5, atol=1e-6)


def test_the_report_is_written_shown_and_whole(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    modules = model.down_projections((0, 1))
    chosen = config(tmp_path)
    report = compare_presets(model, modules, chosen, requests=requests(), weight=100.0)
    assert report.full.seconds is not None and report.minimal.seconds is not None
    assert [difference.module for difference in report.modules] == list(modules)
    for difference in report.modules:
        assert (
            0 < difference.matrix < 1
            and 0 < difference.rome_mean <= difference.rome_max
            and difference.minimal_vectors < difference.full_vectors
        )
        assert difference.memit_batch is not None and difference.memit_batch > 0
    write_report(report, tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["modules"][0]["matrix"] == report.modules[0].matrix
    assert read["full"]["documents"] == 256 > read["minimal"]["documents"]
    assert table(report).row_count == 2
    again = compare_presets(model, modules, chosen, requests=requests(), weight=100.0)
    assert again.full.seconds is None and again.modules == report.modules


@pytest.mark.data
def test_more_vectors_come_nearer_to_the_full_statistics_of_a_real_model(tmp_path: Path) -> None:
    from editkit.model.load import ModelConfig

    model = ModelConfig(id=str(real_data("models/stories260k-hf"))).load()
    modules = model.down_projections((1,))
    stories = {
        "path": str(real_data("lm_text/tinystories/train_0.txt")),
        "separator": "<|endoftext|>",
        "context_length": 256,
    }
    chosen = config(tmp_path, num_documents=150, **stories)
    [ten], [fifty] = (
        compare_presets(
            model,
            modules,
            replace(chosen, vectors_per_dimension=count),
            requests=requests(),
            weight=15000.0,
        ).modules
        for count in (10, 50)
    )
    assert (
        ten.full_vectors > 150 * ten.size and 10 * ten.size <= ten.minimal_vectors < 12 * ten.size
    )
    assert 0 < fifty.matrix < ten.matrix < 1
    assert 0 < fifty.rome_mean < ten.rome_mean < 1
