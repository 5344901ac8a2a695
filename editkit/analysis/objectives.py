"""The perplexity of what edits are to write, for the unedited and the edited model (D4S, Huang et
al. 2024, arXiv 2410.23843, section 3: 12.3, 43.3 and 297.4 for three forms of a question).

    PPL = exp(- mean over all tokens of all targets of log p(token | prompt and tokens before it))

`dataset=forms` puts the same facts in the three forms. The paper finds that the abilities lost, and
the L1 norm gained, grow with the perplexity.

Shape letters: B rows, T tokens, K tokens of targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.analysis.base import AbstractAnalysis, Subject, Table
from editkit.lazy import torch
from editkit.model.tokens import encode_with_targets, pad
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

AT_ONCE = 16  # requests of a forward pass


class Objectives(AbstractAnalysis):
    """See the module."""

    name = "objectives"

    def measure(self, subject: Subject) -> dict[str, Any]:
        return {
            "models": {
                name: [
                    {"id": request.id, "log_probabilities": found}
                    for request, found in zip(
                        subject.requests,
                        log_probabilities(subject.model, subject.requests),
                        strict=True,
                    )
                ]
                for name in subject.models()
            }
        }

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        rows = []
        for model, requests in results["models"].items():
            of_tokens = [value for each in requests for value in each["log_probabilities"]]
            lengths = [len(each["log_probabilities"]) for each in requests]
            rows.append(
                (
                    model,
                    str(len(requests)),
                    f"{sum(lengths) / len(lengths):.2f}",
                    f"{perplexity(of_tokens):.4g}",
                )
            )
        head = ("model", "edits", "tokens of a target", "perplexity")
        return [Table(title="The targets of the edits", head=head, rows=tuple(rows))]


def perplexity(log_probabilities: Sequence[float]) -> float:
    """exp of the mean negative log-probability; infinite if a token has the probability 0."""
    mean = -sum(log_probabilities) / len(log_probabilities)
    return math.exp(mean) if mean < math.log(1e300) else math.inf


def log_probabilities(model: EditableModel, requests: Sequence[EditRequest]) -> list[list[float]]:
    """The log-probability of each token of each target after its prompt."""
    found = []
    probes = [request.probe() for request in requests]
    sequences = encode_with_targets(model.tokenizer, probes, chat=model.chat)
    for start in range(0, len(sequences), AT_ONCE):
        chunk = sequences[start : start + AT_ONCE]
        batch = pad(
            [sequence.ids for sequence in chunk],
            device=model.device,
            prompts=[sequence.start for sequence in chunk],
        )
        with torch.no_grad():
            hidden_BTD = model.final_hidden(batch)
            for row, sequence in enumerate(chunk):
                places = sequence.predicting  # padding is on the right
                log_p_KV = model.hidden_to_logits(hidden_BTD[row, places]).float().log_softmax(-1)
                ids_K = torch.tensor(sequence.target_ids, device=log_p_KV.device)
                found.append(log_p_KV.gather(1, ids_K[:, None])[:, 0].tolist())
    return found
