"""Whether complete work is that of the present dataset and model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from editkit.datasets.base import LoadedDataset
from editkit.model.load import ModelConfig
from editkit.runner.inputs import CHAT, MODEL, of_dataset, require_same
from editkit.runner.provenance import read_provenance, recorded_dataset


def require_unchanged(folder: Path, model: ModelConfig, data: LoadedDataset) -> None:
    """Compares dataset and model with those of the complete work in a folder. Work of earlier
    versions of editkit does not tell what it was made with, and is not compared.

    A digest of the model's files is compared first. The model is loaded only if it differs: other
    files may hold the same weights.

    Raises:
        ConfigError: the dataset or the model is another one, or the model cannot be loaded.
    """
    require_same(recorded_dataset(folder), of_dataset(data.provenance()), source=data.origin)
    recorded = read_provenance(folder).get("model") or {}
    if recorded.get("files") in (None, model.files_digest()):
        return
    now = replace(model, device_map=None).load("cpu")
    require_same(
        {MODEL: recorded["fingerprint"], CHAT: str(recorded.get("chat_template"))},
        {MODEL: now.fingerprint, CHAT: str(now.chat and now.chat.label)},
        source=model.id,
    )
