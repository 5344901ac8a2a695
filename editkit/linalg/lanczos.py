"""The largest eigenvalue of a symmetric operator, and certified extreme eigenvalues of a Gram
matrix.

The method is Lanczos with full reorthogonalisation (Golub & Van Loan, Matrix Computations, 4th ed.,
10.3) and shift-and-invert. A small residual only proves that *some* eigenvalue is near: a warm
start close to the second-largest eigenvector converges to the second-largest eigenvalue.
Sylvester's law of inertia certifies the extreme one: the Cholesky factorisation of G - mu I exists
only if no eigenvalue of G lies below mu. The same factor gives the shift-inverted operator of the
next round. Clustered extremes therefore cost one more factorisation instead of hundreds of steps.

Shape letters: M dimension, K Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from editkit.lazy import torch

# Steps of one round. A Cholesky factorisation of size 1600 costs about as much as 70 steps.
ROUND_STEPS = 48
CHECK_EVERY = 4  # steps between two solutions of the small tridiagonal problem
MAX_ROUNDS = 10
# Share of the fixed random vector in a warm start: every eigenvector needs a component in the
# start.
WARM_NOISE = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Ritz:
    """An approximate eigenpair; some eigenvalue lies within `error` of `value`."""

    value: float
    vector_M: torch.Tensor  # unit length
    error: float


def start_vector(like_M: torch.Tensor, warm_M: torch.Tensor | None) -> torch.Tensor:
    """The unit start vector: a fixed pseudo-random vector, plus the warm start if it is given and
    not empty.
    """
    generator = torch.Generator().manual_seed(0)
    noise_M = torch.randn(like_M.shape[0], generator=generator, dtype=torch.float64).to(
        like_M.device
    )
    noise_M = unit(noise_M)
    if warm_M is None or warm_M.numel() == 0:
        return noise_M
    return unit(warm_M.to(noise_M) + WARM_NOISE * noise_M)


def unit(vector_M: torch.Tensor) -> torch.Tensor:
    """The vector divided by its Euclidean norm."""
    scaled_M: torch.Tensor = vector_M / torch.linalg.vector_norm(vector_M)
    return scaled_M


def lanczos(
    apply: Callable[[torch.Tensor], torch.Tensor],
    start_M: torch.Tensor,
    *,
    max_steps: int,
    converged: Callable[[float, float], bool],
) -> Ritz:
    """The largest eigenvalue of the symmetric operator `apply`.

    The iteration stops once `converged(value, error)` holds, or after `max_steps`. An operator that
    overflows gives a Ritz pair with an infinite error.
    """
    steps = min(max_steps, start_M.shape[0])
    basis_KM = start_M.new_zeros((steps, start_M.shape[0]))
    basis_KM[0] = unit(start_M)
    diagonal: list[float] = []
    below: list[float] = []
    for step in range(1, steps + 1):
        known_KM = basis_KM[:step]
        image_M = apply(known_KM[-1])
        first_K = known_KM @ image_M
        image_M = image_M - known_KM.T @ first_K
        # Two passes are enough (Parlett). One pass loses orthogonality when the residual is small.
        second_K = known_KM @ image_M
        image_M = image_M - known_KM.T @ second_K
        diagonal.append(float(first_K[-1] + second_K[-1]))
        residual = float(torch.linalg.vector_norm(image_M))
        if not math.isfinite(residual) or not math.isfinite(diagonal[-1]):
            return Ritz(math.nan, start_M, math.inf)
        if step % CHECK_EVERY == 0 or step == steps or residual <= 1e-14 * abs(diagonal[-1]):
            tridiagonal_KK = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            # eigh reads the lower triangle only.
            tridiagonal_KK += torch.diag(torch.tensor(below, dtype=torch.float64), -1)
            values_K, vectors_KK = torch.linalg.eigh(tridiagonal_KK)
            value, error = float(values_K[-1]), residual * abs(float(vectors_KK[-1, -1]))
            if step == steps or residual == 0.0 or converged(value, error):
                break
        below.append(residual)
        basis_KM[step] = image_M / residual
    vector_M = known_KM.T @ vectors_KK[:, -1].to(start_M.device)
    return Ritz(value, unit(vector_M), error)


def inverse(lower_MM: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> (L L^T)^-1 x for a lower triangular L."""
    upper_MM = lower_MM.mT

    def apply(vector_M: torch.Tensor) -> torch.Tensor:
        half_M1 = torch.linalg.solve_triangular(lower_MM, vector_M[:, None], upper=False)
        whole_M1: torch.Tensor = torch.linalg.solve_triangular(upper_MM, half_M1, upper=True)
        return whole_M1[:, 0]

    return apply


def largest_eigenvalue(
    gram_MM: torch.Tensor, warm_M: torch.Tensor | None, *, tolerance: float
) -> Ritz | None:
    """The largest eigenvalue of a positive semidefinite matrix (float64), certified to a relative
    `tolerance`; None if the tolerance was not reached.
    """

    def first_round(start_M: torch.Tensor, steps: int) -> _Bracket:
        ritz = lanczos(
            lambda x_M: gram_MM @ x_M,
            start_M,
            max_steps=steps,
            converged=lambda value, error: error <= tolerance * value,
        )
        return _Bracket(-ritz.value, -(ritz.value + ritz.error), ritz.vector_M)

    # The largest eigenvalue of G is the smallest of -G, negated.
    bracket = _smallest(-gram_MM, first_round, warm_M, tolerance=tolerance)
    if bracket is None:
        return None
    return Ritz(-bracket.value, bracket.vector_M, bracket.value - bracket.lower)


def smallest_eigenvalue(
    gram_MM: torch.Tensor, warm_M: torch.Tensor | None, *, tolerance: float, floor: float
) -> Ritz | None:
    """The smallest eigenvalue of a positive definite matrix (float64), certified to a relative
    `tolerance`.

    None if the tolerance was not reached, if the matrix is not positive definite in float64, or if
    the eigenvalue lies below `floor`, where rounding would decide the certificate.
    """
    lower_MM, failed = torch.linalg.cholesky_ex(gram_MM)
    if int(failed):
        return None

    def first_round(start_M: torch.Tensor, steps: int) -> _Bracket:
        return _shifted_round(lower_MM, 0.0, start_M, steps=steps, tolerance=tolerance)

    bracket = _smallest(gram_MM, first_round, warm_M, tolerance=tolerance, floor=floor)
    if bracket is None:
        return None
    # One more inverse iteration damps the remaining components along the large eigenvectors. A
    # residual against W would magnify them.
    vector_M = inverse(lower_MM)(bracket.vector_M)
    return Ritz(bracket.value, unit(vector_M), bracket.value - bracket.lower)


@dataclass(frozen=True, slots=True, eq=False)
class _Bracket:
    """Bounds of the smallest eigenvalue: at most `value`, and at least `lower` unless the iteration
    missed it.
    """

    value: float
    lower: float
    vector_M: torch.Tensor

    def is_within(self, tolerance: float) -> bool:
        return self.value - self.lower <= tolerance * abs(self.value)


def _shifted_round(
    lower_MM: torch.Tensor, shift: float, start_M: torch.Tensor, *, steps: int, tolerance: float
) -> _Bracket:
    """One round of Lanczos on (S - shift I)^-1 = (L L^T)^-1.

    Its largest eigenvalue nu gives the smallest eigenvalue of S, which is shift + 1/nu.
    """

    def bracket(nu: float, error: float) -> tuple[float, float]:
        return (shift + 1 / nu, shift + 1 / (nu + error)) if nu > 0 else (math.nan, math.nan)

    def converged(nu: float, error: float) -> bool:
        value, lower = bracket(nu, error)
        return value - lower <= tolerance * abs(value)

    ritz = lanczos(inverse(lower_MM), start_M, max_steps=steps, converged=converged)
    value, lower = bracket(ritz.value, ritz.error)
    return _Bracket(value, lower, ritz.vector_M)


def _smallest(
    symmetric_MM: torch.Tensor,
    first_round: Callable[[torch.Tensor, int], _Bracket],
    warm_M: torch.Tensor | None,
    *,
    tolerance: float,
    floor: float | None = None,
) -> _Bracket | None:
    """Brackets the smallest eigenvalue by rounds of Lanczos. A Cholesky factorisation just below
    the candidate checks each round.
    """
    size = symmetric_MM.shape[0]
    cold = warm_M is None or warm_M.numel() == 0
    steps = ROUND_STEPS
    candidate = first_round(start_vector(symmetric_MM[0], warm_M), steps)
    for _ in range(MAX_ROUNDS):
        if not math.isfinite(candidate.lower) or (floor is not None and candidate.value < floor):
            return None
        done = candidate.is_within(tolerance)
        width = tolerance * abs(candidate.value) if done else candidate.value - candidate.lower
        shift = candidate.value - 2 * width
        shifted_MM = symmetric_MM.clone()
        shifted_MM.diagonal().sub_(shift)
        lower_MM, missed = torch.linalg.cholesky_ex(shifted_MM)
        if not int(missed):
            if done:
                return _Bracket(candidate.value, shift, candidate.vector_M)
            candidate = _shifted_round(
                lower_MM, shift, candidate.vector_M, steps=ROUND_STEPS, tolerance=tolerance
            )
        elif cold and steps >= size:
            return None
        # An eigenvalue lies below the shift: the warm start hid it, or the round was too short.
        else:
            steps = steps if not cold else 4 * steps
            cold = True
            candidate = first_round(start_vector(symmetric_MM[0], None), steps)
    return None
