"""editkit: sequential-editing benchmarks for large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from editkit.api.editing import edit as edit
    from editkit.api.exported import load_edited as load_edited
    from editkit.api.loading import load as load
    from editkit.api.probing import Measures as Measures
    from editkit.api.result import EditResult as EditResult
    from editkit.api.runs import export as export
    from editkit.api.runs import load_run as load_run
    from editkit.api.runs import load_runs as load_runs
    from editkit.api.runs import run as run
    from editkit.api.session import Session as Session
    from editkit.datasets.base import AbstractDataset as AbstractDataset
    from editkit.editors.base import AbstractEditor as AbstractEditor
    from editkit.editors.base import AbstractSideEditor as AbstractSideEditor
    from editkit.editors.base import Plan as Plan
    from editkit.editors.base import Step as Step
    from editkit.editors.crispedit import CrispEdit as CrispEdit
    from editkit.editors.emmet import Emmet as Emmet
    from editkit.editors.ft import Ft as Ft
    from editkit.editors.grace import Grace as Grace
    from editkit.editors.in_context import InContext as InContext
    from editkit.editors.kn import Kn as Kn
    from editkit.editors.locft import LocFt as LocFt
    from editkit.editors.lora import Lora as Lora
    from editkit.editors.lora import MergedLora as MergedLora
    from editkit.editors.malmen import Malmen as Malmen
    from editkit.editors.memit import Memit as Memit
    from editkit.editors.memoe import Memoe as Memoe
    from editkit.editors.memoir import Memoir as Memoir
    from editkit.editors.mend import Mend as Mend
    from editkit.editors.pmet import Pmet as Pmet
    from editkit.editors.rome import Rome as Rome
    from editkit.editors.serac import Serac as Serac
    from editkit.editors.t_patcher import TPatcher as TPatcher
    from editkit.editors.ultraedit import UltraEdit as UltraEdit
    from editkit.editors.wise import Wise as Wise
    from editkit.errors import ConfigError as ConfigError
    from editkit.evaluation.base import AbstractEvaluator as AbstractEvaluator
    from editkit.evaluation.protocols.base import AbstractProtocol as AbstractProtocol
    from editkit.linalg.lowrank import LowRank as LowRank
    from editkit.model.editable import EditableModel as EditableModel
    from editkit.restraints.alphaedit import AlphaEdit as AlphaEdit
    from editkit.restraints.base import AbstractObjectiveRestraint as AbstractObjectiveRestraint
    from editkit.restraints.base import AbstractSolveRestraint as AbstractSolveRestraint
    from editkit.restraints.base import AbstractTotalRestraint as AbstractTotalRestraint
    from editkit.restraints.base import AbstractUpdateRestraint as AbstractUpdateRestraint
    from editkit.restraints.d4s import D4S as D4S
    from editkit.restraints.eac import Eac as Eac
    from editkit.restraints.emmet import EmmetConstraint as EmmetConstraint
    from editkit.restraints.encore import Encore as Encore
    from editkit.restraints.lyaplock import LyapLock as LyapLock
    from editkit.restraints.mose import Mose as Mose
    from editkit.restraints.mpes import Mpes as Mpes
    from editkit.restraints.nas import Nas as Nas
    from editkit.restraints.norm_cap import NormCap as NormCap
    from editkit.restraints.nse import Nse as Nse
    from editkit.restraints.prune import Prune as Prune
    from editkit.restraints.rect import Rect as Rect
    from editkit.restraints.simie import SimIE as SimIE
    from editkit.restraints.sphere import Sphere as Sphere
    from editkit.types import EditRequest as EditRequest
    from editkit.types import Measurement as Measurement
    from editkit.types import Probe as Probe
else:
    # A name is imported when it is first used, so that `import editkit` costs nothing.
    _MODULES = {
        "AbstractDataset": "datasets.base",
        "AbstractEditor": "editors.base",
        "AbstractEvaluator": "evaluation.base",
        "AbstractObjectiveRestraint": "restraints.base",
        "AbstractProtocol": "evaluation.protocols.base",
        "AbstractSideEditor": "editors.base",
        "AbstractSolveRestraint": "restraints.base",
        "AbstractTotalRestraint": "restraints.base",
        "AbstractUpdateRestraint": "restraints.base",
        "AlphaEdit": "restraints.alphaedit",
        "ConfigError": "errors",
        "CrispEdit": "editors.crispedit",
        "D4S": "restraints.d4s",
        "Eac": "restraints.eac",
        "EditRequest": "types",
        "EditResult": "api.result",
        "EditableModel": "model.editable",
        "Emmet": "editors.emmet",
        "EmmetConstraint": "restraints.emmet",
        "Encore": "restraints.encore",
        "Ft": "editors.ft",
        "Grace": "editors.grace",
        "InContext": "editors.in_context",
        "Kn": "editors.kn",
        "LocFt": "editors.locft",
        "Lora": "editors.lora",
        "LowRank": "linalg.lowrank",
        "LyapLock": "restraints.lyaplock",
        "Malmen": "editors.malmen",
        "Measurement": "types",
        "Measures": "api.probing",
        "Memit": "editors.memit",
        "Memoe": "editors.memoe",
        "Memoir": "editors.memoir",
        "Mend": "editors.mend",
        "MergedLora": "editors.lora",
        "Mose": "restraints.mose",
        "Mpes": "restraints.mpes",
        "Nas": "restraints.nas",
        "NormCap": "restraints.norm_cap",
        "Nse": "restraints.nse",
        "Plan": "editors.base",
        "Pmet": "editors.pmet",
        "Probe": "types",
        "Prune": "restraints.prune",
        "Rect": "restraints.rect",
        "Rome": "editors.rome",
        "Serac": "editors.serac",
        "Session": "api.session",
        "SimIE": "restraints.simie",
        "Sphere": "restraints.sphere",
        "Step": "editors.base",
        "TPatcher": "editors.t_patcher",
        "UltraEdit": "editors.ultraedit",
        "Wise": "editors.wise",
        "edit": "api.editing",
        "export": "api.runs",
        "load": "api.loading",
        "load_edited": "api.exported",
        "load_run": "api.runs",
        "load_runs": "api.runs",
        "run": "api.runs",
    }
    __all__ = ["__version__", *_MODULES]

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'editkit' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"editkit.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
