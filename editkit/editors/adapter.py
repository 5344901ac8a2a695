"""Adapters that peft makes: their modules, their initialisation, and AdaLoRA's allocation of ranks.

peft wraps the matrices in a tree of their own, so the network keeps its modules. The network runs
with the adapter's sides (`LowRankSide`), which compute from peft's parameters.

Shape letters: R rank, I and O input and output width of a matrix.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.editors.low_rank_side import LowRankSide
from editkit.errors import OptionError, message, negative
from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

NAME = "default"  # of the adapter within peft's modules
EPSILON = 1e-5  # that peft adds to AdaLoRA's rank


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """AdaLoRA's schedule (Zhang et al. 2023, arXiv 2303.10512): documented in
    `conf/editor/adalora.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    initial_rank: int
    warmup: float  # shares of the steps of a batch
    final: float
    every: int  # steps; 0: never
    beta1: float
    beta2: float
    orthogonality: float

    def __post_init__(self) -> None:
        problems = [
            message(name, "out of range", got=value, expected="a number above 0 and below 1")
            for name, value in (("beta1", self.beta1), ("beta2", self.beta2))
            if not 0 < value < 1
        ]
        if min(self.warmup, self.final) < 0 or not self.warmup + self.final < 1:
            problem, got = "no steps are left for the allocation", [self.warmup, self.final]
            expected = "warmup and final of at least 0, together less than 1"
            problems.append(message("warmup", problem, got=got, expected=expected))
        problems += negative(self, "every", "orthogonality")
        if problems:
            raise OptionError(problems)

    def first_steps(self, steps: int) -> int:
        """The steps of a batch before the first allocation."""
        return math.floor(self.warmup * steps)

    def last_steps(self, steps: int) -> int:
        """The steps of a batch after the last allocation."""
        return math.floor(self.final * steps)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What peft is told of an adapter."""

    rank: int
    alpha: float
    dropout: float
    steps: int
    allocation: Allocation | None  # None: every matrix has this rank


def lacks_peft() -> list[str]:
    """The message without peft."""
    if importlib.util.find_spec("peft") is not None:
        return []
    problem, fix = "adapters need the package peft", "pip install 'editkit[peft]'"
    return [message("name", problem, fix=fix)]


class Adapter:
    """An adapter in training: the parameters of peft's modules."""

    def __init__(self, model: EditableModel, modules: Sequence[str], shape: Shape) -> None:
        """A new adapter, drawn from torch's global generator."""
        import peft

        self._shape, self._modules = shape, tuple(modules)
        tree, config = _tree(model, modules), _config(model, modules, shape)
        is_plain = shape.allocation is None
        self._tuner: Any = (peft.LoraModel if is_plain else peft.AdaLoraModel)(tree, config, NAME)
        self._layers = {name: tree.get_submodule(name) for name in modules}

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [each for each in self._tuner.parameters() if each.requires_grad]

    def sides(self, *, is_training: bool = False) -> tuple[LowRankSide, ...]:
        """What it is beside the matrices. Gradients flow into the parameters."""
        dropout = self._shape.dropout if is_training else 0.0
        return tuple(
            LowRankSide(
                module=name,
                down_RI=down_RI,
                up_OR=up_OR,
                scales_R=self._scale(scales_R1, down_RI),
                dropout=dropout,
            )
            for name in self._modules
            for down_RI, up_OR, scales_R1 in [self._tensors(name)]
        )

    def load(self, sides: Sequence[LowRankSide]) -> None:
        """Sets the parameters to those of sides of the same modules and ranks."""
        with torch.no_grad():
            for side in sides:
                down_RI, up_OR, scales_R1 = self._tensors(side.module)
                down_RI.copy_(side.down_RI)
                up_OR.copy_(side.up_OR)
                if scales_R1 is not None:
                    scales_R1.copy_(side.scales_R[:, None] / self._factor)

    def penalty(self) -> torch.Tensor | float:
        """AdaLoRA's: the mean of |P P^T - I|_F over both factors P of every matrix, times its
        weight; 0 without an allocation.
        """
        allocation = self._shape.allocation
        if allocation is None or not allocation.orthogonality:
            return 0.0
        grams_RR = [
            gram_RR
            for name in self._modules
            for down_RI, up_OR, _ in [self._tensors(name)]
            for gram_RR in (down_RI @ down_RI.T, up_OR.T @ up_OR)
        ]
        identity_RR = torch.eye(len(grams_RR[0])).to(grams_RR[0])
        norms = [torch.linalg.matrix_norm(gram_RR - identity_RR) for gram_RR in grams_RR]
        return allocation.orthogonality * torch.stack(norms).mean()

    def after_step(self, number: int) -> None:
        """Allocates the ranks after the optimiser's step, counted from 1. The gradients are those
        of the step.
        """
        allocation = self._shape.allocation
        if allocation is not None and allocation.every:
            self._tuner.update_and_allocate(number)

    @property
    def _factor(self) -> float:
        """Of all ranks: alpha / r. peft's AdaLoRA divides by the initial rank."""
        allocation = self._shape.allocation
        rank = self._shape.rank if allocation is None else allocation.initial_rank + EPSILON
        return self._shape.alpha / rank

    def _scale(self, scales_R1: torch.Tensor | None, down_RI: torch.Tensor) -> torch.Tensor:
        if scales_R1 is None:
            return down_RI.new_full((len(down_RI),), self._factor)
        return scales_R1[:, 0] * self._factor

    def _tensors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(R, I), (O, R), and AdaLoRA's singular values (R, 1)."""
        layer: Any = self._layers[name]
        down, up = layer.lora_A[NAME], layer.lora_B[NAME]
        if self._shape.allocation is None:
            return down.weight, up.weight, None
        return down, up, layer.lora_E[NAME]


def _config(model: EditableModel, modules: Sequence[str], shape: Shape) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    given: dict[str, Any] = {
        "target_modules": list(modules),
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        # A Conv1D, as GPT-2's, stores the transpose.
        "fan_in_fan_out": any(isinstance(model.module(name), Conv1D) for name in modules),
    }
    allocation = shape.allocation
    if allocation is None:
        return peft.LoraConfig(r=shape.rank, **given)
    return peft.AdaLoraConfig(
        target_r=shape.rank,
        init_r=allocation.initial_rank,
        total_step=shape.steps,
        tinit=allocation.first_steps(shape.steps),
        tfinal=allocation.last_steps(shape.steps),
        deltaT=max(1, allocation.every),
        beta1=allocation.beta1,
        beta2=allocation.beta2,
        orth_reg_weight=allocation.orthogonality,
        **given,
    )


def _tree(model: EditableModel, modules: Sequence[str]) -> torch.nn.Module:
    """A module that holds these modules of the network, and nothing else, under their names."""
    tree = torch.nn.Module()
    for name in modules:
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, torch.nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, model.module(name))
    return tree
