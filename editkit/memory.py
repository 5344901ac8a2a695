"""What memory a run will take, said before anything is loaded, from the sizes in config.json alone; torch is not needed.

    program       the interpreter, torch and its kernels
    weights       in the dtype that is asked for
    masters       of every edited matrix W_0, and the total in float32, which is held twice while a step is made
    statistics    second moments in float64 and their factors in `solve.dtype`, and the history of D4S and AlphaEdit
    working       the largest of: collecting statistics, target search, solving and telemetry, measuring

The first four are counted; `working` is a model of what a pass keeps, whose constants were measured (GPT-2 on a CPU) and carry a
reserve for other families. `tests/test_memory.py` and the README hold it against reality.

Letters: O d_out, I d_in of an edited matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.model.architecture import EAGER, Architecture, architecture_of
from editkit.model.families import known_families

GB = 1e9
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PROGRAM = {"cpu": 0.57e9, "cuda": 0.6e9}  # a CUDA context takes memory beside torch's allocator
LOGITS = 3  # copies of a pass's logits: the head's, in float32, and their log-softmax
KEPT = (8, 5)  # tensors of the residual width, and of the MLP's, that autograd keeps of a block for each token
PASS = (8, 4)  # the same of a pass without gradients, of one block at a time; as in `editkit.stats.estimate`
PROMPT = (10, 5)  # tokens of a request up to its subject's end, and from there on (CounterFact, GPT-2's tokens)
SHORT = 1024  # tokens of a pass over the world's texts, which are 30 tokens long: a pass ends where it would pad too much
ANSWERS = 1 / 8  # of the tokens of a measuring pass, at how many logits are wanted
COLUMNS = 1 / 4  # of d_in: how wide a history gets before it is a matrix
SUM_COPIES = 0.53  # of a second moment: the triangle in which it is collected


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Bytes by what they are for, in one place (a device, or the host)."""

    program: float = 0.0
    weights: float = 0.0
    masters: float = 0.0
    statistics: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        return self.program + self.weights + self.masters + self.statistics + self.working

    def __str__(self) -> str:
        names = ("program", "weights", "masters", "statistics", "working")
        parts = ", ".join(f"{name} {getattr(self, name) / GB:.2g}" for name in names if getattr(self, name))
        return f"{self.total / GB:.3g} GB ({parts})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run takes at its peak."""

    device: str
    on_device: Parts
    on_host: Parts  # beside it, where the device is a GPU and something is kept on the CPU
    disk: float  # of statistics, stored or mapped
    phases: Mapping[str, float]  # the candidates for `working`
    limit: float | None  # of the device: runtime.memory_gb, or what is free; None: not known
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.limit is None or self.on_device.total <= self.limit

    def rows(self) -> list[tuple[str, str]]:
        """For a listing."""
        limit = "" if self.limit is None else f"; {self.limit / GB:.3g} GB there{'' if self.fits else ': DOES NOT FIT'}"
        phases = ", ".join(f"{name} {count / GB:.2g}" for name, count in self.phases.items())
        found = [("memory", f"about {self.on_device} on {self.device}{limit}"), ("  working", f"the largest of {phases} GB")]
        if self.on_host.total:
            found.append(("  on the host", str(self.on_host)))
        return found

    def problem(self) -> str | None:
        """Why it cannot be run here, and what to do about it."""
        if self.fits:
            return None
        return (
            f"runtime.memory_gb: {self.device} has {(self.limit or 0) / GB:.3g} GB, the run would take about {self.on_device} - "
            f"{'; '.join(self.advice) or 'a smaller model'}; or runtime.memory_gb=<number> if this is known to be wrong."
        )


def estimated(config: Mapping[str, Any], *, facts: Mapping[str, Any] | None = None) -> Estimate | None:
    """The estimate for a composed configuration; None where the model's sizes are not known here.

    Args:
        facts: the model's config.json; None: what is known without a download.

    Raises:
        ConfigError: the editor's layers are not set.
    """
    from editkit.model.architecture import facts_without_download

    model = config["model"]
    label = model.get("name") or str(model["id"]).removeprefix("asset:").rstrip("/").rsplit("/", 1)[-1]
    facts = facts or facts_without_download(label, str(model["id"]))
    if facts is None:
        return None
    try:
        architecture = architecture_of(facts)
    except KeyError:
        return None
    layers = config["editor"].get("layers", ())
    layers = [layers] if isinstance(layers, int) else layers
    if isinstance(layers, str):
        raise ConfigError(f"editor.layers is not set: no recipe for this model - editor.layers={layers} was given.")
    if isinstance(config["editor"].get("layer"), int):
        layers = [config["editor"]["layer"]]
    return _Count(config, architecture, tuple(layers)).estimate()


class _Count:
    """The configuration, taken apart once."""

    def __init__(self, config: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> None:
        self.config, self.size, self.layers = config, architecture, layers
        self.editor, self.runtime = config["editor"], config["runtime"]
        self.itemsize = ITEMSIZE[config["model"].get("dtype", "float32")]
        self.solve = ITEMSIZE[config["solve"]["dtype"]]
        self.is_gpu = str(self.runtime["device"]).startswith("cuda")
        self.statistics_at = self.runtime.get("statistics", "device") if self.is_gpu else "device"
        self.base_at = self.runtime.get("base", "device") if self.is_gpu else "device"

    @property
    def is_ft(self) -> bool:
        return "target" not in self.editor

    @property
    def needs_moments(self) -> bool:
        return not self.is_ft and bool(self.editor.get("covariance", True))

    def estimate(self) -> Estimate:
        size, n = self.size, len(self.layers)
        square, matrix = size.inner**2, size.width * size.inner
        moments = n * square * (8 + self.solve) if self.needs_moments else 0
        history, history_working = self._history()
        base, totals = n * matrix * self.itemsize, n * matrix * 2 * 4
        keeps_moments = self.statistics_at == "device"
        phases = self._phases()
        working = max(max(phases.values()), history_working)
        on_device = Parts(
            program=PROGRAM["cuda" if self.is_gpu else "cpu"],
            weights=size.num_parameters * self.itemsize,
            masters=totals + (base if self.base_at == "device" else 0),
            statistics=(moments if keeps_moments else 0) + history,
            working=working,
        )
        on_host = Parts(
            program=PROGRAM["cpu"] if self.is_gpu else 0,
            masters=base if self.base_at != "device" else 0,
            statistics=moments if self.statistics_at == "cpu" else 0,
        )
        return Estimate(
            device=str(self.runtime["device"]),
            on_device=on_device,
            on_host=on_host if self.is_gpu else Parts(),
            disk=n * square * 8 * (1 + (1 if self.statistics_at == "disk" else 0)) if self.needs_moments else 0,
            phases=phases,
            limit=self._limit(),
            advice=tuple(self._advice(moments if keeps_moments else 0, base if self.base_at == "device" else 0, phases)),
        )

    def _history(self) -> tuple[float, float]:
        """What D4S and AlphaEdit keep, and what making it takes for a moment."""
        names, square, n = set(self.config.get("restraint") or ()), self.size.inner**2, len(self.layers)
        edits = int(self.config.get("edits", 0))
        if not names & {"d4s", "alphaedit"}:
            return 0.0, 0.0
        is_matrix = edits > COLUMNS * self.size.inner
        kept = (1.0 if is_matrix else 2 * min(edits, COLUMNS * self.size.inner) / self.size.inner) * square * self.solve * n
        if "alphaedit" in names:
            return kept + n * square * self.solve / 2, 3 * square * 8  # an eigendecomposition, in float64
        return kept, square * self.solve if is_matrix else 0.0

    def _phases(self) -> dict[str, float]:
        size = self.size
        square, matrix = size.inner**2, size.width * size.inner
        update = 2 * 4 * matrix  # an update written out, and the new sum
        found = {"weights read": self._reading(), "solve": update + 8 * (matrix + size.width**2) + self._solving()}
        if self.is_ft:
            found["target"] = len(self.layers) * 4 * 4 * matrix + self._kept(self._rows(1) * sum(PROMPT), size.num_layers)
        else:
            found["target"] = self._search()
        found["measuring"] = self._measuring()
        if self.needs_moments:
            stats, n = self.config["stats"], len(self.layers)
            tokens = int(stats["batch_tokens"])
            keys = max(8192, tokens) * n * size.inner * self.itemsize
            passed = min(tokens, SHORT) if stats["source"] == "world" else tokens
            gathering = n * SUM_COPIES * square * 8 + keys + self._pass(passed, int(stats["context_length"]))
            # What comes after it is counted, and not there yet: the moments themselves, and the masters.
            later = 2 * 4 * n * matrix + n * matrix * self.itemsize * (self.base_at == "device")
            later += n * square * (8 + self.solve) if self.statistics_at == "device" else 0
            found["statistics"] = max(0.0 if self._is_stored() else gathering - later, square * 8)
        return found

    def _is_stored(self) -> bool:
        """Whether second moments of these layers are stored for a model of this name: nothing will be collected, as far as can be told."""
        model, families = self.config["model"], known_families()
        if self.size.kind not in families:
            return False
        label = model.get("name") or str(model["id"]).rstrip("/").rsplit("/", 1)[-1]
        folder = Path(str(self.config["stats"]["folder"])).expanduser()
        modules = [families[self.size.kind].down_projection(layer) for layer in self.layers]
        return all(any(stored_for(path) == label for path in folder.glob(f"{module}-*.safetensors")) for module in modules)

    def _solving(self) -> float:
        return self.size.inner**2 * 8 if self.needs_moments else 0  # a factor while it is made

    def _reading(self) -> float:
        return 0.1e9  # a shard's buffers, and the fingerprint's

    def _rows(self, requests: int) -> int:
        texts = sum(int(count) for _, count in self.editor.get("context_lengths") or ())
        return requests * (texts + 2)

    def _search(self) -> float:
        size, target = self.size, self.editor["target"]
        longest = max([int(tokens) for tokens, _ in self.editor.get("context_lengths") or ()], default=0) + sum(PROMPT)
        rows = self._rows(int(self.config.get("batch_size", 1)))
        rows = max(self._rows(1), min(rows, int(target.get("tokens_at_once") or 8192) // longest))
        above = size.num_layers - 1 - (max(self.layers) if self.layers else 0)
        tokens = rows * (longest if target.get("exact") else PROMPT[1])
        prefix = rows * longest * 2 * size.num_key_value_heads * size.head_width * above * self.itemsize
        logits = rows * size.vocabulary * 4 * LOGITS
        return self._kept(tokens, size.num_layers if target.get("exact") else above) + prefix + logits + self._pass(rows * longest, longest)

    def _measuring(self) -> float:
        tokens = int(self.config["evaluation"].get("tokens_per_batch") or 4096)
        tokens = tokens if self.is_gpu else min(tokens, 512)
        positions = min(tokens * ANSWERS, 2**25 / self.size.vocabulary)
        return self._pass(tokens, 256) + positions * self.size.vocabulary * 4 * LOGITS

    def _kept(self, tokens: float, layers: int) -> float:
        hidden, inner = KEPT
        return tokens * layers * (hidden * self.size.width + inner * self.size.inner) * self.itemsize

    def _pass(self, tokens: float, length: float) -> float:
        hidden, inner = PASS
        values = tokens * (hidden * self.size.width + inner * self.size.inner)
        if self.size.kind in EAGER:
            values += 2 * tokens * length * self.size.num_heads
        return values * self.itemsize

    def _limit(self) -> float | None:
        if (given := self.runtime.get("memory_gb")) is not None:
            return float(given) * GB
        return None if self.is_gpu else available()

    def _advice(self, moments: float, base: float, phases: Mapping[str, float]) -> list[str]:
        found = []
        if self.itemsize == 4:
            found.append(f"model.dtype=bfloat16 (saves {self.size.num_parameters * 2 / GB:.2g} GB)")
        if moments and self.is_gpu:
            found.append(f"runtime.statistics=cpu or disk (saves {moments / GB:.2g} GB)")
        if moments and self.solve == 8:
            found.append("solve.dtype=float32")
        if base and self.is_gpu:
            found.append(f"runtime.base=cpu (saves {base / GB:.2g} GB)")
        largest = max(phases, key=lambda name: phases[name])
        smaller = {
            "target": "a lower editor.target.tokens_at_once or batch_size",
            "measuring": "a lower evaluation.tokens_per_batch",
            "statistics": "a lower stats.batch_tokens, or `editkit stats build` on a larger machine first",
        }
        if largest in smaller:
            found.append(smaller[largest])
        if self.is_gpu:
            found.append("model.device_map=auto over several GPUs")
        return found


def stored_for(path: Path) -> str:
    """The key in the header of a stored second moment; empty for a file that cannot be read. Its numbers are not looked at."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return str(json.loads(header["__metadata__"]["key"])["model"])
    except (OSError, ValueError, KeyError):
        return ""


def available() -> float | None:
    """Bytes of the host that can still be had; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_fit(config: Mapping[str, Any], *, facts: Mapping[str, Any] | None = None, free_bytes: float | None = None) -> Estimate | None:
    """The estimate of a run that is about to load its model. Raises ConfigError, with what to do, where it does not fit.

    Args:
        free_bytes: what is free on the device, where `runtime.memory_gb` does not say.
    """
    from dataclasses import replace

    found = estimated(config, facts=facts)
    if found is None:
        return None
    if found.limit is None and free_bytes is not None:
        found = replace(found, limit=free_bytes)
    if problem := found.problem():
        raise ConfigError(problem)
    return found
