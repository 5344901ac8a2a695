"""The public names of `editkit` are frozen, and importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import editkit

NAMES = (
    *("AbstractDataset", "AbstractEditor", "AbstractEvaluator", "AbstractObjectiveRestraint"),
    *("AbstractProtocol", "AbstractSideEditor", "AbstractSolveRestraint", "AbstractTotalRestraint"),
    *("AbstractUpdateRestraint", "AlphaEdit", "ConfigError", "D4S", "Eac", "EditRequest"),
    *(
        "EditResult",
        "EditableModel",
        "Emmet",
        "Ft",
        "Grace",
        "InContext",
        "Kn",
        "LocFt",
        "Lora",
        "Malmen",
    ),
    *(
        "LowRank",
        "Measurement",
        "Measures",
        "Memit",
        "Memoe",
        "Memoir",
        "Mend",
        "MergedLora",
        "NormCap",
        "Plan",
        "Pmet",
        "Probe",
    ),
    *("Prune", "Rect", "Rome", "Serac", "Session"),
    *("Step", "TPatcher", "UltraEdit", "Wise", "__version__"),
    *(
        "CrispEdit",
        "EmmetConstraint",
        "Encore",
        "LyapLock",
        "Mose",
        "Mpes",
        "Nas",
        "Nse",
        "SimIE",
        "Sphere",
    ),
    *("edit", "export", "load", "load_edited", "load_run", "load_runs", "run"),
)


def test_the_public_names() -> None:
    assert sorted(editkit.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_resolves(name: str) -> None:
    assert name in dir(editkit)
    value = getattr(editkit, name)
    assert value is not None
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'roma'"):
        editkit.roma  # noqa: B018


def loaded(code: str) -> set[str]:
    watched = "torch transformers hydra omegaconf numpy pydantic yaml"
    probe = f"import sys\n{code}\nprint(*(m for m in {watched.split()!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_editkit_loads_nothing_heavy() -> None:
    assert loaded("import editkit") == set()


def test_the_names_themselves_load_neither_torch_nor_transformers_nor_hydra() -> None:
    code = "import editkit\nfor name in editkit.__all__: getattr(editkit, name)"
    assert not loaded(code) & {"torch", "transformers", "hydra"}
