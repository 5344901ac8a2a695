"""Tasks of lm-evaluation-harness and editkit's own, loaded by name with their data and with the
options of a suite.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from editkit.errors import ConfigError, message
from editkit.evaluation.harness.catalogue import (
    FOLDER,
    SPLITS,
    Local,
    harness_folders,
    listed_examples,
    local_data,
    no_examples,
    own_tasks,
    takes_examples_from_test,
    too_few_examples,
    unknown_task,
)
from editkit.evaluation.harness.lm import quiet
from editkit.evaluation.tasks.data import DATA_FOLDER, advice, locate, places, read


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTasks:
    """One name of a suite's tasks, loaded: a task, or a group whose items count together."""

    name: str
    tasks: tuple[Any, ...]  # of lm-eval
    # A group's metrics, and whether its tasks are weighted by their numbers of items or all the
    # same; None if it is not such a group.
    pooled: Mapping[str, bool] | None = None


def load_tasks(
    names: Sequence[str], *, data: str | None, shots: Mapping[str, int], seed: int
) -> dict[str, LoadedTasks]:
    """The tasks of these names, with their data.

    Args:
        data: the folder of `suite.data`.
        shots: the number of examples before each question, by name; otherwise that of the task's
            yaml, or none.
        seed: of the choice of examples.

    Raises:
        ConfigError: a name is unknown, data is missing or malformed, a task cannot be measured or
            has no examples. All problems are reported together.
    """
    problems: list[str] = []
    loaded: dict[str, LoadedTasks] = {}
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
    """A manager of editkit's tasks and of the harness's tasks in the folders of these names; of all
    tasks if these do not suffice.
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
    """Whether the manager knows the name and all of its members."""
    members = _members(manager, name) if name in manager.task_index else None
    return members is not None and all(
        _is_complete(manager, member) for member in members if member != name
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
        if isinstance(members, list) and all(isinstance(member, str) for member in members)
        else [name]
    )


def _load(manager: Any, name: str, *, data: str | None, shots: int | None) -> LoadedTasks:
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
        metric["metric"]: bool(metric.get("weight_by_size", True))
        for metric in ([pooled] if isinstance(pooled, Mapping) else pooled or ())
    }
    return LoadedTasks(name=name, tasks=tasks, pooled=metrics or None)


def _leaves(manager: Any, name: str) -> Iterator[str]:
    """The tasks of a name, through groups and tags."""
    for member in _members(manager, name):
        if member == name:
            yield name
        else:
            yield from _leaves(manager, member)


def _leaf(manager: Any, leaf: str, *, name: str, data: str | None, shots: int | None) -> list[Any]:
    """The lm-eval tasks of a name without members, from local files if there are some."""
    entry = manager.task_index[leaf]
    config = entry.cfg or {}
    where = f"suite.tasks: {name}" + (f" ({leaf})" if leaf != name else "")
    known = local_data(config.get("dataset_path"), config.get("dataset_name"))
    folder = data or os.environ.get(DATA_FOLDER)
    if known is not None and folder and locate(folder, known.files):
        return [_stand_in(manager, leaf, known, folder=folder, where=where, shots=shots)]
    if data is not None and known is not None:
        expected = " or ".join(map(str, places(data, known.files)))
        raise ConfigError(message(where, "no data", expected=expected, fix=advice(known.files)))
    try:
        return list(manager.load([leaf])["tasks"].values())
    except ConfigError as error:  # of the data of editkit's own tasks
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None
    except Exception as error:  # the hub's clients raise errors of many libraries
        path = config.get("dataset_path")
        source = f"hub dataset {path}" if path else "its data"
        raise ConfigError(
            message(
                where,
                f"{source} cannot be read",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                fix=advice(known.files if known else {}),
            )
        ) from None


def _stand_in(
    manager: Any, leaf: str, known: Local, *, folder: str, where: str, shots: int | None
) -> Any:
    """A task of the harness with local data."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[leaf].yaml_path)
    try:
        splits = read(files=known.files, columns=known.columns, data=folder)
        rows = {
            split: [known.adapt(record) for record in records] for split, records in splits.items()
        }
    except (ConfigError, ValueError) as error:  # ValueError: an unknown label
        raise ConfigError(
            [f"{where}: {problem}" for problem in getattr(error, "problems", [str(error)])]
        ) from None
    examples = config.get("fewshot_split") or config.get("training_split")
    wanted = shots if shots is not None else config.get("num_fewshot") or 0
    if wanted and examples and examples not in rows:
        problem = f"the split {examples!r}, which {folder} lacks, has the examples of each question"
        raise ConfigError(message(where, problem, got=f"{wanted} examples", expected="0"))
    splits_kept = {
        key: config[key]
        for key in ("training_split", "validation_split", "test_split")
        if config.get(key) in rows
    }
    config |= {"training_split": None, "validation_split": None, "test_split": None} | splits_kept
    config |= {
        "custom_dataset": lambda **_: {
            split: datasets.Dataset.from_list(records) for split, records in rows.items()
        }
    }
    config |= {"dataset_kwargs": None}
    (task,) = manager.load([config])["tasks"].values()
    return task


def _check_shots(name: str, tasks: Sequence[Any], *, shots: int | None) -> None:
    """Raises ConfigError if requested examples would be tested records, which the yaml of a task
    may do, or if they exceed the examples that the yaml lists.
    """
    tested = [
        str(task.config.task)
        for task in tasks
        if shots and shots != task.config.num_fewshot and examples_are_tested(task)
    ]
    if tested:
        raise ConfigError(no_examples(name, shots or 0, members=[] if tested == [name] else tested))
    listed = [listed_examples(partial(getattr, task.config)) for task in tasks]
    fewest = min((count for count in listed if count is not None), default=shots or 0)
    if (shots or 0) > fewest:
        raise ConfigError(too_few_examples(name, shots or 0, fewest))


def examples_are_tested(task: Any) -> bool:
    """Whether the examples of a task of the harness are tested records."""

    def option(key: str) -> Any:
        kind = key.removesuffix("_split")
        given = getattr(task.config, key, None)
        # A task that is a class has methods instead.
        is_method = given is None and kind in SPLITS and getattr(task, f"has_{kind}_docs")()
        return kind if is_method else given

    return takes_examples_from_test(option)


def _prepare(task: Any, name: str, *, shots: int | None, seed: int) -> None:
    """Sets the options that a command line of the harness would set. Raises ConfigError if editkit
    does not support the task.
    """
    is_sampled = (
        bool((task.config.generation_kwargs or {}).get("do_sample"))
        or (task.config.repeats or 1) > 1
    )
    refusals = {
        "executes code that a model wrote": getattr(task, "UNSAFE_CODE", False),
        "needs more than text": getattr(task, "MULTIMODAL", False),
        "samples its outputs, which would differ from one milestone to the next": is_sampled,
    }
    if reasons := [reason for reason, applies in refusals.items() if applies]:
        problem = f"{task.config.task} {' and '.join(reasons)}"
        raise ConfigError(message(f"suite.tasks: {name}", problem, fix="choose another task"))
    if shots is not None:
        task.set_config("num_fewshot", shots)
    elif task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)


def build_requests(
    task: Any, *, limit: int | None, chat: Callable[..., str] | None = None
) -> dict[int, list[Any]]:
    """The harness's requests of the first `limit` items, by item and in order. `chat` renders a
    dialogue: an item's prompt, with its examples, is the user's turn.
    """
    options = {} if chat is None else {"apply_chat_template": True, "chat_template": chat}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        task.build_all_requests(limit=limit, **options)
    items: dict[int, list[Any]] = {}
    for instance in task.instances:
        items.setdefault(instance.doc_id, []).append(instance)
    return {
        item: sorted(instances, key=lambda instance: instance.idx)
        for item, instances in items.items()
    }
