"""Tasks of lm-evaluation-harness by name, ours and its own, with their data and as a suite wants
them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.errors import ConfigError
from editkit.evaluation.harness.catalogue import (
    FOLDER,
    SPLITS,
    Local,
    harness_folders,
    local_data,
    no_examples,
    own_tasks,
    takes_examples_from_test,
    unknown_task,
)
from editkit.evaluation.harness.lm import quiet
from editkit.evaluation.tasks.data import DATA_FOLDER, advice, locate, places, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One name of a suite's tasks, loaded: a task, or a group whose items count together."""

    name: str
    tasks: tuple[Any, ...]  # of lm-eval
    # A group's metrics, and whether a task counts by its items (each item the same) or each task
    # the same; None for what is no such group
    pooled: Mapping[str, bool] | None = None


def load_tasks(
    names: Sequence[str], *, data: str | None, shots: Mapping[str, int], seed: int
) -> dict[str, Chosen]:
    """The tasks of these names, with their data.

    Args:
        data: the folder that `suite.data` names. shots: by name, how many examples stand before
        each question; otherwise as the task says, or none. seed: of the examples' choice.

    Raises:
        ConfigError: a name that nothing has, data that is missing or malformed, a task that cannot
        be measured here, examples that it has
            not; all of them at once.
    """
    problems: list[str] = []
    loaded: dict[str, Chosen] = {}
    with quiet():
        manager = _manager(names, data=data)
        for name in names:
            try:
                chosen = _load(manager, name, data=data, shots=shots.get(name))
                _check_shots(name, chosen.tasks, shots=shots.get(name))
                for task in chosen.tasks:
                    _prepare(task, name, shots=shots.get(name), seed=seed)
            except ConfigError as error:
                problems += error.problems
                continue
            loaded[name] = chosen
    if problems:
        raise ConfigError(problems)
    return loaded


def _manager(names: Sequence[str], *, data: str | None) -> Any:
    """Knows our tasks and, of the harness's, those in the folders of the names; all of them where
    that does not do.
    """
    from lm_eval.tasks import TaskManager

    foreign = set(names) - own_tasks().keys()
    folders = harness_folders(foreign) if foreign else {}
    options: dict[str, Any] = {"metadata": {"data": data}}
    paths = [str(FOLDER), *sorted({str(folder) for folder in folders.values()})]
    narrow = TaskManager(include_path=paths, include_defaults=False, **options)
    if foreign == folders.keys() and all(_is_complete(narrow, name) for name in names):
        return narrow
    return TaskManager(include_path=str(FOLDER), **options)


def _is_complete(manager: Any, name: str) -> bool:
    """Whether the manager knows the name, and all members of what it stands for."""
    members = _members(manager, name) if name in manager.task_index else None
    return members is not None and all(
        _is_complete(manager, each) for each in members if each != name
    )


def _members(manager: Any, name: str) -> list[str]:
    """The names in a group or tag; the name itself for a task, and for a group that changes its
    members' options.
    """
    entry = manager.task_index[name]
    members = (
        sorted(entry.tags)
        if name in manager.all_tags
        else (entry.cfg or {}).get("task")
        if name in manager.all_groups
        else None
    )
    return (
        members
        if isinstance(members, list) and all(isinstance(each, str) for each in members)
        else [name]
    )


def _load(manager: Any, name: str, *, data: str | None, shots: int | None) -> Chosen:
    entry = manager.task_index.get(name)
    if entry is None:
        raise ConfigError(unknown_task(name, manager.all_tasks))
    tasks = tuple(
        task
        for leaf in _leaves(manager, name)
        for task in _leaf(manager, leaf, name=name, data=data, shots=shots)
    )
    pooled = (entry.cfg or {}).get("aggregate_metric_list") if name in manager.all_groups else None
    metrics = {
        each["metric"]: bool(each.get("weight_by_size", True))
        for each in ([pooled] if isinstance(pooled, Mapping) else pooled or ())
    }
    return Chosen(name=name, tasks=tasks, pooled=metrics or None)


def _leaves(manager: Any, name: str) -> Iterator[str]:
    """The tasks that a name stands for, whatever groups and tags lie between."""
    for member in _members(manager, name):
        if member == name:
            yield name
        else:
            yield from _leaves(manager, member)


def _leaf(manager: Any, leaf: str, *, name: str, data: str | None, shots: int | None) -> list[Any]:
    """The lm-eval tasks of a name that cannot be taken apart, from local files where there are
    some.
    """
    entry = manager.task_index[leaf]
    config = entry.cfg or {}
    told = f"suite.tasks: {name}" + (f" ({leaf})" if leaf != name else "")
    known = local_data(config.get("dataset_path"), config.get("dataset_name"))
    folder = data or os.environ.get(DATA_FOLDER)
    if known is not None and folder and locate(folder, known.files):
        return [_stand_in(manager, leaf, known, folder=folder, told=told, shots=shots)]
    if data is not None and known is not None:
        looked = " or ".join(map(str, places(data, known.files)))
        raise ConfigError(f"{told}: no data - {looked} (not there) - {advice(known.files)}")
    try:
        return list(manager.load([leaf])["tasks"].values())
    except ConfigError as error:  # of our own tasks' data
        raise ConfigError([f"{told}: {problem}" for problem in error.problems]) from None
    except (
        Exception
    ) as error:  # the hub's clients raise errors of many libraries; any of them means the same here
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        where = (
            f"hub dataset {config['dataset_path']}" if config.get("dataset_path") else "its data"
        )
        raise ConfigError(
            f"{told}: {where} cannot be read ({said}) - {advice(known.files if known else {})}"
        ) from None


def _stand_in(
    manager: Any, leaf: str, known: Local, *, folder: str, told: str, shots: int | None
) -> Any:
    """A task of the harness, as it is but for its data."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[leaf].yaml_path)
    try:
        splits = read(files=known.files, columns=known.columns, data=folder)
        rows = {split: [known.adapt(row) for row in each] for split, each in splits.items()}
    except (ConfigError, ValueError) as error:  # ValueError: a label that there is not
        raise ConfigError(
            [f"{told}: {problem}" for problem in getattr(error, "problems", [str(error)])]
        ) from None
    examples = config.get("fewshot_split") or config.get("training_split")
    wanted = shots if shots is not None else config.get("num_fewshot") or 0
    if wanted and examples and examples not in rows:
        raise ConfigError(
            f"{told}: {wanted} examples before each question come from the split {examples!r}, "
            f"which {folder} does not have."
        )
    splits_kept = {
        key: config[key]
        for key in ("training_split", "validation_split", "test_split")
        if config.get(key) in rows
    }
    config |= {"training_split": None, "validation_split": None, "test_split": None} | splits_kept
    config |= {
        "custom_dataset": lambda **_: {
            split: datasets.Dataset.from_list(each) for split, each in rows.items()
        }
    }
    config |= {"dataset_kwargs": None}
    (task,) = manager.load([config])["tasks"].values()
    return task


def _check_shots(name: str, tasks: Sequence[Any], *, shots: int | None) -> None:
    """Raises ConfigError where examples were asked for and would be records that are tested; a
    task's own yaml may do that.
    """
    tested = [
        str(task.config.task)
        for task in tasks
        if shots and shots != task.config.num_fewshot and examples_are_tested(task)
    ]
    if tested:
        raise ConfigError(no_examples(name, shots or 0, members=[] if tested == [name] else tested))


def examples_are_tested(task: Any) -> bool:
    """Whether the examples of a task of the harness come from the records that it is tested on."""

    def option(key: str) -> Any:
        kind = key.removesuffix("_split")
        given = getattr(task.config, key, None)
        return (
            kind
            if given is None and kind in SPLITS and getattr(task, f"has_{kind}_docs")()
            else given
        )  # a task that is a class

    return takes_examples_from_test(option)


def _prepare(task: Any, name: str, *, shots: int | None, seed: int) -> None:
    """Sets what a command line of the harness would. Raises ConfigError for a task that editkit
    does not measure.
    """
    is_sampled = (
        bool((task.config.generation_kwargs or {}).get("do_sample"))
        or (task.config.repeats or 1) > 1
    )
    refusals = {
        "needs to run code that a model wrote": getattr(task, "UNSAFE_CODE", False),
        "needs more than text": getattr(task, "MULTIMODAL", False),
        "samples its outputs, which would differ from one milestone to the next": is_sampled,
    }
    if reasons := [reason for reason, applies in refusals.items() if applies]:
        raise ConfigError(
            f"suite.tasks: {name}: {task.config.task} {' and '.join(reasons)} - choose another "
            "task."
        )
    if shots is not None:
        task.set_config("num_fewshot", shots)
    elif task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)


def build_requests(task: Any, *, limit: int | None) -> dict[int, list[Any]]:
    """The harness's requests of the first `limit` items, by item and in order."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        task.build_all_requests(limit=limit)
    items: dict[int, list[Any]] = {}
    for instance in task.instances:
        items.setdefault(instance.doc_id, []).append(instance)
    return {
        item: sorted(instances, key=lambda instance: instance.idx)
        for item, instances in items.items()
    }
