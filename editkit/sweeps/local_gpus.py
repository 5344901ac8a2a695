"""`hydra/launcher=local_gpus`: one process per GPU of this machine, from one command.

A slot is a GPU that is free for a job. Each job is a process of its own that sees its slot's device
alone (CUDA_VISIBLE_DEVICES), so `runtime.device=cuda` means another GPU in each, and a job that
crashes takes nothing with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.runner.signals import stop_signals
from editkit.sweeps.plan import save_outcome
from editkit.sweeps.summary import counted
from editkit.sweeps.sweeper import say

POLL_S = 0.2
LOGS = "logs"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process that runs one configuration."""

    number: int
    overrides: tuple[str, ...]
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


class LocalGpuLauncher(Launcher):
    """Keeps every slot busy until all jobs are done; a stop is passed on to the jobs, which save
    first.
    """

    def __init__(self, *, gpus: int | Sequence[int | str] | None, threads: int | None) -> None:
        self.gpus, self.threads = gpus, threads
        self.config: Any = None
        self.hydra_context: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs the jobs; their outcomes are noted in the sweep's folder."""
        config = self.hydra_context.config_loader.load_sweep_config(
            self.config, list(job_overrides[0])
        )
        devices = devices_of(self.gpus, str(config.runtime.device), os.environ)
        waiting = deque(
            (initial_job_idx + place, tuple(overrides))
            for place, overrides in enumerate(job_overrides)
        )
        running: dict[int, Job] = {}
        codes: dict[int, int] = {}
        say(
            [
                f"{counted(len(waiting), 'job')} on {counted(len(devices), 'slot')}; output in {self.folder / LOGS}"
            ]
        )
        with stop_signals() as asked:
            told = False
            while running or (waiting and asked.number is None):
                for slot in range(len(devices)):
                    if slot not in running and waiting and asked.number is None:
                        number, overrides = waiting.popleft()
                        running[slot] = self._start(number, overrides, slot, devices)
                if asked.number is not None and not told:
                    told = True
                    say([f"stopping: {counted(len(running), 'job')} to save first"])
                    for job in running.values():
                        job.process.send_signal(signal.SIGTERM)
                for slot in [
                    slot for slot, job in running.items() if job.process.poll() is not None
                ]:
                    job = running.pop(slot)
                    codes[job.number] = self._ended(job, devices[slot])
                time.sleep(POLL_S)
        if asked.number is not None:
            raise SystemExit(128 + asked.number)
        return [_returned(codes[initial_job_idx + place]) for place in range(len(job_overrides))]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir))

    def _start(
        self, number: int, overrides: tuple[str, ...], slot: int, devices: Sequence[str]
    ) -> Job:
        threads = self.threads or os.environ.get("OMP_NUM_THREADS") or default_threads(len(devices))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": devices[slot],
        }
        (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
        log = open(self.folder / LOGS / f"{number}.log", "wb")  # noqa: SIM115 (it stays open as long as the job)
        command = [
            sys.executable,
            "-m",
            "editkit",
            "run",
            *self._search_path(),
            *overrides,
            "hydra.mode=RUN",
        ]
        # A session of its own: Ctrl-C in the terminal is for the launcher, which asks the jobs to
        # save.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        save_outcome(
            self.folder,
            number,
            {
                "code": None,
                "error": None,
                "slot": slot,
                "device": devices[slot],
                "pid": process.pid,
            },
        )
        return Job(
            number=number,
            overrides=overrides,
            slot=slot,
            process=process,
            log=log,
            started=time.time(),
        )

    def _search_path(self) -> Iterator[str]:
        """A person's own folder of options, which the jobs need as well."""
        for source in self.config.hydra.runtime.config_sources:
            if source.provider == "command-line":
                yield from ("--config-dir", source.path)

    def _ended(self, job: Job, device: str) -> int:
        job.log.close()
        code, seconds = job.process.returncode, round(time.time() - job.started, 3)
        code = (
            128 - code if code < 0 else code
        )  # killed by signal n: -n for Python, 128 + n for shells
        error = None if code == 0 else last_words(Path(job.log.name)) or f"exit code {code}"
        if job.process.returncode < 0:
            error = f"killed by {signal.Signals(-job.process.returncode).name}"
        facts = {
            "code": code,
            "error": error,
            "seconds": seconds,
            "slot": job.slot,
            "device": device,
            "pid": job.process.pid,
        }
        save_outcome(self.folder, job.number, facts)
        say(
            [
                f"job {job.number} on slot {job.slot}, device {device}: {'done' if code == 0 else error} ({seconds:.0f} s)"
            ]
        )
        return code


def devices_of(
    gpus: int | Sequence[int | str] | None, device: str, environment: Mapping[str, str]
) -> list[str]:
    """What each slot's jobs see as CUDA_VISIBLE_DEVICES: all GPUs, the first so many, or those that
    are named.

    A number, on a machine without GPUs, is that of processes on the CPU. Raises ConfigError where
    the jobs could not use the devices.
    """
    if device.startswith("cuda:"):
        raise ConfigError(
            f"runtime.device: {device} was given; hydra/launcher=local_gpus assigns the devices: runtime.device=cuda."
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    named = [each for each in visible.split(",") if each] if visible is not None else None
    if gpus is None:
        if device != "cuda":
            raise ConfigError(
                f"hydra/launcher=local_gpus: runtime.device is {device}; runtime=cuda, or say hydra.launcher.gpus=<number>."
            )
        if not (named := named or [str(index) for index in range(torch.cuda.device_count())]):
            raise ConfigError("hydra/launcher=local_gpus: this machine shows no GPU.")
        return named
    if not isinstance(gpus, int):
        return [str(each) for each in gpus]
    if gpus < 1:
        raise ConfigError(
            f"hydra.launcher.gpus: {gpus} was given; at least 1, a list of devices, or null for all."
        )
    if named and device == "cuda" and gpus > len(named):
        raise ConfigError(
            f"hydra.launcher.gpus: {gpus} was given; CUDA_VISIBLE_DEVICES shows {len(named)}."
        )
    return named[:gpus] if named and gpus <= len(named) else [str(index) for index in range(gpus)]


def default_threads(slots: int) -> int:
    """The cores of this machine, shared evenly: more threads than cores make every process
    slower.
    """
    return max(1, len(os.sched_getaffinity(0)) // slots) if hasattr(os, "sched_getaffinity") else 1


def last_words(log: Path) -> str:
    """The end of a job's output, on one line: from its last ConfigError on, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    start = next(
        (
            place
            for place in range(len(lines) - 1, -1, -1)
            if lines[place].startswith("ConfigError")
        ),
        len(lines) - 1,
    )
    return " ".join(lines[max(0, start) :])[:2000]


def _returned(code: int) -> JobReturn:
    returned = JobReturn()
    returned.status, returned.return_value = JobStatus.COMPLETED, code
    return returned
