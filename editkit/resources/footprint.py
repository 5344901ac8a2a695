"""What a run, or a training, keeps and works with, in bytes: counted from built objects and the
sizes in config.json, without torch.

    program       the interpreter, torch and its kernels
    weights       in the dtype that is asked for
    masters       W_0 of every edited matrix; the total in float32, twice while a step is made; and
                  the total's factors
    statistics    second moments in float64, their factors in `solve.dtype`, and what a restraint on
                  the solve keeps
    editor        what the editor keeps: a hypernetwork, in training with its optimiser
    beside        what stands beside the weights after the last edit; then there are no masters
    working       the largest of: collecting second moments, planning a batch, solving and
                  telemetry, measuring; the phases of a training

All but the last are counted. `working` is a model of what a pass keeps. Its constants were measured
with GPT-2 on a CPU and carry a reserve for other families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from editkit.model.architecture import Architecture
from editkit.model.families import Family, Outline, known_families, known_mixtures
from editkit.resources.runtime import Runtime
from editkit.resources.workload import EditorMemory, SolveMemory, TrainingMemory, Workload

if TYPE_CHECKING:
    from editkit.model.load import ModelConfig

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Tokens of a pass over the world's texts: they have 30 tokens each, and a pass ends before it would
# pad too much.
SHORT = 1024
ANSWERS = 1 / 8  # of the tokens of a measuring pass, at how many logits are read
SUM_COPIES = 0.53  # of a second moment: the triangle in which it is collected
READING = 0.1e9  # the buffers of a shard that is read, and of the fingerprint


class NeedsMemory(Protocol):
    """What the estimate asks of an editor."""

    @property
    def spans_devices(self) -> bool: ...

    @property
    def needs_moments(self) -> bool: ...

    def memory(self, work: Workload) -> EditorMemory: ...

    def modules(self, model: Outline) -> tuple[str, ...]: ...


class KeepsHistory(Protocol):
    """What the estimate asks of a restraint on the solve."""

    def memory(self, work: Workload) -> SolveMemory: ...


class Trained(Protocol):
    """What the estimate asks of an editor that is trained."""

    def training_memory(
        self, work: Workload, *, is_gpu: bool, reading: float
    ) -> TrainingMemory: ...


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The texts that second moments are collected over."""

    folder: Path  # of stored second moments
    batch_tokens: int
    context_length: int
    is_short: bool  # the texts are single sentences
    is_imported: bool = False  # there are no texts: somebody else computed the second moments


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The parts of a run, or of a training, that memory depends on."""

    model: ModelConfig
    editor: NeedsMemory
    solve: KeepsHistory | None  # the restraint on the solve
    solve_dtype: str
    runtime: Runtime
    edits: int
    batch_size: int
    measuring_tokens: int  # evaluation.tokens_per_batch
    corpus: Corpus


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes by what they are for, wherever they lie."""

    weights: float
    base: float = 0.0  # W_0 of the edited matrices
    totals: float = 0.0
    moments: float = 0.0  # second moments and their factors
    stored: float = 0.0  # second moments as files
    history: SolveMemory = field(default_factory=SolveMemory)
    editor: float = 0.0  # on the device
    beside: float = 0.0
    waiting: float = 0.0  # of a training, on the host
    copied: float = 0.0  # of a training: for a checkpoint
    phases: Mapping[str, float] = field(default_factory=dict)
    savings: Mapping[str, str] = field(default_factory=dict)  # by phase, how it gets smaller


def outline_of(model: ModelConfig, architecture: Architecture) -> Outline:
    """The model as an editor's choice of matrices sees it."""
    families, given = known_families(), model.family
    usual = families.get(architecture.kind, families["llama" if architecture.is_gated else "gpt2"])
    family = families.get(given, usual) if isinstance(given, str) else given or usual
    if model.expert is not None:  # the names of all mixtures are as good
        mixture = given if isinstance(given, Family) else known_mixtures()["mixtral"]
        family = mixture.of_expert(model.expert)
    return Outline(name=model.label, family=family, num_layers=architecture.num_layers)


def workload_of(demand: Demand, architecture: Architecture) -> Workload:
    """The sizes that an editor's and a restraint's bytes follow from.

    Raises:
        ConfigError: the model has no layer of that number.
    """
    outline = outline_of(demand.model, architecture)
    modules = demand.editor.modules(outline)
    downs = outline.down_projections(range(architecture.num_layers))
    shape = (architecture.width, architecture.inner)
    return Workload(
        architecture=architecture,
        shapes=tuple(shape if name in downs else shape[::-1] for name in modules),
        layers=tuple(
            layer
            for layer in range(architecture.num_layers)
            if any(f"{name}.".startswith(f"{outline.family.block(layer)}.") for name in modules)
        ),
        weight_bytes=ITEMSIZE[demand.model.dtype],
        solve_bytes=ITEMSIZE[demand.solve_dtype],
        edits=demand.edits,
        batch_size=demand.batch_size,
    )


def run_footprint(demand: Demand, architecture: Architecture) -> Footprint:
    """The bytes of a run. Raises as `workload_of`."""
    work = workload_of(demand, architecture)
    editor, runtime, n = demand.editor.memory(work), demand.runtime, work.num_matrices
    needs_moments = demand.editor.needs_moments
    history = SolveMemory() if demand.solve is None else demand.solve.memory(work)
    columns = demand.edits * editor.columns_per_edit
    rank = min(columns, work.matrix / work.both)  # factors are kept while they are the smaller form
    is_written = editor.beside is None
    totals = n * 4 * (2 * work.matrix + rank * work.both) if is_written else 0.0
    moments = n * work.second_moment * (8 + work.solve_bytes) if needs_moments else 0.0
    copies = 2 if runtime.statistics_at == "disk" else 1
    # an update in dense form, and the new total
    update = 2 * 4 * work.matrix if is_written else 0
    factor = work.second_moment * 8 if needs_moments else 0  # while it is made
    phases = {
        "weights read": READING,
        "solve": update + 8 * (work.matrix + architecture.width**2) + factor,
        "target": editor.working,
        "measuring": _measuring(demand, work),
    }
    if needs_moments:
        phases["statistics"] = _collecting(demand, work, totals)
    return Footprint(
        weights=architecture.num_parameters * work.weight_bytes,
        base=n * work.matrix * work.weight_bytes if is_written else 0.0,
        totals=totals,
        moments=moments,
        stored=n * work.second_moment * 8 * copies if needs_moments else 0.0,
        history=history,
        editor=editor.kept,
        # once more while an entry is added
        beside=2 * (editor.beside or 0.0),
        phases=phases,
        savings={"target": editor.saving},
    )


def training_footprint(demand: Demand, editor: Trained, architecture: Architecture) -> Footprint:
    """The bytes of training an editor. Raises as `workload_of`."""
    work = workload_of(demand, architecture)
    memory = editor.training_memory(work, is_gpu=demand.runtime.is_gpu, reading=READING)
    return Footprint(
        weights=architecture.num_parameters * work.weight_bytes,
        editor=memory.kept,
        waiting=memory.on_host,
        copied=memory.copied,
        phases=memory.phases,
        savings=memory.saving,
    )


def _measuring(demand: Demand, work: Workload) -> float:
    tokens = demand.measuring_tokens if demand.runtime.is_gpu else min(demand.measuring_tokens, 512)
    positions = min(tokens * ANSWERS, 2**25 / work.architecture.vocabulary)
    return work.forward(tokens, 256) + work.logits(positions)


def _collecting(demand: Demand, work: Workload, totals: float) -> float:
    """Collecting second moments. What is kept later is counted already and not there yet: the
    moments themselves, and all of the totals but a matrix of zeros each.
    """
    corpus, n, square = demand.corpus, work.num_matrices, work.second_moment
    if _is_stored(demand, work):
        return float(square * 8)
    keys = max(8192, corpus.batch_tokens) * n * work.architecture.inner * work.weight_bytes
    tokens = min(corpus.batch_tokens, SHORT) if corpus.is_short else corpus.batch_tokens
    gathering = n * SUM_COPIES * square * 8 + keys + work.forward(tokens, corpus.context_length)
    later = totals - 4 * n * work.matrix
    if demand.runtime.statistics_at == "device":
        later += n * square * (8 + work.solve_bytes)
    return max(gathering - later, square * 8)


def _is_stored(demand: Demand, work: Workload) -> bool:
    """Whether second moments of these matrices are stored for a model of this name: then, as far as
    can be known, nothing is collected.
    """
    if demand.corpus.is_imported:
        return True
    if work.architecture.kind not in known_families():
        return False
    modules = demand.editor.modules(outline_of(demand.model, work.architecture))
    return all(
        any(
            stored_for(path) == demand.model.label
            for path in demand.corpus.folder.glob(f"{module}-*.safetensors")
        )
        for module in modules
    )


def stored_for(path: Path) -> str:
    """The model in the header of a stored second moment; empty for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return str(json.loads(header["__metadata__"]["key"])["model"])
    except (OSError, ValueError, KeyError):
        return ""
