"""The texts of a target search as token ids: every request in its contexts, and the KL prompt,
which preserves the subject's essence.

Shape letters: B sequences (by request: the contexts, then the KL prompt), N requests, C contexts, L
longest target, K tokens of targets, M (sequence, position) pairs whose logits are read (M = K + N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.lazy import torch
from editkit.model.tokens import (
    PLACE,
    FilledPrompt,
    TargetSequence,
    encode,
    encode_with_targets,
    fill,
    subject_position,
)
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

ESSENCE = "{} is a"  # the KL prompt of the published code


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """The tokenised sequences of one request: each context with the target except its last token,
    then the KL prompt, if there is one.
    """

    ids: tuple[tuple[int, ...], ...]  # by row
    sites: tuple[int, ...]  # by row: position of the subject's last token
    predicting: tuple[range, ...]  # by context: the positions whose logits predict the target
    targets: tuple[tuple[int, ...], ...]  # by context: the target's ids
    kl_position: int | None  # in the last row; None: there is no KL prompt

    @property
    def reads(self) -> tuple[Sequence[int], ...]:
        """By row, the positions whose logits the loss needs."""
        kl_position = self.kl_position
        return self.predicting if kl_position is None else (*self.predicting, (kl_position,))


def prepare(
    model: EditableModel,
    request: EditRequest,
    contexts: Sequence[str],
    *,
    kl_position: Literal["subject_last", "prompt_end"],
) -> Sequences:
    """Tokenises a request in its contexts. Raises ConfigError if that is impossible."""
    assert contexts and contexts[0] == PLACE, "the first context is the bare prompt"
    encoded, sites = locate(model, request, contexts)
    essence = essence_of(request)
    essence_encoded = encode(model.tokenizer, [essence.text], chat=model.chat)[0]
    essence_site = subject_position(essence_encoded, essence)
    return Sequences(
        ids=(*(sequence.ids[:-1] for sequence in encoded), essence_encoded.ids),
        sites=(*sites, essence_site),
        predicting=tuple(
            range(sequence.predicting.start, sequence.predicting.stop) for sequence in encoded
        ),
        targets=tuple(sequence.target_ids for sequence in encoded),
        # The published code measures the KL at the subject's last token. The paper's formula
        # p(x | "{subject} is a") is measured at the end of the prompt.
        kl_position=essence_site if kl_position == "subject_last" else len(essence_encoded.ids) - 1,
    )


def essence_of(request: EditRequest) -> FilledPrompt:
    """The KL prompt with the subject, or without one where the request has none."""
    if request.subject:
        return fill(ESSENCE, request.subject)
    return fill(ESSENCE.replace(PLACE, "").strip(), "")


def locate(
    model: EditableModel, request: EditRequest, contexts: Sequence[str]
) -> tuple[list[TargetSequence], list[int]]:
    """Each context with prompt and target as one tokenised text, and the position of the subject's
    last token in it.
    """
    filled = [fill(request.prompt, request.subject, context=context) for context in contexts]
    encoded = encode_with_targets(
        model.tokenizer, [request.probe(prompt=prompt.text) for prompt in filled], chat=model.chat
    )
    return encoded, [
        subject_position(sequence, prompt) for sequence, prompt in zip(encoded, filled, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readout:
    """The positions at which the logits of several requests are read, and their mean per context.

    The indices are on the model's device, so that no step copies them. The pairs are those of the
    targets of every request and context in order, then the KL position of each request.
    """

    rows_M: torch.Tensor
    positions_M: torch.Tensor  # in the unpadded sequences
    ids_K: torch.Tensor  # the targets' tokens, those of all pairs except the last N
    # the pairs of each context of a request, filled up to L with the first of them
    pairs_NCL: torch.Tensor
    is_pair_NCL: torch.Tensor

    def means(self, log_p_K: torch.Tensor) -> torch.Tensor:
        """The mean log-probability of each target's tokens, (N, C)."""
        log_p_NCL = log_p_K[self.pairs_NCL]
        return torch.where(self.is_pair_NCL, log_p_NCL, 0.0).sum(-1) / self.is_pair_NCL.sum(-1)


def readout_of(requests: Sequence[Sequences], *, device: torch.device) -> Readout:
    """The positions that are read in the rows of these requests, which follow one another."""
    pairs: list[tuple[int, int]] = []
    kl_pairs: list[tuple[int, int]] = []
    token_ids: list[int] = []
    longest = max(len(target) for sequences in requests for target in sequences.targets)
    first_row, pairs_NCL, is_pair_NCL = 0, [], []
    for sequences in requests:
        starts, lengths = [], [len(target) for target in sequences.targets]
        for row, (positions, target) in enumerate(
            zip(sequences.predicting, sequences.targets, strict=True), first_row
        ):
            starts.append(len(pairs))
            pairs += [(row, position) for position in positions]
            token_ids += target
        is_pair_NCL.append([[step < length for step in range(longest)] for length in lengths])
        pairs_NCL.append(
            [
                [start + step * is_pair for step, is_pair in enumerate(row)]
                for start, row in zip(starts, is_pair_NCL[-1], strict=True)
            ]
        )
        first_row += len(sequences.ids)
        if sequences.kl_position is not None:
            kl_pairs.append((first_row - 1, sequences.kl_position))
    rows_M, positions_M = torch.tensor([*pairs, *kl_pairs], device=device).T
    return Readout(
        rows_M=rows_M,
        positions_M=positions_M,
        ids_K=torch.tensor(token_ids, device=device),
        pairs_NCL=torch.tensor(pairs_NCL, device=device),
        is_pair_NCL=torch.tensor(is_pair_NCL, device=device),
    )
