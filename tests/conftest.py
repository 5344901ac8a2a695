"""Every test runs offline, on one thread, without a GPU unless it is marked `gpu`."""

from __future__ import annotations

import os

for name in (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
):
    os.environ[name] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """More threads make small matrices slower, and sums depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cuda_device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
