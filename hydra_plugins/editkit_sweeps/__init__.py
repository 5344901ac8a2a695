"""Hydra takes sweepers and launchers from the `hydra_plugins` namespace alone: these are the names;
what they do is in `editkit.sweeps`.
"""

from __future__ import annotations

from editkit.sweeps.local_gpus import LocalGpuLauncher
from editkit.sweeps.slurm import SlurmLauncher
from editkit.sweeps.sweeper import CellSweeper


class Cells(CellSweeper):
    """conf/hydra/sweeper/cells.yaml"""


class LocalGpus(LocalGpuLauncher):
    """conf/hydra/launcher/local_gpus.yaml"""


class Slurm(SlurmLauncher):
    """conf/hydra/launcher/slurm.yaml"""
