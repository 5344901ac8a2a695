"""Every call that cannot work ends with exit code 2 and one message without a traceback."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from editkit.cli import main as cli
from editkit.config.compose import options
from editkit.errors import ConfigError
from tests.cli.bad_calls import CHEAP, COMPOSED, MORE, SMALL
from tests.cli.test_cli import Call, commands
from tests.cli.test_cli import editkit as editkit
from tests.support.bad_files import write_bad_files
from tests.support.datasets import construct_dataset

READERS = sorted(
    {option.name for option in options() if option.group == "dataset"}
    - {"world", "facts", "forms", "zsre_train", "mquake_cf_3k_v2", "mquake_t"}
    - {"hallueditbench", "uniedit"}  # of other kinds of files
)
FOLDERS = {"wikibigedit"}  # may be read as a whole
# What is wrong with a file of requests, and what is told of it.
FILES = {
    "none.json": r"^dataset\.path: the file does not exist \(got 'data/none\.json'; expected a JSON",
    ".": r"^dataset\.path: the path is a folder \(got 'data",
    "empty.json": r"^data/empty\.json.*: (malformed JSON: Expecting value|the file has no records)",
    "object.json": r"^data/object\.json(: the file has no (list \(got 'dict'|records)|, line 1: )",
    "no_records.json": r"^data/no_records\.json(: the file has no records|, line 1: record: is not an object)",
    "cut.json": r"^data/cut\.json, line 1.*: (malformed|record: is not) JSON: Unterminated string",
    "latin.json": r"^data/latin\.json, line 1.*: byte 16 is not UTF-8",
    "numbers.json": r"^data/numbers\.json, (record 0|line 1): record: is not an object with fields but of type (int|list) \(got ",
    "fields.json": r"^data/fields\.json, (record 0|line 1): ",
}  # fmt: skip


def files() -> set[Path]:
    """All files, but for the lock of a run that was refused only after its model was found."""
    return {path for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}


def refused(editkit: Call, line: str, told: str) -> None:
    write_bad_files()
    before = files()
    code, _, err = editkit(*shlex.split(line.replace("SMALL", SMALL)))
    shown = re.sub(r"[│╭╮╰╯─]+", " ", err)  # a box of typer
    assert told in " ".join(shown.split()), err
    assert code == 2
    assert err.startswith(("ConfigError", "Usage: editkit", "usage: editkit"))
    assert files() == before, "nothing is written"


@pytest.mark.parametrize("line", CHEAP, ids=lambda line: line[:60])
def test_a_call_without_a_configuration(editkit: Call, line: str) -> None:
    refused(editkit, line, CHEAP[line])


@pytest.mark.parametrize("line", COMPOSED, ids=lambda line: line[:60])
def test_a_call_with_a_configuration(editkit: Call, line: str) -> None:
    refused(editkit, line, COMPOSED[line])


@pytest.mark.slow
@pytest.mark.parametrize("line", MORE, ids=lambda line: line[:60])
def test_another_call_with_a_configuration(editkit: Call, line: str) -> None:
    refused(editkit, line, MORE[line])


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_of_requests(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bad_files()
    for file, told in FILES.items():
        if file == "." and reader in FOLDERS:
            continue
        with pytest.raises(ConfigError) as raised:
            construct_dataset(reader, path=str(Path("data") / file)).load(0)
        assert re.search(told, raised.value.problems[0]), (file, raised.value.problems)
        assert raised.value.exit_code == 2


def test_there_are_two_hundred_of_them_over_every_command() -> None:
    calls = [*CHEAP, *COMPOSED, *MORE]
    assert len(calls) + len(READERS) * len(FILES) >= 300 and len(calls) >= 200
    group = typer.main.get_command(cli.app)
    every = {" ".join(command) for command in commands(group)} - {"stats"}
    missing = {name for name in every if not any(call.startswith(name) for call in calls)}
    assert not missing
