"""The options of a search for target vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from editkit.errors import OptionError, message
from editkit.model.products import Products
from editkit.resources.workload import PROMPT, REQUEST, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """The options of the search. A recipe has published values for them."""

    # number of loss computations; Adam updates `steps - 1` times in between, as with the published
    # v_num_grad_steps
    steps: int
    lr: float
    # relative: times |v| / sqrt(O), so that one step of Adam changes delta by about lr * |v|
    lr_unit: Literal["absolute", "relative"]
    weight_decay: float
    clamp: float  # |delta| <= clamp * |v|
    kl_factor: float
    kl_position: Literal["subject_last", "prompt_end"]
    stop_loss: float  # the search ends once the loss is below this value
    # true: run the whole network in every step; false: compute everything before delta once, which
    # gives the same results up to rounding
    exact: bool
    # tokens of a batch of requests, including contexts and padding; bounds memory, and changes
    # results only by rounding
    tokens_at_once: int = 8192
    # the dtype of the products of a float32 network's linear layers above delta
    products: Products = "float32"
    # While the target's tokens are the most probable ones in every context: the factor of -log p in
    # the next loss (1: none), and the value of kl_factor * KL at or below which the search ends
    # (None: it does not end there).
    easing: float = 1.0
    stop_kl: float | None = None

    @property
    def is_eased(self) -> bool:
        """Whether the search has to know the most probable tokens."""
        return self.easing != 1 or self.stop_kl is not None

    def __post_init__(self) -> None:
        positive = ("steps", "lr", "clamp", "tokens_at_once")
        not_negative = ("weight_decay", "kl_factor", "easing")
        problems = [
            message(name, "must be positive", got=getattr(self, name))
            for name in positive
            if not getattr(self, name) > 0
        ]
        problems += [
            message(name, "must not be negative", got=getattr(self, name))
            for name in not_negative
            if not getattr(self, name) >= 0
        ]
        if self.stop_kl is not None and not self.stop_kl >= 0:
            problems.append(message("stop_kl", "must not be negative", got=self.stop_kl))
        if problems:
            raise OptionError(problems)

    def working_bytes(self, work: Workload, *, context_lengths: Sequence[tuple[int, int]]) -> float:
        """The bytes that the search for a batch of targets needs in addition to the weights.

        Args:
            context_lengths: (tokens, number of texts) of the sampled contexts.
        """
        size = work.architecture
        rows = 2 + sum(texts for _, texts in context_lengths)  # per request: clean, KL, contexts
        longest = max((tokens for tokens, _ in context_lengths), default=0) + REQUEST
        at_once = min(rows * work.batch_size, self.tokens_at_once // longest)
        num_rows = max(rows, at_once)
        above = size.num_layers - 1 - max(work.layers, default=0)
        tokens = num_rows * (longest if self.exact else PROMPT[1])
        keys_and_values = 2 * size.num_key_value_heads * size.head_width * above
        prefix = num_rows * longest * keys_and_values * work.weight_bytes
        copies = 2 * above * size.block_parameters if self.products == "bfloat16" else 0
        return (
            copies
            + work.kept(tokens, size.num_layers if self.exact else above)
            + prefix
            + work.logits(num_rows)
            + work.forward(num_rows * longest, longest)
        )
