"""`hydra/launcher=slurm`: the jobs of a sweep as a Slurm array, through submitit.

It differs from submitit's own Hydra launcher in four points. A pre-empted or timed-out job finishes
the current edit, saves its state and is requeued; submitit's would stop in the middle of an edit. A
job that failed or was killed does not hide the results of the others. The command can return after
the submission (`detach`). The states of jobs come from squeue, which every Slurm has; sacct needs
an accounting database.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict

from editkit.errors import ConfigError, message
from editkit.sweeps.plan import STOPPED, load_outcome, record_death
from editkit.sweeps.summary import counted
from editkit.sweeps.sweeper import show_lines

EARLY = (signal.SIGUSR1, signal.SIGUSR2)  # blocked until they can be handled
# Exit codes after Slurm's warning of a pre-emption or of the time limit. A cancelled job gets
# SIGTERM.
WARNED = {STOPPED + number for number in EARLY}
# Parameters that submitit knows for every cluster; the others are Slurm's.
COMMON = (
    *("name", "timeout_min", "cpus_per_task", "gpus_per_node"),
    *("mem_gb", "nodes", "tasks_per_node", "stderr_to_stdout"),
)
ALIVE = re.compile(
    r"PENDING|RUNNING|CONFIGURING|COMPLETING|SUSPENDED|REQUEUE|RESIZING|SIGNALING|STAGE_OUT|STOPPED"
)
# Polls in a row without a result or a living state, after which a job counts as dead. A file system
# may show the result late, and a requeue passes through other states.
POLLS_OF_DEATH = 3


class SlurmLauncher(Launcher):
    """One array for the jobs of a sweep."""

    def __init__(
        self,
        *,
        submitit_folder: str,
        detach: bool,
        poll_s: float,
        max_num_timeout: int,
        **parameters: Any,
    ) -> None:
        self.submitit_folder, self.detach = submitit_folder, detach
        self.poll_s, self.max_num_timeout = poll_s, max_num_timeout
        self.parameters = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in parameters.items()
        }
        self.config: Any = None
        self.hydra_context: Any = None
        self.task_function: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submits the array. Unless `detach` is set, it waits until every job has ended.

        Raises:
            ConfigError: submitit or Slurm is missing, or refuses the parameters.
        """
        executor = self._executor()
        cell_job = CellJob(
            config=self.config, hydra_context=self.hydra_context, task_function=self.task_function
        )
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        states = [Singleton.get_state()] * len(numbers)
        jobs = executor.map_array(
            cell_job, [list(overrides) for overrides in job_overrides], list(numbers), states
        )
        array = jobs[0].job_id.partition("_")[0]
        logs = Path(jobs[0].paths.folder).parent
        show_lines([f"Slurm job {array}: {counted(len(jobs), 'job')}, logs in {logs}"])
        if not self.detach:
            try:
                self._wait(array, dict(zip(numbers, jobs, strict=True)))
            except KeyboardInterrupt:
                show_lines([f"the jobs continue without this command; scancel {array} ends them"])
                raise
        return [self._returned(number) for number in numbers]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir))

    def _executor(self) -> Any:
        try:
            import submitit
        except ImportError:
            fix = "pip install 'editkit[slurm]'"
            problem = "submitit is not installed"
            raise ConfigError(message("hydra/launcher=slurm", problem, fix=fix)) from None
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        if "srun_args" not in parameters and "cpus_per_task" in parameters:
            # Since Slurm 22.05 srun does not take it from sbatch.
            parameters["srun_args"] = [f"--cpus-per-task={parameters['cpus_per_task']}"]
        named = {
            name if name in COMMON else f"slurm_{name}": value for name, value in parameters.items()
        }
        try:
            executor = submitit.AutoExecutor(
                cluster="slurm",
                folder=self.submitit_folder,
                slurm_max_num_timeout=self.max_num_timeout,
                slurm_python=signal_blocking_python(),
            )
            executor.update_parameters(**named)
        except (RuntimeError, ValueError, NameError) as error:
            raise ConfigError(message("hydra/launcher", " ".join(str(error).split()))) from None
        return executor

    def _wait(self, array: str, jobs: Mapping[int, Any]) -> None:
        """Waits until every job has a result or is dead. Deaths are recorded."""
        polls_without_life: dict[int, int] = {}
        waiting = dict(jobs)
        while waiting:
            waiting = {
                number: job
                for number, job in waiting.items()
                if not job.paths.result_pickle.exists()
            }
            states = queued(array) if waiting else {}
            for number, job in list(waiting.items()):
                state = states.get(job.job_id, "not in the queue")
                is_alive = ALIVE.search(state) is not None
                polls_without_life[number] = (
                    0 if is_alive else polls_without_life.get(number, 0) + 1
                )
                if polls_without_life[number] >= POLLS_OF_DEATH:
                    error = f"Slurm job {job.job_id} ended without a result ({state})"
                    record_death(self.folder, number, error)
                    del waiting[number]
            if waiting:
                time.sleep(self.poll_s)

    def _returned(self, number: int) -> JobReturn:
        returned = JobReturn()
        returned.status = JobStatus.COMPLETED
        returned.return_value = (load_outcome(self.folder, number) or {}).get("code")
        return returned


class CellJob:
    """The callable of a job of the array. submitit stores it, and stores it again at a requeue."""

    def __init__(self, *, config: Any, hydra_context: Any, task_function: Any) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def __call__(self, overrides: Sequence[str], number: int, singletons: Any) -> int:
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ.setdefault("OMP_NUM_THREADS", cores)  # torch is not loaded yet
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)  # submitit's handlers are installed
        Singleton.set_state(singletons)
        setup_globals()
        # A requeued job resumes what it wrote itself: resume=never was meant for its first start.
        is_requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        config = self.hydra_context.config_loader.load_sweep_config(
            self.config, [*overrides, *(["resume=auto"] if is_requeued else [])]
        )
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = os.environ.get("SLURM_JOB_ID", "?"), number
        try:
            returned = run_job(
                hydra_context=self.hydra_context,
                task_function=self.task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except SystemExit as stop:
            code = int(stop.code or 0)
            if code in WARNED or (code > STOPPED and not is_over()):
                requeue()
            return code
        if returned.status is not JobStatus.FAILED:
            return 0
        return int(getattr(returned._return_value, "code", 0))

    def checkpoint(self, *arguments: Any) -> Any:
        """The same call again. The run resumes from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def signal_blocking_python() -> str:
    """The command line of a job's interpreter, which submitit starts. It blocks Slurm's signals
    until their handlers are installed.

    A pre-emption can come while Python still starts. Its signal would then end the job as if it had
    failed.
    """
    numbers = ",".join(str(int(number)) for number in EARLY)
    block = f"import os,signal,sys;signal.pthread_sigmask(signal.SIG_BLOCK,[{numbers}])"
    program = f"{block};os.execv(sys.executable,[sys.executable,*sys.argv[1:]])"
    return f"{shlex.quote(sys.executable)} -I -S -c {shlex.quote(program)}"


def requeue() -> None:
    """Requeues this job, whose state is saved: submitit's handler of a pre-emption or time-out
    runs. Does not return.
    """
    import submitit

    signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment().USR_SIG}"))


def is_over() -> bool:
    """Whether Slurm is ending this job: the job was cancelled and must not come back, or Slurm
    itself requeues it.

    A cancelled job that is still saving has the state COMPLETING. A job that was warned of a
    pre-emption or of its time limit has the state RUNNING.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    shown = _output(["scontrol", "show", "job", job])
    return bool(re.search(r"JobState=(COMPLETING|CANCELLED)", shown))


def queued(array: str) -> dict[str, str]:
    """The states of the array's jobs by id, from squeue. Ended jobs stay there for a while."""
    lines = _output(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={array}"]
    ).splitlines()
    return {job: state for job, _, state in (line.strip().partition(" ") for line in lines) if job}


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
