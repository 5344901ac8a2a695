"""Datasets of an option's yaml file, over records in a temporary file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from editkit.config.compose import conf_folder
from editkit.config.schema import Problems, construct
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.errors import ConfigError


def construct_dataset(option: str, **changes: Any) -> AbstractDataset:
    """An option's dataset, with its file's own values but for the changes."""
    node = yaml.safe_load((conf_folder() / "dataset" / f"{option}.yaml").read_text())
    problems = Problems()
    dataset = construct(node | changes, "dataset", AbstractDataset, problems)
    if dataset is None:
        raise ConfigError(problems.messages)
    return dataset


def load(
    option: str, records: object, folder: Path, *, seed: int = 0, **changes: Any
) -> LoadedDataset:
    path = folder / "records.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return construct_dataset(option, path=str(path), **changes).load(seed)


def problems_of(option: str, records: object, folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(option, records, folder, **changes)
    return [
        problem.removeprefix(f"{folder / 'records.json'}, ") for problem in caught.value.problems
    ]
