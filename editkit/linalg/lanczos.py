"""The largest eigenvalue of a symmetric operator, and certified extreme eigenvalues of a Gram
matrix.

Lanczos with full reorthogonalisation (Golub & Van Loan, Matrix Computations, 4th ed., 10.3) and
shift-and-invert. A small residual only says that *an* eigenvalue is near: a warm start close to the
second-largest eigenvector converges to it. What makes the answer the extreme one is Sylvester's law
of inertia: the Cholesky factorisation of G - mu I exists only if no eigenvalue of G lies below mu.
The same factor is the shift-inverted operator for the next round, so that clustered extremes cost
one more factorisation, not hundreds of steps.

Shape letters: M dimension, K Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from editkit.lazy import torch

ROUND_STEPS = (
    48  # of one round; a Cholesky factorisation of size 1600 costs about as much as 70 steps
)
CHECK_EVERY = 4  # the small tridiagonal problem is solved every so many steps
MAX_ROUNDS = 10
WARM_NOISE = (
    0.05  # share of the fixed random vector in a warm start: no eigenvector may be missing from it
)


@dataclass(frozen=True, slots=True, eq=False)
class Ritz:
    """An approximate eigenpair; some eigenvalue lies within `error` of `value`."""

    value: float
    vector_M: torch.Tensor  # unit length
    error: float


def start_vector(like_M: torch.Tensor, warm_M: torch.Tensor | None) -> torch.Tensor:
    """A unit vector to start from: always the same pseudo-random one, the warm start (if any, and
    not empty) on top of it.
    """
    generator = torch.Generator().manual_seed(0)
    noise_M = torch.randn(like_M.shape[0], generator=generator, dtype=torch.float64).to(
        like_M.device
    )
    noise_M = noise_M / torch.linalg.vector_norm(noise_M)
    if warm_M is None or warm_M.numel() == 0:
        return noise_M
    mixed_M = warm_M.to(noise_M) + WARM_NOISE * noise_M
    return mixed_M / torch.linalg.vector_norm(mixed_M)


def lanczos(
    apply: Callable[[torch.Tensor], torch.Tensor],
    start_M: torch.Tensor,
    *,
    max_steps: int,
    converged: Callable[[float, float], bool],
) -> Ritz:
    """The largest eigenvalue of the symmetric operator `apply`; stops where `converged(value,
    error)` holds, or after `max_steps`.

    An operator that overflows gives a Ritz pair whose error is infinite.
    """
    steps = min(max_steps, start_M.shape[0])
    basis_KM = start_M.new_zeros((steps, start_M.shape[0]))
    basis_KM[0] = start_M / torch.linalg.vector_norm(start_M)
    diagonal: list[float] = []
    below: list[float] = []
    for step in range(1, steps + 1):
        known_KM = basis_KM[:step]
        image_M = apply(known_KM[-1])
        first_K = known_KM @ image_M
        image_M = image_M - known_KM.T @ first_K
        second_K = (
            known_KM @ image_M
        )  # twice is enough (Parlett): once loses orthogonality when the residual is small
        image_M = image_M - known_KM.T @ second_K
        diagonal.append(float(first_K[-1] + second_K[-1]))
        residual = float(torch.linalg.vector_norm(image_M))
        if not math.isfinite(residual) or not math.isfinite(diagonal[-1]):
            return Ritz(math.nan, start_M, math.inf)
        if step % CHECK_EVERY == 0 or step == steps or residual <= 1e-14 * abs(diagonal[-1]):
            tridiagonal_KK = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            tridiagonal_KK += torch.diag(
                torch.tensor(below, dtype=torch.float64), -1
            )  # eigh reads the lower triangle
            values_K, vectors_KK = torch.linalg.eigh(tridiagonal_KK)
            value, error = float(values_K[-1]), residual * abs(float(vectors_KK[-1, -1]))
            if step == steps or residual == 0.0 or converged(value, error):
                break
        below.append(residual)
        basis_KM[step] = image_M / residual
    vector_M = known_KM.T @ vectors_KK[:, -1].to(start_M.device)
    return Ritz(value, vector_M / torch.linalg.vector_norm(vector_M), error)


def inverse(lower_MM: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> (L L^T)^-1 x for a lower triangular L."""
    upper_MM = lower_MM.mT

    def apply(vector_M: torch.Tensor) -> torch.Tensor:
        half_M1 = torch.linalg.solve_triangular(lower_MM, vector_M[:, None], upper=False)
        return torch.linalg.solve_triangular(upper_MM, half_M1, upper=True)[:, 0]

    return apply


def largest_eigenvalue(
    gram_MM: torch.Tensor, warm_M: torch.Tensor | None, *, tolerance: float
) -> Ritz | None:
    """The largest eigenvalue of a positive semidefinite matrix (float64), certified to `tolerance`;
    None if that could not be reached.
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
    found = _smallest(-gram_MM, first_round, warm_M, tolerance=tolerance)
    return None if found is None else Ritz(-found.value, found.vector_M, found.value - found.lower)


def smallest_eigenvalue(
    gram_MM: torch.Tensor, warm_M: torch.Tensor | None, *, tolerance: float, floor: float
) -> Ritz | None:
    """The smallest eigenvalue of a positive definite matrix (float64), certified to `tolerance`.

    None if that could not be reached: not positive definite in float64, or below `floor`, where
    rounding would decide the certificate.
    """
    lower_MM, failed = torch.linalg.cholesky_ex(gram_MM)
    if int(failed):
        return None

    def first_round(start_M: torch.Tensor, steps: int) -> _Bracket:
        return _shifted_round(lower_MM, 0.0, start_M, steps=steps, tolerance=tolerance)

    found = _smallest(gram_MM, first_round, warm_M, tolerance=tolerance, floor=floor)
    if found is None:
        return None
    # One more inverse iteration: it damps what is left of the large eigenvectors, which a residual
    # against W would magnify.
    vector_M = inverse(lower_MM)(found.vector_M)
    return Ritz(
        found.value, vector_M / torch.linalg.vector_norm(vector_M), found.value - found.lower
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Bracket:
    """The smallest eigenvalue is at most `value`, and at least `lower` unless the iteration missed
    it.
    """

    value: float
    lower: float
    vector_M: torch.Tensor

    def is_within(self, tolerance: float) -> bool:
        return self.value - self.lower <= tolerance * abs(self.value)


def _shifted_round(
    lower_MM: torch.Tensor, shift: float, start_M: torch.Tensor, *, steps: int, tolerance: float
) -> _Bracket:
    """One round of Lanczos on (S - shift I)^-1 = (L L^T)^-1, whose largest eigenvalue nu belongs to
    the smallest of S: shift + 1/nu.
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
    """Brackets the smallest eigenvalue by rounds of Lanczos, each followed by a Cholesky
    factorisation just below what it found.
    """
    size = symmetric_MM.shape[0]
    cold = warm_M is None or warm_M.numel() == 0
    steps = ROUND_STEPS
    found = first_round(start_vector(symmetric_MM[0], warm_M), steps)
    for _ in range(MAX_ROUNDS):
        if not math.isfinite(found.lower) or (floor is not None and found.value < floor):
            return None
        done = found.is_within(tolerance)
        width = tolerance * abs(found.value) if done else found.value - found.lower
        shift = found.value - 2 * width
        shifted_MM = symmetric_MM.clone()
        shifted_MM.diagonal().sub_(shift)
        lower_MM, missed = torch.linalg.cholesky_ex(shifted_MM)
        if not int(missed):
            if done:
                return _Bracket(found.value, shift, found.vector_M)
            found = _shifted_round(
                lower_MM, shift, found.vector_M, steps=ROUND_STEPS, tolerance=tolerance
            )
        elif cold and steps >= size:
            return None
        # an eigenvalue lies below the shift: the warm start hid it, or the round was too short
        else:
            steps = steps if not cold else 4 * steps
            cold = True
            found = first_round(start_vector(symmetric_MM[0], None), steps)
    return None
