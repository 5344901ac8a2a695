"""The reference pages are complete: every group, key, command, room, and every key of a run's
files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.gen.annotated import TARGET, field_comments, read
from docs.gen.reference import GROUPS, described, pages
from editkit import types
from editkit.cli.run import run
from editkit.config.compose import conf_folder, options
from tests.support.paths import ROOT
from tests.test_imports import ORDER

IN_RECIPES = {"recipe", "restraint_recipe"}
# Groups whose files override keys of others: their comments stand there.
OVERLAYS = {"experiment", "debug", "setting", "scale", "sweep"}


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


def test_every_group_has_a_page_and_every_option_a_section(made: dict[str, str]) -> None:
    assert set(GROUPS) == {option.group for option in options()} - IN_RECIPES
    for option in options():
        if option.group not in IN_RECIPES:
            page = made[f"reference/configuration/{option.group}.md"]
            assert f"\n## {option.name} {{" in page
            assert option.about


def test_every_row_of_a_table_is_one_line(made: dict[str, str]) -> None:
    rows = [line for page in made.values() for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 100
    assert [row for row in rows if not row.endswith("|")] == []


def test_every_key_is_described() -> None:
    bare = [
        f"{group}={path.stem}: {key.path}"
        for group in GROUPS.keys() - OVERLAYS
        for path in sorted((conf_folder() / group).glob("**/*.yaml"))
        for file in [read(path)]
        for key in file.keys
        if key.value and key.path.rpartition(".")[2] != TARGET and not described(key, file)
    ]
    assert not bare


def test_a_comment_is_read_beside_a_key_and_above_it(tmp_path: Path) -> None:
    path = tmp_path / "rome.yaml"
    path.write_text(
        "# @package _global_\n# About it,\n# on two lines\nfirst: 1 # of the first\n"
        "# which second:\n#   a: one\n#     thing\n#   b: another\nsecond: '#2'\nthird:\n"
        "  # inside\n  fourth: {a: 1} # beside it\n"
    )
    file = read(path)
    assert (file.about, file.notes) == ("About it,", "on two lines")
    assert {key.path: key.comment for key in file.keys} == {
        "first": "of the first",
        "second": "which second:\na: one thing\nb: another",
        "third": "",
        "third.fourth": "inside beside it",
    }


def test_every_command_and_option_of_the_program_is_on_its_page(made: dict[str, str]) -> None:
    page = made["reference/cli.md"]
    for name in ("run", "validate", "stats build", "export", "submit", "train"):
        assert f"\n## editkit {name} {{" in page
    assert "`--every-step`" in page and "`--view`" in page


def test_every_field_of_a_record_has_a_comment() -> None:
    for record in (types.EditRequest, types.Measurement, types.EvalRecord, types.StepRecord):
        comments = field_comments(record)
        assert not {name for name in set(comments) - {"measurement", "view"} if not comments[name]}


def test_the_table_of_rooms_is_the_order_of_imports() -> None:
    text = (ROOT / "docs/architecture.md").read_text().partition("## The rooms")[2]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == ORDER


def test_every_page_is_in_the_navigation(made: dict[str, str]) -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/&-]+\.md", text.partition("\nnav:")[2]))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("**/*.md")}
    assert listed == written | set(made)


def test_the_page_of_a_runs_files_names_every_key(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["editor=ft", "edits=2", "suite=none", "tracker=none", "restraint=prune_linear"]
    assert run(given) == 0
    (folder,) = tmp_path.glob("outputs/default/*/seed0")
    page = made["reference/records.md"]
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    keys: set[str] = set(json.loads((folder / "provenance.json").read_text()))
    for step in steps:
        keys |= {*step, *step["target"], *step["seconds"]}
        keys |= {key for figures in step["modules"].values() for key in figures}
    keys |= {key for record in evals for key in record}
    assert not {key for key in keys if f"`{key}`" not in page}
    names: set[Any] = {path.name for path in folder.iterdir()}
    assert not {name for name in names if f"`{name}`" not in page and f"`{name}/`" not in page}


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_every_issue_form_has_what_github_needs() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "new_method", "question"]
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= content.keys()
        identities = [item["id"] for item in content["body"]]
        assert len(set(identities)) == len(identities)
        assert all("label" in item["attributes"] for item in content["body"])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_link_of_a_page_that_the_site_does_not_check_leads_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()):
        path, _, heading = link.partition("#")
        if "://" not in path:
            text = (ROOT / path).read_text()
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
            assert not heading or heading in anchors
