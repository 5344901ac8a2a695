"""A real Slurm of two nodes on this host, in a folder of its own; every process that it starts ends
with it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
TEMPLATE = Path(__file__).with_name("slurm.conf")


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own wants root"
    absent = [name for name in PROGRAMS if program(name) is None]
    return f"{', '.join(absent)} missing: apt-get install slurm-wlm munge" if absent else None


def program(name: str) -> str | None:
    return shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    )


@dataclass
class Cluster:
    """The running cluster."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }

    def ask(self, *command: str) -> str:
        """The answer of one of Slurm's commands. Raises CalledProcessError."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def jobs(self) -> dict[str, str]:
        """State by job."""
        lines = self.ask(
            "squeue", "--noheader", "--array", "--states=all", "--format=%i %T"
        ).splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def start(self, name: str, *command: str) -> None:
        found = program(command[0])
        assert found is not None
        with open(self.folder / f"{name}.out", "wb") as log:
            self.processes[name] = subprocess.Popen(
                [found, *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def release(self) -> None:
        """Lets requeued jobs start at once: Slurm makes them wait two minutes."""
        for job, state in self.jobs().items():
            if state == "PENDING":
                subprocess.run(
                    ["scontrol", "update", f"JobId={job}", "StartTime=now"],
                    env=self.environment,
                    capture_output=True,
                    check=False,
                )

    def told(self) -> str:
        """The ends of all logs, for a failure's report."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self.folder.glob("*.[lo][ou][gt]"))
        )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Starts munged, slurmctld and two slurmd, waits until both nodes are idle, and stops
    everything at the end.
    """
    cluster = Cluster(folder)
    try:
        _prepare(cluster)
        cluster.start("munged", "munged", "--foreground", "--force", *_munge(folder))
        wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        cluster.start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            cluster.start(node, "slurmd", "-D", "-N", node)
        wait_for(
            lambda: _states(cluster) == {"n1": "idle", "n2": "idle"}, "two idle nodes", seconds=60
        )
        yield cluster
    finally:
        stop(cluster)


def stop(cluster: Cluster) -> None:
    """Ends the jobs, then the daemons; what does not go by itself is killed."""
    if "slurmctld" in cluster.processes:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "--user", "root"],
                env=cluster.environment,
                capture_output=True,
                timeout=30,
                check=False,
            )
            wait_for(
                lambda: (
                    not [
                        state
                        for state in cluster.jobs().values()
                        if state in ("RUNNING", "COMPLETING")
                    ]
                ),
                "the end of all jobs",
                40,
            )
    for name in reversed(cluster.processes):
        cluster.processes[name].terminate()
    for process in cluster.processes.values():
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in _left_behind(cluster.folder):  # steps of jobs whose slurmd is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


def _left_behind(folder: Path) -> list[int]:
    """Processes that were started with this cluster's configuration, and this process's children no
    more.
    """
    mark, found = f"SLURM_CONF={folder}/slurm.conf".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(path.name) != os.getpid() and mark in (path / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(path.name))
    return found


def wait_for(
    condition: Callable[[], bool], what: str, seconds: float = 30, every: float = 0.25
) -> None:
    """Raises TimeoutError if it does not come true."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.SubprocessError):
            if condition():
                return
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


def _prepare(cluster: Cluster) -> None:
    folder = cluster.folder
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    host = platform.node().partition(".")[0]
    ports = dict(zip(("port_ctld", "port_n1", "port_n2"), _free_ports(3), strict=True))
    text = TEMPLATE.read_text()
    for name, value in {"host": host, "user": "root", "folder": folder, **ports}.items():
        text = text.replace("{" + name + "}", str(value))
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")


def _munge(folder: Path) -> list[str]:
    names = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    return [f"--{option}={folder / name}" for option, name in names.items()]


def _states(cluster: Cluster) -> dict[str, str]:
    lines = cluster.ask(
        "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t"
    ).splitlines()
    return dict(line.split() for line in lines)  # type: ignore[misc]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
