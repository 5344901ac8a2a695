"""Knowledge circuits before and after the edits (Yao et al. 2024, arXiv 2405.17969): which heads
and MLPs carry the edited facts, by edge attribution (`editkit.analysis.attribution`).

The unedited model's circuit is that of the old answers, the edited one's that of the new answers,
over the same prompts. The scores of an edge are averaged over facts. What a circuit carries by
itself is measured by running it alone: all other edges are corrupted (Table 1 of the paper has
Hit@10 and the negative log-likelihood of the answer). Their corruption sets all other edges to
zero, here it is noise on the subject.

A head is named by the definitions of the paper's appendix B.2, made rules: a *mover* attends to the
subject from the last token, and the answer is among the first ten words of its output there; a
*relation* head attends to the tokens between subject and end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.analysis.attribution import (
    Fact,
    Passes,
    attention_of_last,
    circuit,
    edge_names,
    nodes,
    overlap,
    passes_of,
    require_parts,
    scores,
)
from editkit.analysis.base import UNEDITED, AbstractAnalysis, Subject, Table
from editkit.analysis.lens import first_tokens
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.path_passes import run
from editkit.model.paths import INPUT, Graph
from editkit.model.tokens import encode_with_targets, fill, subject_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from editkit.model.editable import EditableModel
    from editkit.types import EditRequest

HIT = 10
SHOWN = 12  # edges and heads of a table
DRAWN = 60  # edges of a figure
ATTENDS = 0.5  # share of a head's attention that names it


@dataclass(frozen=True, kw_only=True)
class Circuit(AbstractAnalysis):
    """See the module."""

    edges: int = 3000  # of a circuit, at most
    steps: int = 5  # of the integrated gradients; 1 is plain attribution
    noise: float = 3.0  # in standard deviations of the embeddings

    name = "circuit"

    def problems(self, subject: Subject) -> list[str]:
        found = [
            message(f"--{key}", "out of range", got=value, expected="1 or more")
            for key, value in (("edges", self.edges), ("steps", self.steps))
            if value < 1
        ]
        folder = str(subject.records.folder)
        if subject.model.sides:
            problem = "something stands beside the weights, which is no part of the graph"
            found.append(message(folder, problem))
        if not any(each.subject and each.target_old for each in subject.requests):
            found.append(message(folder, "no edit has a subject and an old answer"))
        return found

    def measure(self, subject: Subject) -> dict[str, Any]:
        graph = Graph(subject.model)
        requests = [each for each in subject.requests if each.subject and each.target_old]
        models, kept = {}, {}
        for name in subject.models():
            facts = facts_of(subject.model, requests, new=name != UNEDITED)
            passes = [
                passes_of(graph, fact, noise=self.noise, seed=place)
                for place, fact in enumerate(facts)
            ]
            if not all(bool(each.clean.logits_V.isfinite().all()) for each in passes):
                problem = "the logits of the edited model are not finite"
                raise ConfigError(message(str(subject.records.folder), problem))
            require_parts(graph, facts[0], passes[0])
            score_RS = sum(
                scores(graph, fact, each, steps=self.steps)
                for fact, each in zip(facts, passes, strict=True)
            ) / len(facts)
            assert isinstance(score_RS, torch.Tensor)
            kept[name] = circuit(graph, score_RS, edges=self.edges)
            models[name] = _described(graph, kept[name], score_RS) | {
                "carried": _carried(graph, facts, passes, kept[name]),
                "heads": _heads(graph, facts, passes, score_RS, subject.model),
            }
        one, other = kept.values()
        return {
            "facts": len(requests),
            "edges_of_the_model": int(graph.existing_RS.sum()),
            "layers": graph.num_layers,
            "heads_of_a_layer": graph.num_heads,
            "models": models,
            "overlap": {
                "nodes": overlap(nodes(graph, one), nodes(graph, other)),
                "edges": overlap(set(edge_names(graph, one)), set(edge_names(graph, other))),
            },
        }

    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        models = results["models"]
        rows = [
            (
                model,
                f"{len(of['edges'])} of {results['edges_of_the_model']:,}",
                str(len(of["nodes"])),
                *(f"{of['carried'][what]['value']:.2f}" for what in ("full", "circuit", "none")),
                f"{100 * of['carried']['share']:.0f}",
                *(f"{of['carried'][what]['nll']:.2f}" for what in ("full", "circuit", "none")),
                *(
                    f"{100 * of['carried'][what]['hit']:.0f}"
                    for what in ("full", "circuit", "none")
                ),
            )
            for model, of in models.items()
        ]
        kinds = ("all edges", "circuit", "no edge")
        head = (
            *("model", "edges", "nodes", *(f"value, {kind}" for kind in kinds), "carried (%)"),
            *(f"NLL, {kind}" for kind in kinds),
            *(f"Hit@{HIT} (%), {kind}" for kind in kinds),
        )
        common = results["overlap"]
        title = (
            "value: logit of the answer minus that of the other one. Circuits share "
            f"{100 * common['nodes']:.0f} % of their nodes and {100 * common['edges']:.0f} % of "
            "their edges (Jaccard)"
        )
        strongest = [
            (str(place + 1), *(cell for of in models.values() for cell in _edge(of, place)))
            for place in range(SHOWN)
        ]
        heads = [
            (
                *(model, head["head"], f"{head['score']:.3f}"),
                *(f"{100 * head[what]:.0f}" for what in ("subject", "between", "hit")),
                head["kind"],
            )
            for model, of in models.items()
            for head in of["heads"]
        ]
        return [
            Table(title=title, head=head, rows=tuple(rows)),
            Table(
                title="The strongest edges",
                head=("", *(cell for model in models for cell in (model, "score"))),
                rows=tuple(strongest),
            ),
            Table(
                title="The heads with the strongest edges. Attention from the last token; "
                f"Hit@{HIT} of the answer in the head's output there",
                head=("model", "head", "score", "subject (%)", "between (%)", "hit (%)", "kind"),
                rows=tuple(heads),
            ),
        ]

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        from editkit.report.figures.axes import COLOURS, UNRESTRAINED_COLOUR, grid, legend

        models = results["models"]
        layers, heads = results["layers"], results["heads_of_a_layer"]
        figure, axes = grid(len(models), width=4.6, height=4.8)
        for axis, (model, of) in zip(axes, models.items(), strict=True):
            strongest = sorted(of["edges"], key=lambda edge: -abs(edge["score"]))[:DRAWN]
            largest = abs(strongest[0]["score"]) if strongest else 1.0
            for edge in strongest:
                ends = [_place(edge[end], heads, layers) for end in ("source", "reader")]
                axis.plot(
                    [end[0] for end in ends],
                    [end[1] for end in ends],
                    color=COLOURS[0] if edge["score"] > 0 else UNRESTRAINED_COLOUR,
                    linewidth=0.4 + 2.2 * abs(edge["score"]) / largest,
                    alpha=0.25 + 0.7 * abs(edge["score"]) / largest,
                    label="for the answer" if edge["score"] > 0 else "against it",
                )
            seen = {edge[end] for edge in strongest for end in ("source", "reader")}
            points = {_place(name, heads, layers) for name in seen}
            axis.scatter(
                [x for x, _ in points], [y for _, y in points], s=10, color="black", zorder=3
            )
            axis.set_title(f"{model}: the {len(strongest)} strongest edges", fontsize=10)
            axis.set_xticks([(heads - 1) / 2, heads + 0.5], ["heads", "MLP"], fontsize=8)
            axis.set_yticks(
                [-1, *range(0, layers, max(1, layers // 8)), layers],
                [INPUT, *map(str, range(0, layers, max(1, layers // 8))), "logits"],
                fontsize=8,
            )
            axis.set_xlim(-1, heads + 1.5)
        legend(figure, axes)
        return figure


def facts_of(model: EditableModel, requests: Sequence[EditRequest], *, new: bool) -> list[Fact]:
    """The prompts of the edits with the new answer against the old one, or the other way round."""
    probes = [request.probe() for request in requests]
    sequences = encode_with_targets(model.tokenizer, probes, chat=model.chat)
    olds = first_tokens(model, requests, [request.target_old for request in requests])
    facts = []
    for request, sequence, old in zip(requests, sequences, olds, strict=True):
        place = fill(request.prompt, request.subject)
        subject = [at for at in subject_positions(sequence, place) if at < sequence.start]
        target = sequence.target_ids[0]
        assert old is not None
        facts.append(
            Fact(
                id=request.id,
                ids=sequence.ids[: sequence.start],
                subject=tuple(subject),
                answer=target if new else old,
                other=(old if new else target) if old != target else None,
            )
        )
    return facts


def _described(graph: Graph, kept_RS: torch.Tensor, score_RS: torch.Tensor) -> dict[str, Any]:
    return {
        "nodes": sorted(nodes(graph, kept_RS), key=graph.sources.index),
        "edges": [
            {
                "source": graph.sources[source],
                "reader": graph.readers[row].name,
                "score": float(score_RS[row, source]),
            }
            for row, source in kept_RS.nonzero().tolist()
        ],
    }


def _carried(
    graph: Graph, facts: Sequence[Fact], passes: Sequence[Passes], kept_RS: torch.Tensor
) -> dict[str, Any]:
    """Means over facts of the answer's value, negative log-likelihood and Hit@10, for the model,
    the circuit alone and the corrupted model; and the share of the value that the circuit carries.
    """
    logits: dict[str, list[torch.Tensor]] = {"full": [], "circuit": [], "none": []}
    for fact, each in zip(facts, passes, strict=True):
        alone = run(graph, fact.ids, other=each.corrupted, kept_RS=kept_RS.float())
        for what, found in (("full", each.clean), ("circuit", alone), ("none", each.corrupted)):
            logits[what].append(found.logits_V.float())
    means: dict[str, dict[str, float]] = {}
    for what, of in logits.items():
        pairs = list(zip(facts, of, strict=True))
        means[what] = {
            "value": sum(float(fact.value(each)) for fact, each in pairs) / len(pairs),
            "nll": -sum(float(each.log_softmax(-1)[fact.answer]) for fact, each in pairs)
            / len(pairs),
            "hit": sum(_hits(each, fact.answer) for fact, each in pairs) / len(pairs),
        }
    lowest = means["none"]["value"]
    share = (means["circuit"]["value"] - lowest) / ((means["full"]["value"] - lowest) or 1.0)
    return {**means, "share": share}


def _hits(logits_V: torch.Tensor, answer: int) -> bool:
    return answer in logits_V.topk(HIT).indices.tolist()


def _heads(
    graph: Graph,
    facts: Sequence[Fact],
    passes: Sequence[Passes],
    score_RS: torch.Tensor,
    model: EditableModel,
) -> list[dict[str, Any]]:
    """The heads whose outgoing edges have the largest scores, by amount and summed."""
    total_S = score_RS.abs().sum(dim=0)
    ordered = total_S.argsort(descending=True).tolist()
    found = [place for place in ordered if graph.sources[place].startswith("a")][:SHOWN]
    width = graph.num_heads + 1
    subject_N, between_N, hit_N = (torch.zeros(len(found), len(facts)) for _ in range(3))
    for column, (fact, each) in enumerate(zip(facts, passes, strict=True)):
        weights_LHT = attention_of_last(model, fact.ids)
        after = range(fact.subject[-1] + 1, len(fact.ids))
        for row, place in enumerate(found):
            weights_T = weights_LHT[(place - 1) // width, (place - 1) % width]
            subject_N[row, column] = weights_T[list(fact.subject)].sum()
            between_N[row, column] = weights_T[list(after)].sum()
            written_D = each.clean.sources_STD[place, -1]
            hit_N[row, column] = (
                fact.answer in model.hidden_to_logits(written_D[None])[0].topk(HIT).indices
            )
    heads = []
    for row, place in enumerate(found):
        subject, between, hit = (float(of[row].mean()) for of in (subject_N, between_N, hit_N))
        kind = "mover" if subject > ATTENDS and hit > ATTENDS else "-"
        heads.append(
            {
                "head": graph.sources[place],
                "score": float(total_S[place]),
                "subject": subject,
                "between": between,
                "hit": hit,
                "kind": "relation" if between > ATTENDS else kind,
            }
        )
    return heads


def _edge(of: Mapping[str, Any], place: int) -> tuple[str, str]:
    ordered = sorted(of["edges"], key=lambda edge: -abs(edge["score"]))
    if place >= len(ordered):
        return "-", "-"
    edge = ordered[place]
    return f"{edge['source']} -> {edge['reader']}", f"{edge['score']:.3f}"


def _place(name: str, heads: int, layers: int) -> tuple[float, float]:
    """Where a node is drawn. A reader of a head stands below the head's output."""
    if name == INPUT:
        return (heads - 1) / 2, -1.0
    if name == "logits":
        return (heads - 1) / 2, float(layers)
    if name.startswith("m"):
        return heads + 0.5, int(name[1:]) + 0.5
    layer, _, rest = name[1:].partition(".h")
    return float(rest.partition("<")[0]), float(layer)
