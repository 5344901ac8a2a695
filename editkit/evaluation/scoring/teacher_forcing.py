"""Scores under teacher forcing: log-probabilities and greedy choices of answers after prompts.

An answer's tokens are predicted from the prompt and the answer without its last token, its context.
Contexts are run as trees (`editkit.model.prefix_tree`): a prefix that several contexts share is
computed once. Two one-token answers of a prompt cost one row, and so do several protocols that need
the same score. Logits are computed at the answers' positions alone.

Shape letters: B rows, T tokens, D width of the residual stream, V vocabulary, P different
positions, M answer tokens, K chosen tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.beside import is_routed
from editkit.model.prefix_tree import Ids, Tree, build_trees, supports_trees, tree_batch
from editkit.model.tokens import Encoded, TargetSequence, encode_with_targets
from editkit.types import Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in float32, whatever the vocabulary
# A CPU gains nothing from wider passes, and loses half its speed once the values of a layer outgrow
# the memory that malloc keeps.
TOKENS_ON_CPU = 512
# Attention covers the whole tree, and larger trees usually share little more (1,000 records of
# CounterFact: 1 %). Prompts with common examples share much more, so that larger trees pay.
TOKENS_OF_A_TREE = 64
TOKENS_OF_A_LARGE_TREE = 512
LARGE_TREES_PAY = 0.8  # below this share of the tokens of small trees
# The tokens before an answer's last one, and how many of them are the prompt, by whose last token
# sides beside the weights route it; 0: it does not matter.
Context = tuple[Ids, int]


@dataclass(frozen=True)
class Score:
    """The scores of one answer, token by token."""

    tokens: Ids  # the answer's
    log_probs: tuple[float, ...]  # nats
    greedy: Ids  # the most probable tokens at the same places
    next_tokens: NextTokens | None = None  # if it was requested

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


@dataclass(frozen=True, slots=True, eq=False)
class NextTokens:
    """The most probable next tokens at each position of an answer, and the log-probabilities of
    requested tokens. On the CPU, log-probabilities in nats.
    """

    top_MK: torch.Tensor  # ids, int32, the most probable first
    top_log_probs_MK: torch.Tensor  # float32
    requested_log_probs_MK: torch.Tensor | None  # float32, of the requested ids


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DistributionRequest:
    """The probes whose next-token distributions are needed: the `top` most probable tokens, and the
    log-probabilities of given tokens.
    """

    top: int
    probes: Mapping[
        Probe, torch.Tensor | None
    ]  # given ids (M, K), the same K for all; or None for all


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer's tokens and the first position whose logits predict one."""

    index: int  # which of the probes
    tokens: Ids
    first: int


def score(
    model: EditableModel,
    probes: Iterable[Probe],
    *,
    tokens_per_batch: int,
    distributions: DistributionRequest | None = None,
) -> dict[Probe, Score]:
    """The score of each different probe. Answers follow their prompts as
    `encode_with_targets` joins them.

    A context that exceeds the model's context length loses its beginning.

    Args:
        tokens_per_batch: rows times width of a batch, padding included, on a CPU at most 512. A
            longer row runs alone. It is halved for the rest of the call if memory runs out, and
            changes no score beyond rounding.
        distributions: the probes whose next-token distributions are returned too.

    Raises:
        ConfigError: an answer is blank, or exceeds the model's context length.
    """
    unique = list(dict.fromkeys(probes))
    sequences = encode_with_targets(model.tokenizer, unique, chat=model.chat)
    wanted: dict[int, torch.Tensor | None] = {}
    top = 0
    if distributions is not None:
        given, top = distributions.probes, min(distributions.top, len(model.tokenizer))
        wanted = {index: given[probe] for index, probe in enumerate(unique) if probe in given}
    scores = score_sequences(
        model, sequences, tokens_per_batch=tokens_per_batch, wanted=wanted, top=top
    )
    return dict(zip(unique, scores, strict=True))


def score_sequences(
    model: EditableModel,
    sequences: Sequence[TargetSequence],
    *,
    tokens_per_batch: int,
    wanted: Mapping[int, torch.Tensor | None] | None = None,
    top: int = 0,
) -> list[Score]:
    """`score` of tokenised prompts and answers. `wanted` and `top` are a `DistributionRequest` with
    indices of sequences instead of probes.
    """
    if tokens_per_batch < 1:
        raise ConfigError(
            message("tokens_per_batch", "out of range", got=tokens_per_batch, expected="at least 1")
        )
    if model.device.type == "cpu":
        tokens_per_batch = min(tokens_per_batch, TOKENS_ON_CPU)
    read = _prompted(model, sequences)
    answers = _contexts(read, max_length=model.max_length, is_routed=is_routed(model.sides))
    is_branched = supports_trees(model, longest=max((len(ids) for ids, _ in answers), default=0))
    largest = min(TOKENS_OF_A_LARGE_TREE, model.max_length) if is_branched else 1
    trees = _trees(list(answers), largest=min(largest, tokens_per_batch))
    scores: dict[int, Score] = {}
    done = 0
    while done < len(trees):
        batch = trees[
            done : done + max(1, tokens_per_batch // len(trees[done].ids))
        ]  # the first is the largest
        try:
            batch_scores = _run(model, batch, answers, wanted or {}, top)
        except RuntimeError as error:
            if not is_out_of_memory(error) or (len(batch) == 1 and len(batch[0].branches) == 1):
                raise
            tokens_per_batch = max(1, tokens_per_batch // 2)
            left = [context for tree in trees[done:] for context in _contexts_of(tree)]
            trees, done = _trees(left, largest=min(largest, tokens_per_batch)), 0
            continue
        scores.update(batch_scores)
        done += len(batch)
    return [scores[index] for index in range(len(sequences))]


def _trees(contexts: Sequence[Context], *, largest: int) -> list[Tree]:
    """Small trees, or trees of up to `largest` tokens if these save a good part of the tokens."""
    texts, prompts = [ids for ids, _ in contexts], [prompt for _, prompt in contexts]
    small = build_trees(texts, limit=min(TOKENS_OF_A_TREE, largest), prompts=prompts)
    large = build_trees(texts, limit=largest, prompts=prompts)
    tokens, fewer = (sum(len(tree.ids) for tree in trees) for trees in (small, large))
    return large if fewer < LARGE_TREES_PAY * tokens else small


def _contexts_of(tree: Tree) -> list[Context]:
    return list(zip(tree.sequences, tree.prompts, strict=True))


def _prompted(
    model: EditableModel, sequences: Sequence[TargetSequence]
) -> Sequence[TargetSequence]:
    """The sequences with what texts beside the weights put before their prompts."""
    if not model.sides:
        return sequences
    prompts = model.reader.prompted([sequence.ids[: sequence.start] for sequence in sequences])
    return [
        sequence
        if len(prompt) == sequence.start and prompt == sequence.ids[: sequence.start]
        else TargetSequence(Encoded((*prompt, *sequence.target_ids), (), 0), len(prompt))
        for sequence, prompt in zip(sequences, prompts, strict=True)
    ]


def _contexts(
    sequences: Sequence[TargetSequence], *, max_length: int, is_routed: bool
) -> dict[Context, list[_Answer]]:
    """The answers by the context that they are read from."""
    contexts: dict[Context, list[_Answer]] = {}
    for index, sequence in enumerate(sequences):
        cut = max(0, len(sequence.ids) - 1 - max_length)
        if cut > sequence.predicting.start:
            got, expected = f"{len(sequence.target_ids)} tokens", f"at most {max_length}"
            problem = "exceeds the model's context length"
            raise ConfigError(message("answer", problem, got=got, expected=expected))
        answer = _Answer(index, sequence.target_ids, sequence.predicting.start - cut)
        prompt = answer.first + 1 if is_routed else 0
        contexts.setdefault((sequence.ids[cut:-1], prompt), []).append(answer)
    return contexts


def _run(
    model: EditableModel,
    trees: Sequence[Tree],
    answers: Mapping[Context, Sequence[_Answer]],
    wanted: Mapping[int, torch.Tensor | None],
    top: int,
) -> list[tuple[int, Score]]:
    places: dict[tuple[int, int], int] = {}  # (row, position) -> which of the P
    tokens: list[tuple[int, int]] = []  # (which of the P, token), M of them
    read: list[_Answer] = []
    for row, tree in enumerate(trees):
        for context, path in zip(_contexts_of(tree), tree.paths, strict=True):
            for answer in answers[context]:
                read.append(answer)
                for offset, token in enumerate(answer.tokens):
                    tokens.append(
                        (places.setdefault((row, path[answer.first + offset]), len(places)), token)
                    )
    rows_P, positions_P = torch.tensor(list(places), device=model.device).T
    places_M, tokens_M = torch.tensor(tokens, device=model.device).T
    starts = list(itertools.accumulate((len(answer.tokens) for answer in read), initial=0))
    ends = [start + len(answer.tokens) for start, answer in zip(starts, read, strict=False)]
    looked_at = [number for number, answer in enumerate(read) if answer.index in wanted]
    reader = _DistributionReader(
        top,
        [place for number in looked_at for place, _ in tokens[starts[number] : ends[number]]],
        [ids_MK for number in looked_at if (ids_MK := wanted[read[number].index]) is not None],
        model.device,
    )
    with torch.no_grad():
        hidden_BTD = model.final_hidden(tree_batch(trees, device=model.device, dtype=model.dtype))
        log_probs_M, greedy_M = _read(
            model, hidden_BTD[rows_P, positions_P], places_M, tokens_M, reader
        )
    log_probs, greedy = log_probs_M.tolist(), greedy_M.tolist()
    sizes = [len(read[number].tokens) for number in looked_at]
    distributions = (
        dict(zip(looked_at, reader.next_tokens(sizes), strict=True)) if looked_at else {}
    )
    return [
        (
            answer.index,
            Score(
                answer.tokens,
                tuple(log_probs[start:end]),
                tuple(greedy[start:end]),
                distributions.get(number),
            ),
        )
        for number, (answer, start, end) in enumerate(zip(read, starts, ends, strict=False))
    ]


def _read(
    model: EditableModel,
    hidden_PD: torch.Tensor,
    places_M: torch.Tensor,
    tokens_M: torch.Tensor,
    reader: _DistributionReader,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M,) log-probabilities of the tokens, float32, and (M,) the greedy choices at their places;
    the vocabulary in bounded memory.
    """
    log_probs_M = torch.empty(len(tokens_M), device=hidden_PD.device)
    greedy_M = torch.empty_like(tokens_M)
    size = max(1, LOGITS_AT_ONCE // len(model.tokenizer))
    for start in range(0, len(hidden_PD), size):
        log_probs_PV = (
            model.hidden_to_logits(hidden_PD[start : start + size]).float().log_softmax(-1)
        )
        inside_M = (places_M >= start) & (places_M < start + size)
        here = places_M[inside_M] - start
        log_probs_M[inside_M] = log_probs_PV[here, tokens_M[inside_M]]
        greedy_M[inside_M] = log_probs_PV.argmax(-1)[here]
        reader.read(log_probs_PV, start)
    return log_probs_M, greedy_M


class _DistributionReader:
    """Reads the distributions of one pass at Q places of the P. The places of an answer are
    consecutive.
    """

    def __init__(
        self, top: int, places: Sequence[int], ids: Sequence[torch.Tensor], device: torch.device
    ) -> None:
        self.places_Q = torch.tensor(places, dtype=torch.long, device=device)
        self.ids_QK = torch.cat(list(ids)).long().to(device) if ids else None
        self.top_QK = torch.empty(len(places), top, dtype=torch.int32, device=device)
        self.top_log_probs_QK = torch.empty(len(places), top, device=device)
        self.requested_QK = (
            None if self.ids_QK is None else torch.empty(self.ids_QK.shape, device=device)
        )

    def read(self, log_probs_PV: torch.Tensor, start: int) -> None:
        """Keeps what is needed of the log-probabilities at the places from `start` on."""
        inside_Q = (self.places_Q >= start) & (self.places_Q < start + len(log_probs_PV))
        if not bool(inside_Q.any()):
            return
        log_probs_QV = log_probs_PV[self.places_Q[inside_Q] - start]
        values_QK, ids_QK = log_probs_QV.topk(self.top_QK.shape[1])
        self.top_QK[inside_Q], self.top_log_probs_QK[inside_Q] = ids_QK.int(), values_QK
        if self.requested_QK is not None and self.ids_QK is not None:
            self.requested_QK[inside_Q] = log_probs_QV.gather(-1, self.ids_QK[inside_Q])

    def next_tokens(self, sizes: Sequence[int]) -> list[NextTokens]:
        """The distributions of each answer. `sizes` are the answers' numbers of tokens."""
        top, log_probs = (
            self.top_QK.cpu().split(list(sizes)),
            self.top_log_probs_QK.cpu().split(list(sizes)),
        )
        requested: Sequence[torch.Tensor | None] = [None] * len(sizes)
        if self.requested_QK is not None:
            requested = self.requested_QK.cpu().split(list(sizes))
        return [NextTokens(*parts) for parts in zip(top, log_probs, requested, strict=True)]


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
