"""A model whose every score can be worked out by hand: the next token's logits depend on the
current token alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import torch

from editkit.model.shortcuts import Shortcuts
from editkit.model.texts import Reader
from editkit.model.tokens import PromptBatch, encode_with_target
from tests.support.helpers import tiny_tokenizer


class Bigram:
    """Offers what the scoring engine asks of an EditableModel; remembers the shapes that it was run
    on.
    """

    def __init__(
        self, *, bos: bool = False, max_length: int = 64, memory: int | None = None
    ) -> None:
        self.tokenizer = tiny_tokenizer("gpt2", bos=bos)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        family = SimpleNamespace(base="base", follows_position_ids=True)
        self.name, self.family = "bigram", family
        self.chat = None
        self.sides = ()
        text = SimpleNamespace(_attn_implementation="sdpa")
        config = SimpleNamespace(get_text_config=lambda: text)
        self.network = SimpleNamespace(config=config, generation_config=None)
        self.reader = Reader(
            self.network, self.tokenizer, (), lambda ends: contextlib.nullcontext()
        )  # of no texts before prompts
        self.shortcuts = Shortcuts()
        self.max_length = max_length
        self.logits_VV = torch.zeros(
            len(self.tokenizer), len(self.tokenizer)
        )  # (current token, next token)
        self.shapes: list[tuple[int, int]] = []
        self.failures = 0
        self._memory = memory  # tokens of a batch that it can hold

    def final_hidden(self, batch: PromptBatch) -> torch.Tensor:
        rows, width = batch.ids_BT.shape
        if self._memory is not None and rows * width > self._memory:
            self.failures += 1
            raise torch.OutOfMemoryError("too large")
        assert width <= self.max_length
        self.shapes.append((rows, width))
        return batch.ids_BT[..., None].double()

    def routed(self, routing: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def module(self, name: str) -> Callable[..., SimpleNamespace]:
        """What a generation calls, token by token: it needs no cache."""
        assert name == "base"
        return lambda input_ids, **_: SimpleNamespace(
            last_hidden_state=input_ids[..., None].double(), past_key_values=None
        )

    def hidden_to_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self.logits_VV[hidden_ND[:, 0].long()]

    def say(self, prompt: str, answer: str, *probabilities: float) -> None:
        """Gives the answer's tokens these probabilities, each after the token before it; the rest
        is shared by all others.

        A later call overwrites what an earlier one said of the same tokens.
        """
        sequence = encode_with_target(self.tokenizer, prompt, answer)
        assert len(probabilities) == len(sequence.target_ids), self.tokenizer.convert_ids_to_tokens(
            list(sequence.ids)
        )
        current = sequence.ids[sequence.predicting]
        for before, token, probability in zip(
            current, sequence.target_ids, probabilities, strict=True
        ):
            row_V = torch.full(
                (len(self.tokenizer),), (1 - probability) / (len(self.tokenizer) - 1)
            )
            row_V[token] = probability
            self.logits_VV[before] = row_V.log()
