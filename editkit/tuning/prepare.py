"""From the words of `editkit tune` to checked trials. All problems are reported together, before a
model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.config.build import build, folder_name, locate
from editkit.config.compose import Composed, conf_folder
from editkit.config.explain import composed
from editkit.config.parts import Parts
from editkit.config.schema import Problems, construct
from editkit.datasets.base import LoadedDataset
from editkit.errors import ConfigError, message
from editkit.model.load import ModelConfig
from editkit.sweeps.merge import literal
from editkit.tuning.space import LAYERS, Dimension, Search, dimension, draw, unknown_keys

GROUP = "tune"
# What the command sets itself, and what to set instead.
OWN = {
    "edits": "tune.edits",
    "milestones": "tune.edits",
    "batch_size": "tune.batch_size",
    "rollback": None,
    "setting": None,
    "name": None,
    "experiment_name": None,
    "sweep": None,
    "experiment": None,
}
SINGLE, SEQUENTIAL = "single", "sequential"
# Telemetry only at the end: nothing of it enters the table.
QUIET = "telemetry.every=1000000"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A point of the space. The trial without overrides is the configuration as it is."""

    number: int
    overrides: tuple[str, ...]
    config: Mapping[str, Any]  # of its first run


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A checked search."""

    words: tuple[str, ...]  # as the user wrote them
    base: tuple[str, ...]  # the overrides that all trials share
    search: Search
    dimensions: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    arms: Mapping[str, tuple[str, ...]]  # overrides of the runs of each trial, by name
    data: LoadedDataset
    order: str  # which facts of the dataset are edited
    choices: Mapping[str, Any]
    label: str  # of the model
    spaces: tuple[str, ...]  # the chosen options of the group `tune`
    folder: Path
    config_dir: Path | None

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The overrides of every run, trial by trial."""
        return [(*trial.overrides, *arm) for trial in self.trials for arm in self.arms.values()]

    @property
    def hydra_arguments(self) -> list[str]:
        """The arguments of `editkit run` that run all trials."""
        return [
            *(("--config-dir", str(self.config_dir)) if self.config_dir else ()),
            "--multirun",
            f"hydra.sweep.dir={literal(str(self.folder))}",
            f"hydra.sweeper.cells={literal(self.cells)}",
            *self.base,
        ]


def prepare(words: Sequence[str], config_dir: Path | None) -> Tuning:
    """The search that the words describe.

    Raises:
        ConfigError: with all problems.
    """
    problems = Problems()
    tune, swept, plain = _sorted_words(words, problems)
    base = [*_defaults(plain), *plain]
    try:
        spaces = _spaces(tune[0], composed(base, config_dir), config_dir)
        options = [f"+{GROUP}={literal(list(spaces))}", *(f"++{word}" for word in tune[1])]
        chosen = composed([*options, *base], config_dir)
    except ConfigError as error:
        problems.add_all(error.problems)
        raise ConfigError(problems.messages) from None
    search = construct(chosen.config.pop(GROUP, {}), GROUP, Search, problems)
    order, facts = _facts(chosen.config, plain)
    base += facts
    label = _label(chosen, problems)
    dimensions = _dimensions(search, swept, plain, chosen, problems) if search else ()
    if problems.messages or search is None:
        raise ConfigError(problems.messages)
    folder = _folder(chosen, label)
    base = [word for word in base if not word.startswith("paths.outputs=")]
    base += [f"paths.outputs={literal(str(folder))}", "experiment_name=trials", QUIET]
    arms = _arms(search)
    trials, data = _trials(draw(dimensions, search.trials, search.seed), base, arms, config_dir)
    return Tuning(
        words=tuple(words),
        base=tuple(base),
        search=search,
        dimensions=dimensions,
        trials=trials,
        arms=arms,
        data=data,
        order=order,
        choices=chosen.choices,
        label=label,
        spaces=spaces,
        folder=folder,
        config_dir=config_dir,
    )


def _sorted_words(
    words: Sequence[str], problems: Problems
) -> tuple[tuple[list[str] | None, list[str]], dict[str, str], list[str]]:
    """The named spaces and the options of the search, the swept values by key, and the rest."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    named, options, swept, plain = None, [], {}, []
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            problems.add(message(word, f"cannot be read ({str(error).splitlines()[0]})"))
            continue
        key, root = override.key_or_group, override.key_or_group.partition(".")[0]
        if key == GROUP:
            value = word.partition("=")[2].strip("[]")
            named = [name.strip() for name in value.split(",") if name.strip()]
        elif root == GROUP:
            options.append(word.lstrip("+"))
        elif root in OWN:
            fix = f"set {OWN[root]}" if OWN[root] else f"leave {root} out"
            problems.add(message(root, "`editkit tune` sets it", got=word, fix=fix))
        elif not override.is_sweep_override() or root == "hydra":
            plain.append(word)
        elif key.split("/")[0] in groups and "." not in key:
            fix = "call the command once for each"
            problems.add(message(key, "one search has one choice", got=word, fix=fix))
        else:
            swept[key] = word.partition("=")[2]
    return (named, options), swept, plain


def _defaults(plain: Sequence[str]) -> Iterator[str]:
    """Choices that suit a search, unless the user makes others."""
    given = {word.lstrip("+~").partition("=")[0] for word in plain}
    if "suite" not in given:
        yield "suite=none"


def _spaces(
    named: Sequence[str] | None, chosen: Composed, config_dir: Path | None
) -> tuple[str, ...]:
    """The named spaces; else those of the restraints; else that of the editor; else the empty
    one.
    """
    if named is not None:
        return tuple(named)
    folders = [conf_folder(), *((config_dir,) if config_dir else ())]

    def exists(name: str) -> bool:
        return any((folder / GROUP / f"{name}.yaml").is_file() for folder in folders)

    restraints = tuple(name for name in chosen.config.get("restraint", {}) if exists(name))
    editor = str(chosen.choices["editor"])
    return restraints or ((editor,) if exists(editor) else ("default",))


def _dimensions(
    search: Search,
    swept: Mapping[str, str],
    plain: Sequence[str],
    chosen: Composed,
    problems: Problems,
) -> tuple[Dimension, ...]:
    """The dimensions of the space, in the order of its file. What the command line sweeps replaces
    the file's values; what it sets is not searched.
    """
    fixed = {word.partition("=")[0].lstrip("+") for word in plain}
    space: dict[str, Any] = {}
    if search.layers is not None and LAYERS not in fixed | swept.keys():
        depth = _depth(chosen, problems)
        if depth is not None:
            lists = [literal(layers) for layers in search.layers.of(depth)]
            space[LAYERS] = f"choice({','.join(lists)})"
    space |= {key: value for key, value in search.space.items() if key not in fixed}
    space |= swept
    problems.add_all(unknown_keys(space, chosen.config))
    dimensions = []
    for key, value in space.items():
        try:
            dimensions.append(dimension(key, value))
        except ConfigError as error:
            problems.add_all(error.problems)
    if not space and not problems.messages:
        editor = chosen.choices["editor"]
        names = sorted(path.stem for path in (conf_folder() / GROUP).glob("*.yaml"))
        problems.add(
            message(
                GROUP,
                f"editor={editor} has no search space, and the command line sweeps nothing",
                expected=f"a space of {', '.join(names)}, or values such as editor.lr=1e-4,1e-3",
                fix=f"write conf/{GROUP}/{editor}.yaml, or sweep the values that you want to try",
            )
        )
    return tuple(dimensions)


def _depth(chosen: Composed, problems: Problems) -> int | None:
    """The number of the model's layers. No weights are loaded."""
    from editkit.model.probe import probe

    parts = Parts(chosen.config, chosen.choices)
    config = parts.one("model", ModelConfig)
    if config is None:
        return None  # reported with the first run
    try:
        return len(probe(config).matrices)
    except ConfigError as error:
        problems.add_all(error.problems)
        return None


def _label(chosen: Composed, problems: Problems) -> str:
    parts = Parts(chosen.config, chosen.choices)
    config = parts.one("model", ModelConfig)
    problems.add_all(parts.problems.messages)
    missing = [key for key in parts.problems.unset if key.startswith("model.")]
    problems.add_all(
        message(key, "mandatory value is not set", fix=f"set {key}=<value>") for key in missing
    )
    return config.label if config is not None else "?"


def _facts(config: Mapping[str, Any], plain: Sequence[str]) -> tuple[str, list[str]]:
    """Which facts the trials edit, in words and as overrides: such as a reported run does not
    edit.
    """
    dataset = config.get("dataset") or {}
    key = next((name for name in ("split", "order") if name in dataset), None)
    if key is None:
        return "the first ones of the dataset, which a reported run edits too", []
    given = [word for word in plain if word.startswith(f"dataset.{key}=")]
    if given:
        return f"as you chose: {given[0]}", []
    if key == "split":
        return "the part `tune` of the dataset (dataset.split=tune)", ["dataset.split=tune"]
    return "the last ones of the dataset (dataset.order=reversed)", ["dataset.order=reversed"]


def _folder(chosen: Composed, label: str) -> Path:
    outputs = Path(str(chosen.config["paths"]["outputs"])).expanduser()
    restraints = "+".join(chosen.config.get("restraint") or {}) or "none"
    parts = (label, chosen.choices["editor"], restraints, chosen.choices["dataset"])
    return outputs / GROUP / folder_name("-".join(map(str, parts)))


def _arms(search: Search) -> dict[str, tuple[str, ...]]:
    """The overrides of the runs of a trial."""

    def of(edits: int, batch_size: int, rollback: str) -> tuple[str, ...]:
        size = f"batch_size={batch_size}"
        return (size, f"edits={edits}", f"milestones=[{edits}]", f"rollback={rollback}")

    arms = {
        SINGLE: of(search.edits, 1, "true"),
        SEQUENTIAL: of(search.sequential, search.batch_size, "false"),
    }
    sizes = {SINGLE: search.edits, SEQUENTIAL: search.sequential}
    return {name: arm for name, arm in arms.items() if sizes[name]}


def _trials(
    points: Sequence[tuple[str, ...]],
    base: Sequence[str],
    arms: Mapping[str, tuple[str, ...]],
    config_dir: Path | None,
) -> tuple[tuple[Trial, ...], LoadedDataset]:
    """The checked trials, without repetitions, and their facts.

    Raises:
        ConfigError: with the problems of all trials.
    """
    problems = Problems()
    folders: set[Path] = set()
    trials: list[Trial] = []
    data: LoadedDataset | None = None
    for number, point in enumerate([(), *points]):
        for name, arm in arms.items():
            overrides = [*base, *point, *arm]
            try:
                chosen = composed(overrides, config_dir)
                place = locate(chosen.config, choices=chosen.choices)
                if number == 1:  # the facts are the same in all trials
                    data = build(chosen.config, choices=chosen.choices).data
            except ConfigError as error:
                # The configuration as it is may lack numbers that are searched.
                problems.add_all(_renamed(error, name) if point else ())
                break
            if name == next(iter(arms)) and place.folder not in folders:
                folders.add(place.folder)
                trials.append(Trial(number=len(trials), overrides=point, config=place.config))
            if number > 1:
                break  # the runs of a point differ in the number of edits alone
    if problems.messages:
        raise ConfigError(problems.messages)
    assert data is not None
    return tuple(trials), data


def _renamed(error: ConfigError, arm: str) -> Iterator[str]:
    """The problems, with the keys that the user sets for the numbers of edits."""
    keys = {"edits": "tune.edits" if arm == SINGLE else "tune.sequential"}
    keys |= {"batch_size": "tune.batch_size"}
    for problem in error.problems:
        key, colon, rest = problem.partition(":")
        yield f"{keys.get(key, key)}{colon}{rest}"
