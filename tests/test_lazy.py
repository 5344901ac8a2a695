"""torch is imported late, with threads that spin briefly while they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from editkit.lazy import SPIN_COUNT, WAIT_POLICY


@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [
        ({}, "PASSIVE", "3000"),
        ({SPIN_COUNT: "77"}, "PASSIVE", "77"),
        ({WAIT_POLICY: "ACTIVE"}, "ACTIVE", None),
    ],
)
def test_threads_spin_briefly_unless_the_user_chose(
    given: dict[str, str], policy: str, spins: str | None
) -> None:
    ours = (WAIT_POLICY, SPIN_COUNT)
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    # OpenMP shows its settings when torch loads it.
    code = "from editkit.lazy import torch; torch.zeros(1)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("torch does not use an OpenMP that shows its settings")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    if "GOMP_SPINCOUNT" in done.stderr:
        shown = done.stderr.split("GOMP_SPINCOUNT = '")[1].split("'")[0]
        assert shown == spins if spins is not None else shown != "3000"
