"""Second moments of MEMIT's layers: a pass over the texts for each layer, which stops there, and one for all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from editkit.bench import plain
from editkit.bench.base import Found, Options, Race, relative_difference
from editkit.bench.profiling import profiled
from editkit.bench.synthetic import model_of, texts_for
from editkit.stats.collect import collect

DOCUMENTS = 32
LONGEST = 256  # tokens
BATCH_TOKENS = 2048


def measure(options: Options) -> Found:
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    modules = model.down_projections(options.shape.memit_layers)
    longest = min(LONGEST, model.max_length)
    texts = texts_for(options.shape, documents=DOCUMENTS, longest=longest)
    ours = partial(collect, model, modules, texts, context_length=longest, batch_tokens=BATCH_TOKENS)
    alone = partial(plain.second_moment, model, texts=texts, context_length=longest, batch_tokens=BATCH_TOKENS)
    race, apart = Race(device=options.device), 0.0
    if options.device_type == "cuda":  # kernels are loaded and chosen at their first use
        ours()
    for _ in range(options.repeats):
        expected = race.run("plain", lambda: {module: alone(module) for module in modules})
        found = race.run("ours", ours)
        apart = max(relative_difference(expected[module], found[module].sum_II / found[module].num_tokens) for module in modules)
    more: dict[str, Any] = {"layers_measured": len(modules), "tokens": found[modules[0]].num_tokens}
    if options.profile:
        more["profile"] = profiled(ours, options.device)
    return race.found(relative_difference=apart, **more)
