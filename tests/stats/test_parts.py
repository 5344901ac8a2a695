"""The sums have the same bits for every number of processes and every interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.stats import collect as collecting
from editkit.stats.build import UNFINISHED, Statistics, build, fill_store, statistics
from editkit.stats.collect import PARTS, blocks_of, collect
from editkit.stats.corpus import StatsConfig
from editkit.stats.estimate import estimate
from editkit.stats.parts import Parts, locked
from editkit.stats.shards import ALONE, Shard, shard_from
from editkit.stats.store import list_stored, read
from editkit.trackers.collecting import collecting as shown_collecting
from editkit.trackers.collecting import left_text
from tests.support.helpers import SENTENCES, tiny_model
from tests.support.statistics import text_stats

MANY = tuple(
    f"{one} {other} {third}" for one in SENTENCES for other in SENTENCES for third in SENTENCES[:4]
)
WORLD = (
    "model=tiny-gpt2",
    "stats=world",
    "stats.num_documents=700",
    "stats.save_every_s=0",
    "runtime.threads=1",
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 documents make 26 blocks, of which two parts have 4 and six have 3."""
    monkeypatch.setattr(collecting, "BLOCK", 10)


def config(folder: Path, name: str = "stats", **changes: Any) -> StatsConfig:
    return text_stats(folder, "\n".join(MANY), **{"folder": str(folder / name)} | changes)


def required_of(folder: Path, name: str = "stats", **changes: Any) -> Statistics:
    model = tiny_model("gpt2")
    return statistics(model, model.down_projections((0, 2)), config(folder, name, **changes))


def bits(folder: Path) -> dict[str, str]:
    """The digest of every finished file; the bytes of a file may differ in the order of its
    header.
    """
    return {path.name: read(path).checksum for path in folder.iterdir() if path.is_file()}


class Killed(Exception):
    """Stands for a signal that asks to stop."""


def killing_after(documents: int) -> Any:
    def progress(done: int, of: int) -> None:
        if documents <= done < of:
            raise Killed

    return progress


def test_the_parts_hold_every_document_once() -> None:
    for count in (0, 1, 10, 11, 79, 80, 81, 256):
        amounts = sorted(
            index for part in range(PARTS) for block in blocks_of(part, count) for index in block
        )
        assert amounts == list(range(count))


def test_the_stored_sums_are_those_of_one_process_in_memory(tmp_path: Path) -> None:
    required = required_of(tmp_path)
    assert fill_store(required)
    in_memory = collect(
        required.model, list(required.keys), MANY, context_length=32, batch_tokens=256
    )
    for module, moment in required.read().by_module.items():
        assert torch.equal(
            moment.matrix_II, in_memory[module].sum_II / in_memory[module].num_tokens
        )
        assert moment.num_tokens == in_memory[module].num_tokens
    assert len(list((tmp_path / "stats").iterdir())) == 2, "no unfinished sums remain"


@pytest.mark.parametrize("save_every_s", [0.0, 1000.0])
def test_a_stopped_computation_resumes_and_ends_with_the_same_bits(
    tmp_path: Path, save_every_s: float
) -> None:
    assert fill_store(required_of(tmp_path, "whole"))
    required = required_of(tmp_path, "cut", save_every_s=save_every_s)
    reached = []
    for documents in (10, 30, 31, 100, 101, 240):
        with pytest.raises(Killed):
            fill_store(required, progress=killing_after(documents))
        announced: list[str] = []
        with pytest.raises(Killed):
            fill_store(required, announce=announced.append, progress=killing_after(0))
        reached.append(
            int(announced[1].split("process: ")[1].split(" of ")[0]) if len(announced) > 1 else 0
        )
    assert reached == [10, 30, 40, 106, 106, 246]
    assert fill_store(required)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


@pytest.mark.parametrize("of", [2, 3, 8, 11])
def test_the_number_of_processes_changes_no_bit(tmp_path: Path, of: int) -> None:
    assert fill_store(required_of(tmp_path, "one"))
    required = required_of(tmp_path, "many")
    order = [*range(1, of), 0]
    ends = [fill_store(required, shard=Shard(rank, of)) for rank in order]
    assert ends == [False] * (of - 1) + [True]
    assert bits(tmp_path / "many") == bits(tmp_path / "one")


def test_one_process_can_finish_the_work_of_three(tmp_path: Path) -> None:
    assert fill_store(required_of(tmp_path, "one"))
    required = required_of(tmp_path, "many")
    assert not fill_store(required, shard=Shard(2, 3))
    with pytest.raises(Killed):
        fill_store(required, shard=Shard(0, 3), progress=killing_after(20))
    progressed: list[tuple[int, int]] = []
    assert fill_store(required, progress=lambda *counts: progressed.append(counts))
    assert progressed[0][0] == 2 * 30 + 20 and progressed[-1] == (256, 256)
    assert bits(tmp_path / "many") == bits(tmp_path / "one")


def test_unfinished_sums_of_other_statistics_are_not_resumed(tmp_path: Path) -> None:
    for products in ("bfloat16", "float32"):
        with pytest.raises(Killed):
            fill_store(required_of(tmp_path, products=products), progress=killing_after(50))
    assert len(list((tmp_path / "stats" / UNFINISHED).iterdir())) == 2
    assert fill_store(required_of(tmp_path))
    assert fill_store(required_of(tmp_path, "alone"))
    assert bits(tmp_path / "stats") == bits(tmp_path / "alone")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_damaged_unfinished_sums_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    required = required_of(tmp_path)
    with pytest.raises(Killed):
        fill_store(required, progress=killing_after(10))
    [path] = (tmp_path / "stats" / UNFINISHED).glob("*/part-0.safetensors")
    payload = bytearray(path.read_bytes())
    payload[-20] ^= 1
    path.write_bytes(
        {"flipped": bytes(payload), "truncated": bytes(payload[:-100]), "empty": b""}[damage]
    )
    with pytest.raises(ConfigError, match=r"corrupt statistics.*unfinished") as caught:
        fill_store(required)
    assert str(path) in str(caught.value)
    path.unlink()
    assert fill_store(required)


def test_a_process_that_waited_for_another_one_uses_its_result(
    tmp_path: Path,
) -> None:
    required = required_of(tmp_path)
    assert fill_store(required)
    assert fill_store(required, progress=lambda *_: pytest.fail("computed again"))
    with (
        locked(tmp_path / "lock", may_wait=True) as mine,
        locked(tmp_path / "lock", may_wait=False) as other,
    ):
        assert mine and not other


def test_another_process_that_removes_the_folders_first_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two processes removes the parts, and the folder of all parts, when it is done."""
    make, remove, removed = Path.mkdir, shutil.rmtree, []

    def make_and_lose(folder: Path, *args: Any, **options: Any) -> None:
        make(folder, *args, **options)
        if folder.parent.name == UNFINISHED and len(removed) < 3:
            removed.append(folder)
            remove(folder.parent)

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    with locked(tmp_path / UNFINISHED / "digest" / "lock", may_wait=True) as mine:
        assert mine and len(removed) == 3
    remove(tmp_path / UNFINISHED)

    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: remove(folder.parent))
    required = required_of(tmp_path)
    assert fill_store(required)
    assert not (tmp_path / "stats" / UNFINISHED).exists()


def test_parts_that_vanish_while_they_are_read_are_missing_and_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(folder=tmp_path, num_documents=1)
    parts.path(0).write_bytes(b"merged by another process")

    def gone(path: Path, **_: str) -> None:
        path.unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr("safetensors.safe_open", gone)
    assert parts.blocks_done(0) == 0


def run_build(folder: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "editkit", "stats", "build", *WORLD, f"stats.folder={folder}"]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_at_once_and_a_killed_one_give_the_bits_of_one(tmp_path: Path) -> None:
    alone = run_build(tmp_path / "one")
    assert (
        "1 second moments of tiny-gpt2" in alone.communicate(timeout=180)[0]
        and alone.returncode == 0
    )
    tasks = [run_build(tmp_path / "two", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    announced = [task.communicate(timeout=180)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], announced
    assert sum("second moments of tiny-gpt2" in text for text in announced) >= 1
    assert bits(tmp_path / "two") == bits(tmp_path / "one")

    killed = run_build(tmp_path / "three")
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "three").glob(f"{UNFINISHED}/*/part-0.safetensors"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    assert not list((tmp_path / "three").glob("*.safetensors")), "killed before its end"
    again = run_build(tmp_path / "three")
    output_again = again.communicate(timeout=180)[0]
    assert again.returncode == 0 and "resuming the work of an earlier process" in output_again
    assert bits(tmp_path / "three") == bits(tmp_path / "one")


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Shard(1, 4, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Shard(1, 2)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}, Shard(2, 3)),
        (
            {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"},
            Shard(2, 3),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "7"},
            ALONE,
        ),  # a batch script is one process
        ({"WORLD_SIZE": "4"}, ALONE),
    ],
)
def test_the_share_comes_from_torchrun_or_slurm(environment: dict[str, str], shard: Shard) -> None:
    assert shard_from(environment) == shard


@pytest.mark.parametrize(
    "environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}]
)
def test_an_inconsistent_share_is_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"RANK=.*WORLD_SIZE=2"):
        shard_from(environment)


def test_the_estimate_of_sums_and_keys_is_exact_and_announced_first(tmp_path: Path) -> None:
    required = required_of(tmp_path)
    modules = list(required.keys)
    amounts = estimate(required.model, modules, required.config, num_documents=len(MANY))
    assert (amounts.num_modules, amounts.size, amounts.num_documents) == (2, 128, 256)
    collector = collecting.Collector(required.model, modules, context_length=32, batch_tokens=256)
    assert amounts.sums_bytes == sum(total.num_bytes for total in collector.empty().sums.values())
    assert amounts.keys_bytes == 2 * collecting.keys_at_once(32, 256) * 128 * 4
    announced: list[str] = []
    build(
        required.model,
        modules,
        required.config,
        announce=announced.append,
        progress=lambda *_: announced.append("progress"),
    )
    assert announced[0].startswith(
        "2 second moments of up to 128 x 128 over 256 documents; memory: about"
    )
    assert announced[1] == "progress"


def test_an_estimate_that_does_not_fit_has_a_fix(tmp_path: Path) -> None:
    required = required_of(tmp_path)
    amounts = estimate(required.model, list(required.keys), required.config, num_documents=1)
    assert "lower stats.batch_tokens" in str(
        dataclasses.replace(amounts, free_bytes=amounts.more_bytes - 1)
    )
    assert "lower stats.batch_tokens" not in str(
        dataclasses.replace(amounts, free_bytes=amounts.more_bytes)
    )


def test_the_time_left_follows_the_pace_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert left_text(10, done=5, remaining=20) == "40 s left"
    assert left_text(60, done=1, remaining=59) == "59 min left"
    assert left_text(60, done=1, remaining=150) == "2 h 30 min left"
    assert left_text(10, done=0, remaining=20) == left_text(10, done=20, remaining=0) == ""
    with shown_collecting() as shown:
        shown.announce("what it takes")
        for done in (100, 150, 200):
            shown.progress(done, 200)
    assert capsys.readouterr().err == "what it takes\ndocuments 200 of 200\n"


def test_files_of_another_format_are_distinguished_from_damaged_ones(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    required = required_of(tmp_path)
    fill_store(required)
    path = required.path(next(iter(required.keys)))
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    old = {
        name: value for name, value in json.loads(metadata["key"]).items() if name != "products"
    } | {"format": 1}
    save_file(load_file(path), path, metadata=metadata | {"key": json.dumps(old)})
    problems = [str(stored.problem) for stored in list_stored(tmp_path / "stats") if stored.problem]
    assert len(problems) == 1 and "another version of editkit wrote it in format 1" in problems[0]
