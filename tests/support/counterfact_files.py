"""Small files of CounterFact and zsRE, and their datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.datasets.base import AbstractDataset
from editkit.datasets.counterfact import CounterFact
from editkit.datasets.zsre import ZsRE
from editkit.errors import ConfigError


def original(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "subject": "Ada",
        "target_new": {"str": "French", "id": "Q1"},
        "target_true": {"str": "Latin", "id": "Q2"},
    }
    record = {
        "case_id": case_id,
        "paraphrase_prompts": ["x. Ada speaks"],
        "neighborhood_prompts": ["Bob speaks", "Cy speaks"],
    }
    more = {
        "attribute_prompts": ["Flo speaks"],
        "generation_prompts": ["Ada was born in", "Ada was born in"],
    }
    return {**record, **more, "requested_rewrite": {"relation_id": "P103"} | rewrite | changes}


def flat(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "case_id": case_id,
        "prompt": "The mother tongue of Ada is",
        "subject": "Ada",
        "target_new": "French",
        "ground_truth": "Latin",
        "rephrase_prompt": "Ada speaks",
        "locality_prompt": "Bob speaks",
        "locality_ground_truth": "Greek",
    }
    return record | changes


def question(**changes: Any) -> dict[str, Any]:
    record = {
        "subject": "UniFirst",
        "src": "What is made by UniFirst?",
        "pred": "uniform",
        "alt": " planes",
        "answers": ["uniform", "uniforms"],
        "rephrase": "What does UniFirst make?",
        "loc": "nq question: who wrote it",
        "loc_ans": "Walter",
        "portability": {
            "Recalled Relation": "-",
            "New Question": "Where do the makers of UniFirst's product work?",
            "New Answer": "sky",
        },
    }
    return record | changes


def write(folder: Path, content: object) -> str:
    path = folder / "records.json"
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
    return str(path)


def counterfact(path: str | None, **options: Any) -> CounterFact:
    source = {
        "name": "counterfact",
        "path": path,
        "file": "counterfact/x.json",
        "id": None,
        "snippets": None,
    }
    return CounterFact(
        **(source | {"order": "file", "limit": None, "on_bad_record": "error"} | options)
    )


def zsre(path: str | None, **options: Any) -> ZsRE:
    defaults = {
        "name": "zsre",
        "file": "zsre/x.json",
        "id": None,
        "target": "alt",
        "order": "file",
        "limit": None,
        "on_bad_record": "error",
    }
    return ZsRE(**({"path": path} | defaults | options))


def problems_of(dataset: AbstractDataset) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        dataset.load(0)
    return caught.value.problems
