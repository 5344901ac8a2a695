"""The error of a minimal second moment relative to the full one: of the matrix, and of the updates
that editors compute from it.

For a key k and a residual r, ROME's update is r a^T with a = C^-1 k / (k^T C^-1 k) (Meng et al.
2022, arXiv 2202.05262, Eq. 2). MEMIT's update is R X with X = K^T (lambda C + K K^T)^-1 (Meng et
al. 2023, arXiv 2210.07229, Eq. 14). If two updates differ only in C, their relative difference is
that of a for every r. For a batch it is that of X, as if the residuals were orthonormal.

Shape letters: I d_in, N keys.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.files import write_atomically
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import encode, fill, pad, subject_position
from editkit.stats.build import Statistics, fill_store, statistics
from editkit.stats.corpus import StatsConfig
from editkit.stats.store import Moments

if TYPE_CHECKING:
    from rich.table import Table

    from editkit.model.editable import EditableModel
    from editkit.types import EditRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The differences at one module, relative to the full preset.

    The MEMIT values are None without a covariance weight. The mean and the maximum are over single
    keys, `memit_batch` is for all keys together.
    """

    module: str
    size: int  # d_in
    full_vectors: int
    minimal_vectors: int
    matrix: float  # |C' - C| / |C|, Frobenius
    rome_mean: float  # over keys
    rome_max: float
    memit_mean: float | None
    memit_max: float | None
    memit_batch: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The statistics of one preset."""

    documents: int
    corpus: str  # digest
    seconds: float | None  # duration of collecting; None if the statistics were stored
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The content of the report that `editkit stats compare` writes."""

    model: str
    fingerprint: str
    stats: str  # name of the source
    vectors_per_dimension: int
    keys: int
    covariance_weight: float | None
    full: Preset
    minimal: Preset
    modules: tuple[Difference, ...]


def compare_presets(
    model: EditableModel,
    modules: Sequence[str],
    config: StatsConfig,
    *,
    requests: Sequence[EditRequest],
    weight: float | None,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Builds the missing statistics of both presets and compares them at the requests' keys.

    Args:
        weight: MEMIT's lambda; None leaves MEMIT out.

    Raises:
        ConfigError: see `stats.build.build`; or a second moment cannot be inverted.
    """

    def built(preset: Any) -> tuple[Statistics, Moments, float | None]:
        required = statistics(model, modules, replace(config, preset=preset))
        start, is_stored = time.perf_counter(), not required.missing()
        fill_store(required, announce=announce, progress=progress)
        return required, required.read(), None if is_stored else time.perf_counter() - start

    (full, full_moments, full_s), (few, few_moments, few_s) = built("full"), built("minimal")
    keys = sample_keys(model, modules, requests)
    return Report(
        model=model.name,
        fingerprint=model.fingerprint,
        stats=config.name,
        vectors_per_dimension=config.vectors_per_dimension,
        keys=len(requests),
        covariance_weight=weight,
        full=_preset(full, full_moments, full_s),
        minimal=_preset(few, few_moments, few_s),
        modules=tuple(
            compare(full_moments, few_moments, module, keys[module], weight=weight)
            for module in modules
        ),
    )


def compare(
    full: Moments, minimal: Moments, module: str, keys_IN: torch.Tensor, *, weight: float | None
) -> Difference:
    """The differences at one module for edits with these keys."""
    full_II, minimal_II = full.second_moment(module), minimal.second_moment(module)
    rome = column_differences(
        rome_directions(full, module, keys_IN), rome_directions(minimal, module, keys_IN)
    )
    memit_N, batch = None, None
    if weight is not None:
        singles = [
            torch.cat(
                [
                    memit_directions(moments, module, key_I1, weight=weight)
                    for key_I1 in keys_IN.split(1, dim=1)
                ],
                dim=1,
            )
            for moments in (full, minimal)
        ]
        memit_N = column_differences(*singles)
        batch = relative(
            *(
                memit_directions(moments, module, keys_IN, weight=weight)
                for moments in (full, minimal)
            )
        )
    return Difference(
        module=module,
        size=full_II.shape[0],
        full_vectors=full.by_module[module].num_tokens,
        minimal_vectors=minimal.by_module[module].num_tokens,
        matrix=relative(full_II, minimal_II),
        rome_mean=float(rome.mean()),
        rome_max=float(rome.max()),
        memit_mean=None if memit_N is None else float(memit_N.mean()),
        memit_max=None if memit_N is None else float(memit_N.max()),
        memit_batch=batch,
    )


def rome_directions(moments: Moments, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
    """The vector a of every key, (I, N)."""
    solved_IN = moments.inverse_times(module, keys_IN)
    return solved_IN / (keys_IN * solved_IN).sum(dim=0)


def memit_directions(
    moments: Moments, module: str, keys_IN: torch.Tensor, *, weight: float
) -> torch.Tensor:
    """X^T of the keys as one batch, (I, N), by the Woodbury identity."""
    solved_IN = moments.inverse_times(module, keys_IN) / weight
    core_NN = (
        torch.eye(keys_IN.shape[1], dtype=keys_IN.dtype, device=keys_IN.device)
        + keys_IN.T @ solved_IN
    )
    directions_IN: torch.Tensor = torch.linalg.solve(core_NN, solved_IN, left=False)
    return directions_IN


def column_differences(full_IN: torch.Tensor, minimal_IN: torch.Tensor) -> torch.Tensor:
    """|minimal - full| / |full| of every column, (N,)."""
    norms_N: torch.Tensor = torch.linalg.vector_norm(full_IN, dim=0)
    errors_N: torch.Tensor = torch.linalg.vector_norm(minimal_IN - full_IN, dim=0)
    return errors_N / norms_N


def relative(full: torch.Tensor, minimal: torch.Tensor) -> float:
    """|minimal - full| / |full| in the Frobenius norm."""
    return float(torch.linalg.vector_norm(minimal - full) / torch.linalg.vector_norm(full))


def sample_keys(
    model: EditableModel, modules: Sequence[str], requests: Sequence[EditRequest]
) -> dict[str, torch.Tensor]:
    """By module, the keys at the subject's last token of the requests' prompts, (I, N) float64,
    from one pass.
    """
    filled = [fill(request.prompt, request.subject) for request in requests]
    encoded = encode(model.tokenizer, [prompt.text for prompt in filled], chat=model.chat)
    # Tokens after the subject cannot influence it, because the network is causal.
    texts = [
        sequence.ids[: subject_position(sequence, prompt) + 1]
        for sequence, prompt in zip(encoded, filled, strict=True)
    ]
    batch = pad(texts, device=model.device)
    with torch.no_grad(), capture(model, inputs=modules) as captured:
        model.final_hidden(batch)
    rows_N = torch.arange(len(texts), device=model.device)
    columns_N = batch.columns([len(ids) - 1 for ids in texts])
    return {module: captured.inputs[module][rows_N, columns_N].double().T for module in modules}


def write_report(report: Report, path: Path) -> None:
    write_atomically(path, (json.dumps(asdict(report), indent=1) + "\n").encode())


def table(report: Report) -> Table:
    """The report as a table with a row for each module."""
    from rich.table import Table

    full, few = (
        f"{preset.documents} documents{_duration(preset.seconds)}"
        for preset in (report.full, report.minimal)
    )
    title = (
        f"{report.model}, stats={report.stats}: minimal ({few}) against full ({full}), relative "
        f"differences at {report.keys} keys"
    )
    columns = ["module", "vectors", "minimal", "per dimension", "C", "ROME update", "worst"]
    has_memit = report.covariance_weight is not None
    rows = Table(
        *columns,
        *(["MEMIT update", "worst", "batch"] if has_memit else []),
        box=None,
        pad_edge=False,
        title=title,
    )
    rows.title_justify = "left"
    for column in rows.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for difference in report.modules:
        differences = [
            difference.matrix,
            difference.rome_mean,
            difference.rome_max,
            difference.memit_mean,
            difference.memit_max,
            difference.memit_batch,
        ]
        shown = [f"{value:.1%}" for value in differences if value is not None]
        rows.add_row(
            difference.module,
            str(difference.full_vectors),
            str(difference.minimal_vectors),
            f"{difference.minimal_vectors / difference.size:.1f}",
            *shown,
        )
    return rows


def _duration(seconds: float | None) -> str:
    return ", stored" if seconds is None else f", {seconds:.0f} s"


def _preset(required: Statistics, moments: Moments, seconds: float | None) -> Preset:
    corpus = next(iter(required.keys.values())).corpus
    return Preset(
        documents=required.num_documents, corpus=corpus, seconds=seconds, digests=moments.digests
    )
