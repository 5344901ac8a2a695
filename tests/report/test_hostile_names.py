"""Names from datasets, models and runs are text: nothing in them acts in the page, in a figure, in
a table or in a file's name.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from editkit.cli.run import run
from editkit.files import file_name
from editkit.records.reader import load_run
from editkit.records.samples import read_samples
from editkit.records.writer import save_samples
from editkit.report.escape import visible
from editkit.report.figures.run_figures import draw_figures
from editkit.report.show import ALL, show
from editkit.report.write import Written, report
from editkit.types import SampleRecord
from tests.report.test_report_page import BROWSER
from tests.support.records import changed
from tests.support.sweeps import PRUNE, add_run, config_of, evals_of

SCRIPT = '</pre><script>document.title="taken over"</script><img src=x onerror="document.title=1">'
HOSTILE = f"{SCRIPT}\"'&amp;$x_{{$ [/b]|\x1b[31m\x07\x00 ../../up %s {{0}}\\"


def a_hostile_run(root: Path) -> Path:
    """A run in which every name is hostile."""
    config = config_of(0, restraint={HOSTILE: PRUNE}, model=HOSTILE, editor=HOSTILE)
    config |= {"name": "plain", "dataset": {"name": HOSTILE}, "suite": {"name": HOSTILE}}
    evals = []
    for record in evals_of(efficacy={"unrestrained": 0.5, HOSTILE: 0.6}):
        is_task = record.measurement.kind != "editing"
        names = {"task": HOSTILE, "suite": HOSTILE} if is_task else {"dataset": HOSTILE}
        if record.measurement.protocol == "argmax":
            names |= {"protocol": HOSTILE}
        evals.append(changed(record, **names))
    return add_run(root, config, evals, failure={"kind": HOSTILE, "error": HOSTILE, "step": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_hostile_run(tmp_path_factory.mktemp("hostile") / "runs")


@pytest.fixture(scope="module")
def written(folder: Path) -> Written:
    return report([folder], folder.parents[3] / "out", title=HOSTILE)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text without scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.texts.append(data)


def test_the_page_shows_names_as_text(written: Written) -> None:
    page = Page(written.page.read_text())
    num_figures = sum("plotly-graph-div" in str(each.get("class")) for _, each in page.tags)
    assert num_figures == 4
    scripts = sum(tag == "script" for tag, _ in page.tags)
    assert scripts <= 1 + 2 * num_figures, "plotly and what draws its figures"
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert sum(text.count(visible(HOSTILE)) for text in page.texts) >= 10
    drawn = re.findall(r"Plotly\.newPlot\((.*?)\)", written.page.read_text(), flags=re.DOTALL)
    assert len(drawn) == num_figures and not any(
        "<script" in text or "<img" in text for text in drawn
    )


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser: chromium is not installed")
def test_a_browser_runs_nothing_of_them(written: Written, tmp_path: Path) -> None:
    common = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu"]
    common += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    dumped = subprocess.run(
        [*common, "--enable-logging=stderr", "--dump-dom", written.page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert not [line for line in dumped.stderr.splitlines() if "CONSOLE" in line]
    page = Page(dumped.stdout)
    assert dumped.stdout.count("js-plotly-plot") >= 4, "all figures are drawn"
    title = dumped.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title.startswith("&lt;/pre&gt;&lt;script&gt;"), "nothing has changed it"
    assert not any(tag == "img" for tag, _ in page.tags)
    legend = re.findall(
        r'<text class="legendtext"[^>]*>(.*?)</text>', dumped.stdout, flags=re.DOTALL
    )
    assert legend and any("&lt;script&gt;" in text for text in legend), "plotly shows them too"


def test_files_stay_in_their_folders(folder: Path, written: Written) -> None:
    root = written.page.parent
    for path in [*written.figures, *written.tables]:
        assert path.parent in (root / "figures", root / "tables") and path.is_file()
    figures = draw_figures(folder)
    assert len(figures) == 5 and {path.parent for path in figures} == {folder / "figures"}
    outside = {path.name for path in folder.parents[3].iterdir()}
    assert outside == {"runs", "out"}


@pytest.mark.parametrize("name", [HOSTILE, "../../up", "a-b", "..", "%2F", "x" * 100])
def test_samples_stay_in_their_folder_and_are_read_by_their_names(name: str, folder: Path) -> None:
    record = SampleRecord(step=3, view=HOSTILE, name=name, rows=({"text": HOSTILE},))
    path = save_samples(record, folder / "samples")
    assert path.parent == folder / "samples" and path.is_file()
    assert list(read_samples(load_run(folder), name=name)) == [record]
    path.unlink()


def test_the_name_of_a_file_is_short_and_its_own() -> None:
    long, other = file_name("é/" * 200), file_name("é/" * 199 + "é?")
    assert long != other and len(long.encode()) <= 100
    assert file_name("editing_probability") == "editing_probability"
    assert file_name("\ud800/") == "%3F%2F"


def test_a_terminal_shows_names_as_text(folder: Path) -> None:
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(show(folder))
    console.print(show(folder, protocol=ALL))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/b]" in text and "\x1b[31m" not in text and "\x07" not in text


def test_tables_hold_each_name_in_its_cell(written: Written) -> None:
    markdown = (written.page.parent / "tables" / "summary.md").read_text()
    assert "<script" not in markdown and "\x1b" not in markdown
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith("| ")]
    assert len(tables) >= 3
    for rows in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


@pytest.mark.slow
def test_a_run_of_hostile_requests_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    requests = [
        {"id": HOSTILE, "prompt": "{} lives in", "subject": f"Ann {SCRIPT}", "target": "Rome"},
        {
            "id": "../../up",
            "prompt": 'Say "{}"\x07 in',
            "subject": "Bea's",
            "target": "<b>Paris</b>",
        },
    ]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    (tmp_path / "requests.jsonl").write_text(lines)
    given = ["editor=ft", "editor.steps=2", "edits=2", "suite=none", "tracker=none"]
    assert run([*given, "dataset=jsonl", "dataset.path=requests.jsonl"]) == 0
    (folder,) = tmp_path.glob("outputs/default/*/seed0")
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "requests.jsonl"}
    step = load_run(folder).steps[1]
    assert step.requests == (f"jsonl/{HOSTILE}".strip(),)
    page = Page(report([folder], tmp_path / "report").page.read_text())
    assert not any(tag == "img" for tag, _ in page.tags)
