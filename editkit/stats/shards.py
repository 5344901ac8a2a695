"""The share of the work of this process, if torchrun or a Slurm step started several processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from editkit.errors import ConfigError, message
from editkit.lazy import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """Process number `rank` of `of` processes; `local` is its number on its machine."""

    rank: int = 0
    of: int = 1
    local: int = 0

    def device(self, device: str) -> str:
        """The configured device. For "cuda" without a number, the processes of a machine get
        different GPUs.
        """
        if device != "cuda" or self.of == 1 or not torch.cuda.device_count():
            return device
        return f"cuda:{self.local % torch.cuda.device_count()}"


ALONE = Shard()


def shard_from(environment: Mapping[str, str]) -> Shard:
    """The shard described by RANK and WORLD_SIZE, or by SLURM_PROCID and SLURM_NTASKS.

    A Slurm batch script has the latter two as well, but it is a single process. Only the tasks that
    `srun` starts have a step id.

    Raises:
        ConfigError: the variables are inconsistent.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        is_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
        if is_batch_script or not {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
            return ALONE
    values = [
        environment.get(names[0], ""),
        environment.get(names[1], ""),
        environment.get(names[2], "0"),
    ]
    try:
        rank, of, local = map(int, values)
        if not 0 <= rank < of:
            raise ValueError
    except ValueError:
        raise ConfigError(
            message(
                names[0],
                "the environment does not describe a process of a group",
                got=", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)),
                expected=f"{names[0]} from 0 to {names[1]} - 1, or both unset",
            )
        ) from None
    return Shard(rank, of, local)
