"""Editing metrics: the 26 probes of a CounterFact record, scored record by record (reference) and
in large batches (editkit).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from editkit.bench import reference
from editkit.bench.base import Comparison, Options, PairedTiming
from editkit.bench.profiling import profiled
from editkit.bench.synthetic import model_of, requests_for
from editkit.evaluation.editing import EditingEvaluator, probes_of
from editkit.evaluation.scoring.teacher_forcing import score

RECORDS, RECORDS_OF_SMALL, RECORDS_OF_LARGE = 1000, 16, 64
# Record by record, every record takes equally long. Only these are timed, and the time is scaled.
REFERENCE_RECORDS = 16
TOKENS_PER_BATCH = 4096


def num_records(width: int) -> int:
    """The number of records that a model of this width scores in minutes on one core. `nano` is for
    tests.
    """
    return RECORDS_OF_SMALL if width < 100 else RECORDS if width <= 768 else RECORDS_OF_LARGE


def measure(options: Options) -> Comparison:
    """Both score the same records. The difference is that of mean log-probabilities, the largest
    over the probes that the reference scored.
    """
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    requests = requests_for(options.shape, num_records(options.shape.width))
    evaluator = EditingEvaluator(protocols=("probability",), tokens_per_batch=TOKENS_PER_BATCH)
    probes_by_record = [list(probes_of(request, evaluator.protocols)) for request in requests]
    timed_probes = probes_by_record[:REFERENCE_RECORDS]
    timing = PairedTiming(device=options.device)
    if options.device_type == "cuda":  # kernels are loaded and chosen at their first use
        reference.log_probabilities(model, timed_probes[0])
        evaluator.baseline(model, requests)
    expected: list[list[float]] = []
    for _ in range(options.repeats):
        expected = timing.run(
            "plain",
            lambda: [reference.log_probabilities(model, of_record) for of_record in timed_probes],
        )
        timing.multiply("plain", len(requests) / len(timed_probes))
        timing.run("ours", partial(evaluator.baseline, model, requests))
    scores = score(
        model,
        [probe for of_record in timed_probes for probe in of_record],
        tokens_per_batch=TOKENS_PER_BATCH,
    )
    pairs = [
        (value, scores[probe].mean_log_prob)
        for of_record, values in zip(timed_probes, expected, strict=True)
        for probe, value in zip(of_record, values, strict=True)
    ]
    more: dict[str, Any] = {
        "records": len(requests),
        "plain_records": len(timed_probes),
        "questions": sum(map(len, probes_by_record)),
    }
    if options.profile:
        more["profile"] = profiled(partial(evaluator.baseline, model, requests), options.device)
    return timing.comparison(
        relative_difference=max(abs(value - ours) / abs(value) for value, ours in pairs), **more
    )
