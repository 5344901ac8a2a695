"""MEMIT, D4S and AlphaEdit: one edit with 6 contexts in five layers. MEMIT is also measured in a
large batch, and D4S after 2,000 edits.

Shape letters: I d_in, N keys, C contexts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.bench import reference
from editkit.bench.base import Comparison, Options
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

TEXTS = 5  # of 10 tokens each, in addition to the prompt alone
WEIGHT = 1.0  # of the second moment
# Just above the eigenvalues of three quarters of the synthetic second moments' dimensions.
THRESHOLD = 0.011
L2 = 1.0
MANY_EDITS = 2000


def measure(options: Options) -> Comparison:
    """MEMIT with one request per batch. Also the cost of a request of editkit in a batch of
    `options.batch`.
    """
    bench = _start(options)
    solve = reference.DenseSolve(prior_II=_prior(bench), remembers=False)
    comparison, _ = compare_edits(bench, _reference_edit(bench, solve), options)
    large = _start(replace(options, repeats=1), batch_size=options.batch)
    cost = edit_cost(large, 1)
    more = {
        "batch": options.batch,
        "batch_per_edit_s": cost.seconds / options.batch,
        "batch_gain": comparison.ours_s / cost.seconds * options.batch,
        "batch_cpu_gain": comparison.more["ours_cpu_s"] / cost.cpu_seconds * options.batch,
    }
    return replace(comparison, more={**comparison.more, **more})


def measure_d4s(options: Options) -> Comparison:
    """D4S. Also the time of an edit after 2,000 edits against that of the first."""
    bench = _start(options, solve=D4S())
    solve = reference.DenseSolve(prior_II=_prior(bench), remembers=True)
    comparison, _ = compare_edits(bench, _reference_edit(bench, solve), options)
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
    return replace(comparison, more={**comparison.more, **more})


def measure_alphaedit(options: Options) -> Comparison:
    restraint = AlphaEdit(threshold=THRESHOLD, threshold_unit="absolute", l2=L2)
    bench = _start(options, solve=restraint)
    module = bench.run.editor.modules(bench.run.model)[0]  # all have the same second moments
    used_IR = bench.state.solve[f"{module}.complement"]
    projector_II = (
        torch.eye(len(used_IR), dtype=used_IR.dtype, device=used_IR.device) - used_IR @ used_IR.T
    )
    solve = reference.DenseAlphaEdit(projector_II=projector_II, l2=L2)
    return compare_edits(bench, _reference_edit(bench, solve), options)[0]


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
    """lambda C, which is the same for all modules with synthetic second moments."""
    module = bench.run.editor.modules(bench.run.model)[0]
    prior_II: torch.Tensor = WEIGHT * bench.run.moments.second_moment(module)
    return prior_II


def _reference_edit(bench: Bench, solve: reference.Solve) -> reference.Edit:
    model, editor = bench.run.model, bench.run.editor
    assert isinstance(editor, Memit)
    weights_C = torch.tensor(
        [1 / 2, *[1 / 2 / TEXTS] * TEXTS], dtype=torch.float64, device=model.device
    )

    def edit(
        requests: tuple[EditRequest, ...], contexts: tuple[str, ...]
    ) -> Mapping[str, torch.Tensor]:
        return reference.memit(
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
    """The run with 2,000 synthetic keys in its history."""
    run, solve_state = bench.run, bench.state.solve
    restraint = run.restraints.solve
    assert restraint is not None
    generator = torch.Generator().manual_seed(0)
    for module in run.editor.modules(run.model):
        size_O, size_I = run.model.weight(module).shape
        keys_IN = (
            torch.randn(size_I, MANY_EDITS, generator=generator, dtype=torch.float64).to(
                run.model.device
            )
            / size_I**0.5
        )
        problem = LeastSquares(
            module=module,
            keys_IN=keys_IN,
            residuals_ON=keys_IN.new_zeros(size_O, MANY_EDITS),
            weight=WEIGHT,
        )
        solve_state = restraint.observe(problem, solve_state, run.moments)
    return bench.after(replace(bench.state, solve=solve_state))
