"""Benchmarks: the plain way and ours, side by side in one run, so that a busy machine slows both.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from editkit.errors import ConfigError
from editkit.files import write_atomically
from editkit.lazy import torch
from editkit.linalg.spectral import Spectrum, extreme_singular_values

T = TypeVar("T")

UPDATE_SIZE = 0.05  # sigma_max of an edit, as a share of that of the weight


def shapes() -> dict[str, tuple[int, int]]:
    """(O, I) of the MLP's down projection, by model."""
    return {
        "tiny-gpt2": (192, 768),
        "gpt2": (768, 3072),
        "gpt2-medium": (1024, 4096),
        "gpt2-xl": (1600, 6400),
        "gptj-6b": (4096, 16384),
        "llama2-7b": (4096, 11008),
        "llama3-8b": (4096, 14336),
    }


def bench_telemetry(shape: tuple[int, int], *, repeats: int, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """Seconds for sigma_max and sigma_min after each of `repeats` rank-one edits: a full float64 svdvals against ours, warm-started.

    Both see the same matrices, in turn; `relative_error` is the largest of both values and all edits. The matrix is Gaussian: the edges of
    its spectrum are crowded, which is the hard case for an iteration.
    """
    generator = torch.Generator().manual_seed(0)
    weight_OI = 0.02 * torch.randn(shape, generator=generator)
    weight_OI = weight_OI.to(device=device, dtype=getattr(torch, dtype))
    cold_s, spectrum = _timed(lambda: extreme_singular_values(weight_OI), device)
    size = UPDATE_SIZE * spectrum.sigma_max
    plain_s, ours_s, errors = [], [], []
    for _ in range(repeats):
        left_O, right_I = (torch.randn(length, generator=generator) for length in shape)
        update_OI = torch.outer(left_O / left_O.norm(), size * right_I / right_I.norm())
        weight_OI = (weight_OI.float() + update_OI.to(device)).to(weight_OI.dtype)
        seconds, spectrum = _timed(_warm_started(weight_OI, spectrum), device)
        ours_s.append(seconds)
        seconds, values = _timed(_plain(weight_OI), device)
        plain_s.append(seconds)
        pairs = ((spectrum.sigma_max, float(values[0])), (spectrum.sigma_min, float(values[-1])))
        errors += [abs(ours - plain) / plain for ours, plain in pairs]
    plain, ours = statistics.median(plain_s), statistics.median(ours_s)
    return {
        "shape": list(shape),
        "dtype": dtype,
        "repeats": repeats,
        "plain_s": plain,
        "ours_s": ours,
        "ours_first_s": cold_s,
        "ratio": plain / ours,
        "relative_error": max(errors),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run_bench(
    name: str, shape: str, *, repeats: int = 5, device: str = "cpu", dtype: str = "float32", folder: Path = Path("benchmarks/results")
) -> dict[str, Any]:
    """Runs one benchmark for one model's shape and writes `<folder>/<name>-<shape>.json`; returns what it wrote.

    Raises:
        ConfigError: unknown benchmark or shape, or no repeats.
    """
    problems = []
    if name != "telemetry":
        problems.append(f"bench: no such benchmark - given {name!r} - allowed: telemetry")
    if shape not in shapes():
        problems.append(f"--shape: no such model - given {shape!r} - allowed: {', '.join(shapes())}")
    if repeats < 1:
        problems.append(f"--repeats: at least one is needed - given {repeats} - allowed: 1 or more")
    if problems:
        raise ConfigError(problems)
    result = {"name": name, "model": shape} | bench_telemetry(shapes()[shape], repeats=repeats, device=device, dtype=dtype)
    where = "" if torch.device(device).type == "cpu" else f"-{torch.device(device).type}"
    write_atomically(folder / f"{name}-{shape}{where}.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _warm_started(weight_OI: torch.Tensor, spectrum: Spectrum) -> Callable[[], Spectrum]:
    return lambda: extreme_singular_values(weight_OI, spectrum)


def _plain(weight_OI: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.linalg.svdvals(weight_OI.double())


def _timed(work: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds and result, with the GPU's queue empty before and after."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if is_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
