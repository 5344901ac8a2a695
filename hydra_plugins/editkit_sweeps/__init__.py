"""The sweeper and launchers of editkit under the only namespace in which Hydra looks for plugins.
They are implemented in `editkit.sweeps`.
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
