"""The command line of lm-evaluation-harness with a further model, `editkit`:

    python -m editkit.lm_eval run --model editkit --model_args run=FOLDER,view=prune --tasks piqa

It is the model of a run's last checkpoint, made in memory: what stands beside the weights is there
too. The harness has no entry points for models, so that `lm_eval` itself does not know this one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message, report
from editkit.evaluation.harness.catalogue import missing_harness
from editkit.lazy import torch

ARGUMENTS = ("run", "view", "step", "tokens_per_batch")
TOKENS_PER_BATCH = 4096


def from_arguments(arguments: Mapping[str, Any], *, device: str | None) -> Any:
    """The harness's model over the network of a run.

    Raises:
        ConfigError: an argument is unknown or invalid, or the run cannot be loaded.
    """
    from editkit.evaluation.harness.lm import harness_model
    from editkit.runner.export import edited_model

    problems = [
        message(f"model_args.{name}", "unknown", expected=f"one of {', '.join(ARGUMENTS)}")
        for name in arguments
        if name not in ARGUMENTS
    ]
    if not arguments.get("run"):
        fix = "--model_args run=outputs/.../seed0"
        problems.append(message("model_args.run", "not given", expected="a run's folder", fix=fix))
    numbers = {"step": None, "tokens_per_batch": TOKENS_PER_BATCH}
    for name in numbers:
        try:
            numbers[name] = int(arguments[name]) if name in arguments else numbers[name]
        except (TypeError, ValueError):
            got = arguments[name]
            problems.append(message(f"model_args.{name}", "not a number", got=got))
    if problems:
        raise ConfigError(problems)
    view = arguments.get("view")
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness's default is cuda:0
    model, _, state = edited_model(
        Path(str(arguments["run"])), view=None if view is None else str(view), device=device
    )
    if numbers["step"] not in (None, state.step):
        problem, got = "no checkpoint of this step", numbers["step"]
        expected = f"{state.step}, the newest"
        raise ConfigError(message("model_args.step", problem, got=got, expected=expected))
    return harness_model(model, tokens_per_batch=numbers["tokens_per_batch"] or TOKENS_PER_BATCH)


@functools.cache  # the registry refuses a name that it has
def register() -> None:
    """Adds the model `editkit` to the harness's registry."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string

    class EditedRun(LM):  # type: ignore[misc] # lm_eval carries no types
        """A name in the registry. The harness makes its models by these two methods."""

        @classmethod
        def create_from_arg_obj(
            cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
        ) -> Any:
            return from_arguments(arg_dict, device=(additional_config or {}).get("device"))

        @classmethod
        def create_from_arg_string(
            cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
        ) -> Any:
            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    register_model("editkit")(EditedRun)


def main() -> int:
    """Runs the harness and returns the exit code: 2 for an invalid command or data."""
    if missing := missing_harness("lm_eval"):
        report(ConfigError(missing))
        return 2
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except ConfigError as error:
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
