"""What trained editors share: the file of the training, and what it may not be used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.files import file_digest
from editkit.hypernet.store import SHOWN, Kind, read_header, read_tensors, resolve
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.hypernet.store import Header
    from editkit.model.editable import EditableModel


def header_problems(path: str, kind: Kind) -> list[str]:
    """Why the file's header cannot be read."""
    try:
        read_header(path, kind)
    except OptionError as error:
        return list(error.problems)
    return []


def request_problems(
    path: str, kind: Kind, data: LoadedDataset, requests: Sequence[EditRequest]
) -> list[str]:
    """Why a readable file may not be used for these edits of a dataset: it is damaged, or was
    trained on some of them, or with other text between prompt and target.
    """
    try:
        read_tensors(path, kind)
    except OptionError as error:
        return list(error.problems)
    header = read_header(path, kind)
    return [
        *_leak(path, kind, header, data, requests),
        *_other_separators(path, kind, header, requests),
    ]


def _leak(
    path: str, kind: Kind, header: Header, data: LoadedDataset, requests: Sequence[EditRequest]
) -> list[str]:
    leaks = header.leaks(requests, data.digest)
    if not leaks:
        return []
    shown = ", ".join(leaks[:SHOWN]) + (", ..." if len(leaks) > SHOWN else "")
    held_out = header.facts.get("held_apart")
    kept = f"the first {held_out} of its dataset were held out; " if held_out else ""
    return [
        message(
            kind.key,
            f"{path} was trained on {len(leaks)} of the {len(requests)} requests to edit",
            got=shown,
            fix=f"{kept}edit other requests (edits, dataset.order, dataset.limit), or train "
            "one with editor.train.held_apart",
        )
    ]


def _other_separators(
    path: str, kind: Kind, header: Header, requests: Sequence[EditRequest]
) -> list[str]:
    others = header.other_separators(requests)
    if not others:
        return []
    return [
        message(
            kind.key,
            f"{path} was trained with other text between prompt and target",
            got=sorted(others),
            expected=" or ".join(map(repr, sorted(header.separators))),
            fix="set dataset.separator as in the training, or train one with this text",
        )
    ]


def trained_provenance(path: str | None, kind: Kind) -> Mapping[str, object]:
    """The file's digest, and the facts of its header."""
    if path is None:
        return {}
    header = read_header(path, kind)
    digest = file_digest(resolve(path, kind))
    return {kind.key: {"file": path, "digest": digest, **header.facts}}


def changed_problem(path: str, kind: Kind, *, now: str, then: str) -> str:
    """The message for a run that began with another file."""
    return message(
        kind.key,
        f"{path} is not the file that this run began with",
        got=f"SHA-256 {now[:12]}...",
        expected=f"{then[:12]}...",
        fix="restore that file, or start anew with resume=never",
    )


def model_problems(path: str, kind: Kind, header: Header, model: EditableModel) -> list[str]:
    """Why the file does not belong to a model."""
    if header.fingerprint == model.fingerprint:
        return []
    return [
        message(
            kind.key,
            f"{path} was trained for another model",
            got=f"{model.name}, fingerprint {model.fingerprint[:12]}...",
            expected=f"{header.model}, fingerprint {header.fingerprint[:12]}...",
            fix=f"train one with `editkit train editor={kind.editor} model=...`",
        )
    ]
