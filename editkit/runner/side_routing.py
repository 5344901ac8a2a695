"""Routing as a measurement: which prompts are sent to what stands beside the weights.

recall           the share of edited prompts, and of their paraphrases, that are sent there
false_alarms     the share of locality prompts that are sent there
context_tokens   the number of tokens that texts put before a prompt, mean over the prompts
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from editkit.model.side_routes import context_tokens, routed
from editkit.model.tokens import encode_with_targets
from editkit.records.means import mean_and_stderr
from editkit.runner.plan import Trajectory, digest_of
from editkit.types import EditRequest, EvalRecord, Measurement, Probe

if TYPE_CHECKING:
    from editkit.runner.checkpoint import RunState

RECALL, FALSE_ALARMS, CONTEXT = "recall", "false_alarms", "context_tokens"


def measure_routing(run: Trajectory, state: RunState, timing: str) -> Iterator[EvalRecord]:
    """The routing of the measured edits; nothing if the editor writes the weights."""
    if not run.model.sides:
        return
    step = state.step
    positions = run.positions(step) if run.rollback else run.measured(step)
    requests = run.at(positions)
    asked: dict[tuple[str, str], list[Probe]] = {}
    for request in requests:
        for key, probes in probes_of(request).items():
            asked.setdefault(key, []).extend(probes)
    distinct = list(dict.fromkeys(probe for probes in asked.values() for probe in probes))
    sequences = encode_with_targets(run.model.tokenizer, distinct, chat=run.model.chat)
    room = run.model.max_length
    prompts = [sequence.ids[: sequence.start][-room:] for sequence in sequences]
    is_routed = dict(zip(distinct, routed(run.model, prompts), strict=True))
    found = {key: [float(is_routed[probe]) for probe in probes] for key, probes in asked.items()}
    if (added := context_tokens(run.model, prompts)) is not None:
        tokens = dict(zip(distinct, added, strict=True))
        found |= {
            (CONTEXT, task): [float(tokens[probe]) for probe in probes]
            for (_, task), probes in asked.items()
        }
    for (metric, task), values in found.items():
        value, stderr = mean_and_stderr(values)
        measurement = Measurement(
            kind="routing",
            metric=metric,
            task=task,
            value=value,
            stderr=stderr,
            n=len(values),
            timing=timing,
        )
        yield EvalRecord(
            step=step,
            view=run.restraints.trajectory_view,
            measurement=measurement,
            dataset=run.dataset,
            requests=digest_of(requests),
        )


def probes_of(request: EditRequest) -> dict[tuple[str, str], list[Probe]]:
    """The prompts of a request by metric and kind, kinds without prompts left out."""
    kinds = {
        (RECALL, "prompt"): [request.probe()],
        (RECALL, "paraphrase"): [request.probe(prompt=text) for text in request.paraphrases],
        (FALSE_ALARMS, "neighbour"): list(request.neighbours),
    } | {(FALSE_ALARMS, kind): list(probes) for kind, probes in request.locality.items()}
    return {key: probes for key, probes in kinds.items() if probes}
