"""Editing metrics: CounterFact's 26 questions a record, record by record and all together."""

from __future__ import annotations

from functools import partial
from typing import Any

from editkit.bench import plain
from editkit.bench.base import Found, Options, Race
from editkit.bench.profiling import profiled
from editkit.bench.synthetic import model_of, requests_for
from editkit.evaluation.editing import EditingEvaluator, probes_of
from editkit.evaluation.scoring.teacher_forcing import score

RECORDS, RECORDS_OF_SMALL, RECORDS_OF_LARGE = 1000, 16, 64
PLAIN_RECORDS = 16  # one record at a time takes as long for each: these are timed, and multiplied
TOKENS_PER_BATCH = 4096


def num_records(width: int) -> int:
    """As many as a model of this width scores in minutes on one core; `nano` is for tests."""
    return RECORDS_OF_SMALL if width < 100 else RECORDS if width <= 768 else RECORDS_OF_LARGE


def measure(options: Options) -> Found:
    """Both ways score the same records; the difference is that of mean log-probabilities, the
    largest over what the plain way was asked.
    """
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    requests = requests_for(options.shape, num_records(options.shape.width))
    evaluator = EditingEvaluator(protocols=("probability",), tokens_per_batch=TOKENS_PER_BATCH)
    asked = [list(probes_of(request, evaluator.protocols)) for request in requests]
    probes = asked[:PLAIN_RECORDS]
    race = Race(device=options.device)
    if options.device_type == "cuda":  # kernels are loaded and chosen at their first use
        plain.log_probabilities(model, probes[0])
        evaluator.baseline(model, requests)
    expected: list[list[float]] = []
    for _ in range(options.repeats):
        expected = race.run(
            "plain", lambda: [plain.log_probabilities(model, of_record) for of_record in probes]
        )
        race.multiply("plain", len(requests) / len(probes))
        race.run("ours", partial(evaluator.baseline, model, requests))
    scores = score(
        model,
        [probe for of_record in probes for probe in of_record],
        tokens_per_batch=TOKENS_PER_BATCH,
    )
    pairs = [
        (value, scores[probe].mean_log_prob)
        for of_record, values in zip(probes, expected, strict=True)
        for probe, value in zip(of_record, values, strict=True)
    ]
    more: dict[str, Any] = {
        "records": len(requests),
        "plain_records": len(probes),
        "questions": sum(map(len, asked)),
    }
    if options.profile:
        more["profile"] = profiled(partial(evaluator.baseline, model, requests), options.device)
    return race.found(
        relative_difference=max(abs(value - ours) / abs(value) for value, ours in pairs), **more
    )
