"""How much each edge of the graph of a network (`editkit.model.paths`) carries a fact, and the
circuit of the edges that carry most.

Edge attribution (EAP; Syed et al. 2023, arXiv 2310.10348) with integrated gradients (EAP-IG; Hanna
et al. 2024, arXiv 2403.17806). A text is run as it is and corrupted: noise on the embeddings of its
subject, as in causal tracing. With value m(logits),

    score(u, v) = (a_u - a_u') . mean over k of dm / d(stream of v) at x' + (k / K) (x - x')

for x the embeddings, a_u the output of the source u and ' the corrupted pass, summed over tokens.
It is the first-order change of m if v reads u as it is instead of corrupted. With K = 1 the
gradient is taken at the text itself: two passes and one backward pass for all edges.

Shape letters: R readers, S sources, T tokens, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.path_passes import Pass, embeddings_of, gradients, run
from editkit.model.paths import Graph

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

TOLERANCE = (
    0.02  # error of the logits of a pass that was taken apart, by what corruption moves them
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A prompt and the tokens that its value compares."""

    id: str
    ids: tuple[int, ...]
    subject: tuple[int, ...]  # the positions that are corrupted
    answer: int
    other: int | None  # the answer that stands against it

    def value(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The difference of the two logits, or log p of the answer alone."""
        if self.other is None:
            return logits_V.float().log_softmax(-1)[self.answer]
        return logits_V[self.answer] - logits_V[self.other]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passes:
    """A fact's two passes."""

    clean: Pass
    corrupted: Pass
    embeddings_TD: torch.Tensor
    corrupted_TD: torch.Tensor


def passes_of(graph: Graph, fact: Fact, *, noise: float, seed: int) -> Passes:
    """The passes over a fact's prompt.

    Args:
        noise: in standard deviations of the embeddings.
    """
    model = graph.model
    embeddings_TD = embeddings_of(graph, fact.ids)
    scale = noise * float(model.network.get_input_embeddings().weight.float().std())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(fact.subject), embeddings_TD.shape[1], generator=generator)
    corrupted_TD = embeddings_TD.clone()
    corrupted_TD[list(fact.subject)] += scale * drawn.to(embeddings_TD)
    return Passes(
        clean=run(graph, fact.ids),
        corrupted=run(graph, fact.ids, embeddings_TD=corrupted_TD),
        embeddings_TD=embeddings_TD,
        corrupted_TD=corrupted_TD,
    )


def scores(graph: Graph, fact: Fact, passes: Passes, *, steps: int) -> torch.Tensor:
    """(R, S) float32 on the CPU: the score of each edge, 0 where there is none."""
    gradient_RTD: torch.Tensor | None = None
    for step in range(1, steps + 1):
        at_TD = torch.lerp(passes.corrupted_TD, passes.embeddings_TD, step / steps)
        grads = torch.stack(gradients(graph, fact.ids, fact.value, embeddings_TD=at_TD))
        gradient_RTD = grads if gradient_RTD is None else gradient_RTD + grads
    assert gradient_RTD is not None
    moved_STD = passes.clean.sources_STD - passes.corrupted.sources_STD
    score_RS = gradient_RTD.flatten(1).float() @ moved_STD.flatten(1).float().T / steps
    return score_RS.cpu() * graph.existing_RS


def require_parts(graph: Graph, fact: Fact, passes: Passes) -> None:
    """Raises ConfigError unless the parts make the network: the residual streams of the two passes
    differ by what the sources differ by, and a pass along all edges is the plain one.
    """
    one, other = passes.clean, passes.corrupted
    moved_TD = one.stream_TD - other.stream_TD
    parts_TD = (one.sources_STD - other.sources_STD).sum(dim=0)
    kept_RS = graph.existing_RS.float()
    along_V = run(graph, fact.ids, other=other, kept_RS=kept_RS).logits_V
    errors = (
        (moved_TD - parts_TD).norm() / moved_TD.norm(),
        (along_V - one.logits_V).norm() / (one.logits_V - other.logits_V).norm(),
    )
    if not all(float(error) < TOLERANCE for error in errors):
        problem = f"{graph.model.name}: its residual stream is not the sum of heads and MLPs"
        got = " and ".join(f"{float(error):.2g}" for error in errors)
        raise ConfigError(message("model", problem, got=f"relative errors of {got}"))


def circuit(graph: Graph, score_RS: torch.Tensor, *, edges: int) -> torch.Tensor:
    """(R, S) bool: the edges with the largest scores by amount, without those that are not on a
    path from the input to the logits.
    """
    amount_RS = torch.where(graph.existing_RS, score_RS.abs(), -1.0)
    count = min(edges, int(graph.existing_RS.sum()))
    kept_RS = torch.zeros_like(graph.existing_RS)
    kept_RS.view(-1)[amount_RS.flatten().topk(count).indices] = True
    return on_paths(graph, kept_RS & graph.existing_RS)


def on_paths(graph: Graph, kept_RS: torch.Tensor) -> torch.Tensor:
    """The edges of a set that are on a path from the input to the logits inside the set."""
    readers = graph.readers
    reached = {0}  # sources that the input reaches; readers are in the order of a pass
    for row, reader in enumerate(readers):
        if reached.intersection(kept_RS[row].nonzero().flatten().tolist()):
            reached.update(graph.sources_of(reader))
    leading: set[int] = set()  # sources from which the logits are reached
    for row in range(len(readers) - 1, -1, -1):
        is_end = row == len(readers) - 1
        if is_end or leading.intersection(graph.sources_of(readers[row])):
            leading.update(kept_RS[row].nonzero().flatten().tolist())
    left_RS = kept_RS.clone()
    for row, reader in enumerate(readers):
        leads = row == len(readers) - 1 or bool(leading.intersection(graph.sources_of(reader)))
        for source in kept_RS[row].nonzero().flatten().tolist():
            left_RS[row, source] = leads and source in reached
    return left_RS


def acdc(
    graph: Graph,
    facts: Sequence[tuple[Fact, Passes]],
    *,
    threshold: float,
    progress: Callable[[int], object] = lambda _: None,
) -> torch.Tensor:
    """(R, S) bool: the circuit of ACDC (Conmy et al. 2023, arXiv 2304.14997), a pass for each edge.

    Readers are visited from the logits backwards. An edge goes if the mean value falls by less than
    the threshold without it. This is the slow oracle for small models.
    """
    kept_RS = graph.existing_RS.clone()

    def value(edges_RS: torch.Tensor) -> float:
        return sum(
            float(
                fact.value(
                    run(graph, fact.ids, other=passes.corrupted, kept_RS=edges_RS.float()).logits_V
                )
            )
            for fact, passes in facts
        ) / len(facts)

    best = value(kept_RS)
    for row in range(len(graph.readers) - 1, -1, -1):
        reader = graph.readers[row]
        behind = graph.sources_of(reader)
        if behind and not bool(kept_RS[:, list(behind)].any()):
            kept_RS[row] = False  # nobody reads it
            continue
        for source in reversed(range(reader.num_sources)):
            kept_RS[row, source] = False
            without = value(kept_RS)
            if best - without < threshold:
                best = without
            else:
                kept_RS[row, source] = True
        progress(row)
    return on_paths(graph, kept_RS)


def nodes(graph: Graph, kept_RS: torch.Tensor) -> set[str]:
    """The sources of a circuit."""
    return {graph.sources[source] for source in kept_RS.any(dim=0).nonzero().flatten().tolist()}


def overlap(one: set[str], other: set[str]) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one | other else 1.0


def edge_names(graph: Graph, kept_RS: torch.Tensor) -> list[str]:
    """ "a3.h1 -> m4" of each edge."""
    return [
        f"{graph.sources[source]} -> {graph.readers[row].name}"
        for row, source in kept_RS.nonzero().tolist()
    ]


def attention_of_last(model: EditableModel, ids: Sequence[int]) -> torch.Tensor:
    """(L, H, T): to which tokens each head of each block attends from the last token."""
    network, kind = model.network, model.network.config._attn_implementation
    base = model.module(model.family.base)
    try:
        network.set_attn_implementation("eager")  # the others do not return their weights
        with torch.no_grad():
            out = base(
                input_ids=torch.tensor([list(ids)], device=model.device),
                use_cache=False,
                output_attentions=True,
            )
    finally:
        network.set_attn_implementation(kind)
    return torch.stack([weights[0, :, -1] for weights in out.attentions])
