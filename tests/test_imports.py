"""The rooms stand on each other in one order, and nothing that should be quick loads torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import rooms

# From the ground up. A room may import from those above it in this list, for the type checker too.
ORDER = (
    *("ground", "linalg", "datasets", "records", "model"),
    *("resources", "stats", "targets", "hypernet"),
    *("restraints", "editors", "evaluation"),
    *("config", "report", "trackers", "wandb"),
    *("runner", "bench", "training", "analysis"),
    *("sweeps", "tuning", "api", "ledger", "certify", "lm_eval", "cli", "roof"),
)
MOST_LOOSE_FILES = 6


@pytest.fixture(scope="module")
def files() -> rooms.Graph:
    return rooms.files_graph()


def test_every_room_has_its_place_in_the_order(files: rooms.Graph) -> None:
    assert set(rooms.rooms_graph(files)) == set(ORDER)


def test_no_import_points_upwards(files: rooms.Graph) -> None:
    height = {room: floor for floor, room in enumerate(ORDER)}
    upwards = [
        f"{name} imports {below}"
        for name, imported in files.items()
        for below in imported
        if height[rooms.room_of(below)] > height[rooms.room_of(name)]
    ]
    assert not upwards


def test_no_files_import_each_other_in_a_circle(files: rooms.Graph) -> None:
    assert not rooms.circle(files)


def test_few_files_lie_loose_at_the_top() -> None:
    assert len(rooms.loose_files()) <= MOST_LOOSE_FILES


def loaded_after(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter holds after running that code."""
    watched = "torch transformers datasets matplotlib pandas numpy safetensors"
    probe = f"import sys\n{code}\nsys.stderr.write('LOADED ' + ' '.join(name for name in {watched!r}.split() if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False
    )
    assert "LOADED" in done.stderr, done.stderr
    return set(done.stderr.rpartition("LOADED")[2].split())


def test_importing_every_configurable_class_loads_neither_torch_nor_transformers() -> None:
    names = [name for name in rooms.modules() if not name.endswith("__main__")]
    assert not loaded_after(
        "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in names)
    )
