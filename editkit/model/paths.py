"""A network as a graph: what each attention head and MLP adds to the residual stream, and who reads
it.

The residual stream at a place is the sum of what stands before it:

    input           the embeddings, as the first block reads them
    a<l>.h<i>       the output of head i of block l, through its rows of the output projection
    m<l>            the output of the MLP of block l

These are the *sources*. The *readers* are the queries, keys and values of each head
(`a<l>.h<i><q>`; keys and values by the number of key-value heads), the MLPs (`m<l>`) and the
`logits`. An edge goes from a source to a reader behind it. A reader's own residual stream can be
composed anew: of the sources along its edges as they are in this pass, and of all other sources as
they were in another pass (path patching; Goldowsky-Dill et al. 2023, arXiv 2304.05969).

Biases and whatever else stands in the stream are in both passes and cancel.

Shape letters: S sources, R readers, T tokens, D width of the stream, H heads, P of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

INPUT, MLP, LOGITS = "input", "m", "logits"
KINDS = ("q", "k", "v")
# (norm before the attention, norm before the MLP) of a block
NORMS = (("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2"), ("ln_1", "ln_1"))
FUSED = "c_attn"  # queries, keys and values side by side: GPT-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A reader, and the sources before it."""

    name: str
    layer: int  # the number of blocks for the logits
    kind: str  # "q", "k", "v", "m" or "logits"
    head: int
    num_sources: int  # the first so many sources stand before it


class Graph:
    """The graph of a model.

    Raises:
        ConfigError: the modules of its blocks are not those of GPT-2, GPT-J or the Llama family.
    """

    def __init__(self, model: EditableModel) -> None:
        self.model, self.num_layers = model, model.num_layers
        config = model.network.config.get_text_config()
        self.num_heads = int(config.num_attention_heads)
        self.num_key_heads = int(getattr(config, "num_key_value_heads", None) or self.num_heads)
        family = model.family
        attention, _, output = family.attention_in_block.rpartition(".")
        block = dict(model.module(family.block(0)).named_modules())
        separate = tuple(f"{attention}.{kind}_proj" for kind in KINDS)
        fused = f"{attention}.{FUSED}"
        norms = next((pair for pair in NORMS if all(name in block for name in pair)), None)
        is_known = all(name in block for name in separate) or fused in block
        if not is_known or norms is None or family.final_norm is None or family.experts_in_block:
            problem = f"{model.name}: its blocks cannot be taken apart into heads"
            expected = "the modules of GPT-2, GPT-J or the Llama family"
            raise ConfigError(message("model", problem, expected=expected))
        self.is_fused = fused in block
        self.projections = (fused,) if self.is_fused else separate
        self.output = f"{attention}.{output}"
        self.norms = norms
        self.is_parallel = norms[0] == norms[1]

    # Names

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """In the order of a forward pass."""
        names = [INPUT]
        for layer in range(self.num_layers):
            names += [f"a{layer}.h{head}" for head in range(self.num_heads)]
            names.append(f"m{layer}")
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """In the order of a forward pass."""
        found = []
        for layer in range(self.num_layers):
            before = 1 + layer * (self.num_heads + 1)
            for kind in KINDS:
                heads = self.num_heads if kind == "q" else self.num_key_heads
                found += [
                    Reader(
                        name=f"a{layer}.h{head}<{kind}>",
                        layer=layer,
                        kind=kind,
                        head=head,
                        num_sources=before,
                    )
                    for head in range(heads)
                ]
            within = before if self.is_parallel else before + self.num_heads
            found.append(
                Reader(name=f"m{layer}", layer=layer, kind=MLP, head=0, num_sources=within)
            )
        last = Reader(
            name=LOGITS,
            layer=self.num_layers,
            kind=LOGITS,
            head=0,
            num_sources=len(self.sources),
        )
        return (*found, last)

    @cached_property
    def existing_RS(self) -> torch.Tensor:
        """Whether there is such an edge, by reader and source."""
        places_S = torch.arange(len(self.sources))
        return torch.stack([places_S < reader.num_sources for reader in self.readers])

    def sources_of(self, reader: Reader) -> tuple[int, ...]:
        """The sources that a reader is a part of: an MLP, or the heads that read a key or value."""
        if reader.kind == LOGITS:
            return ()
        first = 1 + reader.layer * (self.num_heads + 1)
        if reader.kind == MLP:
            return (first + self.num_heads,)
        group = 1 if reader.kind == "q" else self.num_heads // self.num_key_heads
        return tuple(first + reader.head * group + place for place in range(group))

    def module(self, layer: int, name: str) -> torch.nn.Module:
        """A module of a block."""
        return self.model.module(f"{self.model.family.block(layer)}.{name}")
