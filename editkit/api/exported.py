"""`editkit.load_edited`: an exported model as transformers loads it, with what stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.runner.side_files import attach_sides

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_edited(folder: str | Path, *, device: str = "cpu") -> PreTrainedModel:
    """The model of a folder that `export` wrote, as a transformers model.

    What an editor such as GRACE put beside the weights is attached to it. `generate` and a call of
    the model then give the edited answers. A row of a call without cached tokens is read as a
    prompt up to its last token; `generate` needs its cache.

    Args:
        device: where the model is put.

    Raises:
        ConfigError: the folder holds no exported model, or its files do not belong together.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        expected = "a folder that `editkit export` wrote"
        raise ConfigError(message("folder", "no model there", got=str(folder), expected=expected))
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    network.to(device)  # type: ignore[arg-type] # transformers wraps the method without its types
    attach_sides(network, AutoTokenizer.from_pretrained(place), place)
    return network
