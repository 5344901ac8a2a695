"""GRACE's codebook: keys with radii, and the values that take the place of a module's output.

A prompt is looked up by the module's input at its last token. All entries are compared at once: one
matrix product finds the nearest candidates, whose distances are then computed exactly, because the
product loses small distances between large vectors.

Shape letters: N entries, P or Q prompts, I and O input and output width of the module, L tokens of
the longest answer, K candidates, B rows, T tokens, X any width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts
from editkit.types import TensorState

Replaced = Literal["last", "prompt"]

CANDIDATES = 8
MARGIN = 1e-5  # between two keys of other answers that would touch (published code)
# Rounding of a key, relative to its length: another batch or a cache gives other last bits.
ROUNDING = 1e-5
NO_TOKEN = -1  # behind the tokens of an answer that is not the longest
FREE = -2  # a row of labels that no entry has taken; of float32, nan
LEAST_ROWS = 16  # free rows behind the first entry


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebook(AbstractSide):
    """Some entries beside one module."""

    belongs: ClassVar[str] = "the codebook belongs to a module"

    module: str
    replace: Replaced  # whose output the value replaces: of a prompt's last token, or of all
    keys_NI: torch.Tensor  # float32
    values_NO: torch.Tensor  # float32
    radii_N: torch.Tensor  # float32
    labels_NL: torch.Tensor  # int64, the tokens of the answers

    @classmethod
    def empty(cls, module: str, replaced: Replaced, shape: tuple[int, int]) -> Codebook:
        """No entries beside a module of this shape, (O, I)."""
        return cls(
            module=module,
            replace=replaced,
            keys_NI=torch.zeros(0, shape[1]),
            values_NO=torch.zeros(0, shape[0]),
            radii_N=torch.zeros(0),
            labels_NL=torch.zeros(0, 0, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.radii_N)

    # As a side

    def choose(self, prompts: Prompts) -> torch.Tensor:
        return self.covering(prompts.last_PI)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        where_BT = place.is_end_BT if self.replace == "last" else place.is_prompt_BT
        where_BT = where_BT & (chosen_BT != NONE)
        if not bool(where_BT.any()):
            return outputs_BTO
        changed_BTO = outputs_BTO.clone()
        changed_BTO[where_BT] = self.values_NO[chosen_BT[where_BT]].to(outputs_BTO)
        return changed_BTO

    def options(self) -> dict[str, Any]:
        return {"module": self.module, "replace": self.replace}

    def state(self) -> TensorState:
        return {
            "keys": self.keys_NI,
            "values": self.values_NO,
            "radii": self.radii_N,
            "labels": self.labels_NL,
        }

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        return cls(
            module=options["module"],
            replace=options["replace"],
            keys_NI=state["keys"],
            values_NO=state["values"],
            radii_N=state["radii"],
            labels_NL=state["labels"],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_NO.shape[1], self.keys_NI.shape[1]

    def figures(self) -> dict[str, float]:
        tensors = self.state().values()
        return {
            "entries": float(len(self)),
            "parameters": float(self.values_NO.numel()),
            "bytes": float(sum(tensor.nbytes for tensor in tensors)),
            "norm": float(self.values_NO.double().norm()),
        }

    # Looking up and adding

    def covering(self, queries_PI: torch.Tensor) -> torch.Tensor:
        """(P,) int64: the nearest entry of each query whose radius covers it; NONE without one."""
        if not len(self) or not len(queries_PI):
            return torch.full((len(queries_PI),), NONE, device=queries_PI.device)
        distances_P, entries_P = self.nearest(queries_PI)
        rounding_P = ROUNDING * queries_PI.float().norm(dim=-1)
        is_covered_P = distances_P <= self.radii_N[entries_P] + rounding_P
        return torch.where(is_covered_P, entries_P, NONE)

    def nearest(self, queries_PI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P,) Euclidean distances, float32, and (P,) entries: the nearest of at least one."""
        queries_PI = queries_PI.to(self.keys_NI)
        # |q - k|^2 without |q|^2, which does not change the order
        scores_QN = torch.addmm(self._squares_N, queries_PI, self.keys_NI.T, alpha=-2)
        near_PK = scores_QN.topk(min(CANDIDATES, len(self)), largest=False, dim=1).indices
        near_PK = near_PK.sort(dim=1).values  # of equal distances, the older entry
        distances_PK = (self.keys_NI[near_PK] - queries_PI[:, None]).norm(dim=-1)
        distances_P, places_P = distances_PK.min(dim=1)
        return distances_P, near_PK.gather(1, places_P[:, None])[:, 0]

    @cached_property
    def _squares_N(self) -> torch.Tensor:
        return self.keys_NI.square().sum(dim=1)

    def entry_for(self, query_I: torch.Tensor, answer: Sequence[int], radius: float) -> int | None:
        """The entry that a prompt and its answer would have; None for a new one."""
        return self._place(query_I, answer, radius).entry

    def placed(
        self,
        query_I: torch.Tensor,
        answer: Sequence[int],
        value_O: torch.Tensor,
        *,
        radius: float,
    ) -> tuple[Codebook, int]:
        """The codebook with an entry of this value for a prompt and its answer, and which entry
        that is.

            r > radius + radius_i           a new entry (Hartvigsen et al. 2023, Algorithm 1)
            within reach, another answer    radius_i = r / 2, and a new entry of radius r / 2
            within reach, the same answer   radius_i = max(radius_i, r)

        r is the distance to the nearest key. A prompt at the key itself, to rounding, has its
        entry: a later answer takes the place of the earlier one. The published code would give the
        same prompt two entries of radius zero, neither of which rounding lets it reach.
        """
        place, found = self._place(query_I, answer, radius), self
        for entry, resized in place.resized.items():
            radii_N = self.radii_N.clone()
            radii_N[entry] = resized
            found = replace(found, radii_N=radii_N)
        if place.entry is None:
            return found._with(query_I, answer, value_O, place.radius), len(self)
        if self.answer(place.entry) != tuple(answer):
            labels_NL = self._wide_enough(answer).clone()
            labels_NL[place.entry] = self._label(answer, labels_NL)
            found = replace(found, labels_NL=labels_NL)
        values_NO = self.values_NO.clone()
        values_NO[place.entry] = value_O.detach().to(values_NO)
        return replace(found, values_NO=values_NO), place.entry

    def _place(self, query_I: torch.Tensor, answer: Sequence[int], radius: float) -> _Place:
        """Where a prompt and its answer belong."""
        if not len(self):
            return _Place(entry=None, radius=radius)
        distances_P, entries_P = self.nearest(query_I[None])
        distance, entry = float(distances_P[0]), int(entries_P[0])
        if distance <= ROUNDING * float(query_I.float().norm()):
            return _Place(entry=entry)
        if distance > radius + float(self.radii_N[entry]):
            return _Place(entry=None, radius=radius)
        if self.answer(entry) != tuple(answer):
            resized = {entry: distance / 2 - MARGIN}
            return _Place(entry=None, radius=distance / 2, resized=resized)
        is_far = distance > float(self.radii_N[entry])
        return _Place(entry=entry, resized={entry: distance} if is_far else {})

    def answer(self, entry: int) -> tuple[int, ...]:
        """The tokens of an entry's answer."""
        return tuple(token for token in self.labels_NL[entry].tolist() if token != NO_TOKEN)

    def _with(
        self, query_I: torch.Tensor, answer: Sequence[int], value_O: torch.Tensor, radius: float
    ) -> Codebook:
        labels_NL = self._wide_enough(answer)
        return replace(
            self,
            keys_NI=appended(self.keys_NI, query_I.detach().to(self.keys_NI)),
            values_NO=appended(self.values_NO, value_O.detach().to(self.values_NO)),
            radii_N=appended(self.radii_N, self.radii_N.new_tensor(radius)),
            labels_NL=appended(labels_NL, self._label(answer, labels_NL)),
        )

    def _wide_enough(self, answer: Sequence[int]) -> torch.Tensor:
        """The labels with columns for this answer."""
        missing = len(answer) - self.labels_NL.shape[1]
        if missing <= 0:
            return self.labels_NL
        return torch.nn.functional.pad(self.labels_NL, (0, missing), value=NO_TOKEN)

    def _label(self, answer: Sequence[int], labels_NL: torch.Tensor) -> torch.Tensor:
        row = [*answer, *[NO_TOKEN] * (labels_NL.shape[1] - len(answer))]
        return torch.tensor(row, device=labels_NL.device)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a prompt belongs: an entry, or a new one with this radius; and other radii."""

    entry: int | None
    radius: float = 0.0
    resized: Mapping[int, float] = field(default_factory=dict)


def appended(rows_NX: torch.Tensor, row_X: torch.Tensor) -> torch.Tensor:
    """(N + 1, X): the rows and one more, which no other tensor sees change.

    Rows that grew this way are the beginning of a larger tensor, whose rest is marked as free. One
    more row takes the first free place, so that N rows cost N writes, and all codebooks that an
    edit began with share the memory. If the place is taken, by another codebook that grew from the
    same rows, or if there is none, the rows are copied.
    """
    count, whole = len(rows_NX), rows_NX._base
    free = math.nan if rows_NX.is_floating_point() else FREE
    has_place = (
        whole is not None
        and whole.shape[1:] == rows_NX.shape[1:]
        and whole.data_ptr() == rows_NX.data_ptr()
        and count < len(whole)
    )
    if whole is None or not has_place or not _is_free(whole[count]):
        whole = rows_NX.new_full((count + count // 2 + LEAST_ROWS, *rows_NX.shape[1:]), free)
        whole[:count] = rows_NX
    whole[count] = row_X
    return whole[: count + 1]


def _is_free(row_X: torch.Tensor) -> bool:
    first = row_X.flatten()[:1]
    is_free = first.isnan() if first.is_floating_point() else first == FREE
    return bool(is_free.any())
