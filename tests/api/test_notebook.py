"""The notebooks run from their first cell to their last in a kernel of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "first_edit.ipynb"
STREAM = ROOT / "examples" / "streaming_edits.ipynb"


def texts(notebook: Any) -> dict[int, str]:
    """What each code cell showed, by its number among the code cells."""
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = {}
    for number, cell in enumerate(codes, start=1):
        parts = [
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell["outputs"]
        ]
        shown[number] = "\n".join("".join(part) for part in parts)
    return shown


def executed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook after all its cells, in an empty folder."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute()
    return notebook


# The kernel is another process. Its sockets and loops warn when they are closed.
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_stream_takes_back_the_edit_that_breaks_a_canary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = texts(executed(STREAM, tmp_path, monkeypatch))
    states = [line.split()[0] for line in shown[2].splitlines() if line.strip()]
    assert states == ["kept", "kept", "taken"] and "works for Mokris" in shown[2]
    assert "efficacy 100.0 %, locality 50.0 %" in shown[3]
    assert "changed: ['Zoso Vosset grew up in']" in shown[3]
    assert "edits in the model: 2" in shown[3] and "edits in the model: 1" in shown[4]
    assert "edited in a session" in (tmp_path / "edited" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOK, tmp_path, monkeypatch)
    shown = texts(notebook)
    assert "born in Krimus" in shown[2]
    assert "EditResult: 1 request" in shown[3] and "rank 1 update" in shown[3]
    assert "born in Tunit" in shown[4] and "grew up in Krimus" in shown[4]
    assert "condition_number" in shown[5]
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any("image/png" in output.get("data", {}) for cell in codes for output in cell.outputs)


@pytest.mark.parametrize("path", [NOTEBOOK, STREAM])
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert all(len(line.rstrip("\n")) <= 105 for line in cell["source"])
