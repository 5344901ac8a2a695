"""The report as a person gets it: the files, and the page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from editkit.report.write import report
from tests.support.sweeps import a_sweep, add_run, config_of, evals_of

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("report")
    runs = a_sweep(root / "runs")
    collapse = {"kind": "collapse", "error": "step 1: loss is not finite <b>&", "step": 1}
    add_run(
        runs,
        config_of(9, restraint={"rect": {"keep": 0.2}}),
        evals_of(efficacy={"unrestrained": None}, steps=(0,)),
        steps=1,
        failure=collapse,
    )
    add_run(
        runs,
        config_of(0, restraint={}, model="llama2-7b", name="prune-table1"),
        evals_of(efficacy={"unrestrained": 0.1}),
    )
    return report([runs], root / "out", title="A <sweep>")


def test_a_report_is_a_page_figures_and_tables(written) -> None:
    assert sorted(path.name for path in written.figures) == sorted(
        f"{name}.{kind}"
        for name in ("weights", "editing_probability", "editing_argmax", "tasks_world")
        for kind in ("png", "pdf")
    )
    for path in written.figures:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
    assert [path.name for path in written.tables] == [
        "summary.md",
        "summary.tex",
        "published.md",
        "published.tex",
    ]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_runs_say(written) -> None:
    text = written.page.read_text()
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=['"](?!data:)""", body)
    assert "<title>A &lt;sweep&gt;</title>" in text
    assert "loss is not finite &lt;b&gt;&amp;" in text


def test_the_page_holds_tests_failures_provenance_and_the_published_numbers(written) -> None:
    body = re.sub(r"<script.*?</script>", "", written.page.read_text(), flags=re.DOTALL)
    for wanted in (
        "paired t-tests",
        "more than 400 points, 400 are drawn",
        "<h2>Comparison with the published numbers</h2>",
        "collapse",
        "configuration and provenance",
        "wall_seconds",
        "PRUNE (arXiv 2405.16821), Table 1",
        "3/4",
        "Collapse points",
    ):
        assert wanted in body, wanted


def test_the_page_says_once_what_all_published_rows_share_and_where_all_runs_are(written) -> None:
    body = re.sub(r"<script.*?</script>", "", written.page.read_text(), flags=re.DOTALL)
    assert "<h3>prune/table1: PRUNE (arXiv 2405.16821), Table 1</h3>" in body
    (head,) = re.findall(r"<thead>((?:(?!</thead>).)*published.*?)</thead>", body)
    assert re.findall(r"<th[^>]*>(.*?)</th>", head)[:3] == [
        "row",
        "metric",
        "paper&#x27;s model",
    ], "no column without a value"
    runs = written.page.parent.parent / "runs"
    assert f"Runs below {runs}" in body and body.count(str(runs)) == 1
    assert "sweep/tiny-gpt2-rome-prune-00000000/seed0" in body


def test_the_same_runs_give_the_same_page(written, tmp_path: Path) -> None:
    runs = written.page.parent.parent / "runs"
    again = report([runs], tmp_path / "again.html", title="A <sweep>")
    assert again.page == tmp_path / "again.html"
    assert {path.parent for path in again.figures} == {tmp_path / "again" / "figures"}
    assert again.page.read_bytes() == written.page.read_bytes()
    assert [path.read_bytes() for path in again.figures] == [
        path.read_bytes() for path in written.figures
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no browser: chromium is not installed (apt-get install chromium)"
)
def test_a_browser_draws_every_figure_without_an_error_on_its_console(
    written, tmp_path: Path
) -> None:
    common = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
    ]
    common += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,4000"]
    page = written.page.as_uri()
    dumped = subprocess.run(
        [*common, "--dump-dom", page], capture_output=True, text=True, timeout=300, check=True
    )
    console = [line for line in dumped.stderr.splitlines() if "CONSOLE" in line]
    assert not console
    figures = re.findall(
        r'id="figure-(\w+)" class="plotly-graph-div[^"]*js-plotly-plot', dumped.stdout
    )
    assert sorted(figures) == ["editing_argmax", "editing_probability", "tasks_world", "weights"]
    for part in re.split(r'id="figure-', dumped.stdout)[1:]:
        assert part.count('class="trace scatter') >= 3, part[
            :40
        ]  # a line for each subject at least
    shot = tmp_path / "page.png"
    subprocess.run(
        [*common, f"--screenshot={shot}", page], capture_output=True, timeout=300, check=True
    )
    assert shot.stat().st_size > 50_000
