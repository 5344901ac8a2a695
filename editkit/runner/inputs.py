"""What a run reads besides its configuration. One that goes on must find the same again: its
records would be of two runs otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editkit.errors import ConfigError

MODEL, DATASET = (
    "model",
    "dataset",
)  # names of inputs; one of second moments is `second_moment(module)`
DIGITS = 12
REMEDY = "start anew with resume=never, which removes the earlier results"


def of_dataset(provenance: Mapping[str, Any]) -> dict[str, str]:
    """A dataset's inputs, from what it says of itself in the provenance: its file, and others that
    its requests are made from.
    """
    others = {
        f"{DATASET}.{name}": str(value) for name, value in (provenance.get("variant") or {}).items()
    }
    return {DATASET: str(provenance.get("digest"))} | others


def second_moment(module: str) -> str:
    return f"stats of {module}"


def require_same(
    began_with: Mapping[str, str] | None, found: Mapping[str, str], *, source: str
) -> None:
    """Raises ConfigError for inputs that are others now, or of which the run's files do not say
    what they were.

    Args:
        began_with: digests by input, as the run's files have them; None where there is no earlier
        run. found: those of now, perhaps not of all inputs. source: where these come from, for the
        message.
    """
    if began_with is None:
        return
    problems = []
    for name, digest in found.items():
        if name not in began_with:
            problems.append(
                f"{name}: the checkpoint does not say whether the run began with {source} as it is now - it was written by an earlier "
                f"version of editkit. Finish the run with that version, or {REMEDY}."
            )
        elif began_with[name] != digest:
            before, now = began_with[name][:DIGITS], digest[:DIGITS]
            problems.append(
                f"{name}: {source} is not what the run began with (digest {before}... then, {now}... now). "
                f"Put the former back, or {REMEDY}."
            )
    if problems:
        raise ConfigError(problems)
