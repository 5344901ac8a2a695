"""How many facts of a dataset a model knows, by relation.

    python scripts/known_facts.py model=smollm2-135m-instruct dataset=facts dataset.split=all

The arguments are overrides, as of `editkit run`. A fact is known as `dataset.known_only` defines it
(`editkit.evaluation.known`). The relation is the middle of a request's id ("facts/capital/France"),
or its prompt if the id has no middle.
"""

from __future__ import annotations

import sys
from collections import Counter

from editkit.config.compose import compose
from editkit.config.parts import Parts
from editkit.datasets.base import AbstractDataset
from editkit.model.load import ModelConfig
from editkit.runner.known import select_known
from editkit.types import EditRequest


def relation_of(request: EditRequest) -> str:
    parts = request.id.split("/", 2)
    return parts[1] if len(parts) == 3 else request.prompt


def main(overrides: list[str]) -> None:
    """Prints a line for each relation, the best known one first, and the sum."""
    parts = Parts(compose(overrides).config)
    config, dataset = parts.one("model", ModelConfig), parts.one("dataset", AbstractDataset)
    parts.finish()
    assert config and dataset
    data = dataset.load(0)
    known = Counter(map(relation_of, select_known(config.load("cpu"), data).requests))
    total = Counter(map(relation_of, data.requests))
    rows = sorted(((known[name], total[name], name) for name in total), reverse=True)
    for count, of, name in [*rows, (known.total(), total.total(), "all")]:
        sys.stdout.write(f"{count:5d} {of:5d}  {name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
