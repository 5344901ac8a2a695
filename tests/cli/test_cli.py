"""The commands: exit codes, messages without tracebacks, and the user's own configurations."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from editkit.cli import main as cli
from editkit.cli.run import flags_first
from editkit.config.compose import options
from tests.support.paths import ROOT

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def editkit(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Call]:
    """Calls the command in an empty folder; its exit code, stdout and stderr (on one line, as
    messages are wrapped to a width).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["editkit", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        return int(left.value.code or 0), output.out, " ".join(output.err.split())

    loggers = [logging.getLogger(name) for name in (None, "hydra")]
    handlers = [list(logger.handlers) for logger in loggers]
    yield call
    # Hydra's handlers hold on to a stream that this test's capture closes.
    for logger, before in zip(loggers, handlers, strict=True):
        logger.handlers[:] = before


def test_ls_lists_every_option_of_every_group_with_its_description(editkit: Call) -> None:
    code, out, _ = editkit("ls")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for option in options():
        assert any(
            line.endswith(f"{option.name}{' *' if option.is_default else ''} {option.about}")
            for line in lines
        ), option


def test_ls_pairs_says_which_restraint_works_with_which_editor(editkit: Call) -> None:
    code, out, _ = editkit("ls", "pairs")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and ["editor", "objective", "solve", "update", "total"] in lines
    assert any(line[:1] == ["grace"] and line[1:] == ["-"] * 4 for line in lines)
    assert "d4s" in out


def test_ls_of_a_group_lists_only_that_group_and_an_unknown_one_is_a_mistake(editkit: Call) -> None:
    _, out, _ = editkit("ls", "editor")
    assert "rome" in out and "counterfact" not in out
    code, _, err = editkit("ls", "editors")
    assert (
        code == 2
        and "group: unknown group (got 'editors'; expected one of dataset, debug, editor," in err
    )


def test_cfg_job_shows_the_composed_configuration(editkit: Call) -> None:
    code, out, _ = editkit("run", "model=gpt2-xl", "restraint=prune", "--cfg", "job")
    assert code == 0
    assert re.search(r"layers:\s+- 17\b", out) and "prune:" in out and "seed: 0" in out


def test_hydra_options_may_stand_before_and_after_the_overrides(editkit: Call) -> None:
    assert (
        editkit("run", "--cfg", "job", "seed=7")[1] == editkit("run", "seed=7", "--cfg", "job")[1]
    )
    assert editkit("run", "-c", "job", "-p", "paths")[1].strip().endswith("outputs: outputs")


def test_help_and_info_are_hydras(editkit: Call) -> None:
    code, out, _ = editkit("run", "--help")
    assert code == 0 and re.search(r"restraint: .*\bprune\b", out) and "editkit validate" in out
    code, out, _ = editkit("run", "--info", "defaults")
    assert code == 0 and "rome/tiny-gpt2" in out


def test_validate_says_ok_and_where_the_run_would_write_and_writes_nothing(
    editkit: Call, tmp_path: Path
) -> None:
    code, out, _ = editkit("validate", "edits=20", "restraint=prune")
    assert code == 0
    assert (
        out.startswith("ok")
        and "outputs/default/tiny-gpt2-rome-prune-" in out
        and "0, 2, 10, 20" in out
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["editor=memitt"], "Could not find 'editor/memitt'"),
        (
            ["editor.cov_wieght=1", "seed=x"],
            "2 problems - seed: invalid value (got 'x'; expected a valid integer). - editor.cov_wieght: unknown",
        ),
        (["+editr=1"], "editr: unknown option of the configuration (expected one of batch_size,"),
        (["+editr=1"], "). Fix: did you mean editor?"),
        (["edits"], "Error parsing override 'edits'"),
        (
            ["editor=alphaedit", "restraint=alphaedit"],
            "restraint: alphaedit is chosen twice. Fix: name it once (editor=alphaedit,",
        ),
        (
            ["+restraint=prune"],
            "+restraint=prune: the group already has a choice. Fix: remove the +;",
        ),
        (
            ["restraint.prune.alpha=2"],
            "restraint.prune: a value is set, but the restraint is not chosen. "
            "Fix: choose it with restraint=[prune].",
        ),
        (
            ["milestones=[101]"],
            "milestones: out of range (got [101]; expected numbers from 0 to edits=100).",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_exit_code_2(
    editkit: Call, command: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    code, _, err = editkit(command, *overrides)
    assert code == 2
    assert message in err and err.startswith("ConfigError: ")
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves nothing behind"


def test_an_unknown_flag_is_exit_code_2(editkit: Call) -> None:
    assert editkit("run", "--nonsense")[0] == 2
    assert editkit("validate", "--nonsense")[0] == 2


def test_in_a_multirun_every_job_is_checked_and_the_exit_code_reports_failures(
    editkit: Call, tmp_path: Path
) -> None:
    code, _, err = editkit("run", "--multirun", "edits=0,-1", "tracker=none")
    assert code == 2
    assert "ConfigError in job 0 (edits=0 tracker=none): edits: out of range (got 0;" in err
    assert "ConfigError in job 1 (edits=-1 tracker=none): edits: out of range (got -1;" in err
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["multirun"]


def test_flags_of_a_run_may_stand_among_its_overrides(editkit: Call, tmp_path: Path) -> None:
    code, _, err = editkit("run", "edits=0,-1", "--multirun", "tracker=none")
    assert code == 2
    assert err.count("at least 1") == 2
    (tmp_path / "mine").mkdir()
    code, out, _ = editkit("run", "edits=7", "--config-dir", "mine", "seed=3", "--cfg", "job")
    assert code == 0 and "edits: 7" in out and "seed: 3" in out
    code, _, err = editkit("run", "edits=7", "--no-such-flag", "seed=3")
    assert code == 2 and "unrecognized arguments: --no-such-flag" in err


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (["a=b", "--multirun", "c=d"], ["--multirun", "a=b", "c=d"]),
        (["a=b", "c=d", "-m"], ["-m", "a=b", "c=d"]),
        (["a=b", "--config-dir", "mine", "c=d"], ["--config-dir", "mine", "a=b", "c=d"]),
        (["~a", "--config-dir=x", "+b=1"], ["--config-dir=x", "~a", "+b=1"]),
        (["--multirun", "a=b", "a=b"], ["--multirun", "a=b", "a=b"]),
        ([], []),
    ],
)
def test_flags_go_to_hydra_before_the_overrides(given: list[str], passed_on: list[str]) -> None:
    assert flags_first(given) == passed_on


def test_a_misspelt_key_in_a_multirun_is_named_before_any_job_starts(editkit: Call) -> None:
    code, _, err = editkit("run", "-m", "editor.kyes=original,clean")
    assert code == 2
    assert "editor.kyes: unknown option of Rome (expected one of" in err
    assert "Fix: did you mean editor.keys?" in err


def test_a_users_option_and_class_are_loaded_from_the_current_folder(
    editkit: Call, tmp_path: Path
) -> None:
    (tmp_path / "conf/editor").mkdir(parents=True)
    (tmp_path / "conf/editor/mine.yaml").write_text(
        "# Mine\n_target_: my_editor.Mine\nname: mine\nlayers: [1]\n"
    )
    (tmp_path / "my_editor.py").write_text(
        "from dataclasses import dataclass\nfrom tests.support.fakes import FakeEditor\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(FakeEditor):\n    name: str\n"
    )
    assert "Mine" in editkit("ls", "editor", "--config-dir", "conf")[1]
    code, out, err = editkit("validate", "editor=mine", "--config-dir", "conf", "restraint=prune")
    assert code == 0, err
    assert "tiny-gpt2-mine-prune-" in out
    assert "mine" in editkit("run", "--config-dir", "conf", "editor=mine", "--cfg", "job")[1]


def test_an_option_of_a_restraint_is_named_by_the_key_that_the_restraint_stands_under(
    editkit: Call, tmp_path: Path
) -> None:
    (tmp_path / "conf/restraint").mkdir(parents=True)
    node = "{_target_: editkit.restraints.norm_cap.NormCap, norm: spectral, ratio: 0.5}"
    (tmp_path / "conf/restraint/mine.yaml").write_text(f"# A cap\ncap2: {node}\n")
    own = ("--config-dir", "conf", "restraint=mine")
    assert editkit("validate", *own)[0] == 0
    code, _, err = editkit("validate", *own, "restraint.cap2.ratio=-1", "editor.target.lr=-1")
    assert code == 2
    assert " restraint.cap2.ratio: " in err and " editor.target.lr: " in err
    assert "norm_cap.ratio" not in err


def commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*prefix, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))


@pytest.mark.parametrize("command", list(commands(typer.main.get_command(cli.app))), ids=" ".join)
def test_every_command_has_a_help_text_in_sentences(
    editkit: Call, command: tuple[str, ...]
) -> None:
    code, out, _ = editkit(*command, "--help")
    assert code == 0 and f"editkit {' '.join(command)}" in out
    group: Any = typer.main.get_command(cli.app)
    for name in command:
        group = group.commands[name]
    about = (group.help or "").strip()
    assert about[0].isupper() and about.endswith("."), about


def test_python_dash_m_editkit_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "editkit", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    assert re.fullmatch(r"editkit \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.slow
def test_the_wheel_brings_configurations_and_models_and_works_from_an_empty_folder(
    tmp_path: Path,
) -> None:
    def python(*arguments: str, **options: Any) -> str:
        command = [sys.executable, *arguments]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=300, **options
        )
        return done.stdout

    python(
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    )
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packed = {
        str(path.relative_to(site / "editkit"))
        for path in (site / "editkit").rglob("*")
        if path.is_file()
    }
    for folder, source in (
        ("conf", ROOT / "conf"),
        ("assets", ROOT / "editkit/assets"),
        ("evaluation/tasks", ROOT / "editkit/evaluation/tasks"),
    ):
        wanted = {
            f"{folder}/{path.relative_to(source)}"
            for path in source.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert not {name for name in wanted - packed if not name.startswith("conf/local/")}
    # -S keeps the editable install's finder away, so the checkout cannot help out; the dependencies
    # come by PYTHONPATH.
    installed = next(path for path in sys.path if path.endswith("site-packages"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), installed])}
    where = python(
        "-S", "-c", "import editkit; print(editkit.__file__)", cwd=empty, env=environment
    )
    assert Path(where.strip()).is_relative_to(site)
    assert "tiny-gpt2" in python("-S", "-m", "editkit", "ls", cwd=empty, env=environment)
    assert "layers:" in python(
        "-S", "-m", "editkit", "run", "--cfg", "job", cwd=empty, env=environment
    )
    assert python(
        "-S", "-m", "editkit", "validate", "edits=5", cwd=empty, env=environment
    ).startswith("ok")
    assert not list(empty.iterdir())
