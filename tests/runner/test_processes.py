"""No hidden state: a run gives the same bits whatever its process did before, and so two runs in
one process equal two processes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from editkit.editors.ft import Ft
from editkit.editors.rome import Rome
from editkit.restraints.alphaedit import AlphaEdit
from editkit.restraints.base import Restraints
from editkit.restraints.d4s import D4S
from editkit.restraints.eac import Eac
from editkit.runner.loop import run_edits
from editkit.types import EvalRecord, StepRecord
from tests.support.fakes import trajectory
from tests.support.helpers import Kind, requests, tiny_model
from tests.support.methods import memit, model_moments
from tests.support.paths import ROOT

ALPHAEDIT = AlphaEdit(threshold=0.3, threshold_unit="absolute", l2=1.0)
EAC = Eac(
    variant="paper", gamma=50.0, l1=1e-6, l2=0.1, l2_unit="relative", epsilon=1e-6, steps_search=2, steps_retrain=2,
    selector="random", saliency=True, elastic_net=True, seed=0,
)  # fmt: skip
# Published code keeps contexts, statistics, null spaces and histories of keys in its processes:
# each of these runs would meet another's.
METHODS = ("rome", "memit", "d4s", "alphaedit", "eac", "ft")


def fingerprint(method: str, kind: Kind) -> str:
    """A digest of a run's records, all but its seconds, and of the weights that it ends with."""
    quick: dict[str, Any] = {"target": {"steps": 3}}
    editors: dict[str, Any] = {"rome": rome, "ft": ft}
    solves = {"d4s": D4S(), "alphaedit": ALPHAEDIT}
    editor = editors[method]() if method in editors else memit(**quick)
    model = tiny_model(kind)
    restraints = Restraints(solve=solves.get(method), objective=EAC if method == "eac" else None)
    chosen = [replace(request, id=f"run/{index}") for index, request in enumerate(requests(3))]
    plan = trajectory(
        model, chosen, editor=editor, restraints=restraints, milestones=(0, 3), checkpoint_every=100
    )
    plan = replace(plan, moments=model_moments(model, editor.modules(model)))
    digest = hashlib.sha256()
    for event in run_edits(plan):
        if isinstance(event, StepRecord | EvalRecord):
            record = asdict(event) | ({"seconds": None} if isinstance(event, StepRecord) else {})
            digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    for module in model.edited_modules:
        digest.update(model.weight(module).contiguous().numpy().tobytes())
    return digest.hexdigest()


def rome() -> Rome:
    return Rome(
        name="rome",
        layers=(1,),
        keys="averaged",
        covariance=True,
        context_lengths=((4, 2),),
        target=memit().target,
    )


def ft() -> Ft:
    return Ft(
        name="ft",
        layers=(1,),
        objective="target",
        steps=3,
        lr=0.01,
        norm_constraint=0.02,
        stop_loss=0.0,
        l1=0.0,
        l2=0.0,
    )


def alone(runs: list[tuple[str, Kind]]) -> list[str]:
    """The fingerprints of these runs, one after another, in a fresh process."""
    code = (
        "import torch; torch.set_num_threads(1); from tests.runner.test_processes import fingerprint; "
        f"print(*(fingerprint(*run) for run in {runs}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


KINDS_IN_TURN: tuple[Kind, ...] = ("gpt2", "llama", "gptj", "gpt2", "llama", "gptj")
RUNS: list[tuple[str, Kind]] = list(zip(METHODS, KINDS_IN_TURN, strict=True))


def test_runs_in_one_process_give_the_same_bits_in_any_order() -> None:
    first = [fingerprint(*run) for run in RUNS]
    assert [fingerprint(*run) for run in reversed(RUNS)] == first[::-1]
    assert len(set(first)) == len(RUNS)


@pytest.mark.slow
def test_two_runs_in_one_process_give_the_bits_of_two_processes() -> None:
    here = [fingerprint(*run) for run in RUNS]
    assert alone(RUNS[0::2]) == here[0::2]
    assert alone(RUNS[1::2]) == here[1::2]


def test_the_global_generators_state_before_a_run_does_not_matter() -> None:
    torch.manual_seed(1)
    first = fingerprint("memit", "llama")
    torch.manual_seed(2)
    torch.randn(3)
    assert fingerprint("memit", "llama") == first
