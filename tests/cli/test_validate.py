"""`editkit validate` of a sweep: every cell is checked, and data is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from editkit.cli.main import app
from editkit.config import composer
from editkit.config.compose import compose
from editkit.config.composer import Composer
from editkit.config.loads import Loads
from editkit.datasets.world import WorldDataset
from editkit.errors import ConfigError
from editkit.sweeps.grid import cells_of_command


def validate(*overrides: str) -> Any:
    return CliRunner().invoke(app, ["validate", "suite=none", *overrides])


def problems_of(result: Any) -> list[str]:
    assert isinstance(result.exception, ConfigError), result.output
    return list(result.exception.problems)


def test_a_grid_is_valid_where_the_default_editor_is_not_part_of_it() -> None:
    assert "batch_size: editor=rome edits one request" in problems_of(validate("batch_size=10"))[0]
    result = validate("editor=ft,memit,d4s,alphaedit", "batch_size=10")
    assert result.exit_code == 0, result.output
    assert "ok: 4 cells" in result.output
    assert validate("--multirun", "editor=ft,memit,d4s,alphaedit", "batch_size=10").output == (
        result.output
    ), "a command of `run` can be checked as it stands"
    for editor in ("ft", "memit", "d4s", "alphaedit"):
        assert f"editor={editor}" in result.output
    assert result.output.count("2080 requests") == 1, "what all cells share is shown once"
    assert "tokens      shown of a single run: editkit validate ... editor=ft" in result.output


def test_a_run_without_protocols_says_that_no_edit_is_judged() -> None:
    result = validate("evaluation.protocols=[]", "model=tiny-gpt2")
    assert result.exit_code == 0 and "ok" in result.output
    assert "no edit is judged: evaluation.protocols is empty" in result.output


def test_every_problem_of_every_cell_is_reported_once_with_its_cells() -> None:
    result = validate("editor=rome,mend", "restraint=none,eac,alphaedit", "edits=0")
    assert problems_of(result) == [
        "all cells: edits: out of range (got 0; expected at least 1).",
        "cell 2 (editor=rome restraint=alphaedit): restraint.alphaedit: editor=rome cannot be "
        "restrained at this place (got 'solve'; expected one of objective, update, total).",
        "cell 4 (editor=mend restraint=eac): restraint.eac: editor=mend cannot be restrained at "
        "this place (got 'objective'; expected one of update, total).",
        "cell 5 (editor=mend restraint=alphaedit): restraint.alphaedit: editor=mend cannot be "
        "restrained at this place (got 'solve'; expected one of update, total).",
    ]
    assert "0 of 6 cells can be run" in result.output


def test_a_cell_that_cannot_be_composed_does_not_hide_the_others() -> None:
    result = validate("editor=rome,nope", "seed=1,2", "batch_size=2")
    first, second = problems_of(result)
    assert first.startswith("cells 0, 1 (editor=rome): batch_size: editor=rome edits one request")
    assert second.startswith("cells 2, 3 (editor=nope): In 'config': Could not find 'editor/nope'")


def test_the_data_of_all_cells_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, composed = [], []
    load, with_hydra = WorldDataset.load, composer.with_hydra
    monkeypatch.setattr(
        WorldDataset, "load", lambda self, seed: loaded.append(seed) or load(self, seed)
    )
    monkeypatch.setattr(
        composer,
        "with_hydra",
        lambda *args, **options: composed.append(args) or with_hydra(*args, **options),
    )
    assert validate("editor=rome,memit", "seed=1,2", "edits=3").exit_code == 0
    assert loaded == [1, 2]
    assert len(composed) == 2, "cells that differ in their seeds alone are composed once"


def test_a_shared_composition_is_what_hydra_composes() -> None:
    together = Composer(None)
    for cell in (
        ["editor=memit", "seed=1"],
        ["editor=memit", "seed=2", "edits=7"],
        ["editor=memit", "milestones=[1,2]", "editor.covariance_weight=10"],
    ):
        assert together.compose(cell) == compose(cell)
    with pytest.raises(ConfigError, match="nope: unknown option"):
        together.compose(["editor=memit", "nope=1"])


def test_an_error_of_data_is_raised_for_every_cell_and_found_once() -> None:
    loads, attempts = Loads(), []

    def load() -> Path:
        attempts.append(1)
        raise ConfigError("dataset.path: no such file.")

    for _ in range(3):
        with pytest.raises(ConfigError, match="no such file"):
            loads.get(["dataset", {"path": None}, 0], load)
    assert attempts == [1]


def test_the_command_line_overrides_a_grid_by_name_and_a_single_run_is_no_grid() -> None:
    assert cells_of_command(["editor=memit", "seed=2"]) is None
    cells = cells_of_command(["experiment=prune/table1", "editor=rome", "seed=1,2"])
    assert cells == [
        ["editor=rome", "experiment=prune/table1", "seed=1"],
        ["editor=rome", "experiment=prune/table1", "seed=2"],
    ]
    with pytest.raises(ConfigError, match="Could not find 'experiment/nope'"):
        cells_of_command(["experiment=nope"])


def test_a_run_shows_the_tokens_of_one_request_and_the_targets_that_cannot_match(
    tmp_path: Path,
) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(
        '{"prompt": "Paris is in", "subject": "Paris", "target": "France"}\n'
        '{"prompt": "法国的首都是", "subject": "法国", "target": "柏林\\n罗马"}\n'
    )
    options = ("dataset=jsonl", f"dataset.path={path}", "model=tiny-gpt2", "editor=ft")
    result = validate(*options, "edits=2", "evaluation.protocols=[generate]")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "tokens jsonl/1: " in output and "-> ' " in output
    assert "warning 1 of 2 targets can never be generated exactly" in output
    assert "jsonl/2 holds '\\n', which ends a generation" in output
    quiet = validate(*options, "edits=1", "evaluation.protocols=[generate]")
    assert "never be generated" not in quiet.output, "the second request is not edited"
