"""Passes through the graph of `editkit.model.paths`, with hooks: what notes sources, composes the
streams of readers, and takes what gradients are asked for.

Shape letters: as there, and V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.lazy import torch
from editkit.model.matrices import matrix_of
from editkit.model.paths import KINDS, LOGITS, MLP, Graph, Reader


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """A forward pass of one text."""

    sources_STD: torch.Tensor
    stream_TD: torch.Tensor  # before the final norm
    logits_V: torch.Tensor  # at the last token


def run(
    graph: Graph,
    ids: Sequence[int],
    *,
    embeddings_TD: torch.Tensor | None = None,
    other: Pass | None = None,
    kept_RS: torch.Tensor | None = None,
) -> Pass:
    """A pass over one text.

    Args:
        embeddings_TD: in place of the embeddings of the tokens.
        other: where sources come from along the edges that are not kept.
        kept_RS: by reader and source, 1 for an edge that is kept. Values between 0 and 1 mix.
    """
    recording = Recording(graph, None if other is None else other.sources_STD, kept_RS)
    embeddings = (
        contextlib.nullcontext() if embeddings_TD is None else embedded(graph, embeddings_TD)
    )
    with torch.no_grad(), embeddings, recording.hooked():
        logits_V = _logits(graph, ids)
    return Pass(torch.cat(recording.noted), recording.stream_TD, logits_V)


def gradients(
    graph: Graph,
    ids: Sequence[int],
    value: Callable[[torch.Tensor], torch.Tensor],
    *,
    embeddings_TD: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradient (T, D) of `value(logits)` in each reader's own residual stream, in one pass and
    one backward pass.
    """
    taken = Gradients(graph)
    with torch.enable_grad(), embedded(graph, embeddings_TD):
        with taken.hooked():
            logits_V = _logits(graph, ids)
        return taken.in_streams(value(logits_V))


def embeddings_of(graph: Graph, ids: Sequence[int]) -> torch.Tensor:
    """(T, D): the embeddings of the tokens, as the network reads them."""
    ids_T = torch.tensor(list(ids), device=graph.model.device)
    with torch.no_grad():
        embedded_TD: torch.Tensor = graph.model.network.get_input_embeddings()(ids_T)
    return embedded_TD


def _logits(graph: Graph, ids: Sequence[int]) -> torch.Tensor:
    """(V,) at the last token."""
    base = graph.model.module(graph.model.family.base)
    ids_1T = torch.tensor([list(ids)], device=graph.model.device)
    hidden_1TD = base(input_ids=ids_1T, use_cache=False).last_hidden_state
    return graph.model.hidden_to_logits(hidden_1TD[0, -1:])[0]


class Recording:
    """Notes the sources of a pass. With other sources, each reader reads a stream of its own.

    Args:
        other_STD: the sources of another pass.
        kept_RS: by reader and source, 1 for an edge that is kept.
    """

    def __init__(
        self, graph: Graph, other_STD: torch.Tensor | None, kept_RS: torch.Tensor | None
    ) -> None:
        self.graph, self.other_STD, self.kept_RS = graph, other_STD, kept_RS
        self.noted: list[torch.Tensor] = []
        self.stream_TD = torch.empty(0)  # before the final norm
        self._streams: dict[tuple[int, str], torch.Tensor] = {}  # before the norm of a block

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Passes inside are recorded."""
        graph, family = self.graph, self.graph.model.family
        with contextlib.ExitStack() as hooks:
            add = hooks.callback
            first = graph.model.module(family.block(0))
            add(first.register_forward_pre_hook(self._note_input, with_kwargs=True).remove)
            for layer in range(graph.num_layers):
                if self.other_STD is not None:
                    for handle in self._patches(layer):
                        add(handle.remove)
                output = graph.module(layer, graph.output)
                add(output.register_forward_pre_hook(self._note_heads(layer)).remove)
                mlp = graph.model.module(family.mlp(layer))
                add(mlp.register_forward_hook(self._note_mlp).remove)
            norm = graph.model.module(str(family.final_norm))
            add(norm.register_forward_pre_hook(self._note_stream).remove)
            if self.other_STD is not None:
                add(norm.register_forward_pre_hook(self._compose_logits).remove)
            yield

    def _note_input(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.noted.append(args[0] if args else kwargs["hidden_states"])

    def _note_heads(self, layer: int) -> Any:
        graph = self.graph
        weight_DO = matrix_of(graph.output, graph.module(layer, graph.output))

        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            values = args[0][0].unflatten(-1, (graph.num_heads, -1))
            weight = weight_DO.unflatten(-1, (graph.num_heads, -1))
            self.noted.append(torch.einsum("tnw,dnw->ntd", values, weight))

        return hook

    def _note_mlp(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.noted.append(output.view(1, -1, output.shape[-1]))

    def _note_stream(self, _module: Any, args: tuple[Any, ...]) -> None:
        self.stream_TD = args[0][0]

    def _patches(self, layer: int) -> Iterator[Any]:
        graph = self.graph
        for kind, name in zip(("a", MLP), graph.norms, strict=True):
            keep = self._keep_stream(layer, kind)
            yield graph.module(layer, name).register_forward_pre_hook(keep)
        groups: Sequence[tuple[str, ...]] = [KINDS] if graph.is_fused else [(k,) for k in KINDS]
        for name, kinds in zip(graph.projections, groups, strict=True):
            compose = self._compose_heads(layer, kinds)
            yield graph.module(layer, name).register_forward_hook(compose)
        mlp = graph.model.module(graph.model.family.mlp(layer))
        yield mlp.register_forward_pre_hook(self._compose_mlp(layer), with_kwargs=True)

    def _keep_stream(self, layer: int, kind: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            self._streams[layer, kind] = args[0][0]

        return hook

    def _composed(self, layer: int, kind: str, stream_TD: torch.Tensor) -> torch.Tensor:
        """(R, T, D): the streams of the readers of this kind in a block."""
        assert self.other_STD is not None and self.kept_RS is not None
        readers = self.graph.readers
        places = [at for at, each in enumerate(readers) if (each.layer, each.kind) == (layer, kind)]
        count = readers[places[0]].num_sources
        now_STD = torch.cat(self.noted)[:count]
        left_RS = 1 - self.kept_RS[places, :count].to(now_STD)
        moved_RTD = torch.einsum("rs,std->rtd", left_RS, self.other_STD[:count] - now_STD)
        return stream_TD + moved_RTD

    def _compose_heads(self, layer: int, kinds: Sequence[str]) -> Any:
        norm: Any = self.graph.module(layer, self.graph.norms[0])

        def hook(module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            share, parts = output.shape[-1] // len(kinds), []
            for place, kind in enumerate(kinds):
                streams_RTD = self._composed(layer, kind, self._streams[layer, "a"])
                # `forward`, as a call would come back here
                projected_RTP = module.forward(norm.forward(streams_RTD))
                projected_RTP = projected_RTP[..., place * share : (place + 1) * share]
                each = share // len(projected_RTP)
                parts += [
                    of_reader_TP[:, head * each : (head + 1) * each]
                    for head, of_reader_TP in enumerate(projected_RTP)
                ]
            return torch.cat(parts, dim=-1)[None]

        return hook

    def _compose_mlp(self, layer: int) -> Any:
        norm: Any = self.graph.module(layer, self.graph.norms[1])

        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            read = norm.forward(self._composed(layer, MLP, self._streams[layer, MLP]))
            return _in_place_of_first(read, args, kwargs)

        return hook

    def _compose_logits(self, _module: Any, args: tuple[Any, ...]) -> Any:
        stream = self._composed(self.graph.num_layers, LOGITS, args[0][0])
        return (stream, *args[1:])


class Gradients:
    """Takes what readers read: the outputs of projections, the inputs of MLPs and of the final
    norm; and the streams before norms.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.taken: dict[str, torch.Tensor] = {}
        self._streams: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """A pass inside is taken."""
        graph, family = self.graph, self.graph.model.family
        with contextlib.ExitStack() as hooks:
            add = hooks.callback
            for layer in range(graph.num_layers):
                for name in graph.projections:
                    take = self._take_output(f"{layer}.{name}")
                    add(graph.module(layer, name).register_forward_hook(take).remove)
                mlp, take = graph.model.module(family.mlp(layer)), self._take_input(f"{layer}.m")
                add(mlp.register_forward_pre_hook(take, with_kwargs=True).remove)
                for kind, name in zip(("a", MLP), graph.norms, strict=True):
                    keep = self._keep(f"{layer}.{kind}")
                    add(graph.module(layer, name).register_forward_pre_hook(keep).remove)
            norm, take = graph.model.module(str(family.final_norm)), self._take_input(LOGITS)
            add(norm.register_forward_pre_hook(take, with_kwargs=True).remove)
            yield

    def in_streams(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The gradient (T, D) of `value` in the stream of each reader."""
        grads = torch.autograd.grad(value, list(self.taken.values()))
        grad_of = dict(zip(self.taken, grads, strict=True))
        return [self._in_stream(reader, grad_of) for reader in self.graph.readers]

    def _in_stream(self, reader: Reader, grad_of: dict[str, torch.Tensor]) -> torch.Tensor:
        graph, layer = self.graph, reader.layer
        if reader.kind == LOGITS:
            return grad_of[LOGITS][0]
        if reader.kind == MLP:
            stream_1TD = self._streams[f"{layer}.m"]
            behind_1TD = grad_of[f"{layer}.m"].view(stream_1TD.shape)
            return self._through_norm(layer, graph.norms[1], stream_1TD, behind_1TD)
        place = KINDS.index(reader.kind)
        name = graph.projections[0 if graph.is_fused else place]
        weight_OD = matrix_of(name, graph.module(layer, name))
        share = len(weight_OD) // (len(KINDS) if graph.is_fused else 1)
        heads = graph.num_heads if reader.kind == "q" else graph.num_key_heads
        first = (place * share if graph.is_fused else 0) + reader.head * (share // heads)
        rows = slice(first, first + share // heads)
        behind_1TD = grad_of[f"{layer}.{name}"][..., rows] @ weight_OD[rows]
        return self._through_norm(layer, graph.norms[0], self._streams[f"{layer}.a"], behind_1TD)

    def _through_norm(
        self, layer: int, name: str, stream_1TD: torch.Tensor, behind_1TD: torch.Tensor
    ) -> torch.Tensor:
        with torch.enable_grad():
            stream_1TD = stream_1TD.detach().requires_grad_()
            normed_1TD = self.graph.module(layer, name)(stream_1TD)
            (grad_1TD,) = torch.autograd.grad(normed_1TD, stream_1TD, behind_1TD)
        return grad_1TD[0]

    def _take_output(self, name: str) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            self.taken[name] = output.clone()
            return self.taken[name]

        return hook

    def _take_input(self, name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.taken[name] = (args[0] if args else next(iter(kwargs.values()))).clone()
            return _in_place_of_first(self.taken[name], args, kwargs)

        return hook

    def _keep(self, name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            self._streams[name] = args[0].detach()

        return hook


@contextlib.contextmanager
def embedded(graph: Graph, embeddings_TD: torch.Tensor) -> Iterator[None]:
    """Passes inside read these embeddings. Gradients begin there."""
    needs_grad = torch.is_grad_enabled()

    def hook(*_: Any) -> torch.Tensor:
        return embeddings_TD[None].clone().requires_grad_(needs_grad)

    handle = graph.model.network.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _in_place_of_first(
    value: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (value, *args[1:]), kwargs
    return args, kwargs | {next(iter(kwargs)): value}
