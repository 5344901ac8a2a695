"""The linear algebra of one update of a down projection: as published (plain), and editkit's.

    ultraedit    D^T = (H^T H + a I)^-1 H^T V by a system of I x I, or in the dual, of N x N
    sphere       the leading directions of the rows by eigenvectors of I x I, or of O x O
    lyaplock     a batch while the queue rests: the published formulas with an I x I system and a
                 dense update, or the recursion; both with what they do after the batch
    simie        the third batch: an edit of W_0 and its merge by two I x I systems, or by the
                 factorised C and the recursion; both with what they do after the batch

Keys, residuals, matrix and second moment are random. Results are compared as updates, dense.

Shape letters: O d_out, I d_in, N target tokens or edits of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from editkit.bench.base import Comparison, Options, PairedTiming, relative_difference
from editkit.lazy import torch
from editkit.linalg.lowrank import dense
from editkit.linalg.recursive import Memory, ridge
from editkit.restraints.base import Norms
from editkit.restraints.lyaplock import LyapLock
from editkit.restraints.simie import SimIE
from editkit.restraints.sphere import Sphere
from editkit.stats.least_squares import LeastSquares
from editkit.stats.store import Moments, SecondMoment

TARGET_TOKENS = 3  # of a request, typically
RIDGE = 1.0
ENERGY, ALPHA = 0.5, 0.8  # SPHERE's on MEMIT
WEIGHT, BOUND = 10.0, 60.0  # of C; LyapLock's alpha
NAME = "matrix"


class _Given:
    """Random inputs in float64, on the device."""

    def __init__(self, options: Options, columns: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.device, shape = options.device, options.shape
        self.rows, self.size, self.columns = shape.width, shape.inner, columns
        self.matrix_OI = self.normal(self.rows, self.size)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator).to(self.device)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (I, N) and residuals (O, N)."""
        return self.normal(self.size, self.columns), self.normal(self.rows, self.columns)


def _compared(
    options: Options, plain: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor]
) -> Comparison:
    timing, difference = PairedTiming(device=options.device), 0.0
    if options.device_type == "cuda":  # kernels are loaded at their first use
        ours()
    for _ in range(options.repeats):
        expected = timing.run("plain", plain)
        difference = max(difference, relative_difference(expected, timing.run("ours", ours)))
    return timing.comparison(relative_difference=difference)


def _second_moment(given: _Given) -> tuple[torch.Tensor, Moments]:
    """A random C, also as the statistics of the matrix."""
    factor_II = given.normal(given.size, given.size) / given.size**0.5
    c_II = factor_II @ factor_II.T
    c_II.diagonal().add_(0.1)
    return c_II, Moments({NAME: SecondMoment(NAME, c_II, 10 * given.size)})


def measure_ultraedit(options: Options) -> Comparison:
    """One solve for a batch's target tokens, `TARGET_TOKENS` a request."""
    given = _Given(options, TARGET_TOKENS * options.batch)
    keys_IN, values_ON = given.batch()

    def plain() -> torch.Tensor:
        normal_II = keys_IN @ keys_IN.T
        normal_II.diagonal().add_(RIDGE)
        found_IO: torch.Tensor = torch.linalg.solve(normal_II, keys_IN @ values_ON.T)
        return found_IO.T

    return _compared(
        options, plain, lambda: Memory().solve(keys_IN, values_ON, ridge(RIDGE)).dense()
    )


def measure_sphere(options: Options) -> Comparison:
    """One update, damped."""
    given = _Given(options, options.batch)
    keys_IN, values_ON = given.batch()
    # Rows whose directions are not all alike: a few hold the share.
    scale_I = torch.logspace(0, -2, given.size, dtype=torch.float64, device=given.device)
    matrix_OI, update = given.matrix_OI * scale_I, values_ON @ keys_IN.T
    norms = Norms(sigma_max=1.0, frobenius=1.0)  # not used

    def plain() -> torch.Tensor:
        rows_OI = matrix_OI / matrix_OI.norm(dim=1, keepdim=True)
        values_I, vectors_II = torch.linalg.eigh(rows_OI.T @ rows_OI / len(rows_OI))
        shares_I = values_I.flip(0).cumsum(0) / values_I.sum()
        leading_IR = vectors_II.flip(1)[:, : int((shares_I < ENERGY).sum()) + 1]
        along_OI: torch.Tensor = (update @ leading_IR) @ leading_IR.T
        return update - ALPHA * along_OI

    sphere = Sphere(energy=ENERGY, alpha=ALPHA)
    return _compared(options, plain, lambda: dense(sphere.restrain(update, matrix_OI, norms)))


def measure_lyaplock(options: Options) -> Comparison:
    """The third batch of a run whose queue rests, with the bookkeeping after it."""
    given = _Given(options, options.batch)
    c_II, moments = _second_moment(given)
    restraint = LyapLock(alpha=BOUND)
    state, total_OI = restraint.init(None, moments), torch.zeros_like(given.matrix_OI)
    history_II = torch.zeros_like(c_II)
    outputs_OI = torch.zeros_like(total_OI)

    def problem(keys_IN: torch.Tensor, values_ON: torch.Tensor) -> LeastSquares:
        return LeastSquares(
            module=NAME,
            keys_IN=keys_IN,
            residuals_ON=values_ON,
            weight=WEIGHT,
            total=lambda columns: total_OI @ columns,
        )

    for _ in range(2):
        keys_IN, values_ON = given.batch()
        asked = problem(keys_IN, values_ON)
        update = restraint.solve(asked, state, moments)
        total_OI = total_OI + dense(update)
        state = restraint.observe(replace(asked, update=update), state, moments)
        history_II = history_II + keys_IN @ keys_IN.T
        outputs_OI = outputs_OI + total_OI @ keys_IN @ keys_IN.T
    keys_IN, values_ON = given.batch()

    def plain() -> torch.Tensor:
        wanted_OI = values_ON @ keys_IN.T - WEIGHT * total_OI @ c_II
        wanted_OI = wanted_OI + outputs_OI - total_OI @ history_II
        system_II = keys_IN @ keys_IN.T + WEIGHT * c_II + history_II
        found_OI: torch.Tensor = torch.linalg.solve(system_II, wanted_OI.T).T
        after_OI = total_OI + found_OI
        (after_OI @ c_II * after_OI).sum()  # PL
        return found_OI

    def ours() -> torch.Tensor:
        asked = problem(keys_IN, values_ON)
        update = restraint.solve(asked, state, moments)
        # The total stays as it was: the bookkeeping takes as long with any.
        restraint.observe(replace(asked, update=update), state, moments)
        return dense(update)

    return _compared(options, plain, ours)


def measure_simie(options: Options) -> Comparison:
    """The third batch of a run, with the bookkeeping after it."""
    given = _Given(options, options.batch)
    c_II, moments = _second_moment(given)
    restraint = SimIE(ridge=RIDGE)
    state, total_OI = restraint.init(None, moments), torch.zeros_like(given.matrix_OI)
    history_II = RIDGE * torch.eye(given.size, dtype=c_II.dtype, device=c_II.device)

    def problem(keys_IN: torch.Tensor, values_ON: torch.Tensor) -> LeastSquares:
        return LeastSquares(
            module=NAME,
            keys_IN=keys_IN,
            residuals_ON=values_ON - total_OI @ keys_IN,  # the step takes off what is written
            weight=WEIGHT,
            total=lambda columns: total_OI @ columns,
        )

    for _ in range(2):
        keys_IN, values_ON = given.batch()
        asked = problem(keys_IN, values_ON)
        total_OI = total_OI + dense(restraint.solve(asked, state, moments))
        state = restraint.observe(asked, state, moments)
        history_II = history_II + keys_IN @ keys_IN.T
    keys_IN, values_ON = given.batch()

    def plain() -> torch.Tensor:
        gram_II = keys_IN @ keys_IN.T
        alone_OI = torch.linalg.solve(WEIGHT * c_II + gram_II, keys_IN @ values_ON.T).T
        wanted_OI = (alone_OI - total_OI) @ gram_II
        found_OI: torch.Tensor = torch.linalg.solve(history_II + gram_II, wanted_OI.T).T
        return found_OI

    def ours() -> torch.Tensor:
        asked = problem(keys_IN, values_ON)
        update = restraint.solve(asked, state, moments)
        restraint.observe(asked, state, moments)
        return dense(update)

    return _compared(options, plain, ours)
