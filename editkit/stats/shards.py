"""Which share of the work this process has, where several were started for it: by torchrun, or as
the tasks of a Slurm step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from editkit.errors import ConfigError
from editkit.lazy import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """Process `rank` of `of`; `local` is its number on its own machine."""

    rank: int = 0
    of: int = 1
    local: int = 0

    def device(self, device: str) -> str:
        """The configured device; where "cuda" leaves open which one, each process of a machine
        takes another.
        """
        if device != "cuda" or self.of == 1 or not torch.cuda.device_count():
            return device
        return f"cuda:{self.local % torch.cuda.device_count()}"


ALONE = Shard()


def shard_from(environment: Mapping[str, str]) -> Shard:
    """Reads RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS. Raises ConfigError where they
    make no sense.

    A Slurm batch script has the latter too, but it is one process; the tasks that `srun` starts
    know their step.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        is_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
        if is_batch_script or not {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
            return ALONE
    given = [
        environment.get(names[0], ""),
        environment.get(names[1], ""),
        environment.get(names[2], "0"),
    ]
    try:
        rank, of, local = map(int, given)
        if not 0 <= rank < of:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{names[0]}={given[0]}, {names[1]}={given[1]}, {names[2]}={given[2]} name no process "
            "of a group - "
            f"{names[0]} must lie from 0 to {names[1]} - 1, or both be unset."
        ) from None
    return Shard(rank, of, local)
