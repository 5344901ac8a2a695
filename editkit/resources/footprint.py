"""What a run, or a training, keeps and works with, in bytes: counted from a configuration and the
sizes in config.json, without torch.

    program       the interpreter, torch and its kernels
    weights       in the dtype that is asked for
    masters       of every edited matrix W_0, and the total in float32, which is held twice while a step is made; and the total's factors
    statistics    second moments in float64 and their factors in `solve.dtype`, and the history of D4S and AlphaEdit
    hypernetwork  MEND's; in training with its gradient, Adam's two moments, and on the host the first one and the best one
    working       the largest of: collecting statistics, target search, solving and telemetry, measuring; the steps of a training

All but the last are counted; `working` is a model of what a pass keeps, whose constants were
measured (GPT-2 on a CPU) and carry a reserve for other families.
`tests/resources/test_footprint.py` and the README hold it against reality.

Letters: O d_out, I d_in of an edited matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editkit.config.schema import Problems, construct
from editkit.editors.base import AbstractEditor
from editkit.editors.ft import Ft
from editkit.editors.mend import Mend
from editkit.errors import ConfigError
from editkit.hypernet.measure import ROWS
from editkit.hypernet.network import num_bytes
from editkit.hypernet.store import resolve
from editkit.model.architecture import EAGER, Architecture, label_of
from editkit.model.families import Outline, known_families

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LOGITS = 3  # copies of a pass's logits: the head's, in float32, and their log-softmax
KEPT = (
    8,
    5,
)  # tensors of the residual width, and of the MLP's, that autograd keeps of a block for each token
PASS = (
    8,
    4,
)  # the same of a pass without gradients, of one block at a time; as in `editkit.stats.estimate`
PROMPT = (
    10,
    5,
)  # tokens of a request up to its subject's end, and from there on (CounterFact, GPT-2's tokens)
# tokens of a pass over the world's texts, which are 30 tokens long: a pass ends where it would pad
# too much
SHORT = 1024
ANSWERS = 1 / 8  # of the tokens of a measuring pass, at how many logits are wanted
COLUMNS = 1 / 4  # of d_in: how wide a history gets before it is a matrix
SUM_COPIES = 0.53  # of a second moment: the triangle in which it is collected
# copies of a matrix's factors while a hypernetwork works on them, and of its hidden layer's half as
# many
TRANSFORMED = 8


def selected(config: Mapping[str, Any], architecture: Architecture) -> tuple[str, ...]:
    """The matrices that the editor of a composed configuration chooses, by their dotted names.

    Raises ConfigError for options out of range and layers that are not set or not there.
    """
    return _chosen(config, outline_of(config, architecture))[1]


def outline_of(config: Mapping[str, Any], architecture: Architecture) -> Outline:
    """The model as an editor's choice of matrices sees it."""
    families, given = known_families(), config["model"].get("family")
    usual = families.get(architecture.kind, families["llama" if architecture.is_gated else "gpt2"])
    family = families.get(given, usual) if isinstance(given, str) else usual
    name = label_of(config["model"].get("name"), str(config["model"]["id"]))
    return Outline(name=name, family=family, num_layers=architecture.num_layers)


def _chosen(
    config: Mapping[str, Any], outline: Outline
) -> tuple[AbstractEditor | None, tuple[str, ...]]:
    """The editor, if all its options are set, and its matrices."""
    layers = config["editor"].get("layers", ())
    layers = [layers] if isinstance(layers, int) else layers
    if isinstance(layers, str):
        raise ConfigError(
            f"editor.layers is not set: no recipe for this model - editor.layers={layers} was given."
        )
    if isinstance(config["editor"].get("layer"), int):
        layers = [config["editor"]["layer"]]
    problems = Problems()
    editor = construct(config["editor"], "editor", AbstractEditor, problems)
    if problems.found:
        raise ConfigError(problems.found)
    if editor is not None:
        try:
            return editor, editor.modules(outline)  # type: ignore[arg-type]
        except (
            AttributeError
        ):  # an editor of a person's own that asks more of a model than its names
            pass
    return editor, outline.down_projections(tuple(layers))


class Footprint:
    """A configuration, taken apart once. With `training`, of `editkit train`: what a run measures
    and collects plays no part.
    """

    def __init__(
        self, config: Mapping[str, Any], architecture: Architecture, *, training: bool = False
    ) -> None:
        self.config, self.size, self.training = config, architecture, training
        self.editor, self.runtime = config["editor"], config["runtime"]
        outline = outline_of(config, architecture)
        self.maker, modules = _chosen(config, outline)
        self.layers = [
            layer
            for layer in range(architecture.num_layers)
            if any(f"{name}.".startswith(f"{outline.family.block(layer)}.") for name in modules)
        ]
        downs = outline.down_projections(range(architecture.num_layers))
        shape = (architecture.width, architecture.inner)
        self.shapes = [shape if name in downs else shape[::-1] for name in modules]  # (O, I)
        self.modules = modules
        self.itemsize = ITEMSIZE[config["model"].get("dtype", "float32")]
        self.solve = ITEMSIZE[config["solve"]["dtype"]]
        self.is_gpu = str(self.runtime["device"]).startswith("cuda")
        self.statistics_at = self.runtime.get("statistics", "device") if self.is_gpu else "device"
        self.base_at = self.runtime.get("base", "device") if self.is_gpu else "device"

    @property
    def needs_moments(self) -> bool:
        if self.maker is not None:
            return self.maker.needs_moments and not self.training
        return "target" in self.editor and bool(self.editor.get("covariance", True))

    @property
    def matrix(self) -> int:
        """Numbers in an edited matrix."""
        return self.size.width * self.size.inner

    # What is kept

    def weights(self) -> float:
        return self.size.num_parameters * self.itemsize

    def base(self) -> float:
        """W_0 of the edited matrices."""
        return 0 if self.training else len(self.modules) * self.matrix * self.itemsize

    def totals(self) -> float:
        """Before and after a step, in float32, and the factors, which are kept while they are
        smaller than their matrix.
        """
        if self.training:
            return 0
        columns = (
            0 if isinstance(self.maker, Ft) else int(self.config.get("edits", 0)) * self._columns()
        )
        rank = min(columns, self.matrix / (self.size.width + self.size.inner))
        return (
            len(self.modules) * 4 * (2 * self.matrix + rank * (self.size.width + self.size.inner))
        )

    def _columns(self) -> int:
        """Of an edit's update: MEND's has one for each token."""
        return sum(PROMPT) if isinstance(self.maker, Mend) else 1

    def moments(self) -> float:
        """Second moments and their factors."""
        return (
            len(self.modules) * self.size.inner**2 * (8 + self.solve) if self.needs_moments else 0
        )

    def stored(self) -> float:
        """Second moments as files."""
        copies = 1 + (1 if self.statistics_at == "disk" else 0)
        return len(self.modules) * self.size.inner**2 * 8 * copies if self.needs_moments else 0

    def history(self) -> tuple[float, float]:
        """What D4S and AlphaEdit keep, and what making it takes for a moment."""
        names, square, n = (
            set(self.config.get("restraint") or ()),
            self.size.inner**2,
            len(self.modules),
        )
        edits = int(self.config.get("edits", 0))
        if self.training or not names & {"d4s", "alphaedit"}:
            return 0.0, 0.0
        is_matrix = edits > COLUMNS * self.size.inner
        kept = (
            (1.0 if is_matrix else 2 * min(edits, COLUMNS * self.size.inner) / self.size.inner)
            * square
            * self.solve
            * n
        )
        if "alphaedit" in names:
            return (
                kept + n * square * self.solve / 2,
                3 * square * 8,
            )  # an eigendecomposition, in float64
        return kept, square * self.solve if is_matrix else 0.0

    def hypernetwork(self) -> tuple[float, float]:
        """On the device, and on the host: what computes and learns, and what waits there. On a CPU
        both are in one place.
        """
        if not isinstance(self.maker, Mend):
            return 0.0, 0.0
        if self.training:
            one = self._untrained(self.maker)
            return (
                4 * one,
                2 * one,
            )  # itself, gradient and two moments; as it was at first, and the best
        if (
            self.maker.hypernetwork is not None
            and (file := resolve(self.maker.hypernetwork)).is_file()
        ):
            return float(file.stat().st_size), 0.0
        return self._untrained(self.maker), 0.0

    def _untrained(self, mend: Mend) -> float:
        return float(num_bytes(self.shapes, mend.network))

    # What works

    def phases(self) -> dict[str, float]:
        """By the name of a phase, what it takes beside what is kept."""
        if self.training:
            return self._training()
        size = self.size
        update = 2 * 4 * self.matrix  # an update written out, and the new sum
        found = {
            "weights read": self._reading(),
            "solve": update + 8 * (self.matrix + size.width**2) + self._solving(),
        }
        if isinstance(self.maker, Mend):
            found["target"] = self._gradient(int(self.config.get("batch_size", 1)))
        elif "target" in self.editor:
            found["target"] = self._search()
        else:
            found["target"] = len(self.modules) * 4 * 4 * self.matrix + self._kept(
                self._rows(1) * sum(PROMPT), size.num_layers
            )
        found["measuring"] = self._measuring()
        if self.needs_moments:
            stats, n, square = self.config["stats"], len(self.modules), size.inner**2
            tokens = int(stats["batch_tokens"])
            keys = max(8192, tokens) * n * size.inner * self.itemsize
            passed = min(tokens, SHORT) if stats["source"] == "world" else tokens
            gathering = (
                n * SUM_COPIES * square * 8
                + keys
                + self._pass(passed, int(stats["context_length"]))
            )
            # What comes after it is counted, and not there yet: the moments themselves, and the
            # totals but for a matrix of zeros each.
            later = self.totals() - 4 * n * self.matrix
            later += n * square * (8 + self.solve) if self.statistics_at == "device" else 0
            found["statistics"] = max(0.0 if self._is_stored() else gathering - later, square * 8)
        return found

    def _training(self) -> dict[str, float]:
        """Of a step, of the validation, and of a checkpoint, whose copies are on the host."""
        assert isinstance(self.maker, Mend)
        options, largest = (
            self.maker.train,
            min(self.maker.network.rank, self._both()) * self._both() * 4,
        )
        is_chain, tokens = options.sequence > 1, sum(PROMPT) * options.locality_texts
        rows = min(options.at_once, options.accumulate) * (
            2 if is_chain else 1
        )  # an earlier edit is asked for beside each
        validated = min(ROWS, options.validation)
        factors = (
            4 * len(self.modules) * sum(PROMPT) * self._both() * options.sequence
        )  # of a chain's edits
        logits = tokens * self.size.vocabulary * 4  # of every token of an edit's locality texts
        step = self._gradient(rows, learning=len(self.modules)) + rows * (
            (2 * LOGITS + 2) * logits + self._kept(tokens, self._above)
        )
        found = {
            "weights read": self._reading(),
            "step": step
            + (options.accumulate * factors if is_chain else 0)
            + 2 * largest,  # Adam's own two
            "validation": self._gradient(validated) + validated * ((LOGITS + 2) * logits + factors),
        }
        if not self.is_gpu:
            found["checkpoint"] = self.copied() + self._reading()
        return found

    def copied(self) -> float:
        """For a checkpoint of a training: the network and its two moments."""
        return (
            3 * self._untrained(self.maker)
            if self.training and isinstance(self.maker, Mend)
            else 0.0
        )

    def _both(self) -> int:
        return self.size.width + self.size.inner

    @property
    def _above(self) -> int:
        """Blocks that a gradient goes back through, to the first edited matrix."""
        return self.size.num_layers - min(self.layers, default=0)

    def _gradient(self, edits: int, *, learning: int = 1) -> float:
        """A pass of so many edits forward and backward, its factors in float32, and what a
        hypernetwork makes of them.

        Args:
            learning: matrices of which autograd keeps it.
        """
        assert isinstance(self.maker, Mend)
        tokens = edits * sum(PROMPT)
        hidden = TRANSFORMED / 2 * min(self.maker.network.rank, self._both())
        factors = (
            4
            * tokens
            * (
                len(self.modules) * 4 * self._both()
                + learning * (TRANSFORMED * self._both() + hidden)
            )
        )
        logits = edits * PROMPT[1] * self.size.vocabulary * 4 * LOGITS
        return self._kept(tokens, self._above) + self._pass(tokens, sum(PROMPT)) + factors + logits

    def _is_stored(self) -> bool:
        """Whether second moments of these layers are stored for a model of this name: nothing will
        be collected, as far as can be told.
        """
        model = self.config["model"]
        if self.size.kind not in known_families():
            return False
        label = label_of(model.get("name"), str(model["id"]))
        folder = Path(str(self.config["stats"]["folder"])).expanduser()
        return all(
            any(stored_for(path) == label for path in folder.glob(f"{module}-*.safetensors"))
            for module in self.modules
        )

    def _solving(self) -> float:
        return self.size.inner**2 * 8 if self.needs_moments else 0  # a factor while it is made

    def _reading(self) -> float:
        return 0.1e9  # a shard's buffers, and the fingerprint's

    def _rows(self, requests: int) -> int:
        texts = sum(int(count) for _, count in self.editor.get("context_lengths") or ())
        return requests * (texts + 2)

    def _search(self) -> float:
        size, target = self.size, self.editor["target"]
        longest = max(
            [int(tokens) for tokens, _ in self.editor.get("context_lengths") or ()], default=0
        ) + sum(PROMPT)
        rows = self._rows(int(self.config.get("batch_size", 1)))
        rows = max(self._rows(1), min(rows, int(target.get("tokens_at_once") or 8192) // longest))
        above = size.num_layers - 1 - max(self.layers, default=0)
        tokens = rows * (longest if target.get("exact") else PROMPT[1])
        prefix = (
            rows * longest * 2 * size.num_key_value_heads * size.head_width * above * self.itemsize
        )
        logits = rows * size.vocabulary * 4 * LOGITS
        return (
            self._kept(tokens, size.num_layers if target.get("exact") else above)
            + prefix
            + logits
            + self._pass(rows * longest, longest)
        )

    def _measuring(self) -> float:
        tokens = int(self.config["evaluation"].get("tokens_per_batch") or 4096)
        tokens = tokens if self.is_gpu else min(tokens, 512)
        positions = min(tokens * ANSWERS, 2**25 / self.size.vocabulary)
        return self._pass(tokens, 256) + positions * self.size.vocabulary * 4 * LOGITS

    def _kept(self, tokens: float, layers: int) -> float:
        hidden, inner = KEPT
        return (
            tokens * layers * (hidden * self.size.width + inner * self.size.inner) * self.itemsize
        )

    def _pass(self, tokens: float, length: float) -> float:
        hidden, inner = PASS
        values = tokens * (hidden * self.size.width + inner * self.size.inner)
        if self.size.kind in EAGER:
            values += 2 * tokens * length * self.size.num_heads
        return values * self.itemsize


def stored_for(path: Path) -> str:
    """The key in the header of a stored second moment; empty for a file that cannot be read. Its
    numbers are not looked at.
    """
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return str(json.loads(header["__metadata__"]["key"])["model"])
    except (OSError, ValueError, KeyError):
        return ""
