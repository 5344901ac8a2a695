"""Composes configurations inside a Python process without changing its global state."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

from editkit.config.compose import Composed
from editkit.config.explain import composed
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.runner.checkpoint import generator_states, restore_generators

LITERALS = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as other values


def composed_apart(overrides: Sequence[str]) -> Composed:
    """The configuration of these overrides, also inside an application of Hydra.

    Raises:
        ConfigError: the overrides cannot be composed.
    """
    with _own_hydra():
        return composed(overrides, None)


def override(key: str, value: object) -> str:
    """`key=value` in Hydra's grammar."""
    return f"{key}={_literal(key, value)}"


def _literal(key: str, value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_literal(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        items = (f"{name}:{_literal(key, item)}" for name, item in value.items())
        return f"{{{','.join(items)}}}"
    text = str(value)
    if re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in LITERALS:
        return text
    # Inside quotes, Hydra takes a backslash literally unless a quote follows.
    if "'" not in text and not text.endswith("\\"):
        return f"'{text}'"
    if '"' not in text and not text.endswith("\\"):
        return f'"{text}"'
    raise ConfigError(message(key, "the text cannot be quoted for Hydra", got=value))


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """A caller may be a Hydra application itself; its global state is put back afterwards."""
    from hydra.core.global_hydra import GlobalHydra

    former = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = former


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Puts torch's global generators back afterwards."""
    former = generator_states()
    try:
        yield
    finally:
        restore_generators(former)


@contextlib.contextmanager
def kept_threads() -> Iterator[None]:
    """Puts torch's number of threads back afterwards."""
    former = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(former)
