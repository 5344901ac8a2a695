"""Suites, tasks of a few texts, and a small model with one edited module."""

from __future__ import annotations

from typing import Any

import torch

from editkit.evaluation.base import Samples
from editkit.evaluation.harness.lm import quiet
from editkit.evaluation.harness.load_tasks import LoadedTasks
from editkit.evaluation.harness.suite import LoadedSuite, Suite
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from editkit.types import Measurement
from tests.support.helpers import tiny_model

WORLD = (
    "world_arithmetic",
    "world_entailment",
    "world_entailment_likelihood",
    "world_passage",
    "world_summary",
)


def suite(*tasks: str, **options: Any) -> Suite:
    given: dict[str, Any] = {
        "name": "world",
        "tasks": tasks,
        "shots": None,
        "limit": 3,
        "seed": 1234,
        "data": None,
        "max_new_tokens": None,
        "tokens_per_batch": 512,
        "every": 1,
    }
    return Suite(**given | options)


def edited_model() -> tuple[EditableModel, str]:
    model = tiny_model("llama")
    module = model.family.down_projection(0)
    model.edit([module])
    return model, module


def an_update(model: EditableModel, module: str, size: float = 1.0) -> LowRank:
    rows, columns = model.weight(module).shape
    generator = torch.Generator().manual_seed(0)
    return LowRank(
        size * torch.randn(rows, 1, generator=generator),
        torch.randn(columns, 1, generator=generator),
    )


def measured(found: list[Measurement | Samples], kind: str = "downstream") -> list[Measurement]:
    return [each for each in found if isinstance(each, Measurement) and each.kind == kind]


def rows_of_samples(found: list[Measurement | Samples], number: int) -> Any:
    return [each for each in found if isinstance(each, Samples)][number].rows


def a_task(texts: list[str], **changes: Any) -> Any:
    """A task of the harness's kind: the last word of each text, as lambada asks for it."""
    import datasets
    from lm_eval.tasks import TaskManager

    config = {
        "task": "last_word",
        "custom_dataset": lambda **_: {
            "test": datasets.Dataset.from_list([{"text": text} for text in texts])
        },
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "num_fewshot": 0,
    }
    with quiet():
        (task,) = TaskManager(include_defaults=False).load([config | changes])["tasks"].values()
    return task


def suite_of(pooled: dict[str, bool] | None, *tasks: Any) -> LoadedSuite:
    """A suite of one name that stands for these tasks."""
    options = suite("mine", name="mine", limit=None)
    return LoadedSuite(options, {"mine": LoadedTasks(name="mine", tasks=tasks, pooled=pooled)})


TEXTS = [
    "Paris is in France",
    "Rome is in Italy",
    "Berlin is in Germany",
    "The Eiffel Tower is in Paris",
    "He speaks French",
]
