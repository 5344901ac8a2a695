"""A run that is killed, at any moment, and started again is the run that was never killed."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.records.ledger import read_ledger
from editkit.records.writer import EVALS, STEPS, RecordFiles
from editkit.runner.checkpoint import load_state
from editkit.runner.session import RunSession
from editkit.runner.signals import Received
from editkit.types import StepRecord
from tests.support.sessions import finish, records, run_folder, start, wait_for_lines

RUN = (
    *(
        "model=tiny-gpt2",
        "editor=rome",
        "restraint=prune",
        "dataset=world",
        "suite=none",
        "tracker=none",
    ),
    *(
        "edits=12",
        "milestones=[0,4,12]",
        "checkpoint.every=3",
        "ledger.keep=true",
        "editor.context_lengths=[[5,2]]",
        "editor.target.steps=4",
    ),
    *("stats.num_documents=2000", "restraint.prune.function=linear"),
    *(
        "evaluation.timings=[milestone,immediate,final]",
        "evaluation.block_size=4",
        "evaluation.bootstrap=20",
    ),
)


def arguments(outputs: Path) -> tuple[str, ...]:
    return (*RUN, f"stats.folder={outputs.parent / 'statistics'}")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_writes_the_records_and_weights_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    undisturbed = finish(tmp_path / "undisturbed", arguments(tmp_path / "undisturbed"))
    rng, outputs = random.Random(7), tmp_path / "killed"
    for lines in (1, 3, 6, 11):
        process = start(outputs, arguments(outputs))
        wait_for_lines(process, outputs, lines)
        time.sleep(rng.uniform(0.0, 0.2))  # somewhere in an edit, an evaluation or a checkpoint
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (folder := run_folder(outputs)).joinpath("DONE").exists():
            break
        with open(
            folder / STEPS, "ab"
        ) as file:  # killed in the middle of a line, and of a checkpoint
            file.write(b'{"step": 99, "requ')
        (folder / "state").mkdir(exist_ok=True)
        (folder / "state" / ".step-00000099.safetensors.1.tmp").write_bytes(b"half")
    killed = finish(outputs, arguments(outputs))
    for name in (STEPS, EVALS):
        assert records(killed, name) == records(undisturbed, name)
    for block, other in zip(
        *(read_ledger(folder).blocks for folder in (killed, undisturbed)), strict=True
    ):
        assert block.content == other.content
        assert block.path.read_bytes() == other.path.read_bytes()
    ours, theirs = load_state(killed / "state"), load_state(undisturbed / "state")
    assert ours.step == theirs.step == 12
    for module, total in ours.totals.items():
        assert torch.equal(total.dense(), theirs.totals[module].dense())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_next_edit_and_the_same_command_resumes(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, arguments(tmp_path))
    wait_for_lines(process, tmp_path, 5)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    folder = run_folder(tmp_path)
    stopped_at = load_state(folder / "state").step
    assert stopped_at == records(folder, STEPS)[-1]["step"]
    finish(tmp_path, arguments(tmp_path))
    assert [record["step"] for record in records(folder, STEPS)] == list(range(13))


@pytest.mark.slow
def test_a_signal_while_second_moments_are_computed_keeps_what_is_done_of_them(
    tmp_path: Path,
) -> None:
    composed = compose(
        [*RUN, f"paths.outputs={tmp_path}", f"stats.folder={tmp_path / 'statistics'}"]
    )
    experiment = build(composed.config, choices=composed.choices)
    experiment.folder.mkdir(parents=True)
    assert RunSession(experiment).execute(Received(signal.SIGTERM)) == 128 + signal.SIGTERM
    assert (
        not (experiment.folder / STEPS).exists()
        and not (experiment.folder / "FAILED.json").exists()
    )
    assert RunSession(experiment).execute(Received()) == 0


def test_record_files_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, {})
    files.append(StepRecord(step=0))
    lengths = files.sync()
    files.append(StepRecord(step=1))
    files.close()
    with open(tmp_path / STEPS, "ab") as file:
        file.write(b'{"step": 2, "req')
    again = RecordFiles(tmp_path, lengths)
    again.append(StepRecord(step=1, requests=("r/0",)))
    again.close()
    assert [json.loads(line)["step"] for line in (tmp_path / STEPS).read_text().splitlines()] == [
        0,
        1,
    ]


def test_records_that_are_gone_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"steps\.jsonl: records were lost .* \(got '0 bytes'; expected at least 100 bytes\)",
    ):
        RecordFiles(tmp_path, {STEPS: 100})


def test_numbers_that_json_cannot_hold_are_written_as_null(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, {})
    files.append(
        StepRecord(step=1, target={"loss": float("nan")}, modules={"m": {"l1_norm": float("inf")}})
    )
    files.close()
    line = json.loads((tmp_path / STEPS).read_text())
    assert line["target"] == {"loss": None} and line["modules"] == {"m": {"l1_norm": None}}
