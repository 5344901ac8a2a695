"""Layerwise keys and outputs equal those of a whole pass over the current weights, whatever hidden
states were kept.
"""

from __future__ import annotations

import pytest
import torch

from editkit.model import layerwise
from editkit.model.capture import capture
from editkit.model.editable import EditableModel
from editkit.model.layerwise import LayerwiseForward
from editkit.model.tokens import pad
from tests.support.helpers import KINDS, Kind, tiny_model

LAYERS = (0, 1, 3)


def texts(count: int = 7) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(5, 60, (2 + 3 * index % 8,), generator=generator).tolist())
        for index in range(count)
    ]


def whole(model: EditableModel, layer: int, side: str) -> torch.Tensor:
    """The values at the last token, with each text run alone."""
    module = model.family.down_projection(layer) if side == "inputs" else model.family.block(layer)
    rows = []
    for ids in texts():
        with torch.no_grad(), capture(model, **{side: [module]}) as captured:  # type: ignore[arg-type]
            model.final_hidden(pad([ids]))
        rows.append(getattr(captured, side)[module][0, -1])
    return torch.stack(rows)


def write(model: EditableModel, layer: int) -> None:
    module = model.family.down_projection(layer)
    model.edit([module])
    model.apply(
        module,
        0.1
        * torch.randn(model.weight(module).shape, generator=torch.Generator().manual_seed(layer)),
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, kind: Kind) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.norm(actual - expected) <= (
        1e-6 if kind == "gptj" else 1e-12
    ) * torch.linalg.norm(expected)


@pytest.mark.parametrize("rows_at_once", [2, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_each_read_reflects_the_edits_of_the_layers_below(kind: Kind, rows_at_once: int) -> None:
    model = tiny_model(kind, dtype="float64", num_layers=5)
    forward = LayerwiseForward(model, texts(), rows_at_once=rows_at_once)
    for layer in LAYERS:
        assert_close(forward.keys(layer), whole(model, layer, "inputs"), kind)
        assert_close(forward.outputs(3), whole(model, 3, "outputs"), kind)
        assert_close(
            forward.every(2).outputs(3),
            torch.cat([part[::2] for part in whole(model, 3, "outputs").split(rows_at_once)]),
            kind,
        )
        write(model, layer)
    assert_close(forward.outputs(4), whole(model, 4, "outputs"), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_states_are_discarded_once_the_weights_below_have_changed(kind: Kind) -> None:
    model = tiny_model(kind, dtype="float64", num_layers=4)
    forward = LayerwiseForward(model, texts(), rows_at_once=100)
    forward.keys(2)
    write(model, 1)
    assert_close(forward.keys(2), whole(model, 2, "inputs"), kind)
    assert_close(forward.keys(1), whole(model, 1, "inputs"), kind)
    with model.temporarily(
        {
            model.family.down_projection(1): torch.ones_like(
                model.weight(model.family.down_projection(1))
            )
        }
    ):
        assert_close(forward.keys(2), whole(model, 2, "inputs"), kind)
    assert_close(forward.keys(2), whole(model, 2, "inputs"), kind)


def test_blocks_below_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_layers=4)
    runs = {layer: 0 for layer in range(4)}
    handles = [
        model.module(model.family.mlp(layer)).register_forward_pre_hook(
            lambda *_, layer=layer: runs.update({layer: runs[layer] + 1})
        )
        for layer in range(4)
    ]
    for kept_bytes, expected in ((1 << 30, [1, 2, 2, 1]), (0, [3, 3, 2, 1])):
        monkeypatch.setattr(layerwise, "KEPT_BYTES", kept_bytes)
        runs.update(dict.fromkeys(runs, 0))
        forward = LayerwiseForward(model, texts(), rows_at_once=100)
        for layer in (1, 2, 3):
            forward.keys(layer)
        assert list(runs.values()) == expected
    for handle in handles:
        handle.remove()
