"""Which tasks there are: ours (tasks/**/*.yaml), whose yamls are read here without the harness, and
those that the harness brings along.

A task of the harness reads its data from the hub. For some of them a local folder can stand in:
LOCAL says which files, and how their records become those that the hub has.
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
NEW_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # one option of the harness, the first name that is given
DEFAULT_NEW_TOKENS = 256  # the harness's
# of the extra `tasks`: import name -> what messages call it; the last three compute metrics
PACKAGES = {
    "lm_eval": "lm-evaluation-harness",
    "nltk": "nltk",
    "rouge": "rouge",
    "rouge_score": "rouge-score",
}
# in a task's yaml: what `editkit.evaluation.tasks.data.read` is called with
OPTIONS = "dataset_kwargs"


def missing_harness(suite: str) -> str | None:
    """The message on tasks whose packages are not installed; None where all are."""
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
    """The content of each of our yamls by the task's name; functions stay names."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    found = (yaml.load(path.read_text(), Loader=Loader) for path in sorted(FOLDER.rglob("*.yaml")))
    return {each["task"]: each for each in found}


def harness_folders(names: Iterable[str]) -> dict[str, Path]:
    """Which of the harness's folders has the task or group of each name; names that none has, tags
    among them, are absent.

    Reading all of its 14,000 yamls as yamls takes seconds; looking for a line takes one.
    """
    wanted = set(names)
    (home,) = importlib.util.find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr,misc]
    root = Path(home) / "tasks"
    line = re.compile(
        r"""^["']?(?:task|group)["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE
    )
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        for name in line.findall(path.read_text()):
            if name in wanted:
                found.setdefault(name, root / path.relative_to(root).parts[0])
    return found


def unknown_task(name: str, known: Iterable[str]) -> str:
    """The sentence on a name that no task has."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    nearest = ", ".join(near) or "none"
    return (
        f"suite.tasks: {name!r} is no task. Nearest: {nearest}; `lm_eval ls tasks` lists the "
        "harness's."
    )


def takes_examples_from_test(option: Callable[[str], Any]) -> bool:
    """Whether examples before a question would be records that are asked about, by where the
    harness takes either from.

    Args:
        option: the value of a task's option, None where it is not given.
    """
    given = option("fewshot_config")
    split, samples = (
        (given.get if isinstance(given, Mapping) else partial(getattr, given))(key, None)
        for key in ("split", "samples")
    )
    split = split or option("fewshot_split")
    if split is None and samples is not None:
        return False
    training, validation, test = (option(f"{kind}_split") for kind in SPLITS)
    return bool((split or training or validation or test) == (test or validation))


def no_examples(name: str, shots: int, *, members: Sequence[str] = ()) -> str:
    """The sentence on a task, or on members of a group, whose examples would be records that are
    tested.
    """
    more = f" and {len(members) - 4} more" if len(members) > 4 else ""
    who = f"{', '.join(members[:4])}{more} have" if members else "the task has"
    return (
        f"suite.shots.{name}: {shots} was given; {who} no examples apart from the records that are "
        "tested: 0."
    )


def room_of(option: Callable[[str], Any]) -> int:
    """How many tokens a task asks to be generated, 0 for one that asks for none; a single request
    may ask for another number.
    """
    if (option("output_type") or "generate_until") != "generate_until":
        return 0
    given = option("generation_kwargs") or {}
    return next(
        (int(given[key]) for key in NEW_TOKENS if given.get(key) is not None), DEFAULT_NEW_TOKENS
    )


def no_room(name: str, room: int, positions: int) -> str:
    """The sentence on a task that generates more than a model has positions for."""
    return (
        f"suite.max_new_tokens: {name} generates up to {room} tokens, which leaves no room for a "
        "prompt: the model has "
        f"{positions} positions. Set suite.max_new_tokens={positions // 2}, or leave the task out."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A local stand-in for a hub dataset."""

    files: Mapping[str, str]  # the hub's split -> file below the data folder
    columns: tuple[str, ...]  # what every record must have
    adapt: Callable[[Row], Row] = dict  # a record of the file -> one of the hub


def _with_label(*names: object, column: str = "label") -> Callable[[Row], Row]:
    return lambda row: {**row, "label": names.index(row[column])}


def _mmlu_row(row: Row) -> Row:
    choices = [row[name] for name in MMLU_COLUMNS[1:5]]
    return {"question": row["question"], "choices": choices, "answer": "ABCD".index(row["answer"])}


def local_data(path: str | None, name: str | None) -> Local | None:
    """What stands in for the hub dataset `path`, configuration `name`; None where we know no local
    layout of it.
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
