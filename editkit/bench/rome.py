"""ROME: one edit with 21 contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from editkit.bench import reference
from editkit.bench.base import Comparison, Options
from editkit.bench.edit import Bench, bench_of, compare_edits, target_settings
from editkit.bench.synthetic import model_of
from editkit.editors.rome import Rome
from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.types import EditRequest

CONTEXTS = ((5, 10), (10, 10))  # (tokens, texts), in addition to the prompt alone


def start(options: Options) -> Bench:
    """A run of ROME before its first step."""
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


def measure(options: Options) -> Comparison:
    bench = start(options)
    model, layer = bench.run.model, options.shape.rome_layer
    (module,) = bench.run.editor.modules(model)
    inverse_II = torch.linalg.inv(bench.run.moments.second_moment(module))

    def edit(
        requests: tuple[EditRequest, ...], contexts: tuple[str, ...]
    ) -> Mapping[str, torch.Tensor]:
        settings = target_settings()
        return {
            module: reference.rome(
                model,
                requests[0],
                layer=layer,
                contexts=contexts,
                settings=settings,
                inverse_II=inverse_II,
            )
        }

    return compare_edits(bench, edit, options)[0]
