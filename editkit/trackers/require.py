"""Packages that a tracker needs."""

from __future__ import annotations

import importlib.util

from editkit.errors import OptionError, message


def require_package(package: str, *, extra: str) -> None:
    """Raises OptionError, with the command that installs it, if the package is missing."""
    if importlib.util.find_spec(package) is None:
        fix = f"pip install 'editkit[{extra}]'"
        raise OptionError([message("", f"the package {package} is not installed", fix=fix)])
