"""The command `editkit stats` on a bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from editkit.cli.main import app
from editkit.errors import ConfigError

SMALL = ("model=tiny-gpt2", "stats.num_documents=300")
MEMIT = ("editor=memit", "editor.layers=[0,1,2]")


def call(command: str, folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["stats", command, *SMALL, f"stats.folder={folder}", *arguments])


def test_build_ls_and_verify_show_the_same_files(tmp_path: Path) -> None:
    assert "no second moments are stored there yet" in call("ls", tmp_path).output
    built = call("build", tmp_path, *MEMIT)
    assert built.exit_code == 0 and "3 second moments of tiny-gpt2" in built.output
    assert "3 second moments of up to 512 x 512 over 300 documents; memory: about" in built.output
    again = call("build", tmp_path, *MEMIT)
    assert again.exit_code == 0 and "memory" not in again.output
    for command in ("ls", "verify"):
        result = call(command, tmp_path)
        assert result.exit_code == 0
        assert (
            all(path.name in result.output for path in tmp_path.iterdir())
            and "transformer.h.2.mlp.c_proj " in result.output
        )

    damaged = next(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-8])
    refused = call("verify", tmp_path)
    assert isinstance(refused.exception, ConfigError)
    assert f"{damaged}: corrupt statistics" in str(refused.exception)
    refused = call("build", tmp_path, *MEMIT)
    assert isinstance(refused.exception, ConfigError)
    assert f"{damaged}: corrupt statistics" in str(refused.exception)


def test_compare_shows_a_row_for_each_module_and_writes_the_report(tmp_path: Path) -> None:
    result = call(
        "compare", tmp_path / "stats", *MEMIT, "--keys", "4", "--to", str(tmp_path / "report.json")
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [module["module"] for module in report["modules"]] == [
        f"transformer.h.{layer}.mlp.c_proj" for layer in range(3)
    ]
    assert all(module["module"] in result.output for module in report["modules"])
    assert report["keys"] == 4 and report["covariance_weight"] is not None
    assert all(module["minimal_vectors"] >= 10 * module["size"] for module in report["modules"])
    assert len(list((tmp_path / "stats").iterdir())) == 6


@pytest.mark.parametrize("command", ["build", "compare"])
def test_an_editor_without_statistics_needs_none(tmp_path: Path, command: str) -> None:
    result = call(command, tmp_path, "editor.covariance=null")
    assert "needs no second moments" in f"{result.output} {result.exception}"
    assert not list(tmp_path.iterdir())
