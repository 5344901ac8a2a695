"""Which edits damaged which unrelated prompts. The run must have a ledger (`ledger.keep=true`).

The change of log p(answer) of an unrelated prompt from W_0 to W_0 + D is divided among the edits by
integrated gradients along the straight path (Sundararajan et al. 2017, arXiv 1703.01365). With U_i
the updates of block i and D their sum,

    influence_i = mean over K midpoints t of <d log p / dW at W_0 + t D, U_i>

The influences of all blocks add up to the change, up to the error of K points, which is told. An
edit of a batch shares the block of the batch.

Shape letters: P prompts, B blocks, T tokens, R rank, O d_out, I d_in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.analysis.base import AbstractAnalysis, Subject, Table
from editkit.analysis.objectives import log_probabilities
from editkit.errors import message
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank, Update
from editkit.model.capture import capture_for_gradients
from editkit.model.tokens import encode_with_targets, pad
from editkit.records.ledger import LEDGER, read_ledger
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from editkit.model.editable import EditableModel

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Influence(AbstractAnalysis):
    """See the module."""

    steps: int = 8  # points on the path

    name = "influence"
    needs_weights = True

    def problems(self, subject: Subject) -> list[str]:
        found = super().problems(subject)
        folder = subject.records.folder
        if not (folder / LEDGER).exists():
            fix = "run it with ledger.keep=true resume=never"
            found.append(message(str(folder), "the run has no ledger of its edits", fix=fix))
        if subject.view != subject.records.trajectory_view:
            problem, got = "blocks add up to the trajectory, not to a view of it", subject.view
            found.append(message("--view", problem, got=got))
        if self.steps < 1:
            found.append(message("--steps", "out of range", got=self.steps, expected="1 or more"))
        if not any(request.neighbours for request in subject.requests):
            found.append(message(str(folder), "the edits have no unrelated prompts"))
        return found

    def measure(self, subject: Subject) -> dict[str, Any]:
        ledger = read_ledger(subject.records.folder)
        blocks = [block.load() for block in ledger.blocks]
        probes = [each.neighbours[0] for each in subject.requests if each.neighbours]
        influence_PB = influences(subject.model, blocks, probes, steps=self.steps)
        values = {}
        for name in subject.models():
            requests = [as_request(probe) for probe in probes]
            values[name] = [sum(of) for of in log_probabilities(subject.model, requests)]
        before, after = values.values()
        changes = [new - old for old, new in zip(before, after, strict=True)]
        return {
            "blocks": [
                {"id": block.id, "requests": [request.id for request in block.requests]}
                for block in ledger.blocks
            ],
            "prompts": [
                {"prompt": probe.prompt, "answer": probe.answer, "change": change}
                for probe, change in zip(probes, changes, strict=True)
            ],
            "influence": influence_PB.tolist(),
            "error": max(
                abs(float(of_B.sum()) - change)
                for of_B, change in zip(influence_PB, changes, strict=True)
            ),
        }

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        influence_PB = torch.tensor(results["influence"])
        blocks, prompts = results["blocks"], results["prompts"]
        total_B = influence_PB.clamp(max=0).sum(dim=0)
        worst = total_B.argsort()[:SHOWN].tolist()
        damaged = sorted(range(len(prompts)), key=lambda place: prompts[place]["change"])[:SHOWN]
        rows = []
        for place in damaged:
            first = influence_PB[place].argsort()[:3].tolist()
            named = ", ".join(
                f"{blocks[block]['id']} ({influence_PB[place, block]:+.2f})" for block in first
            )
            prompt = prompts[place]
            rows.append((prompt["prompt"], prompt["answer"], f"{prompt['change']:+.2f}", named))
        return [
            Table(
                title="The edits that cost unrelated prompts most, in nats of log p over all of "
                "them. The influences of a prompt add up to its change within "
                f"{results['error']:.2g}",
                head=("edit", "requests", "cost", "prompts that lose 0.1 or more"),
                rows=tuple(
                    (
                        str(blocks[block]["id"]),
                        ", ".join(blocks[block]["requests"][:3]),
                        f"{total_B[block]:+.2f}",
                        str(int((influence_PB[:, block] < -0.1).sum())),
                    )
                    for block in worst
                ),
            ),
            Table(
                title="The prompts that lost most, and the edits with the largest part in it",
                head=("prompt", "answer", "change of log p", "edits"),
                rows=tuple(rows),
            ),
        ]

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        import numpy as np
        from matplotlib.figure import Figure

        image = np.array(results["influence"])
        largest = float(np.quantile(np.abs(image), 0.99)) or 1.0
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        axis = figure.add_subplot()
        prompts, edits = image.shape
        shown = axis.imshow(
            image,
            extent=(0.5, edits + 0.5, prompts + 0.5, 0.5),
            aspect="auto",
            cmap="RdBu",
            vmin=-largest,
            vmax=largest,
            interpolation="nearest",
        )
        axis.set_xlabel("edits, in their order", fontsize=9)
        axis.set_ylabel("unrelated prompts", fontsize=9)
        axis.set_title("change of log p of unrelated answers by edit", fontsize=10)
        axis.tick_params(labelsize=8)
        figure.colorbar(shown, ax=axis, extend="both").ax.tick_params(labelsize=7)
        return figure


def influences(
    model: EditableModel,
    blocks: Sequence[Mapping[str, Update]],
    probes: Sequence[Probe],
    *,
    steps: int,
) -> torch.Tensor:
    """(P, B) float32 on the CPU: the part of each block in the change of each answer's log p."""
    influence_PB = torch.zeros(len(probes), len(blocks))
    sums = {
        module: sum(
            (_dense(block[module]) for block in blocks if module in block),
            torch.zeros_like(model.base(module), dtype=torch.float32, device="cpu"),
        )
        for module in model.edited_modules
    }
    sequences = encode_with_targets(model.tokenizer, probes, chat=model.chat)
    for step in range(steps):
        left = 1 - (step + 0.5) / steps
        with model.temporarily({module: -left * total for module, total in sums.items()}):
            for row, sequence in enumerate(sequences):
                influence_PB[row] += _along(model, blocks, sequence) / steps
    return influence_PB


def _along(
    model: EditableModel, blocks: Sequence[Mapping[str, Update]], sequence: Any
) -> torch.Tensor:
    """(B,): the derivative of the answer's log p along each block's updates."""
    modules = model.edited_modules
    batch = pad([sequence.ids], device=model.device, prompts=[sequence.start])
    with torch.enable_grad(), capture_for_gradients(model, modules) as captured:
        hidden_1TD = model.final_hidden(batch)
        logits_KV = model.hidden_to_logits(hidden_1TD[0, sequence.predicting])
        ids_K = torch.tensor(sequence.target_ids, device=logits_KV.device)
        value = logits_KV.float().log_softmax(-1).gather(1, ids_K[:, None]).sum()
        grads = torch.autograd.grad(value, [captured.outputs[module] for module in modules])
    found_B = torch.zeros(len(blocks))
    for module, grad_1TO in zip(modules, grads, strict=True):
        grad_TO, keys_TI = grad_1TO[0].float(), captured.inputs[module][0].float()
        for place, block in enumerate(blocks):
            if module in block:
                found_B[place] += float((grad_TO * _times(block[module], keys_TI)).sum())
    return found_B


def _times(update: Update, keys_TI: torch.Tensor) -> torch.Tensor:
    """(T, O): the update's product with each key."""
    if isinstance(update, LowRank):
        right_IR, left_OR = update.right_IR.to(keys_TI), update.left_OR.to(keys_TI)
        return (keys_TI @ right_IR) @ left_OR.T
    return keys_TI @ update.to(keys_TI).T


def _dense(update: Update) -> torch.Tensor:
    dense = update.dense() if isinstance(update, LowRank) else update
    return dense.float().cpu()


def as_request(probe: Probe) -> EditRequest:
    """The probe as a request that nobody makes, for `log_probabilities`."""
    return EditRequest(
        id="", prompt=probe.prompt, subject="", target=probe.answer, separator=probe.separator
    )
