"""The stored weights of a network as matrices (d_out, d_in). Only this file knows that GPT-2's
Conv1D stores the transpose. The module's type decides, because the shape of a square matrix does
not.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

import difflib

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.families import not_a_matrix


def find_module(network: torch.nn.Module, name: str, *, of: str) -> torch.nn.Module:
    """The module of that dotted name. Raises ConfigError, with the nearest names, for an unknown
    one; `of` is what has no such module.
    """
    try:
        module: torch.nn.Module = network.get_submodule(name)
        return module
    except AttributeError:
        known = [known for known, _ in network.named_modules()]
        near = ", ".join(difflib.get_close_matches(name, known, n=3))
        fix = f"use one of the nearest names: {near}" if near else None
        raise ConfigError(message(name, f"{of} has no such module", fix=fix)) from None


def find_parameter(network: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
    """The parameter of that dotted name; None if there is none, as for the name of a module."""
    owner, _, last = name.rpartition(".")
    try:
        return network.get_submodule(owner)._parameters.get(last)
    except AttributeError:
        return None


def matrix_of(name: str, module: torch.nn.Module) -> torch.Tensor:
    """(O, I): the matrix of a module as a view of its weights.

    Raises:
        ConfigError: the module has no matrix.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.weight.detach().T
    if isinstance(module, torch.nn.Linear):
        return module.weight.detach()
    raise ConfigError(not_a_matrix(name, module))


def is_matrix_module(module: torch.nn.Module) -> bool:
    """Whether `matrix_of` finds a matrix."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D | torch.nn.Linear)


def rows_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter as a matrix, as a view of it. A vector is one row; of a stack of matrices, the
    rows follow each other.
    """
    return parameter.detach().view(-1, parameter.shape[-1])
