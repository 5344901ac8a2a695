"""Second moments of MEMIT's layers: a pass over the texts for each layer (reference), and one pass
for all layers (editkit).

The reference follows the published code (`rome/layer_stats.py`): its passes stop at their layer,
and a batch holds documents of similar length with at most the tokens of three full ones.
`unstopped_s` is its time with passes through all layers and the full vocabulary, measured once for
one layer. `flop_ratio` is the ratio of the multiplications of the two, an estimate of the possible
speed-up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from editkit.bench import reference
from editkit.bench.base import Comparison, Options, PairedTiming, relative_difference, timed
from editkit.bench.profiling import profiled
from editkit.bench.shapes import Shape
from editkit.bench.synthetic import model_of, texts_for
from editkit.stats.collect import collect

DOCUMENTS = 32
LONGEST = 256  # tokens
BATCH_TOKENS = 8192  # of editkit, as in conf/stats


def measure(options: Options) -> Comparison:
    model = model_of(options.shape, options.model, device=options.device, dtype=options.dtype)
    modules = model.down_projections(options.shape.memit_layers)
    longest = min(LONGEST, model.max_length)
    texts = texts_for(options.shape, documents=DOCUMENTS, longest=longest)
    ours = partial(
        collect, model, modules, texts, context_length=longest, batch_tokens=BATCH_TOKENS
    )
    alone = partial(
        reference.second_moment,
        model,
        texts=texts,
        context_length=longest,
        batch_tokens=3 * longest,
    )
    timing, difference = PairedTiming(device=options.device), 0.0
    if options.device_type == "cuda":  # kernels are loaded and chosen at their first use
        ours()
    for _ in range(options.repeats):
        expected = timing.run("plain", lambda: {module: alone(module) for module in modules})
        sums = timing.run("ours", ours)
        difference = max(
            difference,
            *(
                relative_difference(expected[module], sums[module].sum_II / sums[module].num_tokens)
                for module in modules
            ),
        )
    unstopped, _ = timed(lambda: alone(modules[0], stop=False), options.device)
    more: dict[str, Any] = {
        "layers_measured": len(modules),
        "tokens": sums[modules[0]].num_tokens,
        "unstopped_s": unstopped.seconds * len(modules),  # every layer's pass is the same
        "flop_ratio": flop_ratio(options.shape),
    }
    if options.profile:
        more["profile"] = profiled(ours, options.device)
    return timing.comparison(relative_difference=difference, **more)


def flop_ratio(shape: Shape) -> float:
    """Multiplications per token of the reference over those of editkit: the weights of the pass,
    and k k^T, of which editkit computes the lower half.

    Attention scores, padding and elementwise operations are not counted.
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
