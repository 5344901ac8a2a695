"""The bundled world's four tasks, in the form of the papers' four, as items (prompt, answer, choices) that any harness could read.

The model generates greedily up to a newline, its end token or a cap that lies above the longest reference.

arithmetic   solve_rate: the generation is the number
entailment   accuracy: the generation is the right one of two choices; accuracy_likelihood: the right one is the more probable
passage      exact_match after SQuAD's normalisation (Rajpurkar et al. 2016, arXiv 1606.05250)
summary      rougeL, the F-measure; rouge, the mean of the F-measures of ROUGE-1, -2 and -L (Lin 2004)
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.datasets.world import TaskItem, generate_world, task_items
from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractEvaluator, Measurement, mean_and_stderr
from editkit.evaluation.scoring import score
from editkit.model.generate import decode, end_ids, generate
from editkit.model.tokens import encode, encode_prompts, encode_with_targets
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel

Task = Literal["arithmetic", "entailment", "passage", "summary"]
TASK_VERSION = 1  # to be raised with any change of items, prompts or scores
ROOM = 8  # tokens that a generation may have beyond the longest reference


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(generation: str, answer: str) -> float:
    """1 where both are the same after normalisation."""
    return float(normalise(generation) == normalise(answer))


def is_solved(generation: str, answer: str) -> float:
    """1 where the generation is the number and nothing else, a full stop apart."""
    return float(generation.strip().removesuffix(".") == answer)


def rouge(generation: str, answer: str) -> dict[str, float]:
    """F-measures: rougeL alone, and rouge, the mean of ROUGE-1, -2 and -L."""
    from rouge_score.rouge_scorer import RougeScorer

    f_measures = {
        kind: float(value.fmeasure) for kind, value in RougeScorer(["rouge1", "rouge2", "rougeL"]).score(answer, generation).items()
    }
    return {"rougeL": f_measures["rougeL"], "rouge": sum(f_measures.values()) / len(f_measures)}


@dataclass(frozen=True, kw_only=True)
class WorldTasks(AbstractEvaluator):
    """The chosen tasks on the first test items of the world."""

    tasks: tuple[Task, ...]
    limit: int  # items of each task
    world_seed: int
    tokens_per_batch: int

    def __post_init__(self) -> None:
        least = {"suite.limit": self.limit, "suite.tokens_per_batch": self.tokens_per_batch}
        if problems := [f"{key}: {value} was given; at least 1 is needed." for key, value in least.items() if value < 1]:
            raise ConfigError(problems)

    def baseline(self, model: EditableModel, requests: Sequence[EditRequest]) -> dict[str, torch.Tensor]:
        """Nothing: the items bring their answers along."""
        return {}

    def evaluate(self, model: EditableModel, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]) -> list[Measurement]:
        """Measures general ability; the requests do not matter."""
        world = generate_world(self.world_seed)
        measured: list[Measurement] = []
        for task in self.tasks:
            items = task_items(world, task, n=self.limit)
            generations = generate_answers(model, items, tokens_per_batch=self.tokens_per_batch)
            measured += measure_generations(task, items, generations)
            if task == "entailment":
                measured.append(measure_likelihood(model, task, items, tokens_per_batch=self.tokens_per_batch))
        return measured


def generate_answers(model: EditableModel, items: Sequence[TaskItem], *, tokens_per_batch: int) -> list[str]:
    """What the model says greedily after each prompt, up to the first newline."""
    references = encode_with_targets(model.tokenizer, [(item.prompt, item.answer) for item in items])
    prompts = encode_prompts(model.tokenizer, [item.prompt for item in items])
    cap = max(len(reference.target_ids) for reference in references) + ROOM
    rows = generate(
        model,
        prompts,
        max_new_tokens=cap,
        ends=end_ids(model) | _newline_ids(model),
        batch_size=max(1, tokens_per_batch // (max(map(len, prompts)) + cap)),
    )
    return [text.partition("\n")[0] for text in decode(model, rows)]


def measure_generations(task: Task, items: Sequence[TaskItem], generations: Sequence[str]) -> list[Measurement]:
    """The task's metrics that compare generations with answers."""
    pairs = [(generation, item.answer) for generation, item in zip(generations, items, strict=True)]
    match task:
        case "arithmetic":
            return [_measurement(task, "solve_rate", [is_solved(*pair) for pair in pairs])]
        case "entailment":
            return [_measurement(task, "accuracy", [exact_match(*pair) for pair in pairs])]
        case "passage":
            return [_measurement(task, "exact_match", [exact_match(*pair) for pair in pairs])]
        case "summary":
            found = [rouge(*pair) for pair in pairs]
            return [_measurement(task, metric, [f_measures[metric] for f_measures in found]) for metric in ("rougeL", "rouge")]


def measure_likelihood(model: EditableModel, task: Task, items: Sequence[TaskItem], *, tokens_per_batch: int) -> Measurement:
    """How often the right choice is the more probable one, by the sum of its tokens' log-probabilities."""
    choices = [[Probe(prompt=item.prompt, answer=choice) for choice in item.choices or ()] for item in items]
    scores = score(model, [probe for probes in choices for probe in probes], tokens_per_batch=tokens_per_batch)
    finite = [all(scores[probe].is_finite for probe in probes) for probes in choices]
    right = [
        float(is_finite and max(probes, key=lambda probe: scores[probe].sum_log_prob).answer == item.answer)
        for item, probes, is_finite in zip(items, choices, finite, strict=True)
    ]
    return _measurement(task, "accuracy_likelihood", right, nonfinite=finite.count(False))


def _newline_ids(model: EditableModel) -> frozenset[int]:
    """Ends most generations where their text is cut; a token that holds more than the newline just runs on to the cap."""
    last = {row.ids[-1] for row in encode(model.tokenizer, ["\n", "a\n"]) if row.ids}
    return frozenset(token for token in last if "\n" in decode(model, [[token]])[0])


def _measurement(task: Task, metric: str, scores: Sequence[float], *, nonfinite: int = 0) -> Measurement:
    mean, stderr = mean_and_stderr(scores)
    return Measurement(
        kind="downstream",
        suite="world",
        task=task,
        task_version=TASK_VERSION,
        metric=metric,
        value=mean,
        stderr=stderr,
        n=len(scores),
        nonfinite=nonfinite,
    )
