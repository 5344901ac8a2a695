"""MEMIT and its relatives D4S and AlphaEdit: one edit with 6 contexts in five layers, the plain way
and ours.

MEMIT is measured in a large batch, too, and D4S after 2,000 edits.

Shape letters: I d_in, N keys, C contexts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.bench import plain
from editkit.bench.base import Found, Options
from editkit.bench.edit import Bench, bench_of, compare_edits, edit_cost, target_settings
from editkit.bench.synthetic import model_of
from editkit.editors.memit import Memit
from editkit.lazy import torch
from editkit.restraints.alphaedit import AlphaEdit
from editkit.restraints.base import AbstractSolveRestraint
from editkit.restraints.d4s import D4S
from editkit.stats.least_squares import LeastSquares

if TYPE_CHECKING:
    from editkit.types import EditRequest

TEXTS = 5  # of 10 tokens, beside the bare prompt
WEIGHT = 1.0  # of the second moment
# just above what the made-up second moments hold in three quarters of their dimensions
THRESHOLD = 0.011
L2 = 1.0
MANY_EDITS = 2000


def measure(options: Options) -> Found:
    """MEMIT with one request a batch; what a request costs in a batch of `options.batch`, ours
    against ours.
    """
    bench = _start(options)
    solve = plain.DenseSolve(prior_II=_prior(bench), remembers=False)
    found, _ = compare_edits(bench, _plain_edit(bench, solve), options)
    large = _start(replace(options, repeats=1), batch_size=options.batch)
    cost = edit_cost(large, 1)
    more = {
        "batch": options.batch,
        "batch_per_edit_s": cost.seconds / options.batch,
        "batch_gain": found.ours_s / cost.seconds * options.batch,
        "batch_cpu_gain": found.more["ours_cpu_s"] / cost.cpu_seconds * options.batch,
    }
    return replace(found, more={**found.more, **more})


def measure_d4s(options: Options) -> Found:
    """D4S; and how long an edit takes when 2,000 are in the history already, against one with
    none.
    """
    bench = _start(options, solve=D4S())
    solve = plain.DenseSolve(prior_II=_prior(bench), remembers=True)
    found, _ = compare_edits(bench, _plain_edit(bench, solve), options)
    first, later = bench.after(replace(bench.state, solve={})), _with_history(bench)
    pairs = [
        (edit_cost(first, number), edit_cost(later, number))
        for number in range(1, options.repeats + 1)
    ]
    more = {
        "edit_1_s": statistics.median(before.seconds for before, _ in pairs),
        f"edit_{MANY_EDITS}_s": statistics.median(after.seconds for _, after in pairs),
        "later_over_first": statistics.median(
            after.seconds / before.seconds for before, after in pairs
        ),
        "later_over_first_cpu": statistics.median(
            after.cpu_seconds / before.cpu_seconds for before, after in pairs
        ),
    }
    return replace(found, more={**found.more, **more})


def measure_alphaedit(options: Options) -> Found:
    restraint = AlphaEdit(threshold=THRESHOLD, threshold_unit="absolute", l2=L2)
    bench = _start(options, solve=restraint)
    module = bench.job.editor.modules(bench.job.model)[
        0
    ]  # the second moments are the same everywhere
    used_IR = bench.state.solve[f"{module}.complement"]
    projector_II = (
        torch.eye(len(used_IR), dtype=used_IR.dtype, device=used_IR.device) - used_IR @ used_IR.T
    )
    return compare_edits(
        bench, _plain_edit(bench, plain.DenseAlphaEdit(projector_II=projector_II, l2=L2)), options
    )[0]


def _start(
    options: Options, *, solve: AbstractSolveRestraint | None = None, batch_size: int = 1
) -> Bench:
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    editor = Memit(
        name="memit",
        layers=options.shape.memit_layers,
        covariance_weight=WEIGHT,
        spread="recomputed",
        context_lengths=((10, TEXTS),),
        target=target_settings(),
    )
    return bench_of(model, editor, options, solve=solve, batch_size=batch_size)


def _prior(bench: Bench) -> torch.Tensor:
    """lambda C, which the made-up second moments have in common."""
    return WEIGHT * bench.job.moments.second_moment(bench.job.editor.modules(bench.job.model)[0])


def _plain_edit(bench: Bench, solve: plain.Solve) -> plain.Edit:
    model, editor = bench.job.model, bench.job.editor
    assert isinstance(editor, Memit)
    weights_C = torch.tensor(
        [1 / 2, *[1 / 2 / TEXTS] * TEXTS], dtype=torch.float64, device=model.device
    )

    def edit(
        requests: tuple[EditRequest, ...], contexts: tuple[str, ...]
    ) -> Mapping[str, torch.Tensor]:
        return plain.memit(
            model,
            requests,
            layers=editor.layers,
            contexts=contexts,
            weights_C=weights_C,
            settings=target_settings(),
            solve=solve,
        )

    return edit


def _with_history(bench: Bench) -> Bench:
    """The run as if 2,000 made-up keys were in its memory."""
    job, solve_state = bench.job, bench.state.solve
    restraint = job.restraints.solve
    assert restraint is not None
    generator = torch.Generator().manual_seed(0)
    for module in job.editor.modules(job.model):
        size_O, size_I = job.model.weight(module).shape
        keys_IN = (
            torch.randn(size_I, MANY_EDITS, generator=generator, dtype=torch.float64).to(
                job.model.device
            )
            / size_I**0.5
        )
        problem = LeastSquares(
            module=module,
            keys_IN=keys_IN,
            residuals_ON=keys_IN.new_zeros(size_O, MANY_EDITS),
            weight=WEIGHT,
        )
        solve_state = restraint.observe(problem, solve_state, job.moments)
    return bench.after(replace(bench.state, solve=solve_state))
