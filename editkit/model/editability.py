"""Which matrices can be edited.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.model.experts import parameter_of_expert
from editkit.model.matrices import find_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from editkit.lazy import torch


def require_editable(network: PreTrainedModel, module: str, weight_OI: torch.Tensor) -> None:
    """Raises ConfigError if the weights of a module are offloaded, quantised or shared. A parameter
    by its own name may be shared.
    """
    if weight_OI.device.type == "meta":
        raise ConfigError(
            message(
                module,
                "the weights are offloaded, and offloaded weights cannot be edited",
                fix="place the module on a device with enough memory",
            )
        )
    if not weight_OI.is_floating_point():
        raise ConfigError(
            message(
                module,
                "quantised weights cannot be edited",
                got=str(weight_OI.dtype),
                expected="a floating-point dtype",
            )
        )
    if find_parameter(network, module) is not None:
        return  # a parameter that is named as such is changed wherever it is used
    storage = weight_OI.untyped_storage().data_ptr()
    own = (f"{module}.weight", parameter_of_expert(module))
    sharing = [
        name
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if parameter.untyped_storage().data_ptr() == storage and name not in own
    ]
    if sharing:
        raise ConfigError(
            message(
                module,
                f"the matrix shares its weights with {', '.join(sharing)}, which an edit would "
                "change as well",
                fix="edit another matrix",
            )
        )
