"""The facts that a model recalls, before and after: the hidden states that its head reads at the
end of prompts, on their two principal components (EAC, Xu et al. 2025, Figure 3).

The prompts are those of the edits and of their unrelated facts (`neighbours`). Logistic regression
tells the two models' states apart: its accuracy on prompts that it was not fitted on is 50 % where
edits moved nothing, and 100 % where the sets are separate. The paper draws the boundary and gives
no number.

Shape letters: P prompts, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.analysis.base import UNEDITED, AbstractAnalysis, Subject, Table
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.tokens import encode_prompts, pad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from editkit.model.editable import EditableModel

GROUPS = ("edits", "unrelated")
AT_ONCE = 32  # prompts of a forward pass
FEWEST = 6  # prompts of a group
FOLDS = 3


class Recall(AbstractAnalysis):
    """See the module."""

    name = "recall"

    def problems(self, subject: Subject) -> list[str]:
        if len(subject.requests) < FEWEST:
            problem, expected = "too few edits to be compared", f"{FEWEST} or more"
            return [message("--requests", problem, got=len(subject.requests), expected=expected)]
        return []

    def measure(self, subject: Subject) -> dict[str, Any]:
        model = subject.model
        prompts = {
            "edits": [request.full_prompt for request in subject.requests],
            "unrelated": [
                request.neighbours[0].prompt for request in subject.requests if request.neighbours
            ],
        }
        states = {
            name: {
                group: final_states(model, of_group)
                for group, of_group in prompts.items()
                if len(of_group) >= FEWEST
            }
            for name in subject.models()
        }
        before, after = states[UNEDITED], states[subject.view]
        if not all(bool(states_PD.isfinite().all()) for states_PD in after.values()):
            problem = "the hidden states of the edited model are not finite"
            raise ConfigError(message(str(subject.records.folder), problem))
        return {
            "groups": {
                group: {
                    "prompts": len(before[group]),
                    "moved": float((after[group] - before[group]).norm() / before[group].norm()),
                    "told_apart": _told_apart(before[group], after[group]),
                    **_projected(before[group], after[group]),
                }
                for group in before
            },
            "models": [UNEDITED, subject.view],
        }

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        rows = [
            (
                group,
                str(of["prompts"]),
                f"{100 * of['moved']:.1f}",
                f"{100 * of['told_apart']:.0f}",
                " + ".join(f"{100 * share:.0f}" for share in of["explained"]),
            )
            for group, of in results["groups"].items()
        ]
        head = ("prompts of", "prompts", "moved (% of the norm)", "told apart (%)")
        return [
            Table(
                title="Hidden states that the head reads",
                head=(*head, "variance on the components (%)"),
                rows=tuple(rows),
            )
        ]

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        from editkit.report.figures.axes import COLOURS, UNRESTRAINED_COLOUR, grid, legend

        groups = results["groups"]
        figure, axes = grid(len(groups), width=4.0, height=3.4)
        for axis, (group, of) in zip(axes, groups.items(), strict=True):
            for model, colour in zip(
                results["models"], (COLOURS[0], UNRESTRAINED_COLOUR), strict=True
            ):
                points = of["points"][model == results["models"][1]]
                axis.scatter(
                    [point[0] for point in points],
                    [point[1] for point in points],
                    s=14,
                    color=colour,
                    label=model,
                )
            axis.set_title(f"{group}: told apart {100 * of['told_apart']:.0f} %", fontsize=10)
            axis.set_xlabel("first component", fontsize=9)
            axis.set_ylabel("second component", fontsize=9)
            axis.tick_params(labelsize=8)
        legend(figure, axes)
        return figure


def final_states(model: EditableModel, prompts: Sequence[str]) -> torch.Tensor:
    """(P, D) float32 on the CPU: the final hidden state at each prompt's last token."""
    rows = []
    ids = encode_prompts(model.tokenizer, prompts, chat=model.chat)
    for start in range(0, len(ids), AT_ONCE):
        chunk = ids[start : start + AT_ONCE]
        lengths = [len(row) for row in chunk]
        batch = pad(chunk, device=model.device, prompts=lengths)
        with torch.no_grad():
            hidden_BTD = model.final_hidden(batch)
        columns_B = batch.columns([length - 1 for length in lengths])
        rows.append(hidden_BTD[torch.arange(len(chunk)), columns_B].float().cpu())
    return torch.cat(rows)


def _told_apart(before_PD: torch.Tensor, after_PD: torch.Tensor) -> float:
    """The mean accuracy over folds of prompts. Both states of a prompt are in the same fold."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    points = torch.cat([before_PD, after_PD]).double().numpy()
    labels = np.repeat([0, 1], len(before_PD))
    prompts = np.tile(np.arange(len(before_PD)), 2)
    scores = cross_val_score(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        points,
        labels,
        groups=prompts,
        cv=GroupKFold(FOLDS),
    )
    return float(scores.mean())


def _projected(before_PD: torch.Tensor, after_PD: torch.Tensor) -> dict[str, Any]:
    """The points of both models on the principal components of all of them."""
    points_QD = torch.cat([before_PD, after_PD]).double()
    centred_QD = points_QD - points_QD.mean(dim=0)
    _, s_K, v_KD = torch.linalg.svd(centred_QD, full_matrices=False)
    projected_Q2 = centred_QD @ v_KD[:2].T
    size = len(before_PD)
    return {
        "points": [projected_Q2[:size].tolist(), projected_Q2[size:].tolist()],
        "explained": (s_K[:2] ** 2 / (s_K**2).sum()).tolist(),
    }
