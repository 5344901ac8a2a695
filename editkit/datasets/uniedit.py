"""UniEdit (Chen et al. 2025, arXiv 2505.12345): facts of 25 disciplines with chains of facts around
them. A file is an object {<sample>: {edit, generality, locality}} of one discipline.

    edit                prompt, target, subject; head_entity.id, property.id, and
                        tail_entity.value.id if tail_entity.datatype is "wikibase-item"
    generality          {"0": chain}: a question whose answer follows from the edit
    locality            {"0": chain}: a question whose answer must stay
    chain               prompt, target, path_type. "single": `paths`, the facts of the chain as
                        [from, relation, to, "f" | "b" (reversed), "s" | "m"], and `one_hops`, the
                        same with path, subject, target and ids. "double": two such chains,
                        single_path1 and single_path2, and the question whether they end equally.

The layout was read in the README of qizhou000/UniEdit and in its reader, `dataset/llm.py`, whose
criteria the kinds below are. A question belongs to several criteria there, and to the first that
holds here:

    portability         same_entity (a double chain; the answer is Yes or No), multi_hop (several
                        facts), reversed (relation reversal), alias (another name of the subject or
                        the object). What is left is a paraphrase.
    locality            forgetfulness (the edit's subject and relation), same_subject, same_object,
                        same_relation (an entity or the relation of the edit anywhere in the chain),
                        unrelated
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from editkit.datasets.base import AbstractFullPrompts
from editkit.datasets.fields import Fields, shortened
from editkit.datasets.files import AbstractRecordFiles, read_folder, read_objects
from editkit.datasets.records import Reader
from editkit.types import EditRequest, Probe

_EDITED, _REVERSED = ["h_e", "r_e", "t_e"], ["t_e", "r_e", "h_e", "b"]
_PARAPHRASE = "paraphrase"
# What the published reader appends to the question whether two chains end equally.
_YES_OR_NO = "The answer is (Yes/No):"


@dataclass(frozen=True, kw_only=True)
class UniEdit(AbstractRecordFiles, AbstractFullPrompts):
    """Facts with one question that depends on the edit and one that does not."""

    advice: ClassVar[str] = "The files: https://huggingface.co/datasets/qizhou/UniEdit"
    read: ClassVar[Reader] = functools.partial(read_folder, read=read_objects)

    path: str | None  # the file of a discipline, or a folder of such files
    hub_file: str | None  # the file in its repository; <folder>/*.json: all of a folder

    @property
    def file_on_hub(self) -> str | None:
        return self.hub_file

    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
        subject = self.subject_of(fields, "edit.subject")
        target = fields.text("edit.target")
        prompt, subject = self.located(fields, "edit.prompt", subject)
        paraphrases: list[str] = []
        portability: dict[str, tuple[Probe, ...]] = {}
        for chain in _chains(fields, "generality"):
            probe, kind = _question(chain), _generality(chain, target)
            if kind == _PARAPHRASE:
                paraphrases.append(probe.prompt)
            else:
                portability[kind] = (*portability.get(kind, ()), probe)
        locality: dict[str, tuple[Probe, ...]] = {}
        for chain in _chains(fields, "locality"):
            kind = _locality(fields, chain)
            locality[kind] = (*locality.get(kind, ()), _question(chain))
        return [
            EditRequest(
                id=f"{self.name}/{fields.get('id')}",
                prompt=prompt,
                subject=subject,
                target=target,
                paraphrases=tuple(paraphrases),
                locality=locality,
                portability=portability,
            )
        ]


def _chains(fields: Fields, key: str) -> Iterator[Fields]:
    """The chains of a record."""
    if fields.get(key) is None:
        fields.note(key, "is missing", expected="an object of chains")
    for name in fields.names(key):
        yield fields.part(f"{key}.{name}")


def _question(chain: Fields) -> Probe:
    prompt = chain.text("prompt")
    if chain.get("path_type") == "double":
        prompt = f"{prompt} {_YES_OR_NO}"
    return Probe(prompt=prompt, answer=chain.text("target"))


def _singles(chain: Fields) -> list[Fields]:
    """The single chains: the chain itself, or the two of a double one."""
    match kind := chain.get("path_type"):
        case "single":
            return [chain]
        case "double":
            return [chain.part("single_path1"), chain.part("single_path2")]
    chain.note("path_type", "is no kind of chain", got=shortened(kind), expected="single or double")
    return []


def _generality(chain: Fields, target: str) -> str:
    """The kind of a question whose answer follows from the edit."""
    singles = _singles(chain)
    paths = [path for single in singles for path in single.lists("paths")]
    hops = [hop for single in singles for hop in single.parts("one_hops")]
    if chain.get("path_type") == "double":
        return "same_entity"
    if len(paths) > 1:
        return "multi_hop"
    if any(path[:4] == _REVERSED for path in paths):
        return "reversed"
    return "alias" if _has_alias(chain, hops, target) else _PARAPHRASE


def _has_alias(chain: Fields, hops: list[Fields], target: str) -> bool:
    """Whether the subject or the object of the edited fact has another name in its question."""
    edited = [hop for hop in hops if hop.get("path") == _EDITED]
    return chain.text("target") != target or any(
        hop.get("subject") != hop.get("head_entity.label") and hop.get("head_entity.aliases") != []
        for hop in edited
    )


def _locality(fields: Fields, chain: Fields) -> str:
    """The kind of a question whose answer must stay, by what its chain shares with the edit."""
    hops = [hop for single in _singles(chain) for hop in single.parts("one_hops")]
    head, relation = fields.text("edit.head_entity.id"), fields.text("edit.property.id")
    tail = _tail(fields, "edit.")
    heads = [hop.text("head_entity.id") for hop in hops]
    relations = [hop.text("property.id") for hop in hops]
    entities = {*heads, *(_tail(hop, "") for hop in hops)}
    if (head, relation) in zip(heads, relations, strict=True):
        return "forgetfulness"
    if head in entities:
        return "same_subject"
    if tail is not None and tail in entities:
        return "same_object"
    return "same_relation" if relation in relations else "unrelated"


def _tail(fields: Fields, prefix: str) -> str | None:
    """The id of the object, if it is an entity."""
    if fields.text(f"{prefix}tail_entity.datatype") != "wikibase-item":
        return None
    return fields.text(f"{prefix}tail_entity.value.id")
