"""`editkit evaluate`: a model that somebody else edited is measured like the end of a run.

The command is `editkit run` with `editor=none`: `base` is the model of the run, and its only batch
puts the edited model in its place. It measures with all protocols, unless `evaluation` is chosen,
and each edit once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from editkit.api.composing import override
from editkit.cli.run import flags_first, parse_hydra_arguments, run
from editkit.config.compose import conf_folder
from editkit.errors import ConfigError, message
from editkit.model.architecture import label_of

MODEL, BASE = "model", "base"
# What the command itself decides, and why.
DECIDED = {
    "editor": "the edits are those of the model",
    "batch_size": "all edits are in the model at once",
    "rollback": "the edits cannot be taken back one by one",
}


def evaluate(arguments: Sequence[str]) -> int:
    """Measures the model that the arguments name. Returns the exit code of `editkit run`.

    Raises:
        ConfigError: with all problems of the arguments that the command itself reads.
    """
    return run(as_run(arguments))


def as_run(arguments: Sequence[str]) -> list[str]:
    """The arguments of `editkit run` that measure the same."""
    arguments = flags_first(arguments)
    overrides, _ = parse_hydra_arguments(arguments)
    given = {
        key: value for key, _, value in (each.partition("=") for each in overrides) if key and value
    }
    kept = [
        each
        for each in arguments
        if each not in overrides or each.partition("=")[0].partition(".")[0] not in (MODEL, BASE)
    ]
    if problems := _problems(given):
        raise ConfigError(problems)
    edited, base = given[MODEL], given[BASE]
    return [
        *kept,
        *_model(base),
        *(f"{MODEL}{key.removeprefix(BASE)}={value}" for key, value in _options(given)),
        "editor=none",
        override("editor.edited", _id_of(edited)),
        "batch_size=${edits}",
        *_unless_given(given, "evaluation", "evaluation=full"),
        *_unless_given(given, "evaluation.timings", "evaluation.timings=[milestone]"),
        *_unless_given(given, "milestones", "milestones=[0,${edits}]"),
        *_unless_given(given, "name", override("name", _name(base, edited))),
    ]


def _unless_given(given: Mapping[str, str], key: str, chosen: str) -> list[str]:
    return [] if key in given else [chosen]


def _problems(given: Mapping[str, str]) -> list[str]:
    problems = []
    for key, what in ((MODEL, "the model that was edited"), (BASE, "the model before the edits")):
        if key not in given:
            expected = "an option of the group model, or a folder, file or hub id"
            problems.append(message(key, f"is not set: {what}", expected=expected))
    for key in given:
        group, _, option = key.partition(".")
        if group == MODEL and option:
            problem = "both models are loaded with the options of the base"
            problems.append(message(key, problem, fix=f"set {BASE}.{option}"))
        if group in DECIDED:
            problem = f"is not an option of `editkit evaluate`: {DECIDED[group]}"
            problems.append(message(key, problem, fix="leave it out, or use `editkit run`"))
    return problems


def _options(given: Mapping[str, str]) -> list[tuple[str, str]]:
    """The options of the base."""
    return [(key, value) for key, value in given.items() if key.startswith(f"{BASE}.")]


def _is_option(name: str) -> bool:
    return (conf_folder() / MODEL / f"{name}.yaml").is_file()


def _model(name: str) -> list[str]:
    """The choice of a model by the name of an option, or by what `model.id` takes."""
    return [f"{MODEL}={name}"] if _is_option(name) else ["model=hf", override("model.id", name)]


def _id_of(name: str) -> str:
    """The `model.id` of an option, or the name itself."""
    if not _is_option(name):
        return name
    import yaml

    return str(yaml.safe_load((conf_folder() / MODEL / f"{name}.yaml").read_text())["id"])


def _name(base: str, edited: str) -> str:
    """The run's name, which tells two edited models of one base apart."""
    from editkit.config.build import folder_name

    return folder_name(f"{label_of(None, base)}-{label_of(None, edited)}")
