"""The inputs of a run besides its configuration: dataset, model, second moments, evaluation data.

A resumed run must find the same inputs. Its records would otherwise come from two different runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from editkit.datasets.separators import WITH_BLANK
from editkit.errors import ConfigError, message

# names of inputs; that of second moments is `second_moment(module)`
MODEL, DATASET, CHAT, KNOWN = "model", "dataset", "model.chat_template", "known facts"
ROUTED = "requests of the expert"
DIGITS = 12
ANEW = "start anew with resume=never, which removes the earlier results"


def of_dataset(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The inputs of a dataset, from its entry in the provenance: its file, and others that its
    requests are made from.
    """
    others = {
        f"{DATASET}.{name}": str(value) for name, value in (provenance.get("variant") or {}).items()
    }
    separators = provenance.get("separators") or {}
    if set(separators) - {WITH_BLANK}:  # a blank is what every earlier version put
        others[f"{DATASET}.separators"] = json.dumps(separators, sort_keys=True)
    return {DATASET: str(provenance.get("digest"))} | others


def second_moment(module: str) -> str:
    """The name of the input for a module's second moments."""
    return f"stats of {module}"


def require_same(
    began_with: Mapping[str, str] | None, now: Mapping[str, str], *, source: str
) -> None:
    """Compares inputs with those that a run began with.

    Args:
        began_with: digests by input from the run's files; None for a new run.
        now: digests of the present inputs, not necessarily of all of them.
        source: where these inputs come from, for the message.

    Raises:
        ConfigError: an input has changed, or the run's files do not tell what it was.
    """
    if began_with is None:
        return
    problems = []
    for name, digest in now.items():
        if name not in began_with:
            problems.append(
                message(
                    name,
                    f"the checkpoint does not record whether the run began with {source} as it is "
                    "now, because an earlier version of editkit wrote it",
                    fix=f"finish the run with that version, or {ANEW}",
                )
            )
        elif began_with[name] != digest:
            problems.append(
                message(
                    name,
                    f"{source} is not what the run began with",
                    got=digest[:DIGITS],
                    expected=f"a digest that begins with {began_with[name][:DIGITS]!r}",
                    fix=f"restore the former one, or {ANEW}",
                )
            )
    if problems:
        raise ConfigError(problems)
