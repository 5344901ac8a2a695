"""Knowledge anchors: the tokens of a prompt that name what it is about.

    subject    the subject of an edit that the prompt contains; of several, the longest
    entities   names by a rule on the tokens: runs of words with a capital. A single word at the
               beginning of the text counts only if there is no other (Who, The). The paper leaves
               the recognition of entities open.

Shape letters: V vocabulary, N forms of subjects, L tokens of the longest form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from editkit.lazy import torch
from editkit.model.tokens import encode, fill

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.types import EditRequest, TensorState

Kind = Literal["subject", "entities", "none"]
Ids = tuple[int, ...]
NO_TOKEN = -1  # behind the tokens of a form that is not the longest
# What a token is to the rule: no letters or digits; letters that go on with a word; a word with a
# capital, after a blank; a capital without a blank, which may be either; any other word.
OTHER, GOES_ON, BEGINS, CAPITAL, WORD = range(5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchors:
    """How anchors are found, without a tokenizer."""

    kind: Kind
    subjects_NL: torch.Tensor  # int64: the forms that are known
    kinds_V: torch.Tensor  # int8: what each token is to the rule; empty for other kinds

    @classmethod
    def of(cls, model: EditableModel, kind: Kind) -> Anchors:
        """Anchors before any edit."""
        kinds = token_kinds(model) if kind == "entities" else []
        return cls(
            kind=kind,
            subjects_NL=torch.zeros(0, 0, dtype=torch.int64),
            kinds_V=torch.tensor(kinds, dtype=torch.int8),
        )

    @classmethod
    def restored(cls, kind: Kind, state: Mapping[str, torch.Tensor]) -> Anchors:
        """The inverse of `state`."""
        return cls(kind=kind, subjects_NL=state["subjects"], kinds_V=state["kinds"])

    def state(self) -> TensorState:
        """Its tensors by name."""
        return {"subjects": self.subjects_NL, "kinds": self.kinds_V}

    def find(self, ids: Ids) -> Ids:
        """The anchor's tokens in a prompt; empty if it has none."""
        if self.kind == "subject":
            return self._subject_in(ids)
        return self._entities_in(ids) if self.kind == "entities" else ()

    def with_subjects(self, model: EditableModel, requests: Sequence[EditRequest]) -> Anchors:
        """The anchors with the subjects of these requests, in all forms that a text may have."""
        if self.kind != "subject":
            return self
        forms = list(self._forms)
        forms += [form for request in requests for form in forms_of(model, request)]
        forms = list(dict.fromkeys(forms))
        width = max(map(len, forms), default=0)
        rows = [(*form, *[NO_TOKEN] * (width - len(form))) for form in forms]
        subjects_NL = torch.tensor(rows, dtype=torch.int64, device=self.subjects_NL.device)
        return Anchors(kind=self.kind, subjects_NL=subjects_NL, kinds_V=self.kinds_V)

    @cached_property
    def _forms(self) -> dict[Ids, None]:
        rows = self.subjects_NL.tolist()
        return {tuple(token for token in row if token != NO_TOKEN): None for row in rows}

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(form) for form in self._forms}, reverse=True)

    def _subject_in(self, ids: Ids) -> Ids:
        for length in self._lengths:
            for start in range(len(ids) - length + 1):
                if (form := ids[start : start + length]) in self._forms:
                    return form
        return ()

    @cached_property
    def _kinds(self) -> list[int]:
        found: list[int] = self.kinds_V.tolist()
        return found

    def _entities_in(self, ids: Ids) -> Ids:
        kinds = [self._kinds[token] if token < len(self._kinds) else OTHER for token in ids]
        words: list[list[int]] = []  # the indices of each word with a capital
        for index, kind in enumerate(kinds):
            inside = bool(words) and words[-1][-1] == index - 1
            if inside and kind in (GOES_ON, CAPITAL):
                words[-1].append(index)
            elif kind in (BEGINS, CAPITAL):
                words.append([index])
        if len(words) > 1 and words[1][0] > words[0][-1] + 1 and not any(kinds[: words[0][0]]):
            words = words[1:]
        return tuple(ids[index] for word in words for index in word)


def forms_of(model: EditableModel, request: EditRequest) -> list[Ids]:
    """The tokens of a request's subject: in its prompt, alone, and after a blank."""
    tokenizer, subject = model.tokenizer, request.subject.strip()
    if not subject:
        return []
    filled = fill(request.prompt, request.subject)
    [encoded] = encode(tokenizer, [filled.text], chat=model.chat)
    within = tuple(
        token
        for token, (first, after) in zip(encoded.ids, encoded.spans, strict=True)
        if first < filled.subject_end and after > filled.subject_start and after > first
    )
    texts = [subject, f" {subject}"]
    alone = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [form for form in (within, *map(tuple, alone)) if form]


def token_kinds(model: EditableModel) -> list[int]:
    """What each token of the vocabulary is to the rule."""
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    kinds = []
    for token, (name, text) in enumerate(zip(names, texts, strict=True)):
        word = text.strip()
        after_blank = text.startswith(" ") or str(name).startswith(("Ġ", "▁"))
        if token in special or not word or not word[0].isalnum():
            kinds.append(OTHER)
        elif word[0].isupper():
            kinds.append(BEGINS if after_blank else CAPITAL)
        else:
            kinds.append(WORD if after_blank else GOES_ON)
    return kinds
