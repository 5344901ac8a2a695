"""The device of the tests that are about nothing but a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture
def device() -> str:
    return "cuda"
