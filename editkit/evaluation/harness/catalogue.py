"""The known tasks: editkit's own (tasks/**/*.yaml), which are read here without the harness, and
those of the harness.

A task of the harness reads its data from the hub. LOCAL lists the tasks that a local folder can
serve: the files, and the conversion of their records to those of the hub.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from editkit.errors import message
from editkit.evaluation.tasks.data import MMLU_COLUMNS, Row
from editkit.lazy import missing_packages

FOLDER = Path(__file__).parent.parent / "tasks"
SPLITS = ("training", "validation", "test")
# The names of one option of the harness; the first that is given counts.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256  # of the harness
# The packages of the extra `tasks`, with their names in messages. The last three compute metrics.
PACKAGES = {
    "lm_eval": "lm-evaluation-harness",
    "nltk": "nltk",
    "rouge": "rouge",
    "rouge_score": "rouge-score",
}
# the key in a task's yaml that holds the arguments of `editkit.evaluation.tasks.data.read`
OPTIONS = "dataset_kwargs"


def missing_harness(suite: str) -> str | None:
    """The problem that packages of the tasks are not installed; None if all are."""
    missing = [PACKAGES[name] for name in missing_packages(PACKAGES)]
    if not missing:
        return None
    return message(
        "suite",
        f"the tasks need {', '.join(missing)}, not installed here",
        got=suite,
        fix="pip install 'editkit[tasks]', or choose suite=none",
    )


def own_tasks() -> dict[str, Mapping[str, Any]]:
    """The content of each of editkit's yamls by the task's name. Functions stay names."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    paths = sorted(FOLDER.rglob("*.yaml"))
    contents = (yaml.load(path.read_text(), Loader=Loader) for path in paths)
    return {content["task"]: content for content in contents}


def harness_folders(names: Iterable[str]) -> dict[str, Path]:
    """The harness's folder of the task or group of each name. Names without a folder, such as tags,
    are absent.

    Parsing all of its 14,000 yamls takes several seconds, searching for a line takes one.
    """
    wanted = set(names)
    (home,) = importlib.util.find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr,misc]
    root = Path(home) / "tasks"
    line = re.compile(
        r"""^["']?(?:task|group)["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE
    )
    folders: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        for name in line.findall(path.read_text()):
            if name in wanted:
                folders.setdefault(name, root / path.relative_to(root).parts[0])
    return folders


def unknown_task(name: str, known: Iterable[str]) -> str:
    """The problem of a name that no task has."""
    nearest = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    expected = f"a task; nearest: {', '.join(nearest) or 'none'}"
    fix = "choose one of the tasks that `lm_eval ls tasks` lists, or one of editkit's own"
    return message("suite.tasks", "unknown task", got=name, expected=expected, fix=fix)


def takes_examples_from_test(option: Callable[[str], Any]) -> bool:
    """Whether the examples before a question would be tested records, by the splits that the
    harness takes both from.

    Args:
        option: the value of a task's option by its name; None if it is not given.
    """
    if _listed(option) is not None:
        return False
    split = _example_option(option, "split") or option("fewshot_split")
    training, validation, test = (option(f"{kind}_split") for kind in SPLITS)
    return bool((split or training or validation or test) == (test or validation))


def listed_examples(option: Callable[[str], Any]) -> int | None:
    """The number of examples that a task's yaml lists; None if it lists none."""
    samples = _listed(option)
    return len(samples) if isinstance(samples, Sequence) else None


def _listed(option: Callable[[str], Any]) -> Any:
    """The examples of a task that takes them from no split."""
    if _example_option(option, "split") or option("fewshot_split"):
        return None
    return _example_option(option, "samples")


def _example_option(option: Callable[[str], Any], key: str) -> Any:
    given = option("fewshot_config")
    return (given.get if isinstance(given, Mapping) else partial(getattr, given))(key, None)


def too_few_examples(name: str, shots: int, listed: int) -> str:
    """The problem of a task whose yaml lists fewer examples than requested."""
    problem, expected = "the task lists fewer examples", f"at most {listed}"
    return message(f"suite.shots.{name}", problem, got=shots, expected=expected)


def no_examples(name: str, shots: int, *, members: Sequence[str] = ()) -> str:
    """The problem of a task, or of members of a group, whose examples would be tested records."""
    more = f" and {len(members) - 4} more" if len(members) > 4 else ""
    who = f"{', '.join(members[:4])}{more} have" if members else "the task has"
    problem = f"{who} no examples apart from the tested records"
    return message(f"suite.shots.{name}", problem, got=shots, expected="0")


def room_of(option: Callable[[str], Any]) -> int:
    """The number of tokens that a task generates, 0 if it generates none. A single request may
    differ.
    """
    if (option("output_type") or "generate_until") != "generate_until":
        return 0
    given = option("generation_kwargs") or {}
    return next(
        (int(given[key]) for key in NEW_TOKENS if given.get(key) is not None), DEFAULT_NEW_TOKENS
    )


def no_room(name: str, room: int, positions: int) -> str:
    """The problem of a task that generates more tokens than the model's context length."""
    return message(
        "suite.max_new_tokens",
        f"{name} generates up to {room} tokens, which leaves no room for a prompt",
        expected=f"less than the model's context length of {positions}",
        fix=f"set suite.max_new_tokens={positions // 2}, or leave the task out",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A local stand-in for a hub dataset."""

    files: Mapping[str, str]  # the hub's split -> file below the data folder
    columns: tuple[str, ...]  # that every record must have
    adapt: Callable[[Row], Row] = dict  # from a record of the file to one of the hub


def _with_label(*names: object, column: str = "label") -> Callable[[Row], Row]:
    return lambda row: {**row, "label": names.index(row[column])}


def _mmlu_row(row: Row) -> Row:
    choices = [row[name] for name in MMLU_COLUMNS[1:5]]
    return {"question": row["question"], "choices": choices, "answer": "ABCD".index(row["answer"])}


def local_data(path: str | None, name: str | None) -> Local | None:
    """The local stand-in for the configuration `name` of the hub dataset `path`; None if no local
    layout is known.
    """
    if path == "cais/mmlu":
        files = {split: f"mmlu/{split}/{name}_{split}.csv" for split in ("dev", "test")}
        return Local(files=files, columns=MMLU_COLUMNS, adapt=_mmlu_row)
    return LOCAL.get((path, name))


LOCAL: Mapping[tuple[str | None, str | None], Local] = {
    ("openai/gsm8k", "main"): Local(
        files={"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        columns=("question", "answer"),
    ),
    ("nyu-mll/glue", "rte"): Local(
        files={"train": "rte/rte_train.tsv", "validation": "rte/rte_dev_262.tsv"},
        columns=("sentence1", "sentence2", "label"),
        adapt=_with_label("entailment", "not_entailment"),
    ),
    ("nyu-mll/glue", "sst2"): Local(
        files={"validation": "sst2/sst2_dev.tsv"},
        columns=("sentence", "label"),
        adapt=_with_label("0", "1"),
    ),
    ("google-research-datasets/nq_open", None): Local(
        files={"validation": "nq_open/NQ-open.dev.jsonl"},
        columns=("question", "answer"),
    ),
    ("aps/super_glue", "boolq"): Local(
        files={"validation": "boolq/boolq.jsonl"},
        columns=("question", "passage", "answer"),
        adapt=_with_label(False, True, column="answer"),
    ),
}
