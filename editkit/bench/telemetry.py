"""The spectrum after each edit: a full singular value decomposition in float64 (reference) against
warm-started extreme singular values (editkit).

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from functools import partial

from editkit.bench import rome
from editkit.bench.base import Comparison, Options, PairedTiming, timed
from editkit.lazy import torch
from editkit.linalg.spectral import extreme_singular_values

UPDATE_SIZE = 0.05  # sigma_max of an edit, as a fraction of that of the weight


def measure(options: Options) -> Comparison:
    """Both decompose the same matrices. The difference is the largest over both values and all
    edits.

    The matrix is Gaussian. The edges of its spectrum are dense, which is the hard case for an
    iterative method. `telemetry_share` is the share of all telemetry, which includes more than the
    spectrum, in an edit of ROME at this shape.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (options.shape.width, options.shape.inner)
    weight_OI = 0.02 * torch.randn(shape, generator=generator)
    weight_OI = weight_OI.to(device=options.device, dtype=getattr(torch, options.dtype))
    cold, spectrum = timed(lambda: extreme_singular_values(weight_OI), options.device)
    size = UPDATE_SIZE * spectrum.sigma_max
    timing, difference = PairedTiming(device=options.device), 0.0
    for _ in range(options.repeats):
        left_O, right_I = (torch.randn(length, generator=generator) for length in shape)
        update_OI = torch.outer(left_O / left_O.norm(), size * right_I / right_I.norm())
        weight_OI = (weight_OI.float() + update_OI.to(options.device)).to(weight_OI.dtype)
        spectrum = timing.run("ours", partial(extreme_singular_values, weight_OI, spectrum))
        values = timing.run("plain", partial(torch.linalg.svdvals, weight_OI.double()))
        pairs = ((spectrum.sigma_max, float(values[0])), (spectrum.sigma_min, float(values[-1])))
        difference = max(difference, *(abs(ours - exact) / exact for ours, exact in pairs))
    record, _ = rome.start(options).step(1)
    more = {
        "shape": list(shape),
        "ours_first_s": cold.seconds,
        "relative_error": difference,
        "rome_edit_s": sum(record.seconds.values()),
        "telemetry_share": record.seconds["telemetry"] / sum(record.seconds.values()),
    }
    return timing.comparison(relative_difference=difference, **more)
