"""MEND's hypernetwork, which maps the factors of a gradient to the factors of an update (Mitchell
et al. 2022, arXiv 2110.11309, section 3).

The gradient of a loss with respect to a matrix W is the sum over tokens of d_t x_t^T, where x_t is
the input of the matrix and d_t the gradient of its output. One network for all matrices of a shape
maps each pair to another pair,

    z = [norm(x), norm(d)]                                  running mean and standard deviation
    h = z + relu(scale_1 * (U_1 V_1 z + b_1) + shift_1)     Eq. 3a; scale and shift of one matrix
    g = h +  act(scale_2 * (U_2 V_2 h + b_2) + shift_2)     Eq. 3b; [x~, d~] = g
    W - alpha * sum over tokens of d~_t x~_t^T              Eq. 4; alpha is learned for each matrix

`act` is a ReLU in the paper's Eq. 3b, with which no coordinate can decrease. `last: linear` leaves
it out. Differences from the authors' code (algs/mend.py): they add alpha times the sum, so that
alpha must change its sign to descend; here it is subtracted, as in the paper. They update the
standard deviation token by token; here it is updated once per pass, in float64.

Shape letters: O d_out, I d_in, Z = I + O, R rank, M matrices of one shape, N any leading shape
(tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from editkit.errors import OptionError, message
from editkit.hypernet.abstract import STEP_SIZES, AbstractNetwork, Factors, Shape, name_of
from editkit.lazy import torch
from editkit.linalg.running import Running

TINY = 1e-7  # added to standard deviations, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The sizes of a hypernetwork: `editor.network` in the configuration.

    Raises:
        OptionError: an option is out of range.
    """

    rank: int  # of U V; the published value is 1920
    step_size: float  # alpha before training; the published value is 1e-4
    last: Literal["relu", "linear"]

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(message("rank", "out of range", got=self.rank, expected="at least 1"))
        if not self.step_size > 0:
            problems.append(message("step_size", "must be positive", got=self.step_size))
        if problems:
            raise OptionError(problems)


@dataclass(frozen=True, eq=False)
class Hypernetwork(AbstractNetwork):
    """MEND's weights and running statistics."""

    options: NetworkOptions

    def observed(self, factors: Mapping[str, Factors]) -> Hypernetwork:
        """The network with the statistics of further tokens, matrix by matrix."""
        tensors = dict(self.tensors)
        for module, own in factors.items():
            key = name_of(self.shapes[module])
            z_NZ = torch.cat([own.inputs_NI, own.gradients_NO], dim=-1)[own.counts_N]
            tensors |= Running.from_state(key, tensors).plus(z_NZ).state(key)
        return replace(self, tensors=tensors)

    def transform(self, module: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """The update left^T right of a matrix: left (N, O) and right (N, I), float32, with zeros
        for tokens that do not count.
        """
        key, place = (
            name_of(self.shapes[module]),
            self.modules_of(self.shapes[module]).index(module),
        )
        part = {
            name.removeprefix(f"{key}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{key}.")
        }
        deviation_Z = (part["squares"] / (part["count"] - 1)).sqrt() + TINY
        # Without at least two tokens there is no deviation yet.
        deviation_Z = torch.where(part["count"] < 2, torch.ones_like(deviation_Z), deviation_Z)
        z_NZ = torch.cat([factors.inputs_NI.float(), factors.gradients_NO.float()], dim=-1)
        z_NZ = (z_NZ - part["mean"].float()) / deviation_Z.float()
        # At 0, where training begins, the gradient of relu is 0 and that of clamp is 1.
        z_NZ = z_NZ + _layer(z_NZ, part, 1, place).clamp(min=0)
        second_NZ = _layer(z_NZ, part, 2, place)
        z_NZ = z_NZ + (second_NZ.clamp(min=0) if self.options.last == "relu" else second_NZ)
        z_NZ = z_NZ * factors.counts_N[..., None]
        right_NI, left_NO = z_NZ.split(
            [factors.inputs_NI.shape[-1], factors.gradients_NO.shape[-1]], dim=-1
        )
        return -self.tensors[STEP_SIZES][self.modules.index(module)] * left_NO, right_NI  # Eq. 4


def new_hypernetwork(
    shapes: Mapping[str, Shape], options: NetworkOptions, *, seed: int
) -> Hypernetwork:
    """An untrained network. It only scales a gradient: with U = 0 every pair stays unchanged."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {STEP_SIZES: torch.full((len(shapes),), options.step_size)}
    for shape in dict.fromkeys(tuple(shape) for shape in shapes.values()):
        size, matrices = sum(shape), [tuple(own) for own in shapes.values()].count(shape)
        key, rank = name_of(shape), min(options.rank, size)
        for layer in (1, 2):
            tensors[f"{key}.u{layer}"] = torch.zeros(size, rank)
            tensors[f"{key}.v{layer}"] = torch.randn(rank, size, generator=generator) / size**0.5
            tensors[f"{key}.b{layer}"] = torch.zeros(size)
            tensors[f"{key}.scale{layer}"] = torch.ones(matrices, size)
            tensors[f"{key}.shift{layer}"] = torch.zeros(matrices, size)
        tensors[f"{key}.mean"] = torch.zeros(size, dtype=torch.float64)
        tensors[f"{key}.squares"] = torch.zeros(size, dtype=torch.float64)
        tensors[f"{key}.count"] = torch.zeros((), dtype=torch.float64)
    return Hypernetwork(
        shapes={module: (shape[0], shape[1]) for module, shape in shapes.items()},
        options=options,
        tensors=tensors,
    )


def num_bytes(shapes: Sequence[Shape], options: NetworkOptions) -> int:
    """The bytes of the tensors of `new_hypernetwork` for these matrices."""
    count = 4 * len(shapes)
    for shape in set(shapes):
        size = sum(shape)
        count += 2 * 4 * (
            2 * min(options.rank, size) * size + size + 2 * shapes.count(shape) * size
        ) + 8 * (2 * size + 1)
    return count


def _layer(
    z_NZ: torch.Tensor, part: Mapping[str, torch.Tensor], layer: int, place: int
) -> torch.Tensor:
    u_ZR, v_RZ, b_Z = (part[f"{name}{layer}"] for name in "uvb")
    return (
        part[f"scale{layer}"][place] * ((z_NZ @ v_RZ.T) @ u_ZR.T + b_Z)
        + part[f"shift{layer}"][place]
    )
