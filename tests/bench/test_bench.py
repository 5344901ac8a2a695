"""The benchmarks compare equal work: both implementations give the same results, and the result
files are complete. No test checks a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from editkit.bench import measurements, run_bench, shapes
from editkit.bench.base import Options, PairedTiming, relative_difference
from editkit.bench.shapes import model_shapes
from editkit.bench.synthetic import (
    NUM_NEIGHBOURS,
    NUM_PARAPHRASES,
    model_of,
    requests_for,
    texts_for,
    tokenizer,
)
from editkit.cli.main import app
from editkit.errors import ConfigError
from editkit.evaluation.editing import probes_of
from editkit.model.tokens import encode_with_target, fill, subject_position

TOLERANCES = {
    "telemetry": 1e-6,
    "editing": 1e-6,
    "moments": 1e-5,
}  # edits: their factors are float32
EDIT_TOLERANCE = 2e-5


@pytest.mark.parametrize("name", list(measurements()))
def test_both_implementations_give_the_same_result_and_the_file_holds_it(
    name: str, tmp_path: Path
) -> None:
    result = run_bench(name, "nano", repeats=2, dtype="float64", batch=2, folder=tmp_path)
    assert json.loads((tmp_path / f"{name}-nano-float64.json").read_text()) == result
    assert result["relative_difference"] < TOLERANCES.get(name, EDIT_TOLERANCE)
    assert result["ratio"] == result["plain_s"] / result["ours_s"] > 0
    assert len(result["all_plain_s"]) == len(result["all_ours_s"]) == 2
    assert (
        f"editkit bench {name} --shape=nano" in result["command"]
        and len(result["load_average"]) == 3
    )
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}-nano-float64.json"]


def test_edits_agree_in_float32_within_its_precision(tmp_path: Path) -> None:
    assert (
        run_bench("memit", "nano", repeats=1, batch=1, folder=tmp_path)["relative_difference"]
        < 1e-2
    )


def test_a_wrong_reference_would_be_noticed() -> None:
    right = torch.ones(3, 4)
    assert relative_difference(right, right) == 0
    assert relative_difference(right, 1.5 * right) == pytest.approx(0.5)


def test_the_profile_names_operations_and_the_table_shows_them(tmp_path: Path) -> None:
    options = ["--shape", "nano", "--repeats", "1", "--profile", "--folder", str(tmp_path)]
    shown = CliRunner().invoke(app, ["bench", "moments", *options])
    assert shown.exit_code == 0, shown.output
    result = json.loads((tmp_path / "moments-nano.json").read_text())
    assert result["profile"][0]["operation"] in shown.output and "moments nano" in shown.output
    seconds = [row["seconds"] for row in result["profile"]]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 0


def test_a_reduced_depth_is_stated_in_the_result_and_in_the_files_name(tmp_path: Path) -> None:
    result = run_bench("editing", "nano", repeats=1, layers=2, folder=tmp_path)
    assert (result["layers"], result["layers_of_the_model"]) == (2, 3)
    assert (tmp_path / "editing-nano-2layers.json").exists()


@pytest.mark.parametrize("name", list(model_shapes()))
@pytest.mark.parametrize("depth", [None, 2, 3])
def test_the_edited_layers_lie_below_the_last_one_at_every_depth(
    name: str, depth: int | None
) -> None:
    shape = model_shapes()[name].of_depth(depth)
    edited = (shape.rome_layer, *shape.memit_layers)
    assert all(0 <= layer < shape.num_layers - 1 for layer in edited)
    assert list(shape.memit_layers) == sorted(set(shape.memit_layers)) and shape.memit_layers
    assert shapes()[name] == (shape.width, shape.inner)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda:0"},
        {"dtype": "bfloat16"},
        {"layers": 2},
        {"layers": 2, "dtype": "bfloat16", "device": "cuda"},
    ],
)
def test_measurements_of_different_things_do_not_share_a_file(changes: dict[str, Any]) -> None:
    assert Options(model="nano", **changes).label() not in ("nano", Options(model="nano").label())


def test_all_invalid_options_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"(?s)bench: unknown measurement \(got 'speed'; expected one of telemetry, rome,.*--shape: .*'gpt5'.*gpt2-xl.*--dtype: .*'int8'.*--repeats",
    ):
        run_bench("speed", "gpt5", repeats=0, dtype="int8", folder=tmp_path)
    with pytest.raises(
        ConfigError, match=r"--layers: this model has 3 layers \(got 9; expected 2 to 3\)"
    ):
        run_bench("rome", "nano", layers=9, folder=tmp_path)


def test_a_word_is_a_token_and_the_vocabulary_is_full() -> None:
    shape = model_shapes()["nano"]
    encoder = tokenizer(shape.vocabulary)
    assert len(encoder) == shape.vocabulary
    for index, request in enumerate(requests_for(shape, 10)):
        prompt = fill(request.prompt, request.subject)
        sequence = encode_with_target(encoder, prompt.text, request.target)
        assert sequence.start == 9 + index % 2 and len(sequence.target_ids) == len(
            request.target.split()
        )
        assert sequence.start - 1 - subject_position(sequence, prompt) == 3 + index % 2
        assert encoder.unk_token_id not in sequence.ids
        assert len(list(probes_of(request, ("probability",)))) == 2 * (
            1 + NUM_PARAPHRASES + NUM_NEIGHBOURS
        )
    assert max(len(text.split()) for text in texts_for(shape, documents=9, longest=40)) <= 40


def test_the_same_options_give_the_same_weights_and_requests() -> None:
    shape = model_shapes()["nano"]
    first, second = (model_of(shape, "nano", device="cpu", dtype="float32") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert requests_for(shape, 2) == requests_for(shape, 2)


def test_time_outside_the_comparison_is_subtracted_from_both_clocks() -> None:
    timing = PairedTiming(device="cpu")
    timing.run("ours", lambda: torch.ones(200, 200) @ torch.ones(200, 200))
    (before,) = timing.costs["ours"]
    timing.discount("ours", before.seconds / 4)
    (after,) = timing.costs["ours"]
    assert after.seconds == pytest.approx(0.75 * before.seconds)
    assert after.cpu_seconds == pytest.approx(0.75 * before.cpu_seconds)
