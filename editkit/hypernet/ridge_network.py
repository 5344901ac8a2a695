"""MALMEN's hypernetwork: it transforms the features of tokens, and a ridge regression turns them
into an update (Tan, Zhang & Fu 2024, "Massive Editing for Large Language Models via Meta Learning",
arXiv 2311.04661, ICLR 2024, and its code).

At the positions that predict target tokens a matrix has an input h and a gradient g of its output.

    x = [h^, g^]                                normalised by all tokens so far, as in UltraEdit
    x <- x + s * relu(U V x + b) + t            a block; s and t of one matrix, the rest of a shape
    v = -eta (h . h~) g~                        [h~, g~] = x; eta of one matrix
    D^T = (H^T H + e^l I)^-1 H^T V              l of one matrix

Without training U, b and t are zero: x stays as it is, and D is the ridge solution of normalised
gradients. `coefficient: normalised` takes |h~|^2 in place of h . h~, and the untrained network is
UltraEdit.

The gradient of a loss reaches the network in two phases, as published: forward without a graph, the
gradients of the losses with respect to V and l, and then token by token through the network alone.
No activation of all tokens is kept at once (`Shifts`).

Differs from the published code: statistics are exact (`editkit.linalg.running`), and the system has
the size of the tokens, not I x I.

Shape letters: O d_out, I d_in, Z = I + O, R rank, M matrices of one shape, T target tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import OptionError, message
from editkit.hypernet.abstract import STEP_SIZES, AbstractNetwork, Factors, Shape, name_of
from editkit.hypernet.features import joined
from editkit.hypernet.normaliser import Normaliser
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.capture import add_low_rank

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

LOG_RIDGES = "log_ridges"  # l, one for each matrix
TOKENS = 1024  # that pass through the network together

Coefficient = Literal["key", "normalised"]


@dataclass(frozen=True, kw_only=True)
class RidgeOptions:
    """The sizes of a network and its values before training: `editor.network` in the configuration.

    Raises:
        OptionError: an option is out of range.
    """

    rank: int  # of U V
    blocks: int
    step_size: float  # eta
    ridge: float  # e^l
    coefficient: Coefficient

    def __post_init__(self) -> None:
        problems = [
            message(name, "out of range", got=getattr(self, name), expected="at least 1")
            for name in ("rank", "blocks")
            if getattr(self, name) < 1
        ]
        problems += [
            message(name, "must be positive", got=getattr(self, name))
            for name in ("step_size", "ridge")
            if not getattr(self, name) > 0
        ]
        if problems:
            raise OptionError(problems)


@dataclass(frozen=True, eq=False)
class RidgeNetwork(AbstractNetwork):
    """MALMEN's weights and running statistics."""

    options: RidgeOptions

    def observed(self, factors: Mapping[str, Factors]) -> RidgeNetwork:
        """The network with the statistics of further tokens, (T, I) and (T, O) a matrix."""
        tensors = dict(self.tensors)
        for shape in dict.fromkeys(self.shapes[module] for module in factors):
            own = [factors[module] for module in self.modules_of(shape) if module in factors]
            tensors |= self._normaliser(shape).plus(joined(own)).state(name_of(shape))
        return self.with_tensors(tensors)

    def values(self, module: str, factors: Factors) -> torch.Tensor:
        """V, (T, O), in the dtype of the parameters: by what each token's output should change."""
        shape = self.shapes[module]
        key, place = name_of(shape), self.modules_of(shape).index(module)
        of_inputs, of_gradients = self._normaliser(shape).maps()
        dtype = self.tensors[STEP_SIZES].dtype
        x_TZ = torch.cat([of_inputs(factors.inputs_NI), of_gradients(factors.gradients_NO)], dim=-1)
        x_TZ = x_TZ.to(dtype)
        for block in range(self.options.blocks):
            u_ZR, v_RZ, b_Z, scale_MZ, shift_MZ = (
                self.tensors[f"{key}.{name}{block}"] for name in ("u", "v", "b", "scale", "shift")
            )
            # At 0, where training begins, the gradient of relu is 0 and that of clamp is 1.
            inner_TZ = ((x_TZ @ v_RZ.T) @ u_ZR.T + b_Z).clamp(min=0)
            x_TZ = x_TZ + scale_MZ[place] * inner_TZ + shift_MZ[place]
        keys_TI, gradients_TO = x_TZ.split([shape[1], shape[0]], dim=-1)
        own_TI = (
            keys_TI if self.options.coefficient == "normalised" else factors.inputs_NI.to(dtype)
        )
        products_T1 = (own_TI * keys_TI).sum(dim=-1, keepdim=True)
        values_TO: torch.Tensor = -self._of(STEP_SIZES, module) * products_T1 * gradients_TO
        return values_TO

    def rights(self, module: str, factors: Factors) -> torch.Tensor:
        """(H H^T + e^l I)^-1 H, (T, I) float64, with which D = V^T rights."""
        keys_TI = factors.inputs_NI.double()
        gram_TT = keys_TI @ keys_TI.T
        ridge = self._of(LOG_RIDGES, module).double().exp()
        system_TT = gram_TT + ridge * torch.eye(len(gram_TT)).to(gram_TT)
        lower_TT, failed = torch.linalg.cholesky_ex(system_TT)
        # Keys that are not finite, as after a collapse, make no factor: a result, not an error.
        lower_TT = torch.where(failed > 0, torch.nan, lower_TT)
        return torch.cholesky_solve(keys_TI, lower_TT)

    def update(self, module: str, factors: Factors) -> LowRank:
        """D, float32, with one column a token."""
        values_TO = torch.cat([self.values(module, part) for part in chunks(factors)]).double()
        return LowRank(values_TO.T, self.rights(module, factors).T).to(dtype=torch.float32)

    def _of(self, name: str, module: str) -> torch.Tensor:
        return self.tensors[name][self.modules.index(module)]

    def _normaliser(self, shape: Shape) -> Normaliser:
        return Normaliser.from_state(name_of(shape), self.tensors)


@dataclass(frozen=True, eq=False)
class Shifts:
    """The updates of a batch in factors, as leaves of a graph: losses give them gradients, and
    `backward` passes these on to the network.
    """

    network: RidgeNetwork
    factors: Mapping[str, Factors]
    values_TO: Mapping[str, torch.Tensor]  # V by module
    rights_TI: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, network: RidgeNetwork, factors: Mapping[str, Factors]) -> Shifts:
        """The updates that the network computes from these features, without a graph."""
        with torch.no_grad():
            values = {
                module: torch.cat([network.values(module, part) for part in chunks(own)])
                for module, own in factors.items()
            }
            rights = {module: network.rights(module, own) for module, own in factors.items()}
        for leaf in (*values.values(), *rights.values()):
            leaf.requires_grad_()
        return cls(network, factors, values, rights)

    @contextlib.contextmanager
    def applied(self, model: EditableModel) -> Iterator[None]:
        """Inside, every row passes the model with these updates."""
        with contextlib.ExitStack() as hooks:
            for module, values_TO in self.values_TO.items():
                rights_TI = self.rights_TI[module]
                hooks.enter_context(add_low_rank(model, module, values_TO[None], rights_TI[None]))
            yield

    def updates(self) -> dict[str, torch.Tensor]:
        """D by module, (O, I) float32, without a graph."""
        return {
            module: (values_TO.detach().double().T @ self.rights_TI[module].detach()).float()
            for module, values_TO in self.values_TO.items()
        }

    def penalty(self) -> torch.Tensor:
        """The sum over matrices of |D|_F^2, from the Gram matrices of the factors."""
        parts = []
        for module, values_TO in self.values_TO.items():
            wide_TO, rights_TI = values_TO.double(), self.rights_TI[module]
            parts.append(((wide_TO @ wide_TO.T) * (rights_TI @ rights_TI.T)).sum())
        return torch.stack(parts).sum()

    def backward(self, *, tokens: int = TOKENS) -> None:
        """Adds the gradients of the losses so far to those of the network's parameters.

        Args:
            tokens: so many pass through the network together; changes memory alone.
        """
        with torch.enable_grad():
            for module, own in self.factors.items():
                given_TO, given_TI = self.values_TO[module].grad, self.rights_TI[module].grad
                if given_TI is not None:
                    self.network.rights(module, own).backward(given_TI)
                if given_TO is None:
                    continue
                parts = zip(chunks(own, tokens), given_TO.split(tokens), strict=True)
                for part, gradient_TO in parts:
                    self.network.values(module, part).backward(gradient_TO)


def new_ridge_network(
    shapes: Mapping[str, Shape], options: RidgeOptions, *, seed: int
) -> RidgeNetwork:
    """An untrained network, which is the identity."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {
        STEP_SIZES: torch.full((len(shapes),), options.step_size),
        LOG_RIDGES: torch.full((len(shapes),), options.ridge).log(),
    }
    for shape in dict.fromkeys(tuple(shape) for shape in shapes.values()):
        size, matrices = sum(shape), [tuple(own) for own in shapes.values()].count(shape)
        key, rank = name_of(shape), min(options.rank, size)
        for block in range(options.blocks):
            tensors[f"{key}.u{block}"] = torch.zeros(size, rank)
            tensors[f"{key}.v{block}"] = torch.randn(rank, size, generator=generator) / size**0.5
            tensors[f"{key}.b{block}"] = torch.zeros(size)
            tensors[f"{key}.scale{block}"] = torch.ones(matrices, size)
            tensors[f"{key}.shift{block}"] = torch.zeros(matrices, size)
        tensors |= Normaliser.empty((shape[0], shape[1]), whitens=False).state(key)
    return RidgeNetwork(
        shapes={module: (shape[0], shape[1]) for module, shape in shapes.items()},
        options=options,
        tensors=tensors,
    )


def chunks(factors: Factors, tokens: int = TOKENS) -> list[Factors]:
    """The tokens in parts of so many."""
    pairs = zip(factors.inputs_NI.split(tokens), factors.gradients_NO.split(tokens), strict=True)
    return [Factors(inputs_NI, gradients_NO) for inputs_NI, gradients_NO in pairs]


def num_bytes(shapes: Sequence[Shape], options: RidgeOptions) -> int:
    """The bytes of the tensors of `new_ridge_network` for these matrices."""
    count = 8 * len(shapes)
    for shape in set(shapes):
        size = sum(shape)
        block = 2 * min(options.rank, size) * size + size + 2 * shapes.count(shape) * size
        count += 4 * options.blocks * block + 8 * (2 * size + 2)
    return count
