"""One expert of a mixture as linear modules, so that its matrices are edited like any others.

transformers keeps the matrices of all experts of a block in tensors of three dimensions.
`expose_expert` adds the modules `<experts>.<index>.gate_up_proj` and `.down_proj`. Their weights
are views of the expert's slices, so they add nothing to the network's parameters and files.

The chosen expert runs at every token. Where the router sends a token elsewhere, the input of its
down projection is zero, and its output is multiplied by zero: second moments are means over all
tokens, of which only those with this expert contribute.

Shape letters: N tokens, D width of the residual stream, I inner width, K experts of a token.
"""

from __future__ import annotations

from typing import Any

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.families import Family

MATRICES = ("gate_up_proj", "down_proj")
KEY = "model.expert"


def require_expert(expert: int, num_experts: int) -> None:
    """Raises ConfigError for an expert that a mixture does not have."""
    if not 0 <= expert < num_experts:
        expected = f"0 to {num_experts - 1}"
        raise ConfigError(message(KEY, "no such expert", got=expert, expected=expected))


def expose_expert(network: torch.nn.Module, family: Family) -> None:
    """Adds the modules of `family.expert`, if there is one, to every block. A second call only
    renews the views of weights that have moved.

    Raises:
        ConfigError: the network has no such expert, or its experts are built in another way.
    """
    if family.expert is None:
        return
    for layer in range(len(network.get_submodule(family.blocks))):  # type: ignore[arg-type]
        name = family.experts(layer)
        try:
            experts: Any = network.get_submodule(name)
        except AttributeError:
            experts = None
        if not _is_mixture(experts):
            problem = f"{name} is no module of experts that editkit can take apart"
            expected = "transformers' experts with gate_up_proj and down_proj in every block"
            raise ConfigError(message(KEY, problem, got=family.expert, expected=expected))
        require_expert(family.expert, len(experts.down_proj))
        _expose(experts, family.expert)


def _is_mixture(experts: Any) -> bool:
    return (
        getattr(experts, "has_gate", False)
        and not experts.has_post_expert_norm
        and all(getattr(experts, name).dim() == 3 for name in MATRICES)
    )


def _expose(experts: Any, index: int) -> None:
    """Adds the modules to the experts of a block, which then run this expert by them."""
    is_exposed = str(index) in experts._modules
    chosen = torch.nn.Module()
    for name in MATRICES:
        chosen.add_module(name, _view(experts, name, index))
    experts.add_module(str(index), chosen)
    if is_exposed:
        return
    run_all = experts.forward  # accelerate also sets it on the instance

    def forward(
        hidden_ND: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        is_here_NK = indices_NK == index
        others_ND = run_all(hidden_ND, indices_NK, weights_NK.masked_fill(is_here_NK, 0))
        own = getattr(experts, str(index))
        inner_NI = experts._apply_gate(own.gate_up_proj(hidden_ND))
        inner_NI = inner_NI * is_here_NK.any(dim=1, keepdim=True)
        weight_N1 = (weights_NK * is_here_NK).sum(dim=1, keepdim=True)
        result_ND: torch.Tensor = others_ND + (own.down_proj(inner_NI) * weight_N1).to(others_ND)
        return result_ND

    experts.forward = forward


def _view(experts: Any, name: str, index: int) -> torch.nn.Linear:
    """A linear module whose weight and bias are those of one expert, without parameters."""
    weight_OI = getattr(experts, name).detach()[index]
    if experts.is_transposed:
        weight_OI = weight_OI.T
    linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], device="meta")
    del linear.weight, linear.bias
    linear.weight = weight_OI  # a plain tensor
    bias: Any = getattr(experts, f"{name}_bias").detach()[index] if experts.has_bias else None
    linear.bias = bias
    return linear


def parameter_of_expert(module: str) -> str:
    """The parameter with the matrices of all experts, by the name of one expert's module."""
    experts, _, name = module.rpartition(".")
    return f"{experts.rpartition('.')[0]}.{name}"
