"""The bundled world as a dataset: nothing to download, and known to the bundled models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from editkit.datasets import world
from editkit.datasets.base import AbstractDataset, LoadedDataset, Order, arrange


@dataclass(frozen=True, kw_only=True)
class WorldDataset(AbstractDataset):
    """Requests about the invented people of a generated world."""

    name: str
    world_seed: int  # the bundled models know the world of seed 0
    order: Order
    limit: int | None

    def load(self, seed: int) -> LoadedDataset:
        requests = list(world.requests(world.generate_world(self.world_seed)))
        content = json.dumps(
            [dataclasses.asdict(request) for request in requests],
            sort_keys=True,
            ensure_ascii=False,
        )
        return LoadedDataset(
            name=self.name,
            requests=arrange(requests, order=self.order, seed=seed, limit=self.limit),
            digest=hashlib.sha256(content.encode()).hexdigest(),
            origin=f"generated world of seed {self.world_seed}",
        )
