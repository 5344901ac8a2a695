"""A key in the environment is never written into a file."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from typer.testing import CliRunner

from editkit.cli.main import app
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.runner.session import run as run_experiment
from tests.support.sessions import run_folder

KEYS = {
    name: f"{name}-7c1e5b90d2".lower()
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "HUGGING_FACE_HUB_TOKEN")
}


def test_no_file_of_a_run_or_of_an_exported_folder_holds_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    few = ["edits=2", "milestones=[2]", "suite=none", "tracker=none", "editor=ft", "editor.steps=2"]
    chosen = compose([*few, "model=tiny-gpt2", f"paths.outputs={tmp_path / 'runs'}"])
    assert run_experiment(build(chosen.config)) == 0
    run = run_folder(tmp_path / "runs")
    shown = ""
    for form in ("model", "lora"):
        to = ("--to", str(tmp_path / form), "--as", form)
        done = CliRunner().invoke(app, ["export", str(run), *to, "--push", "me/it", "--dry-run"])
        assert done.exit_code == 0, done.exception
        shown += done.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"provenance.json", "config.yaml", "README.md", "editkit.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        assert not [name for name, key in KEYS.items() if key.encode() in content], path
    assert not [key for key in KEYS.values() if key in shown]
