"""The logit lens: where in the network the old and the new answer appear.

The residual stream after each block goes through the final norm and the head, at the last token of
the subject and at the last token of the prompt. The rank and the probability of the first token of
each answer are what Knowledge Circuits (Yao et al. 2024, arXiv 2405.17969, Figures 3 and 6) plots.
Row 0 is the input of the first block.

Shape letters: N requests, L blocks + 1, V vocabulary, D width of the residual stream.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.analysis.base import AbstractAnalysis, Subject, Table
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import encode_with_targets, fill, pad, subject_position
from editkit.types import EditRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from editkit.model.editable import EditableModel

PLACES = ("subject", "prompt")  # the last token of each
AT_ONCE = 16  # requests of a forward pass


class Lens(AbstractAnalysis):
    """See the module."""

    name = "lens"

    def measure(self, subject: Subject) -> dict[str, Any]:
        return {
            "layers": subject.model.num_layers,
            "requests": [
                {"id": request.id, "target": request.target, "target_old": request.target_old}
                for request in subject.requests
            ],
            "models": {
                model: [_json(reading) for reading in read_lens(subject.model, subject.requests)]
                for model in subject.models()
            },
        }

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        rows = [
            (model, place, answer, *_summary(found))
            for model, readings in results["models"].items()
            for place in PLACES
            for answer in ("target", "target_old")
            if (found := [each[place][answer] for each in readings if each[place][answer]])
        ]
        head = ("model", "last token of", "answer", "median rank", "probability (%)")
        return [
            Table(
                title="The last block's reading, and the first block after which the answer is "
                "the most probable token",
                head=(*head, "ever first (%)", "median first block"),
                rows=tuple(rows),
            )
        ]

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        from editkit.report.figures.axes import COLOURS, UNRESTRAINED_COLOUR, dress, grid, legend

        figure, axes = grid(len(PLACES), width=4.2, height=3.0)
        answers = (("target", UNRESTRAINED_COLOUR, "new"), ("target_old", COLOURS[0], "old"))
        for axis, place in zip(axes, PLACES, strict=True):
            for number, (model, readings) in enumerate(results["models"].items()):
                for answer, colour, label in answers:
                    ranks = [
                        each[place][answer]["rank"] for each in readings if each[place][answer]
                    ]
                    if not ranks:
                        continue
                    middle = [_median(of) for of in zip(*ranks, strict=True)]
                    axis.plot(
                        range(len(middle)),
                        middle,
                        color=colour,
                        linestyle="--" if number == 0 else "-",
                        label=f"{label} answer, {model}",
                    )
            axis.set_yscale("log")
            axis.invert_yaxis()
            dress(axis, title=f"last token of the {place}", ylabel="median rank")
            axis.set_xlabel("blocks", fontsize=9)
        legend(figure, axes)
        return figure


def read_lens(
    model: EditableModel, requests: Sequence[EditRequest]
) -> list[dict[str, dict[str, tuple[torch.Tensor, torch.Tensor] | None]]]:
    """For each request, place and answer: ranks (L,), 1 for the most probable token, and
    probabilities (L,) float32; None without that answer.
    """
    blocks = [model.family.block(layer) for layer in range(model.num_layers)]
    readings: list[dict[str, dict[str, tuple[torch.Tensor, torch.Tensor] | None]]] = []
    for start in range(0, len(requests), AT_ONCE):
        chunk = requests[start : start + AT_ONCE]
        probes = [each.probe() for each in chunk]
        sequences = encode_with_targets(model.tokenizer, probes, chat=model.chat)
        olds = first_tokens(model, chunk, [each.target_old for each in chunk])
        prompts = [sequence.ids[: sequence.start] for sequence in sequences]
        lasts = [
            len(prompt) - 1
            if not request.subject
            else min(
                subject_position(sequence, fill(request.prompt, request.subject)), len(prompt) - 1
            )
            for request, sequence, prompt in zip(chunk, sequences, prompts, strict=True)
        ]
        batch = pad(prompts, device=model.device, prompts=[len(each) for each in prompts])
        with (
            torch.no_grad(),
            capture(model, inputs=blocks[:1], outputs=blocks, stop_after_last=False) as captured,
        ):
            model.final_hidden(batch)
        stream = [captured.inputs[blocks[0]], *(captured.outputs[block] for block in blocks)]
        for row in range(len(chunk)):
            answers = {"target": sequences[row].target_ids[0], "target_old": olds[row]}
            places = {"subject": lasts[row], "prompt": len(prompts[row]) - 1}
            readings.append({})
            for place, position in places.items():
                column = int(batch.columns([position] * len(chunk))[row])
                state_LD = torch.stack([hidden[row, column] for hidden in stream])
                log_p_LV = _through_head(model, state_LD)
                readings[-1][place] = {
                    answer: None if token is None else _place_of(log_p_LV, token)
                    for answer, token in answers.items()
                }
    return readings


def first_tokens(
    model: EditableModel, requests: Sequence[EditRequest], answers: Sequence[str | None]
) -> list[int | None]:
    """The first token of an answer to each request; None without an answer."""
    probes = [
        request.probe(answer=answer)
        for request, answer in zip(requests, answers, strict=True)
        if answer
    ]
    encoded = iter(encode_with_targets(model.tokenizer, probes, chat=model.chat) if probes else ())
    return [next(encoded).target_ids[0] if answer else None for answer in answers]


def _through_head(model: EditableModel, state_LD: torch.Tensor) -> torch.Tensor:
    """(L, V) float32 log-probabilities."""
    with torch.no_grad():
        if model.family.final_norm is not None:
            state_LD = model.module(model.family.final_norm)(state_LD)
        return model.hidden_to_logits(state_LD).float().log_softmax(dim=-1)


def _place_of(log_p_LV: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    log_p_L = log_p_LV[:, token]
    return 1 + (log_p_LV > log_p_L[:, None]).sum(dim=1), log_p_L.exp()


def _json(
    reading: Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor] | None]],
) -> dict[str, Any]:
    return {
        place: {
            answer: None
            if values is None
            else {"rank": values[0].tolist(), "probability": values[1].tolist()}
            for answer, values in answers.items()
        }
        for place, answers in reading.items()
    }


def _summary(readings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The last block's median rank and mean probability; the share of requests whose answer is the
    most probable token after some block, and the median of the first such blocks.
    """
    probability = sum(each["probability"][-1] for each in readings) / len(readings)
    firsts = [each["rank"].index(1) for each in readings if 1 in each["rank"]]
    return (
        f"{_median([each['rank'][-1] for each in readings]):.0f}",
        f"{100 * probability:.1f}",
        f"{100 * len(firsts) / len(readings):.0f}",
        f"{_median(firsts):.0f}" if firsts else "-",
    )


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
