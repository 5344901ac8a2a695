"""The sum of all updates of one matrix, D = W_N - W_0, in the order in which they were applied.

Shape letters: O d_out, I d_in, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from editkit.lazy import torch
from editkit.linalg import lowrank
from editkit.linalg.lowrank import LowRank, Update


@dataclass(frozen=True, slots=True, eq=False)
class Total:
    """A sum of low-rank blocks while the factors are smaller than the matrix, and a float32 matrix
    from then on.

    Floating-point sums depend on their order, so the total keeps the boundaries of its blocks.
    `dense` adds the blocks one by one in float32. Its bits equal those of a matrix to which every
    update was added at its step. `plus` carries this sum along, because the model needs it after
    every edit. A total from a checkpoint has no sum until the next `plus`.
    """

    shape: tuple[int, int]
    blocks: tuple[LowRank, ...] = ()  # empty once the total is dense
    # (O, I) float32, the sum so far; may be None while there are blocks
    matrix: torch.Tensor | None = None

    def plus(self, update: Update) -> Total:
        """The total with one more update.

        The result is dense if the update is dense, or if the factors would take as much memory as
        the matrix.

        Raises:
            ValueError: the update has another shape.
        """
        shape = tuple(update.shape)
        if shape != self.shape:
            raise ValueError(
                f"an update of shape {shape} does not fit a total of shape {self.shape}"
            )
        blocks: tuple[LowRank, ...] = ()
        if (
            not self.is_dense
            and isinstance(update, LowRank)
            and self.rank + update.rank < self._dense_rank
        ):
            update = update if update.dtype == torch.float64 else update.to(dtype=torch.float32)
            blocks = (*self.blocks, update)
        matrix_OI = lowrank.dense(update).to(torch.float32)
        sum_OI = self._sum()
        return Total(
            self.shape, blocks=blocks, matrix=matrix_OI + (0.0 if sum_OI is None else sum_OI)
        )

    @property
    def is_zero(self) -> bool:
        """Whether no update was added yet."""
        return not self.blocks and self.matrix is None

    @property
    def is_dense(self) -> bool:
        """Whether the total is a matrix without factors."""
        return not self.blocks and self.matrix is not None

    @property
    def rank(self) -> int:
        """An upper bound of the rank: the number of columns of all factors, or min(O, I) if
        dense.
        """
        return min(self.shape) if self.is_dense else sum(block.rank for block in self.blocks)

    def dense(self) -> torch.Tensor:
        """D as a new (O, I) float32 tensor, on the device of the updates, or on the CPU if there
        are none.
        """
        if self.matrix is not None:
            return self.matrix.clone()
        sum_OI = self._sum()
        return torch.zeros(self.shape) if sum_OI is None else sum_OI

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(u_OK, s_K, v_IK) in float64 with s descending, from the factors unless the total is
        dense.
        """
        if not self.is_dense:
            return self._factors().svd()
        u_OK, s_K, vt_KI = torch.linalg.svd(self.dense().double(), full_matrices=False)
        return u_OK, s_K, vt_KI.mT

    def sigma_max(self) -> float:
        """The largest singular value; nan if the total is not finite."""
        return lowrank.sigma_max(self._update())

    def frobenius(self) -> float:
        """The Frobenius norm of the float32 sum; nan if the total is not finite."""
        sum_OI = self._sum()
        return 0.0 if sum_OI is None else lowrank.frobenius(sum_OI)

    def is_finite(self) -> bool:
        """Whether the total holds no nan and no infinity."""
        return lowrank.is_finite(self._update())

    def to(self, *, device: torch.device | str) -> Total:
        """The same total on another device."""
        matrix_OI = None if self.matrix is None else self.matrix.to(device)
        return Total(
            self.shape,
            blocks=tuple(block.to(device=device) for block in self.blocks),
            matrix=matrix_OI,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint: the concatenated factors with the rank and dtype of each block,
        or the matrix. A zero total has no tensors.
        """
        if self.is_zero:
            return {}
        if self.is_dense:
            return {"matrix": self.dense().cpu()}
        factors = self._factors()
        return {
            "left": factors.left_OR.cpu(),
            "right": factors.right_IR.cpu(),
            "ranks": torch.tensor([block.rank for block in self.blocks], dtype=torch.int64),
            "is_double": torch.tensor(
                [block.dtype == torch.float64 for block in self.blocks], dtype=torch.bool
            ),
        }

    @classmethod
    def from_state(cls, shape: tuple[int, int], state: Mapping[str, torch.Tensor]) -> Total:
        """The inverse of `state`; `dense` returns the same bits."""
        if not state:
            return cls(shape)
        if "matrix" in state:
            return cls(shape, matrix=state["matrix"].clone())
        ranks = state["ranks"].tolist()
        pairs = zip(
            state["left"].split(ranks, dim=1),
            state["right"].split(ranks, dim=1),
            state["is_double"].tolist(),
            strict=True,
        )
        return cls(
            shape,
            blocks=tuple(
                _owned(left, right, torch.float64 if double else torch.float32)
                for left, right, double in pairs
            ),
        )

    @property
    def _dense_rank(self) -> float:
        rows, columns = self.shape
        return rows * columns / (rows + columns)

    def _factors(self) -> LowRank:
        """The concatenated factors of all blocks; rank 0 if there are none."""
        if not self.blocks:
            rows, columns = self.shape
            return LowRank(torch.zeros(rows, 0), torch.zeros(columns, 0))
        return LowRank(
            torch.cat([block.left_OR for block in self.blocks], dim=1),
            torch.cat([block.right_IR for block in self.blocks], dim=1),
        )

    def _update(self) -> Update:
        return self.dense() if self.is_dense else self._factors()

    def _sum(self) -> torch.Tensor | None:
        """The float32 sum, or None for a zero total. Callers must not write to it."""
        if self.matrix is not None or not self.blocks:
            return self.matrix
        # Adding 0.0 removes negative zeros, as a sum that begins with zeros does.
        sum_OI = self.blocks[0].dense().to(torch.float32) + 0.0
        for block in self.blocks[1:]:
            sum_OI += block.dense().to(torch.float32)
        return sum_OI


def _owned(left_OR: torch.Tensor, right_IR: torch.Tensor, dtype: torch.dtype) -> LowRank:
    """A contiguous copy. A slice has other strides, and the bits of a product may depend on
    them.
    """
    layout = torch.contiguous_format
    return LowRank(
        left_OR.to(dtype).clone(memory_format=layout),
        right_IR.to(dtype).clone(memory_format=layout),
    )
