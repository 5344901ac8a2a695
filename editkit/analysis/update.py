"""What the edits wrote: the sum D of all updates of each matrix, by neuron and as words.

- The norm of D's columns, which belong to the inner neurons of an MLP, and how few of them hold
  most of it (survey of KnowEdit, Zhang et al. 2024, arXiv 2401.01286, Figure 6).
- The words that the columns of W_0 and W_0 + D promote, for the columns that changed most, and
  whether the new answers are among them: Hit@10 and Hit@50 of Figure 7 there. A column lies in the
  residual stream, and the head maps it to the vocabulary (Dar et al. 2023, arXiv 2209.02535).
- The words that the first left singular vectors of D promote. A vector has no sign of its own: it
  is given the one with which it promotes the new answers more.

Shape letters: O d_out, I d_in, K columns or vectors, N requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.analysis.base import AbstractAnalysis, Subject, Table
from editkit.analysis.lens import first_tokens
from editkit.lazy import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from editkit.model.editable import EditableModel

COLUMNS = 5  # of each matrix, as in the survey
VECTORS = 5
WORDS = 10
HITS = (10, 50)
BINS = 256  # of the heat map


class Update(AbstractAnalysis):
    """See the module."""

    name = "update"
    needs_weights = True

    def measure(self, subject: Subject) -> dict[str, Any]:
        model, requests = subject.model, subject.requests
        answers = first_tokens(model, requests, [request.target for request in requests])
        tokens_N = torch.tensor(answers, device=model.device)
        return {
            "modules": {
                module: _of_matrix(model, module, tokens_N) for module in model.edited_modules
            },
            "requests": len(requests),
        }

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        modules = results["modules"]
        size = Table(
            title="The sum of all updates D. half in: the share of columns that hold half of |D|^2",
            head=("matrix", "|D| / |W_0|", "sigma_max", "rank", "half in (%)"),
            rows=tuple(
                (
                    module,
                    f"{of['relative_frobenius']:.3g}",
                    f"{of['sigma_max']:.3g}",
                    str(of["rank"]),
                    f"{100 * of['half_in']:.2f}",
                )
                for module, of in modules.items()
            ),
        )
        words = [
            (module, f"{what} {place + 1}", ", ".join(map(repr, each["words"])))
            for module, of in modules.items()
            for what, vectors in (("column", of["columns"]), ("vector", of["vectors"]))
            for place, each in enumerate(vectors)
        ]
        hits = [
            (module, *(f"{100 * value:.0f}" for key in ("before", "after") for value in of[key]))
            for module, of in modules.items()
            if of["columns"]
        ]
        names = tuple(f"Hit@{top} {when}" for when in ("before", "after") for top in HITS)
        return [
            size,
            *(
                [
                    Table(
                        title="New answers among the words of the columns that changed most (%)",
                        head=("matrix", *names),
                        rows=tuple(hits),
                    ),
                    Table(
                        title="Words that these columns of W_0 + D, and the left singular vectors "
                        "of D, promote",
                        head=("matrix", "what", "words"),
                        rows=tuple(words),
                    ),
                ]
                if words
                else []
            ),
        ]

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        import numpy as np
        from matplotlib.figure import Figure

        rows = {module: of["column_norms"] for module, of in results["modules"].items()}
        width = min(BINS, *(len(norms) for norms in rows.values()))
        image = np.array(
            [[max(part) for part in np.array_split(norms, width)] for norms in rows.values()]
        )
        figure = Figure(figsize=(8.4, 1.4 + 0.35 * len(rows)), layout="constrained")
        axis = figure.add_subplot()
        shown = axis.imshow(image, aspect="auto", cmap="Greys", interpolation="nearest", vmin=0)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axis.set_xticks([])
        axis.set_xlabel("inner neurons, the largest of each group", fontsize=9)
        axis.set_title("norm of the columns of the sum of all updates", fontsize=10)
        figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=7)
        return figure


def _of_matrix(model: EditableModel, module: str, tokens_N: torch.Tensor) -> dict[str, Any]:
    total = model.total(module)
    total_OI = total.dense().float()
    norms_I = total_OI.norm(dim=0)
    ordered_I = (norms_I**2).sort(descending=True).values.cumsum(0)
    half = int((ordered_I < 0.5 * ordered_I[-1]).sum()) + 1
    facts = {
        "relative_frobenius": total.frobenius() / model.base_frobenius(module),
        "sigma_max": total.sigma_max(),
        "rank": total.rank,
        "column_norms": norms_I.tolist(),
        "half_in": half / len(norms_I),
        "columns": [],
        "vectors": [],
    }
    width = model.network.get_input_embeddings().weight.shape[1]
    if total_OI.shape[0] != width or total.is_zero:  # it does not write into the residual stream
        return facts
    top = norms_I.topk(min(COLUMNS, len(norms_I))).indices
    before_KV, after_KV = (
        _logits(model, weight_OI.float()[:, top].T)
        for weight_OI in (model.base(module).to(model.device), model.weight(module))
    )
    vectors_OK = total.svd()[0][:, :VECTORS].to(model.device).float()
    vectors_KV = _logits(model, vectors_OK.T)
    sign_K1 = vectors_KV[:, tokens_N].sum(dim=1, keepdim=True).sign()
    return facts | {
        "before": _hits(before_KV, tokens_N),
        "after": _hits(after_KV, tokens_N),
        "columns": [
            {"neuron": int(neuron), "norm": float(norms_I[neuron]), "words": words}
            for neuron, words in zip(top, _words(model, after_KV), strict=True)
        ],
        "vectors": [{"words": words} for words in _words(model, vectors_KV * sign_K1)],
    }


def _logits(model: EditableModel, vectors_KO: torch.Tensor) -> torch.Tensor:
    """(K, V): the head's product alone, without bias and without a norm."""
    head_VO: torch.Tensor = model.network.get_output_embeddings().weight
    with torch.no_grad():
        return vectors_KO @ head_VO.float().T


def _hits(logits_KV: torch.Tensor, tokens_N: torch.Tensor) -> list[float]:
    """For each k of `HITS`: the share of answers among the k first words of at least one vector."""
    found = []
    for top in HITS:
        first_KT = logits_KV.topk(min(top, logits_KV.shape[1]), dim=1).indices
        found.append(float(torch.isin(tokens_N, first_KT).float().mean()))
    return found


def _words(model: EditableModel, logits_KV: torch.Tensor) -> list[list[str]]:
    first_KT = logits_KV.topk(min(WORDS, logits_KV.shape[1]), dim=1).indices
    return [[str(model.tokenizer.decode([token])) for token in row] for row in first_KT.tolist()]
