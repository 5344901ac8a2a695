"""Target searches of one request with 21 contexts: what grouped query heads and what products in
bfloat16 save. Every search makes the same number of steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

from editkit.bench.base import Comparison, Options, PairedTiming, relative_difference
from editkit.bench.edit import target_settings
from editkit.bench.rome import start
from editkit.lazy import torch
from editkit.model import cached_suffix
from editkit.model.products import Products
from editkit.targets.search import search_targets


def measure_products(options: Options) -> Comparison:
    """Products in float32 and in bfloat16. The difference is that of the vectors found."""
    vector_of = _searches(options)
    return _compare(options, lambda: vector_of("float32"), lambda: vector_of("bfloat16"))


def measure_attention(options: Options) -> Comparison:
    """Repeated keys and values, and grouped query heads. The same in models whose query heads have
    their own.
    """
    vector_of = _searches(options)

    def repeated() -> torch.Tensor:
        transformers_own = contextlib.nullcontext()
        with mock.patch.object(cached_suffix, "grouped_attention", lambda _: transformers_own):
            return vector_of("float32")

    return _compare(options, repeated, lambda: vector_of("float32"))


def _searches(options: Options) -> Callable[[Products], torch.Tensor]:
    bench = start(options)
    run = bench.run
    model, requests = run.model, run.batch(1)
    site = model.family.mlp(options.shape.rome_layer)

    def vector(products: Products) -> torch.Tensor:
        settings = dataclasses.replace(target_settings(), products=products)
        [target] = search_targets(
            model, requests, site=site, contexts=bench.state.contexts, settings=settings
        )
        return target.vector_O

    return vector


def _compare(
    options: Options, plain: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor]
) -> Comparison:
    timing = PairedTiming(device=options.device)
    difference = relative_difference(plain(), ours())  # kernels are chosen at their first use
    for _ in range(options.repeats):
        timing.run("plain", plain)
        timing.run("ours", ours)
    return timing.comparison(relative_difference=difference)
