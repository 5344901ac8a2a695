"""ROME: one edit with 21 contexts, the plain way and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from editkit.bench import plain
from editkit.bench.base import Found, Options
from editkit.bench.edit import Bench, bench_of, compare_edits, target_settings
from editkit.bench.synthetic import model_of
from editkit.editors.rome import Rome
from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.types import EditRequest

CONTEXTS = ((5, 10), (10, 10))  # (tokens, texts), beside the bare prompt


def start(options: Options) -> Bench:
    """A run of ROME that is about to begin."""
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    editor = Rome(
        name="rome",
        layers=(options.shape.rome_layer,),
        keys="averaged",
        covariance=True,
        context_lengths=CONTEXTS,
        target=target_settings(),
    )
    return bench_of(model, editor, options)


def measure(options: Options) -> Found:
    bench = start(options)
    model, layer = bench.job.model, options.shape.rome_layer
    (module,) = bench.job.editor.modules(model)
    inverse_II = torch.linalg.inv(bench.job.moments.second_moment(module))

    def edit(
        requests: tuple[EditRequest, ...], contexts: tuple[str, ...]
    ) -> Mapping[str, torch.Tensor]:
        settings = target_settings()
        return {
            module: plain.rome(
                model,
                requests[0],
                layer=layer,
                contexts=contexts,
                settings=settings,
                inverse_II=inverse_II,
            )
        }

    return compare_edits(bench, edit, options)[0]
