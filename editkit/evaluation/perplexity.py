"""Perplexity on running text, which shows whether the edited model still models language.

The text is tokenised as a whole and cut into windows of `window` tokens without overlap. If the
tokenizer adds a start token, every window begins with one. Each token is predicted from those
before it in its window, except a first token that nothing precedes. `perplexity_per_token` is
exp(mean negative log-likelihood per token). It is comparable between views and milestones, not
between tokenizers.

The mean is the ratio of the windows' losses to their numbers of tokens. Its standard error over
windows is that of a ratio (Cochran 1977, Sampling Techniques, 6.4): a window is weighted by its
tokens. The standard error of the perplexity follows by the delta method.

Shape letters: B windows, T tokens, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, OptionError, message
from editkit.evaluation.base import AbstractEvaluator
from editkit.evaluation.scoring.teacher_forcing import LOGITS_AT_ONCE, TOKENS_ON_CPU
from editkit.lazy import torch
from editkit.model.tokens import encode, pad
from editkit.types import EditRequest, Measurement

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
TEXTS = "a text file, or a folder with *.txt or *.raw files"


@dataclass(frozen=True, kw_only=True)
class Perplexity(AbstractEvaluator):
    """Perplexity on the beginning of a text file (utf-8), or of all `*.txt` and `*.raw` files of a
    folder in the order of their names.
    """

    path: str | None  # None: not measured
    max_tokens: int | None  # of the text; None: all of it
    window: int
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        problems = [
            message(name, "out of range", got=value, expected="at least 2")
            for name, value in {"max_tokens": self.max_tokens, "window": self.window}.items()
            if value is not None and value < 2
        ]
        if self.path is not None and not self._files():
            problems.append(message("path", "no text there", got=self.path, expected=TEXTS))
        if problems:
            raise OptionError(problems)

    def inputs(self, model: EditableModel) -> dict[str, str]:
        """The digest of the files."""
        content = (
            b"\n".join(file.read_bytes() for file in self._files())
            if self.path is not None
            else b""
        )
        return (
            {}
            if self.path is None
            else {"evaluation.perplexity.path": hashlib.sha256(content).hexdigest()}
        )

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> dict[str, torch.Tensor]:
        """Nothing is frozen: the text has the right tokens."""
        return {}

    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> list[Measurement]:
        """Measures the model; the requests do not matter."""
        if self.path is None:
            return []
        windows, num_special = self._windows(model)
        losses: list[float] = []  # nats per token, of each window
        counts: list[int] = []
        bound = (
            min(self.tokens_per_batch, TOKENS_ON_CPU)
            if model.device.type == "cpu"
            else self.tokens_per_batch
        )
        size = max(1, bound // max(map(len, windows)))
        for start in range(0, len(windows), size):
            chosen = windows[start : start + size]
            counts += [len(ids) - max(1, num_special) for ids in chosen]
            losses += self._losses(model, chosen, max(1, num_special))
        total = math.fsum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(
            counts
        )
        value = math.exp(total) if math.isfinite(total) and total < 700 else None
        stderr = _ratio_stderr(losses, counts, total)
        return [
            Measurement(
                kind="language",
                metric="perplexity_per_token",
                task=Path(self.path).stem,
                value=value,
                stderr=None if value is None or stderr is None else value * stderr,
                n=len(windows),
                nonfinite=sum(not math.isfinite(loss) for loss in losses),
            )
        ]

    def _files(self) -> list[Path]:
        path = Path(self.path or "").expanduser()
        if path.is_dir():
            return sorted(file for file in path.iterdir() if file.suffix in (".txt", ".raw"))
        return [path] if path.is_file() else []

    def _windows(self, model: EditableModel) -> tuple[list[tuple[int, ...]], int]:
        """The windows' ids with their special tokens, and the number of special tokens of each
        window. A window has at least two tokens.
        """
        # A token stands for less than 20 characters on average.
        characters = None if self.max_tokens is None else 20 * self.max_tokens
        text = "\n".join(
            file.read_text(encoding="utf-8", errors="replace") for file in self._files()
        )[:characters]
        encoded = encode(model.tokenizer, [text])[0]
        special = encoded.ids[: encoded.num_special]
        ids = encoded.ids[encoded.num_special :][: self.max_tokens]
        size = min(self.window, model.max_length) - len(special)
        windows = [special + ids[start : start + size] for start in range(0, len(ids), size)]
        windows = [window for window in windows if len(window) > max(1, len(special))]
        if not windows:
            raise ConfigError(
                message(
                    "evaluation.perplexity.path", "no text there", got=self.path, expected=TEXTS
                )
            )
        return windows, len(special)

    def _losses(
        self, model: EditableModel, windows: Sequence[tuple[int, ...]], first: int
    ) -> list[float]:
        """The mean negative log-likelihood of each window's tokens from `first` on, in nats per
        token. The logits take bounded memory.
        """
        with torch.no_grad():
            # What stands before the first scored token is the prompt that a side would see.
            prompts = [first] * len(windows)
            hidden_BTD = model.final_hidden(pad(windows, device=model.device, prompts=prompts))
            size = max(1, LOGITS_AT_ONCE // len(model.tokenizer))
            losses = []
            for row, ids in enumerate(windows):
                hidden_TD = hidden_BTD[row, first - 1 : len(ids) - 1]
                targets_T = torch.tensor(ids[first:], device=model.device)
                total = 0.0
                for hidden_ND, targets_N in zip(
                    hidden_TD.split(size), targets_T.split(size), strict=True
                ):
                    log_probs_NV = model.hidden_to_logits(hidden_ND).float().log_softmax(-1)
                    total -= float(log_probs_NV.gather(-1, targets_N[:, None]).double().sum())
                losses.append(total / len(targets_T))
        return losses


def _ratio_stderr(losses: Sequence[float], counts: Sequence[int], mean: float) -> float | None:
    """The standard error of the mean per token; None for fewer than two windows. It is that of a
    plain mean if all windows have the same number of tokens.
    """
    n = len(losses)
    if n < 2 or not math.isfinite(mean):
        return None
    squares = math.fsum(
        (count * (loss - mean)) ** 2 for loss, count in zip(losses, counts, strict=True)
    )
    return math.sqrt(n / (n - 1) * squares) / sum(counts)
