"""Logits from final hidden states, as the network itself computes them.

A network may do more than multiply by its head: Gemma 2 caps the logits, Cohere and Granite scale
them.

Shape letters: N rows, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from editkit.lazy import torch
from editkit.model.replaced import replaced_forwards


class _Finished:
    """The output of a base network whose blocks did not run. What is not known of it is None."""

    def __init__(self, hidden_1ND: torch.Tensor) -> None:
        self.last_hidden_state = hidden_1ND

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, _name: str) -> None:
        return None


def own_logits(network: Any, base: torch.nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
    """(N, V): what the network makes of these final hidden states. Gradients flow."""
    finished = _Finished(hidden_ND[None])
    ids_1N = torch.zeros(1, len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    # A multimodal network calls its language model through another module.
    bases = {base, network.base_model}
    with replaced_forwards(dict.fromkeys(bases, lambda *_args, **_kwargs: finished)):
        logits_1NV: torch.Tensor = network(input_ids=ids_1N, use_cache=False).logits
    return logits_1NV[0].to(hidden_ND.device)


def is_matrix(network: Any, base: torch.nn.Module) -> bool:
    """Whether the logits of a small and of a large hidden state are the head's products alone."""
    head = network.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    generator = torch.Generator().manual_seed(0)
    states_ND = torch.randn(2, head.in_features, generator=generator) * torch.tensor([[1.0], [1e3]])
    states_ND = states_ND.to(head.weight)
    with torch.no_grad():
        products_NV = head(states_ND[None])[0].to(states_ND.device)
        return torch.equal(own_logits(network, base, states_ND).to(products_NV), products_NV)
