"""What tests of MEND share: options, hypernetworks with random weights, data to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from editkit.editors.mend import Mend
from editkit.hypernet.learner import MendLearning
from editkit.hypernet.network import Hypernetwork, NetworkOptions, new_hypernetwork
from editkit.hypernet.options import TrainingOptions
from editkit.hypernet.store import Header, read_header, read_tensors, save_hypernetwork
from editkit.model.editable import EditableModel
from editkit.types import EditRequest, Probe

LAYERS = (1, 2)
NAMES = ("Ann", "Bea", "Cleo", "Dora", "Eve", "Fay", "Gil", "Hal", "Ida", "Jan", "Kim", "Lea")
OPTIONS: dict[str, Any] = {
    "steps": 4,
    "lr": 1e-3,
    "lr_step_sizes": 1e-3,
    "edit_weight": 0.1,
    "locality_weight": 1.0,
    "accumulate": 2,
    "at_once": 2,
    "clip": 1e9,
    "validate_every": 2,
    "patience": 100,
    "validation": 2,
    "held_apart": 3,
    "locality_texts": 2,
    "sequence": 1,
}


def network_options(**changes: Any) -> NetworkOptions:
    fields: dict[str, Any] = {"rank": 6, "step_size": 1e-3, "last": "linear"} | changes
    return NetworkOptions(**fields)


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**OPTIONS | changes)


def mend(path: Path | str | None = None, **changes: Any) -> Mend:
    fields: dict[str, Any] = {
        "name": "mend",
        "layers": LAYERS,
        "hypernetwork": None if path is None else str(path),
        "step_scale": 1.0,
        "network": network_options(),
        "train": options(),
    }
    return Mend(**fields | changes)


def random_network(
    model: EditableModel, *, layers: tuple[int, ...] = LAYERS, last: Any = "linear", seed: int = 0
) -> Hypernetwork:
    """Every tensor random, as after some training; its statistics are those of many tokens."""
    shapes = {
        name: (model.weight(name).shape[0], model.weight(name).shape[1])
        for name in model.mlp_matrices(layers)
    }
    network = new_hypernetwork(shapes, network_options(last=last), seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        kind = name.rpartition(".")[2]
        if kind == "count":
            return torch.full_like(tensor, 1e12)  # a step's tokens change next to nothing
        if kind == "squares":
            return 1e12 * (0.1 + noise.square()) * 0.01
        return tensor + 0.1 * noise if kind != "step_sizes" else tensor + 1e-4 * noise

    return network.with_tensors(
        {name: drawn(name, tensor) for name, tensor in network.tensors.items()}
    )


def saved(
    model: EditableModel,
    folder: Path,
    *,
    layers: tuple[int, ...] = LAYERS,
    trained: tuple[EditRequest, ...] = (),
) -> Path:
    """A random hypernetwork's file."""
    path = folder / "hypernetwork.safetensors"
    network = random_network(model, layers=layers)
    save_hypernetwork(
        path,
        network,
        model=model.name,
        fingerprint=model.fingerprint,
        dataset="d",
        trained=trained,
        facts={"held_apart": 3},
    )
    return path


def load_hypernetwork(path: str) -> tuple[Hypernetwork, Header]:
    """The hypernetwork in a file of MEND, and its header."""
    header = read_header(path)
    return mend().stored_network(header, read_tensors(path)), header


def facts(count: int = 12, **changes: Any) -> list[EditRequest]:
    """Small requests, each with two paraphrases and two neighbours."""
    made = []
    for index, name in enumerate(NAMES[:count]):
        other = NAMES[(index + 1) % len(NAMES)]
        fields: dict[str, Any] = {
            "id": f"fact/{index}",
            "prompt": "{} lives in",
            "subject": name,
            "target": ("Paris", "Rome", "Seattle")[index % 3],
            "target_old": "France",
            "paraphrases": (f"The home of {name} is", f"The city of {name} is"),
            "neighbours": (
                Probe(prompt=f"{other} plays the", answer="guitar"),
                Probe(prompt=f"{other} speaks", answer="French"),
            ),
        }
        made.append(EditRequest(**fields | changes))
    return made


def learning(
    model: EditableModel, *, network: Hypernetwork | None = None, **changes: Any
) -> MendLearning:
    from editkit.hypernet.examples import split

    chosen = options(**changes)
    divided = split(
        facts(),
        held_apart=chosen.held_apart,
        validation=chosen.validation,
        least=chosen.accumulate,
        seed=0,
    )
    return MendLearning(
        model=model,
        network=network or random_network(model),
        split=divided,
        options=chosen,
        seed=0,
        checkpoint_every=1,
    )
