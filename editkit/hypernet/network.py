"""The hypernetwork of MEND as values and functions: from the factors of a gradient to those of an
update (Mitchell et al. 2022, arXiv 2110.11309, section 3).

The gradient of a loss with respect to a matrix W is the sum over tokens of d_t x_t^T, where x_t
goes into the matrix and d_t is the gradient of what comes out. One network for all matrices of one
shape turns each pair into another pair,

    z = [norm(x), norm(d)]                                  running mean and standard deviation
    h = z + relu(scale_1 * (U_1 V_1 z + b_1) + shift_1)     Eq. 3a; scale and shift of one matrix
    g = h +  act(scale_2 * (U_2 V_2 h + b_2) + shift_2)     Eq. 3b; [x~, d~] = g
    W - alpha * sum over tokens of d~_t x~_t^T              Eq. 4; alpha is learned, one a matrix

`act` is a ReLU in the paper's Eq. 3b; with it no coordinate can become smaller. `last: linear`
leaves it out. Differs from the authors' code (algs/mend.py): they add alpha times the sum, so that
alpha has to change its sign to descend; ours subtracts it, as the paper writes. Their deviation is
that of the tokens seen so far, updated one by one; ours a pass at a time, in float64.

Shape letters: O d_out, I d_in, Z = I + O, R rank, M matrices of one shape, N any leading shape
(tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from editkit.errors import OptionError, message
from editkit.lazy import torch

TINY = 1e-7  # added to deviations, as in the authors' code
STATISTICS = ("mean", "squares", "count")  # of a shape; everything else is learned
STEP_SIZES = "step_sizes"

Shape = tuple[int, int]  # (O, I)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The sizes of a hypernetwork: `editor.network` in the configuration.

    Raises:
        OptionError: an option is out of range.
    """

    rank: int  # of U V; published 1920
    step_size: float  # alpha before training; published 1e-4
    last: Literal["relu", "linear"]

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(message("rank", "out of range", got=self.rank, expected="at least 1"))
        if not self.step_size > 0:
            problems.append(message("step_size", "must be positive", got=self.step_size))
        if problems:
            raise OptionError(problems)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What goes into a matrix and the gradient of what comes out, token by token; zeros where a
    token does not count.
    """

    inputs_NI: torch.Tensor
    gradients_NO: torch.Tensor

    @property
    def counts_N(self) -> torch.Tensor:
        """Which tokens take part: neither side is zero."""
        return (self.inputs_NI != 0).any(dim=-1) & (self.gradients_NO != 0).any(dim=-1)


@dataclass(frozen=True, eq=False)
class Hypernetwork:
    """Weights and running statistics for a set of matrices. A value: what learns makes a new one,
    or owns the tensors.
    """

    shapes: Mapping[str, Shape]  # by module, in the order in which they are edited
    options: NetworkOptions
    tensors: Mapping[str, torch.Tensor]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def modules_of(self, shape: Shape) -> tuple[str, ...]:
        """The matrices that share one network."""
        return tuple(module for module, each in self.shapes.items() if tuple(each) == tuple(shape))

    def learned(self) -> dict[str, torch.Tensor]:
        """What Adam moves."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.rpartition(".")[2] not in STATISTICS
        }

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Hypernetwork:
        """The same with some of the tensors exchanged."""
        return replace(self, tensors={**self.tensors, **tensors})

    def to(self, device: torch.device | str) -> Hypernetwork:
        return replace(
            self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()}
        )

    def detached(self) -> Hypernetwork:
        """A copy that nothing learns."""
        return replace(
            self, tensors={name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        )

    def observed(self, factors: Mapping[str, Factors]) -> Hypernetwork:
        """With the statistics of these tokens added, matrix after matrix (Chan's update of mean and
        sum of squares).
        """
        tensors = dict(self.tensors)
        for module, each in factors.items():
            key = name_of(self.shapes[module])
            z_NZ = torch.cat([each.inputs_NI, each.gradients_NO], dim=-1)[each.counts_N].double()
            if not len(z_NZ):
                continue
            mean_Z, squares_Z, count = (tensors[f"{key}.{name}"] for name in STATISTICS)
            new_Z = z_NZ.mean(dim=0)
            total = count + len(z_NZ)
            shift_Z = new_Z - mean_Z
            tensors[f"{key}.mean"] = mean_Z + shift_Z * (len(z_NZ) / total)
            tensors[f"{key}.squares"] = (
                squares_Z
                + (z_NZ - new_Z).square().sum(dim=0)
                + shift_Z.square() * (count * len(z_NZ) / total)
            )
            tensors[f"{key}.count"] = total
        return replace(self, tensors=tensors)

    def transform(self, module: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """The update of a matrix in factors, left (N, O) and right (N, I) float32: left^T right;
        zeros where a token does not count.
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
        deviation_Z = torch.where(
            part["count"] < 2, torch.ones_like(deviation_Z), deviation_Z
        )  # nothing is known yet
        z_NZ = torch.cat([factors.inputs_NI.float(), factors.gradients_NO.float()], dim=-1)
        z_NZ = (z_NZ - part["mean"].float()) / deviation_Z.float()
        z_NZ = z_NZ + _layer(z_NZ, part, 1, place).clamp(
            min=0
        )  # not relu: at 0, where training begins, its gradient is 0 and clamp's is 1
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
    """One that changes nothing but the scale yet: U = 0, so each pair stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {STEP_SIZES: torch.full((len(shapes),), options.step_size)}
    for shape in dict.fromkeys(tuple(shape) for shape in shapes.values()):
        size, matrices = sum(shape), [tuple(each) for each in shapes.values()].count(shape)
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
    """What the tensors of `new_hypernetwork` take, for these matrices."""
    count = 4 * len(shapes)
    for shape in set(shapes):
        size = sum(shape)
        count += 2 * 4 * (
            2 * min(options.rank, size) * size + size + 2 * shapes.count(shape) * size
        ) + 8 * (2 * size + 1)
    return count


def name_of(shape: Sequence[int]) -> str:
    """What the tensors of a shape's network begin with: "512x128" for O = 512, I = 128."""
    return f"{shape[0]}x{shape[1]}"


def _layer(
    z_NZ: torch.Tensor, part: Mapping[str, torch.Tensor], layer: int, place: int
) -> torch.Tensor:
    u_ZR, v_RZ, b_Z = (part[f"{name}{layer}"] for name in "uvb")
    return (
        part[f"scale{layer}"][place] * ((z_NZ @ v_RZ.T) @ u_ZR.T + b_Z)
        + part[f"shift{layer}"][place]
    )
