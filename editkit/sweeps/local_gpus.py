"""`hydra/launcher=local_gpus`: one process per GPU of this machine.

A slot is a GPU that runs one job at a time. Each job is a process that sees only the device of its
slot (CUDA_VISIBLE_DEVICES). So `runtime.device=cuda` is a different GPU in each job, and a crash of
one job does not affect the others.
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

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.runner.signals import stop_signals
from editkit.sweeps.plan import STOPPED, save_outcome
from editkit.sweeps.summary import counted
from editkit.sweeps.sweeper import show_lines

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
    """Fills every slot until all jobs have ended. A stop signal is passed on to the jobs, which
    save their state first.
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
        """Runs the jobs. Their ends are recorded in the sweep's folder."""
        config = self.hydra_context.config_loader.load_sweep_config(
            self.config, list(job_overrides[0])
        )
        devices = devices_of(self.gpus, str(config.runtime.device), os.environ)
        waiting = deque(
            (initial_job_idx + index, tuple(overrides))
            for index, overrides in enumerate(job_overrides)
        )
        running: dict[int, Job] = {}
        codes: dict[int, int] = {}
        jobs, slots = counted(len(waiting), "job"), counted(len(devices), "slot")
        show_lines([f"{jobs} on {slots}; output in {self.folder / LOGS}"])
        with stop_signals() as stop:
            is_stopping = False
            while running or (waiting and stop.number is None):
                for slot in range(len(devices)):
                    if slot not in running and waiting and stop.number is None:
                        number, overrides = waiting.popleft()
                        running[slot] = self._start(number, overrides, slot, devices)
                if stop.number is not None and not is_stopping:
                    is_stopping = True
                    show_lines([f"stopping: {counted(len(running), 'job')} saving first"])
                    for job in running.values():
                        job.process.send_signal(signal.SIGTERM)
                ended = [slot for slot, job in running.items() if job.process.poll() is not None]
                for slot in ended:
                    job = running.pop(slot)
                    codes[job.number] = self._finish(job, devices[slot])
                time.sleep(POLL_S)
        if stop.number is not None:
            raise SystemExit(STOPPED + stop.number)
        return [_returned(codes[initial_job_idx + index]) for index in range(len(job_overrides))]

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
        # The log stays open until the job ends.
        log = open(self.folder / LOGS / f"{number}.log", "wb")  # noqa: SIM115
        command = [
            *(sys.executable, "-m", "editkit", "run"),
            *self._config_dir(),
            *overrides,
            "hydra.mode=RUN",
        ]
        # In a session of its own the job does not receive Ctrl-C from the terminal. The launcher
        # does, and asks the jobs to save their state.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        outcome = {"code": None, "error": None, "slot": slot, "device": devices[slot]}
        save_outcome(self.folder, number, outcome | {"pid": process.pid})
        return Job(
            number=number,
            overrides=overrides,
            slot=slot,
            process=process,
            log=log,
            started=time.time(),
        )

    def _config_dir(self) -> Iterator[str]:
        """The user's own folder of options, as an argument of the jobs."""
        for source in self.config.hydra.runtime.config_sources:
            if source.provider == "command-line":
                yield from ("--config-dir", source.path)

    def _finish(self, job: Job, device: str) -> int:
        job.log.close()
        code, seconds = job.process.returncode, round(time.time() - job.started, 3)
        error = None
        if code < 0:  # killed by signal n: -n in Python, 128 + n in shells
            error = f"killed by {signal.Signals(-code).name}"
            code = STOPPED - code
        elif code:
            error = last_error(Path(job.log.name)) or f"exit code {code}"
        outcome = {
            "code": code,
            "error": error,
            "seconds": seconds,
            "slot": job.slot,
            "device": device,
            "pid": job.process.pid,
        }
        save_outcome(self.folder, job.number, outcome)
        where = f"slot {job.slot}, device {device}"
        show_lines([f"job {job.number} on {where}: {error or 'done'} ({seconds:.0f} s)"])
        return code


def devices_of(
    gpus: int | Sequence[int | str] | None, device: str, environment: Mapping[str, str]
) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each slot: all GPUs (None), the first `gpus`, or the named ones.

    On a machine without GPUs, a number is the number of processes on the CPU.

    Raises:
        ConfigError: the jobs could not use these devices.
    """
    key = "hydra.launcher.gpus"
    if device.startswith("cuda:"):
        problem = "hydra/launcher=local_gpus assigns the devices"
        raise ConfigError(
            message(
                "runtime.device",
                problem,
                got=device,
                expected="cuda",
                fix="set runtime.device=cuda",
            )
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in visible.split(",") if name] if visible is not None else None
    if gpus is None:
        if device != "cuda":
            fix = f"choose runtime=cuda, or set {key}=<number of processes>"
            problem = "hydra/launcher=local_gpus needs GPUs"
            raise ConfigError(
                message("runtime.device", problem, got=device, expected="cuda", fix=fix)
            )
        if not (named := named or [str(index) for index in range(torch.cuda.device_count())]):
            raise ConfigError(message("hydra/launcher", "this machine has no visible GPU"))
        return named
    if not isinstance(gpus, int):
        return [str(name) for name in gpus]
    if gpus < 1:
        expected = "at least 1, a list of devices, or null for all"
        raise ConfigError(message(key, "out of range", got=gpus, expected=expected))
    if named and device == "cuda" and gpus > len(named):
        problem = f"CUDA_VISIBLE_DEVICES shows {counted(len(named), 'GPU')}"
        raise ConfigError(message(key, problem, got=gpus, expected=f"at most {len(named)}"))
    return named[:gpus] if named and gpus <= len(named) else [str(index) for index in range(gpus)]


def default_threads(slots: int) -> int:
    """The cores of this machine, divided by the slots. More threads than cores slow every process
    down.
    """
    return max(1, len(os.sched_getaffinity(0)) // slots) if hasattr(os, "sched_getaffinity") else 1


def last_error(log: Path) -> str:
    """The last ConfigError in a job's output with all that follows, or the last line; on one
    line.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    start = next(
        (
            index
            for index in range(len(lines) - 1, -1, -1)
            if lines[index].startswith("ConfigError")
        ),
        len(lines) - 1,
    )
    return " ".join(lines[max(0, start) :])[:2000]


def _returned(code: int) -> JobReturn:
    returned = JobReturn()
    returned.status, returned.return_value = JobStatus.COMPLETED, code
    return returned
