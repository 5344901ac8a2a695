"""torch is imported late, with threads that sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from editkit.lazy import WAIT_POLICY


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_chose(given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    if given is not None:
        environment[WAIT_POLICY] = given
    # OpenMP shows its settings when torch loads it.
    code = "from editkit.lazy import torch; torch.zeros(1)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        env=environment | {"OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("torch does not use an OpenMP that shows its settings")
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
