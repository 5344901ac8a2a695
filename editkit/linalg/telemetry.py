"""The telemetry of an edited matrix after every step: the values of `modules` in `steps.jsonl`.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from editkit.lazy import torch
from editkit.linalg import lowrank
from editkit.linalg.lowrank import Update
from editkit.linalg.spectral import Spectrum
from editkit.linalg.total import Total


def l1_norm_of(weight_OI: torch.Tensor) -> float:
    """The sum of the absolute entries, in float64."""
    return float(torch.linalg.vector_norm(weight_OI, ord=1, dtype=torch.float64))


def module_record(
    weight_OI: torch.Tensor,
    spectrum: Spectrum,
    update: Update | None,
    total: Total,
    *,
    rounding_error: float = 0.0,
) -> dict[str, float]:
    """The figures of one matrix in its current state, in float64; nan if an input is not finite.

    `l1_norm` is the sum of the absolute entries, `l1_mean` is `l1_norm` divided by their number. A
    vector, as of a bias, has no condition number.

    Args:
        spectrum: of `weight_OI`.
        update: of this step; None at step 0.
        total: the sum of all updates, including `update`.
        rounding_error: the return value of `EditableModel.apply`, the relative part of the update
            that the storage dtype lost.
    """
    l1_norm = l1_norm_of(weight_OI)
    is_vector = min(weight_OI.shape) == 1
    return {
        **({} if is_vector else {"condition_number": spectrum.condition_number}),
        "sigma_max": spectrum.sigma_max,
        "sigma_min": spectrum.sigma_min,
        "l1_norm": l1_norm,
        "l1_mean": l1_norm / weight_OI.numel(),
        "frobenius": lowrank.frobenius(weight_OI),
        "update_frobenius": 0.0 if update is None else lowrank.frobenius(update),
        "update_sigma_max": 0.0 if update is None else lowrank.sigma_max(update),
        "total_frobenius": total.frobenius(),
        "total_sigma_max": total.sigma_max(),
        "rounding_error": rounding_error,
    }
