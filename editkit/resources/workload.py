"""What a run asks of memory, as editors and restraints see it before a model is loaded.

Everything is in bytes. Counts of tokens are typical ones: the requests are not tokenised yet.

Letters: O d_out, I d_in of an edited matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from editkit.model.architecture import EAGER, Architecture

LOGITS = 3  # copies of a pass's logits: the head's, in float32, and their log-softmax
# Tensors of the residual width and of the MLP's width that autograd keeps of a block per token.
KEPT = (8, 5)
# The same of a pass without gradients, of one block at a time.
PASS = (8, 4)
# Tokens of a request up to the subject's end, and after it (CounterFact, GPT-2's tokenizer).
PROMPT = (10, 5)
REQUEST = sum(PROMPT)
TARGET_TOKENS = 3  # of a request, typically


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The sizes that the bytes of an editor or of a restraint follow from."""

    architecture: Architecture
    shapes: tuple[tuple[int, int], ...]  # (O, I) of each edited matrix
    layers: tuple[int, ...]  # of the blocks that hold them, ascending
    weight_bytes: int  # of a number of the weights
    solve_bytes: int  # of a number of the matrices of least squares (`solve.dtype`)
    edits: int
    batch_size: int

    @property
    def num_matrices(self) -> int:
        return len(self.shapes)

    @property
    def matrix(self) -> int:
        """Numbers in an edited matrix."""
        return self.architecture.width * self.architecture.inner

    @property
    def second_moment(self) -> int:
        """Numbers in the second moment of a matrix's keys."""
        return self.architecture.inner**2

    @property
    def both(self) -> int:
        """O + I: numbers in the two factors of a rank-one update."""
        return self.architecture.width + self.architecture.inner

    @property
    def blocks_with_gradient(self) -> int:
        """Blocks that a gradient passes on its way back to the first edited matrix."""
        return self.architecture.num_layers - min(self.layers, default=0)

    def kept(self, tokens: float, layers: int) -> float:
        """What autograd keeps of a pass through that many blocks."""
        hidden, inner = KEPT
        numbers = hidden * self.architecture.width + inner * self.architecture.inner
        return tokens * layers * numbers * self.weight_bytes

    def forward(self, tokens: float, length: float) -> float:
        """A pass without gradients over texts of that length."""
        hidden, inner = PASS
        size = self.architecture
        numbers = tokens * (hidden * size.width + inner * size.inner)
        if size.kind in EAGER:
            numbers += 2 * tokens * length * size.num_heads
        return numbers * self.weight_bytes

    def logits(self, positions: float) -> float:
        """Logits at that many positions, in all their copies."""
        return positions * self.architecture.vocabulary * 4 * LOGITS


@dataclass(frozen=True, slots=True, kw_only=True)
class EditorMemory:
    """What an editor keeps and works with besides weights, totals and second moments."""

    working: float  # while it plans a batch: the search for targets, or a gradient
    columns_per_edit: int = 1  # of an update's factors; 0: updates are dense
    kept: float = 0.0  # during the whole run: a hypernetwork
    # What stands beside the weights after the run's edits; None: the weights are written instead.
    beside: float | None = None
    saving: str = "a lower batch_size"  # how a user makes `working` smaller


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveMemory:
    """What a restraint on the solve keeps, and what making it takes for a moment."""

    kept: float = 0.0
    working: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """What training an editor takes besides the weights."""

    kept: float  # on the device: the network, its gradient, the optimiser's moments
    on_host: float  # copies that wait there
    copied: float  # for a checkpoint
    phases: Mapping[str, float] = field(default_factory=dict)
    saving: Mapping[str, str] = field(default_factory=dict)  # how a user makes a phase smaller
