"""W&B's process and environment variables for all tests of this folder."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def _service():
    """W&B's own process ends with the module; nothing of the environment's sweeps or keys is
    read.
    """
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    yield
    import wandb

    wandb.teardown()
    del os.environ["WANDB_ERROR_REPORTING"]
    os.environ.update(kept)
