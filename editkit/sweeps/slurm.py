"""`hydra/launcher=slurm`: the jobs of a sweep as a Slurm array, through submitit.

What submitit's own Hydra launcher does not do, and this one does: a pre-empted or timed-out job
saves at the end of the edit at hand and is requeued (that one leaves in the middle of an edit); a
job that failed or was killed does not hide the results of the others; it can leave the array behind
(`detach`); and it asks squeue what became of the jobs, which every Slurm has, where sacct wants an
accounting database.
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

from editkit.errors import ConfigError
from editkit.sweeps.plan import load_outcome, note_death
from editkit.sweeps.summary import counted
from editkit.sweeps.sweeper import say

EARLY = (signal.SIGUSR1, signal.SIGUSR2)  # held back until they can be handled
STOPPED = 128  # exit codes above it: stopped by a signal
WARNED = {
    STOPPED + number for number in EARLY
}  # by Slurm, of a pre-emption or the time limit; a cancelled job gets SIGTERM
COMMON = (
    "name",
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "mem_gb",
    "nodes",
    "tasks_per_node",
    "stderr_to_stdout",
)
ALIVE = re.compile(
    r"PENDING|RUNNING|CONFIGURING|COMPLETING|SUSPENDED|REQUEUE|RESIZING|SIGNALING|STAGE_OUT|STOPPED"
)


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
        self.submitit_folder, self.detach, self.poll_s, self.max_num_timeout = (
            submitit_folder,
            detach,
            poll_s,
            max_num_timeout,
        )
        self.parameters = {
            name: OmegaConf.to_container(each) if OmegaConf.is_config(each) else each
            for name, each in parameters.items()
        }
        self.config: Any = None
        self.hydra_context: Any = None
        self.task_function: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submits the array and, unless it is to be left behind, waits until every job has ended.
        Raises ConfigError without Slurm.
        """
        executor = self._executor()
        work = CellJob(
            config=self.config, hydra_context=self.hydra_context, task_function=self.task_function
        )
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        states = [Singleton.get_state()] * len(numbers)
        jobs = executor.map_array(
            work, [list(each) for each in job_overrides], list(numbers), states
        )
        array = jobs[0].job_id.partition("_")[0]
        say(
            [
                f"Slurm job {array}: {counted(len(jobs), 'job')}, logs in {Path(jobs[0].paths.folder).parent}"
            ]
        )
        if not self.detach:
            try:
                self._wait(array, {number: job for number, job in zip(numbers, jobs, strict=True)})
            except KeyboardInterrupt:
                say([f"the jobs go on without this command; scancel {array} ends them"])
                raise
        return [self._returned(number) for number in numbers]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir))

    def _executor(self) -> Any:
        try:
            import submitit
        except ImportError:
            raise ConfigError(
                "hydra/launcher=slurm needs submitit: pip install 'editkit[slurm]'."
            ) from None
        given = {name: each for name, each in self.parameters.items() if each is not None}
        if "srun_args" not in given and "cpus_per_task" in given:
            given["srun_args"] = [
                f"--cpus-per-task={given['cpus_per_task']}"
            ]  # since 22.05 srun no longer takes it from sbatch
        try:
            executor = submitit.AutoExecutor(
                cluster="slurm",
                folder=self.submitit_folder,
                slurm_max_num_timeout=self.max_num_timeout,
                slurm_python=holding_signals(),
            )
            executor.update_parameters(
                **{
                    name if name in COMMON else f"slurm_{name}": each
                    for name, each in given.items()
                }
            )
        except (RuntimeError, ValueError, NameError) as error:
            raise ConfigError(f"hydra/launcher: {' '.join(str(error).split())}") from None
        return executor

    def _wait(self, array: str, jobs: Mapping[int, Any]) -> None:
        """Until every job has left a result, or is no longer known as alive; what died is noted."""
        gone: dict[int, int] = {}  # how often in a row a job without a result was not alive
        left = dict(jobs)
        while left:
            left = {
                number: job for number, job in left.items() if not job.paths.result_pickle.exists()
            }
            states = queued(array) if left else {}
            for number, job in list(left.items()):
                state = states.get(job.job_id, "not in the queue")
                gone[number] = 0 if ALIVE.search(state) else gone.get(number, 0) + 1
                if (
                    gone[number] >= 3
                    # a file system may show the result late, and a requeue passes through other
                    # states
                ):
                    note_death(
                        self.folder,
                        number,
                        f"Slurm job {job.job_id} ended without a result ({state})",
                    )
                    del left[number]
            if left:
                time.sleep(self.poll_s)

    def _returned(self, number: int) -> JobReturn:
        returned = JobReturn()
        returned.status, returned.return_value = (
            JobStatus.COMPLETED,
            (load_outcome(self.folder, number) or {}).get("code"),
        )
        return returned


class CellJob:
    """What an array's job runs; submitit stores it, and again at a requeue."""

    def __init__(self, *, config: Any, hydra_context: Any, task_function: Any) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def __call__(self, overrides: Sequence[str], number: int, singletons: Any) -> int:
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ.setdefault("OMP_NUM_THREADS", cores)  # torch is not loaded yet
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)  # submitit listens now
        Singleton.set_state(singletons)
        setup_globals()
        # What a requeued job wrote before is its own: resume=never was for the first time.
        again = ["resume=auto"] if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else []
        config = self.hydra_context.config_loader.load_sweep_config(
            self.config, [*overrides, *again]
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
        return int(
            getattr(returned._return_value, "code", 0) if returned.status is JobStatus.FAILED else 0
        )

    def checkpoint(self, *arguments: Any) -> Any:
        """The same again: the run's own checkpoint says where it goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def holding_signals() -> str:
    """The interpreter of a job, as the command line that submitit starts: Slurm's signals wait
    until somebody can handle them.

    A pre-emption can come while Python still starts; its signal would then end the job as if it had
    failed.
    """
    numbers = ",".join(str(int(number)) for number in EARLY)
    block = f"import os,signal,sys;signal.pthread_sigmask(signal.SIG_BLOCK,[{numbers}])"
    program = f"{block};os.execv(sys.executable,[sys.executable,*sys.argv[1:]])"
    return f"{shlex.quote(sys.executable)} -I -S -c {shlex.quote(program)}"


def requeue() -> None:
    """Now that the state is saved: what submitit does when it is told of a pre-emption or a
    time-out. Does not return.
    """
    import submitit

    signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment().USR_SIG}"))


def is_over() -> bool:
    """Whether Slurm has ended this job by itself: a person cancelled it, and it should not come
    back, or Slurm itself will requeue it.

    A cancelled job that still saves is shown as COMPLETING; one that is warned of a pre-emption or
    its time limit, as RUNNING.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return bool(
        re.search(r"JobState=(COMPLETING|CANCELLED)", _answer(["scontrol", "show", "job", job]))
    )


def queued(job: str) -> dict[str, str]:
    """The states of an array's jobs by their ids, as squeue knows them; ended ones stay there for a
    while.
    """
    lines = _answer(
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={job}"]
    ).splitlines()
    return {
        name: state for name, _, state in (line.strip().partition(" ") for line in lines) if name
    }


def _answer(command: Sequence[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
