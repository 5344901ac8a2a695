"""The real model knows enough of the bundled facts for a run of hundreds of edits."""

from __future__ import annotations

import pytest

from editkit.model.load import ModelConfig
from editkit.runner.known import select_known
from tests.support.datasets import construct_dataset
from tests.support.helpers import real_model_id

pytestmark = pytest.mark.real


def test_it_knows_at_least_three_hundred_facts_outside_the_split_for_tuning() -> None:
    model = ModelConfig(id=real_model_id(), name="smollm2-135m-instruct").load("cpu")
    selected = select_known(model, construct_dataset("facts").load(0), edits=300)
    assert len(selected.requests) >= 300
    assert len({request.id.split("/")[1] for request in selected.requests}) >= 20
