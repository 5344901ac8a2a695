"""How good a minimal second moment is: against the full one, matrix by matrix, and in what an edit
would write with each.

For a key k and whatever residual r, ROME writes r a^T with a = C^-1 k / (k^T C^-1 k) (Meng et al.
2022, arXiv 2202.05262, Eq. 2), and MEMIT R X with X = K^T (lambda C + K K^T)^-1 (Meng et al. 2023,
arXiv 2210.07229, Eq. 14). So the relative difference of two updates that differ in C alone is that
of a, whatever r is; for a batch it is taken of X, as if the residuals were orthonormal.

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
    """Of one module, each relative to the full preset. `memit` where a covariance weight is given:
    one key at a time, then all at once.
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
    """One of the two sides."""

    documents: int
    corpus: str  # digest
    seconds: float | None  # that collecting took; None: it was stored
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `editkit stats compare` writes."""

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
    """Builds what is missing of both presets and compares them at the requests' keys. `weight` is
    MEMIT's lambda.

    Raises ConfigError as `stats.build.build` does, and where a second moment cannot be inverted.
    """

    def built(preset: Any) -> tuple[Statistics, Moments, float | None]:
        wanted = statistics(model, modules, replace(config, preset=preset))
        start, is_stored = time.perf_counter(), not wanted.missing()
        fill_store(wanted, announce=announce, progress=progress)
        return wanted, wanted.read(), None if is_stored else time.perf_counter() - start

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
    """The differences at one module, for edits at these keys."""
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
    """(I, N): a of every key."""
    solved_IN = moments.inverse_times(module, keys_IN)
    return solved_IN / (keys_IN * solved_IN).sum(dim=0)


def memit_directions(
    moments: Moments, module: str, keys_IN: torch.Tensor, *, weight: float
) -> torch.Tensor:
    """(I, N): X^T of the keys as one batch, by Woodbury."""
    solved_IN = moments.inverse_times(module, keys_IN) / weight
    core_NN = (
        torch.eye(keys_IN.shape[1], dtype=keys_IN.dtype, device=keys_IN.device)
        + keys_IN.T @ solved_IN
    )
    result: torch.Tensor = torch.linalg.solve(core_NN, solved_IN, left=False)
    return result


def column_differences(full_IN: torch.Tensor, minimal_IN: torch.Tensor) -> torch.Tensor:
    """(N,): |minimal - full| / |full| of every column."""
    result: torch.Tensor = torch.linalg.vector_norm(
        minimal_IN - full_IN, dim=0
    ) / torch.linalg.vector_norm(full_IN, dim=0)
    return result


def relative(full: torch.Tensor, minimal: torch.Tensor) -> float:
    """|minimal - full| / |full|, Frobenius."""
    return float(torch.linalg.vector_norm(minimal - full) / torch.linalg.vector_norm(full))


def sample_keys(
    model: EditableModel, modules: Sequence[str], requests: Sequence[EditRequest]
) -> dict[str, torch.Tensor]:
    """(I, N) float64 by module: the keys at the subject's last token of the requests' own prompts,
    from one pass.
    """
    filled = [fill(request.prompt, request.subject) for request in requests]
    encoded = encode(model.tokenizer, [prompt.text for prompt in filled])
    # Nothing behind the subject can reach it: the network is causal.
    texts = [
        each.ids[: subject_position(each, prompt) + 1]
        for each, prompt in zip(encoded, filled, strict=True)
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
    """A line for each module."""
    from rich.table import Table

    full, few = (
        f"{each.documents} documents{_took(each.seconds)}" for each in (report.full, report.minimal)
    )
    title = (
        f"{report.model}, stats={report.stats}: minimal ({few}) against full ({full}), relative "
        f"differences at {report.keys} keys"
    )
    columns = ["module", "vectors", "minimal", "a dimension", "C", "ROME update", "worst"]
    has_memit = report.covariance_weight is not None
    found = Table(
        *columns,
        *(["MEMIT update", "worst", "batch"] if has_memit else []),
        box=None,
        pad_edge=False,
        title=title,
    )
    found.title_justify = "left"
    for column in found.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for each in report.modules:
        differences = [
            each.matrix,
            each.rome_mean,
            each.rome_max,
            each.memit_mean,
            each.memit_max,
            each.memit_batch,
        ]
        shown = [f"{value:.1%}" for value in differences if value is not None]
        found.add_row(
            each.module,
            str(each.full_vectors),
            str(each.minimal_vectors),
            f"{each.minimal_vectors / each.size:.1f}",
            *shown,
        )
    return found


def _took(seconds: float | None) -> str:
    return ", stored" if seconds is None else f", {seconds:.0f} s"


def _preset(wanted: Statistics, moments: Moments, seconds: float | None) -> Preset:
    corpus = next(iter(wanted.keys.values())).corpus
    return Preset(
        documents=wanted.num_documents, corpus=corpus, seconds=seconds, digests=moments.digests
    )
