"""Everything here needs a CUDA device: `pytest -m gpu tests/gpu`; without one each test is skipped,
and says so.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    return "cuda"
