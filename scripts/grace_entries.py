"""The time of a GRACE edit in an empty codebook and in one of 10,000 entries, and their bytes.

    python scripts/grace_entries.py --model tiny-llama --entries 10000 --edits 100

The entries before the last edits are random keys, far from every prompt. Both codebooks get the
same edits in turn, so that other work on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.editors.base import AbstractSideEditor
from editkit.runner.step import attach

FAR = 1e3  # the size of the random keys' coordinates


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--entries", type=int, default=10000)
    parser.add_argument("--edits", type=int, default=100)
    options = parser.parse_args()
    chosen = [f"model={options.model}", "editor=grace", "suite=none", f"edits={options.edits}"]
    experiment = build(compose(chosen).config)
    editor, model = experiment.editor, experiment.model.load("cpu")
    assert isinstance(editor, AbstractSideEditor)
    from editkit.editors.base import Step
    from editkit.stats.store import Moments

    empty = editor.init(model, Moments())
    states: list[Any] = [empty, filled(empty, options.entries - options.edits)]
    seconds: list[list[float]] = [[], []]
    for request in experiment.data.requests[: options.edits]:
        for index in (0, 1):
            attach(model, editor, states[index])
            begun = time.perf_counter()
            step = Step(model=model, requests=(request,), state=states[index])
            states[index] = editor.propose(step, editor.plan(step))
            attach(model, editor, states[index])
            seconds[index].append(time.perf_counter() - begun)
    first, last = (statistics.median(each) for each in seconds)
    small, large = (
        sum(tensor.nbytes for tensor in state.values()) / len(state["radii"]) for state in states
    )
    sys.stdout.write(
        f"{options.model}: {1e3 * first:.1f} ms an edit from 0 entries on, {1e3 * last:.1f} ms up "
        f"to {len(states[1]['radii'])}: {last / first:.2f} times; {small:,.0f} and {large:,.0f} "
        "bytes an entry\n"
    )


def filled(empty: Any, count: int) -> dict[str, torch.Tensor]:
    """A state with so many entries."""
    generator = torch.Generator().manual_seed(0)
    width, out = empty["keys"].shape[1], empty["values"].shape[1]
    return {
        "keys": FAR * torch.randn(count, width, generator=generator),
        "values": torch.randn(count, out, generator=generator),
        "radii": torch.ones(count),
        "labels": torch.zeros(count, 1, dtype=torch.int64),
    }


if __name__ == "__main__":
    main()
