"""GRACE's codebook: keys with radii, and the values that take the place of a module's output.

A prompt is looked up by the module's input at its last token. All entries are compared at once: one
matrix product finds the nearest candidates, whose distances are then computed exactly, because the
product loses small distances between large vectors.

Shape letters: N entries, P or Q prompts, I and O input and output width of the module, L tokens of
the longest answer, K candidates, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from editkit.errors import message
from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts
from editkit.types import TensorState

Replaced = Literal["last", "prompt"]

CANDIDATES = 8
MARGIN = 1e-5  # between two keys of other answers that would touch (published code)
# Rounding of a key, relative to its length: another batch or a cache gives other last bits.
ROUNDING = 1e-5
NO_TOKEN = -1  # behind the tokens of an answer that is not the longest


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebook(AbstractSide):
    """Some entries beside one module."""

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

    def problems(self, shape: tuple[int, int]) -> list[str]:
        own = (self.values_NO.shape[1], self.keys_NI.shape[1])
        if own == tuple(shape):
            return []
        problem = "the codebook belongs to a module of another shape"
        return [message(self.module, problem, got=own, expected=f"shape {tuple(shape)}")]

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

    def placed(
        self, query_I: torch.Tensor, answer: Sequence[int], *, radius: float
    ) -> tuple[Codebook, int]:
        """The codebook with an entry for a prompt and its answer, and which entry that is. The
        value of a new entry is zero.

            r > radius + radius_i           a new entry (Hartvigsen et al. 2023, Algorithm 1)
            within reach, another answer    radius_i = r / 2, and a new entry of radius r / 2
            within reach, the same answer   radius_i = max(radius_i, r)

        r is the distance to the nearest key. A prompt at the key itself, to rounding, has its
        entry: a later answer takes the place of the earlier one. The published code would give the
        same prompt two entries of radius zero, neither of which rounding lets it reach.
        """
        if not len(self):
            return self._with(query_I, answer, radius)
        distances_P, entries_P = self.nearest(query_I[None])
        distance, entry = float(distances_P[0]), int(entries_P[0])
        is_same = self.answer(entry) == tuple(answer)
        if distance <= ROUNDING * float(query_I.float().norm()):
            return (self if is_same else self._relabelled(entry, answer)), entry
        if distance > radius + float(self.radii_N[entry]):
            return self._with(query_I, answer, radius)
        if not is_same:
            split = self._resized(entry, distance / 2 - MARGIN)
            return split._with(query_I, answer, distance / 2)
        if distance > float(self.radii_N[entry]):
            return self._resized(entry, distance), entry
        return self, entry

    def answer(self, entry: int) -> tuple[int, ...]:
        """The tokens of an entry's answer."""
        return tuple(token for token in self.labels_NL[entry].tolist() if token != NO_TOKEN)

    def with_value(self, entry: int, value_O: torch.Tensor) -> Codebook:
        """The codebook with another value of an entry."""
        values_NO = self.values_NO.clone()
        values_NO[entry] = value_O.detach().to(values_NO)
        return replace(self, values_NO=values_NO)

    def _with(
        self, query_I: torch.Tensor, answer: Sequence[int], radius: float
    ) -> tuple[Codebook, int]:
        key_1I = query_I.detach().to(self.keys_NI)[None]
        radius_1, value_1O = self.radii_N.new_tensor([radius]), self.values_NO.new_zeros(1, 1)
        more = replace(
            self,
            keys_NI=torch.cat([self.keys_NI, key_1I]),
            values_NO=torch.cat([self.values_NO, value_1O.expand(1, self.values_NO.shape[1])]),
            radii_N=torch.cat([self.radii_N, radius_1]),
            labels_NL=torch.cat(
                [self.labels_NL, self.labels_NL.new_full((1, self._width), NO_TOKEN)]
            ),
        )
        return more._relabelled(len(self), answer), len(self)

    @property
    def _width(self) -> int:
        return self.labels_NL.shape[1]

    def _resized(self, entry: int, radius: float) -> Codebook:
        radii_N = self.radii_N.clone()
        radii_N[entry] = radius
        return replace(self, radii_N=radii_N)

    def _relabelled(self, entry: int, answer: Sequence[int]) -> Codebook:
        width = max(self._width, len(answer))
        labels_NL = self.labels_NL.new_full((len(self), width), NO_TOKEN)
        labels_NL[:, : self._width] = self.labels_NL
        row = [*answer, *[NO_TOKEN] * (width - len(answer))]
        labels_NL[entry] = torch.tensor(row, device=labels_NL.device)
        return replace(self, labels_NL=labels_NL)
