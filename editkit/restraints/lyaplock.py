"""LyapLock: what is preserved is a constraint on the whole run, kept by a virtual queue.

Wang et al. 2025, "LyapLock: Bounded Knowledge Preservation in Sequential Large Language Model
Editing" (arXiv 2505.15702, EMNLP 2025; the published code). T = W - W_0 is the total so far, H the
sum of K K^T over earlier edits, G that of (W' K) K^T with W' the matrix after each edit. The first
batch is MEMIT's. Then, with the weight c = a Z lambda of C,

    D = (R K^T - c T C + G - W H) (K K^T + c C + H)^-1
    PL = tr(T C T^T)                                    the loss of what common text asks for
    Z <- max(Z + a (PL - alpha PL_1), z)                after each batch; PL_1 after the first
    z = sqrt(alpha PL_1), a = 1 / z, Z_1 = z            so that c is lambda until PL > alpha PL_1

lambda is `editor.covariance_weight` (published: 1000). The published code stores three more second
moments; all it needs follows from C and the total.

No edit costs I^3 while Z stays: the solution T (c C + H) is kept, up to what the last batch lacks,
E = R - D K at its keys K', so that

    D = (R K^T - E K'^T - (c - c') T C) (c C + H)^-1    K in H; c' the weight before

with the recursion of `editkit.linalg.recursive`, and PL from its change. A weight that grows takes
one factorisation and a dense update, as each edit of the published code does. The identity takes
the matrix as the solves left it: what a restraint on updates takes away is not asked for again.

Memory: two matrices of I x I x 8 bytes for each edited one; `solve.dtype=float32` halves them.

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank, Update
from editkit.linalg.recursive import Memory, memory_of, with_memory
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint
from editkit.stats.least_squares import LeastSquares, least_squares, weighted

if TYPE_CHECKING:
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, slots=True)
class Queue:
    """The virtual queue of one matrix, after a batch."""

    length: float  # Z
    loss: float  # PL
    first_loss: float  # PL_1
    weight: float  # c of that batch

    def next_weight(self, weight: float, alpha: float) -> float:
        """c of the next batch, for lambda = `weight`."""
        return weight * self.length / math.sqrt(alpha * self.first_loss)


@dataclass(frozen=True, kw_only=True)
class LyapLock(AbstractSolveRestraint):
    """The virtual queue in the least squares. `conf/restraint/lyaplock.yaml` documents the option.

    Raises:
        OptionError: alpha is out of range.
    """

    alpha: float  # the bound of PL, as a multiple of PL_1

    def __post_init__(self) -> None:
        if not 1 <= self.alpha < math.inf:
            expected = "1 or more: the first batch is within the bound; published: 60"
            raise OptionError(message("alpha", "out of range", got=self.alpha, expected=expected))

    def memory(self, work: Workload) -> SolveMemory:
        matrix = work.architecture.inner**2 * work.solve_bytes
        return SolveMemory(kept=2.0 * work.num_matrices * matrix, working=3.0 * matrix)

    def init(self, model: object, moments: Moments) -> TensorState:
        """No history. Raises ConfigError for a second moment that cannot be inverted."""
        moments.factorise_all()
        return {}

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> Update:
        """The update in the residuals' dtype: in factors while the weight of C stays."""
        queue = _queue(problem.module, state)
        if queue is None:
            return least_squares(problem, moments)
        weight = queue.next_weight(problem.weight, self.alpha)
        prior = weighted(replace(problem, weight=weight), moments)
        memory = self._memory(problem, state, weight, queue).plus(problem.keys_IN, prior)
        name, device = problem.module, problem.keys_IN.device
        last_IN, lack_ON = (state[f"{name}.{part}"].to(device) for part in ("keys", "lack"))
        both_IN = torch.cat([problem.keys_IN.double(), last_IN], dim=1)
        left_ON = torch.cat([problem.residuals_ON.double(), -lack_ON], dim=1)
        update = LowRank(left_ON, memory.inverse_times(both_IN, prior))
        dtype = problem.residuals_ON.dtype
        if weight == queue.weight:
            return update.to(dtype=dtype)
        assert problem.total is not None, "the step knows the total"
        total_OI = problem.total(moments.second_moment(name).to(device)).double()
        grown_OI = memory.inverse_times(total_OI.T, prior).T
        return (update.dense() - (weight - queue.weight) * grown_OI).to(dtype)

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """Adds the batch to the history, and moves the queue."""
        update, name = problem.update, problem.module
        assert update is not None, "the step knows the update"
        keys_IN, queue = problem.keys_IN.double(), _queue(name, state)
        lack_ON = problem.residuals_ON.double() - _times(update, keys_IN)
        loss = (queue.loss if queue else 0.0) + self._loss_added(problem, update, moments)
        if queue is None:
            weight, first, length = problem.weight, loss, math.sqrt(self.alpha * max(loss, 0.0))
            if not loss > 0:  # nothing was written: the next batch is the first
                return state
            memory = Memory()
        else:
            weight, first = queue.next_weight(problem.weight, self.alpha), queue.first_loss
            memory = self._memory(problem, state, weight, queue)
            shortest = math.sqrt(self.alpha * first)
            length = max(queue.length + (loss - self.alpha * first) / shortest, shortest)
        memory = memory.plus(
            keys_IN, weighted(replace(problem, weight=weight), moments), dtype=moments.dtype
        )
        white_IN = moments.whiten(name, keys_IN)
        history_II = (white_IN @ white_IN.T).to(getattr(torch, moments.dtype))
        if (earlier_II := state.get(f"{name}.history")) is not None:
            history_II = history_II + earlier_II.to(history_II.device)
        state = with_memory(state, name, memory)
        numbers = torch.tensor([length, loss, first, weight], dtype=torch.float64)
        parts = {"history": history_II, "keys": keys_IN, "lack": lack_ON, "queue": numbers}
        return {**state, **{f"{name}.{part}": tensor for part, tensor in parts.items()}}

    def _memory(
        self, problem: LeastSquares, state: TensorState, weight: float, queue: Queue
    ) -> Memory:
        """The history in the coordinates of weight * C, built anew if the weight has moved."""
        if weight == queue.weight:
            return memory_of(state, problem.module)
        history_II = state[f"{problem.module}.history"].to(problem.keys_IN.device)
        sum_II = history_II.double() / weight
        sum_II.diagonal().add_(1)
        lower_II, failed = torch.linalg.cholesky_ex(sum_II)
        lower_II = torch.where(failed > 0, torch.nan, lower_II)
        return Memory(base_JJ=torch.cholesky_inverse(lower_II).to(history_II.dtype))

    def _loss_added(self, problem: LeastSquares, update: Update, moments: Moments) -> float:
        """What the update D added to tr(T C T^T): 2 tr(D C T^T) - tr(D C D^T), T with D."""
        assert problem.total is not None, "the step knows the total"
        c_II = moments.second_moment(problem.module).to(problem.keys_IN.device)
        if isinstance(update, LowRank):
            left_OR, right_IR = update.left_OR.double(), update.right_IR.double()
            image_IR = c_II @ right_IR
            with_total = (left_OR * problem.total(image_IR).double()).sum()
            alone = ((left_OR.T @ left_OR) * (right_IR.T @ image_IR)).sum()
        else:
            dense_OI = update.double()
            with_total = (dense_OI * problem.total(c_II).double()).sum()
            alone = (dense_OI * (dense_OI @ c_II)).sum()
        return float(2 * with_total - alone)


def _queue(module: str, state: TensorState) -> Queue | None:
    numbers = state.get(f"{module}.queue")
    return None if numbers is None else Queue(*numbers.tolist())


def _times(update: Update, keys_IN: torch.Tensor) -> torch.Tensor:
    """D K, (O, N) float64."""
    if isinstance(update, LowRank):
        return update.left_OR.double() @ (update.right_IR.double().T @ keys_IN)
    return update.double() @ keys_IN
