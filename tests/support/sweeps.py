"""Several small runs as a sweep leaves them: folders, configurations, records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from editkit.types import EvalRecord
from tests.support.records import a_step, editing, task, write_run

PRUNE = {"_target_": "editkit.restraints.prune.Prune", "apply_at": "evaluation"}


def config_of(
    seed: int,
    *,
    restraint: dict[str, Any],
    editor: str = "rome",
    model: str = "tiny-gpt2",
    name: str = "sweep",
    **more: Any,
) -> dict[str, Any]:
    return {
        "name": f"{model}-{editor}-{'+'.join(restraint) or 'none'}",
        "experiment_name": name,
        "seed": seed,
        "edits": 4,
        "milestones": [0, 4],
        "model": {"name": model, "id": f"asset:{model}"},
        "editor": {"_target_": "editkit.editors.rome.Rome", "name": editor, "layers": [0]},
        "restraint": restraint,
        "dataset": {"name": "world"},
        "suite": {"name": "world"},
        **more,
    }


def evals_of(
    *, efficacy: dict[str, float | None], entailment: float = 0.9, steps: tuple[int, ...] = (0, 2)
) -> list[EvalRecord]:
    """`efficacy` by view, after the last step."""
    return [
        record
        for step in steps
        for view, value in efficacy.items()
        for record in (
            editing(step, "efficacy", value if step else 0.0, view=view),
            editing(step, "efficacy", 0.5, view=view, protocol="argmax"),
            task(step, "entailment", entailment, view=view),
        )
    ]


def add_run(
    root: Path,
    config: dict[str, Any],
    evals: list[EvalRecord],
    *,
    steps: int = 2,
    failure: dict[str, Any] | None = None,
) -> Path:
    """Writes a run's folder; `failure` makes it a failed one."""
    folder = (
        root
        / config["experiment_name"]
        / f"{config['name']}-{len(list(root.rglob('steps.jsonl'))):08d}"
        / f"seed{config['seed']}"
    )
    write_run(
        folder,
        steps=[
            a_step(step, condition=(40.0 + step, 20.0 + 10 * step)) for step in range(steps + 1)
        ],
        evals=evals,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    about = {
        "seed": config["seed"],
        "wall_seconds": 12.0,
        "peak_memory_bytes": {"host": 2**30},
        "device": "cpu",
        "git": "abcdef0123456789",
    }
    (folder / "provenance.json").write_text(json.dumps(about))
    if failure is None:
        (folder / "DONE").touch()
    else:
        (folder / "FAILED.json").write_text(json.dumps(failure))
    return folder


def a_sweep(root: Path, *, seeds: int = 3) -> Path:
    """ROME without and with PRUNE (views of one run), and with RECT (runs of its own), a few seeds
    each.
    """
    for seed in range(seeds):
        views = {"unrestrained": 0.5 + 0.01 * seed, "prune": 0.7 + 0.02 * seed**2}
        add_run(root, config_of(seed, restraint={"prune": PRUNE}), evals_of(efficacy=views))
        add_run(
            root,
            config_of(seed, restraint={"rect": {"keep": 0.2}}),
            evals_of(efficacy={"unrestrained": 0.4}),
        )
    return root
