"""One engine for everything that is judged under teacher forcing: log-probabilities and greedy choices of answers after their prompts.

An answer's tokens are predicted from the prompt and the answer without its last token, its context. A context that begins another one is
not run for itself: causal attention gives it the same hidden states inside the longer one. So two one-token answers of a prompt cost one
row, and so do all protocols that ask the same thing. Contexts run in order of length, and logits exist at the answers' positions alone.

Shape letters: B rows, T tokens, D width of the residual stream, V vocabulary, P different positions, M answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.tokens import TargetSequence, encode_with_targets, pad
from editkit.types import Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in float32, whatever the vocabulary
TOKENS_ON_CPU = 512  # a CPU gains nothing from wider passes, and loses half its speed once a layer's values outgrow what malloc keeps


@dataclass(frozen=True)
class Score:
    """What the model says of one answer, token by token."""

    tokens: tuple[int, ...]  # the answer's
    log_probs: tuple[float, ...]  # nats
    greedy: tuple[int, ...]  # the most probable tokens at the same places

    @cached_property
    def mean_log_prob(self) -> float:
        """Length-normalised: nats a token."""
        return math.fsum(self.log_probs) / len(self.log_probs) if self.is_finite else math.nan

    @property
    def sum_log_prob(self) -> float:
        """Nats of the whole answer."""
        return math.fsum(self.log_probs) if self.is_finite else math.nan

    @property
    def probability(self) -> float:
        """exp(mean_log_prob): the geometric mean of the tokens' probabilities."""
        return math.exp(self.mean_log_prob)

    @property
    def is_greedy(self) -> bool:
        """Every token of the answer is the most probable one."""
        return self.greedy == self.tokens

    @cached_property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.log_probs))


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer's tokens and the first position whose logits predict one."""

    index: int  # which of the probes
    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class _Row:
    """Token ids to run, and the answers that are read from them."""

    ids: tuple[int, ...]
    answers: list[_Answer]


def score(model: EditableModel, probes: Iterable[Probe], *, tokens_per_batch: int) -> dict[Probe, Score]:
    """The score of each different probe. Answers follow their prompts after one blank.

    A context longer than the model's positions loses its beginning.

    Args:
        tokens_per_batch: rows times width of a batch, padding included, on a CPU at most 512; a longer row runs alone. Halved, for the rest
            of the call, whenever memory runs out. It changes no score beyond rounding.

    Raises:
        ConfigError: an answer is blank, or longer than the model's positions.
    """
    if tokens_per_batch < 1:
        raise ConfigError(f"tokens_per_batch: {tokens_per_batch} - a whole number of at least 1")
    if model.device.type == "cpu":
        tokens_per_batch = min(tokens_per_batch, TOKENS_ON_CPU)
    unique = list(dict.fromkeys(probes))
    sequences = encode_with_targets(model.tokenizer, [(probe.prompt, probe.answer) for probe in unique])
    rows = _rows(sequences, max_length=model.max_length)
    scores: list[Score | None] = [None] * len(unique)
    done = 0
    while done < len(rows):
        batch = rows[done : done + max(1, tokens_per_batch // len(rows[done].ids))]  # the first is the longest
        try:
            found = _run(model, batch)
        except RuntimeError as error:
            if len(batch) == 1 or not _is_out_of_memory(error):
                raise
            tokens_per_batch = max(1, tokens_per_batch // 2)
            continue
        for index, answer_score in found:
            scores[index] = answer_score
        done += len(batch)
    return {probe: found for probe, found in zip(unique, scores, strict=True) if found is not None}


def _rows(sequences: Sequence[TargetSequence], *, max_length: int) -> list[_Row]:
    """The contexts that must run, the longest first."""
    contexts: list[tuple[tuple[int, ...], _Answer]] = []
    for index, sequence in enumerate(sequences):
        cut = max(0, len(sequence.ids) - 1 - max_length)
        if cut > sequence.predicting.start:
            raise ConfigError(f"an answer has {len(sequence.target_ids)} tokens, the model {max_length} positions")
        contexts.append((sequence.ids[cut:-1], _Answer(index, sequence.target_ids, sequence.predicting.start - cut)))
    rows: list[_Row] = []
    # In dictionary order whatever begins with a context follows right behind it; so seen from the end it is there already.
    for ids, answer in sorted(contexts, key=lambda context: context[0], reverse=True):
        if not rows or rows[-1].ids[: len(ids)] != ids:
            rows.append(_Row(ids, []))
        rows[-1].answers.append(answer)
    return sorted(rows, key=lambda row: len(row.ids), reverse=True)


def _run(model: EditableModel, rows: Sequence[_Row]) -> list[tuple[int, Score]]:
    places: dict[tuple[int, int], int] = {}  # (row, position) -> which of the P
    asked: list[tuple[int, int]] = []  # (which of the P, token), M of them
    for number, row in enumerate(rows):
        for answer in row.answers:
            for offset, token in enumerate(answer.tokens):
                place = places.setdefault((number, answer.first + offset), len(places))
                asked.append((place, token))
    rows_P, positions_P = torch.tensor(list(places), device=model.device).T
    places_M, tokens_M = torch.tensor(asked, device=model.device).T
    with torch.no_grad():
        hidden_BTD = model.final_hidden(pad([row.ids for row in rows], device=model.device))
        log_probs_M, greedy_M = _read(model, hidden_BTD[rows_P, positions_P], places_M, tokens_M)
    log_probs, greedy = log_probs_M.tolist(), greedy_M.tolist()
    found: list[tuple[int, Score]] = []
    start = 0
    for row in rows:
        for answer in row.answers:
            stop = start + len(answer.tokens)
            found.append((answer.index, Score(answer.tokens, tuple(log_probs[start:stop]), tuple(greedy[start:stop]))))
            start = stop
    return found


def _read(
    model: EditableModel, hidden_PD: torch.Tensor, places_M: torch.Tensor, tokens_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M,) log-probabilities of the tokens, float32, and (M,) the greedy choices at their places; the vocabulary in bounded memory."""
    log_probs_M = torch.empty(len(tokens_M), device=hidden_PD.device)
    greedy_M = torch.empty_like(tokens_M)
    size = max(1, LOGITS_AT_ONCE // len(model.tokenizer))
    for start in range(0, len(hidden_PD), size):
        log_probs_PV = model.hidden_to_logits(hidden_PD[start : start + size]).float().log_softmax(-1)
        inside_M = (places_M >= start) & (places_M < start + size)
        here = places_M[inside_M] - start
        log_probs_M[inside_M] = log_probs_PV[here, tokens_M[inside_M]]
        greedy_M[inside_M] = log_probs_PV.argmax(-1)[here]
    return log_probs_M, greedy_M


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
