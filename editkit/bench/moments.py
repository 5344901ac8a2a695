"""Second moments of MEMIT's layers: a pass over the texts for each layer, which stops there, and
one for all of them.

The plain way is that of the public reference code (`rome/layer_stats.py`): its passes stop at their
layer, and pack documents of similar length up to three of full length. `unstopped_s` is what it
would take with passes through all layers and the full vocabulary, measured once and for one layer.
`flop_ratio` is the ratio of the two ways' multiplications, and so about what there is to be had.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from editkit.bench import plain
from editkit.bench.base import Found, Options, Race, relative_difference, timed
from editkit.bench.profiling import profiled
from editkit.bench.shapes import Shape
from editkit.bench.synthetic import model_of, texts_for
from editkit.stats.collect import collect

DOCUMENTS = 32
LONGEST = 256  # tokens
BATCH_TOKENS = 8192  # ours: as conf/stats has it


def measure(options: Options) -> Found:
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    modules = model.down_projections(options.shape.memit_layers)
    longest = min(LONGEST, model.max_length)
    texts = texts_for(options.shape, documents=DOCUMENTS, longest=longest)
    ours = partial(
        collect, model, modules, texts, context_length=longest, batch_tokens=BATCH_TOKENS
    )
    alone = partial(
        plain.second_moment, model, texts=texts, context_length=longest, batch_tokens=3 * longest
    )
    race, apart = Race(device=options.device), 0.0
    if options.device_type == "cuda":  # kernels are loaded and chosen at their first use
        ours()
    for _ in range(options.repeats):
        expected = race.run("plain", lambda: {module: alone(module) for module in modules})
        found = race.run("ours", ours)
        apart = max(
            apart,
            *(
                relative_difference(
                    expected[module], found[module].sum_II / found[module].num_tokens
                )
                for module in modules
            ),
        )
    unstopped, _ = timed(lambda: alone(modules[0], stop=False), options.device)
    more: dict[str, Any] = {
        "layers_measured": len(modules),
        "tokens": found[modules[0]].num_tokens,
        "unstopped_s": unstopped.seconds * len(modules),  # every layer's pass is the same
        "flop_ratio": flop_ratio(options.shape),
    }
    if options.profile:
        more["profile"] = profiled(ours, options.device)
    return race.found(relative_difference=apart, **more)


def flop_ratio(shape: Shape) -> float:
    """Multiplications of the plain way over ours, a token: the weights that it passes, and k k^T,
    of which we take the lower half.

    Attention's scores, padding and everything elementwise are left out.
    """
    gates = 2 if shape.architecture.is_gated else 1
    sizes = shape.architecture
    key_values = sizes.num_key_value_heads / sizes.num_heads
    attention = shape.width**2 * (2 + 2 * key_values)
    below = attention + gates * shape.width * shape.inner  # up to the down projection's input
    block = below + shape.width * shape.inner
    passes = [layer * block + below for layer in shape.memit_layers]
    products = len(passes) * shape.inner**2
    return (sum(passes) + products) / (passes[-1] + products / 2)
