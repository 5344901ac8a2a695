"""TIES: several updates of a matrix as one (Yadav et al. 2023, arXiv 2306.01708).

Shape letters: K updates, O and I rows and columns.
"""

from __future__ import annotations

from editkit.lazy import torch


def ties(updates_KOI: torch.Tensor, density: float) -> torch.Tensor:
    """(O, I): each entry is the mean of the updates that agree with its elected sign.

    Args:
        density: the share of the entries of each update, by size, that is kept before; equal ones
            are kept together.
    """
    sizes_KN = updates_KOI.abs().flatten(1)
    kept = max(1, round(density * sizes_KN.shape[1]))
    least_K = sizes_KN.kthvalue(sizes_KN.shape[1] - kept + 1, dim=1).values
    trimmed_KOI = updates_KOI * (updates_KOI.abs() >= least_K[:, None, None])
    agrees_KOI = (trimmed_KOI.sign() == trimmed_KOI.sum(0).sign()) & (trimmed_KOI != 0)
    return (trimmed_KOI * agrees_KOI).sum(0) / agrees_KOI.sum(0).clamp(min=1)
