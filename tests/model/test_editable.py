"""`EditableModel`: orientation, accumulation, restoring, temporary corrections, refused edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.linalg.total import Total
from editkit.model.editable import EditableModel
from editkit.model.families import family_of
from tests.support.helpers import KINDS, Kind, tiny_model, tiny_tokenizer


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return tiny_model(request.param)


def rank_one(model: EditableModel, module: str, *, seed: int, scale: float = 0.05) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = model.weight(module).shape
    return LowRank(
        torch.randn(rows, 1, generator=generator) * scale,
        torch.randn(columns, 1, generator=generator) / columns**0.5,
    )


def bits(model: EditableModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_weights_are_views_in_maths_orientation(model: EditableModel) -> None:
    module = model.family.down_projection(1)
    hidden = torch.randn(2, 3, model.weight(module).shape[1])
    layer = model.module(module)
    bias = 0 if getattr(layer, "bias", None) is None else layer.bias
    torch.testing.assert_close(layer(hidden), hidden @ model.weight(module).T + bias)
    assert (
        model.weight(module).untyped_storage().data_ptr()
        == layer.weight.untyped_storage().data_ptr()
    )


def test_a_square_conv1d_is_recognised_by_its_type() -> None:
    model = tiny_model("gpt2")
    square = "transformer.h.0.attn.c_proj"
    assert model.weight(square).shape == (32, 32)
    assert torch.equal(model.weight(square), model.module(square).weight.T)


def test_only_matrices_can_be_edited(model: EditableModel) -> None:
    with pytest.raises(ConfigError, match="expected Linear or Conv1D"):
        model.edit([model.family.mlp(0)])
    with pytest.raises(ConfigError, match=r"no such module\. Fix: .* nearest"):
        model.edit([f"{model.family.block(0)}.mlp.nothing"])
    with pytest.raises(ConfigError, match=r"got \[3, -1\]; expected layers 0 to 2"):
        model.down_projections([0, 3, -1])
    with pytest.raises(KeyError, match="was not declared"):
        model.apply(
            model.family.down_projection(0), LowRank(torch.zeros(32, 1), torch.zeros(128, 1))
        )


def test_an_update_changes_its_matrix_and_nothing_else(model: EditableModel) -> None:
    module = model.family.down_projection(1)
    model.edit([module])
    before = bits(model)
    update = rank_one(model, module, seed=0)
    model.apply(module, update)
    torch.testing.assert_close(model.weight(module) - model.base(module), update.dense())
    assert differing(before, bits(model)) == {f"{module}.weight"}
    assert torch.equal(
        model.base(module),
        before[f"{module}.weight"].T if "gpt2" in model.name else before[f"{module}.weight"],
    )


def test_tied_embeddings_are_refused_and_never_touched_by_an_mlp_edit() -> None:
    for kind in KINDS:
        model = tiny_model(kind, tied=True)
        module = model.family.down_projection(0)
        model.edit([module])
        embeddings = model.network.get_input_embeddings().weight.clone()
        model.apply(module, rank_one(model, module, seed=0))
        assert torch.equal(model.network.get_input_embeddings().weight, embeddings)
        assert torch.equal(model.network.get_output_embeddings().weight, embeddings)
        with pytest.raises(ConfigError, match="shares its weights"):
            model.edit(["lm_head"])
    tiny_model("llama", tied=False).edit(["lm_head"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_stored_weight_is_the_rounded_sum_and_the_rounding_error_is_reported(
    dtype: str,
) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    module = model.family.down_projection(0)
    model.edit([module])
    for seed in range(3):
        update = rank_one(model, module, seed=seed)
        error = model.apply(module, update)
        exact = model.base(module).double() + model.total(module).dense().double()
        assert torch.equal(
            model.weight(module),
            (model.base(module).float() + model.total(module).dense()).to(model.dtype),
        )
        assert error == pytest.approx(
            float(
                torch.linalg.norm(model.weight(module).double() - exact)
                / torch.linalg.norm(update.dense().double())
            ),
            rel=1e-4,
        )
    assert model.apply(module, LowRank(torch.zeros(32, 1), torch.zeros(128, 1))) == 0


def test_300_small_bfloat16_edits_lose_less_than_one_percent_of_their_sum() -> None:
    """Adding the same updates in place loses most of them."""
    model, plain = tiny_model("llama", dtype="bfloat16"), tiny_model("llama", dtype="bfloat16")
    module = model.family.down_projection(1)
    model.edit([module])
    base = model.base(module).double()
    # Far below half a unit in the last place of most entries.
    direction = rank_one(model, module, seed=0, scale=1e-4)
    for _ in range(300):
        model.apply(module, direction)
        plain.weight(module).add_(direction.dense().to(plain.dtype))
    expected_OI = 300 * direction.dense().double()

    def lost(edited: EditableModel) -> float:
        """The share of the sum that is missing in its direction. The rounding of W_0 + sum averages
        out.
        """
        return 1 - float(
            ((edited.weight(module).double() - base) * expected_OI).sum()
            / expected_OI.square().sum()
        )

    assert torch.linalg.norm(
        model.total(module).dense().double() - expected_OI
    ) < 1e-4 * torch.linalg.norm(expected_OI)
    assert abs(lost(model)) < 0.01
    assert lost(plain) > 0.3


def test_low_rank_and_dense_updates_add_up_alike(model: EditableModel) -> None:
    module = model.family.down_projection(1)
    model.edit([module])
    # More updates than the rank at which a total turns dense.
    updates = [rank_one(model, module, seed=seed) for seed in range(40)]
    for index, update in enumerate(updates):
        model.apply(module, update.dense() if index % 3 == 2 else update)
    expected = model.base(module).double() + sum(update.dense().double() for update in updates)
    torch.testing.assert_close(model.weight(module).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_updates", [0, 1, 5, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_restoring_totals_gives_the_same_bits_then_and_later(kind: Kind, num_updates: int) -> None:
    first, second = tiny_model(kind), tiny_model(kind)
    modules = [first.family.down_projection(layer) for layer in (0, 2)]
    for model in (first, second):
        model.edit(modules)
    for seed in range(num_updates):
        for module in modules:
            first.apply(module, rank_one(first, module, seed=seed))
    saved = {
        name: ({key: value.clone() for key, value in total.state().items()}, total.shape)
        for name, total in first.totals().items()
    }
    second.restore({name: Total.from_state(shape, state) for name, (state, shape) in saved.items()})
    assert not differing(bits(first), bits(second))
    for model in (first, second):  # the next edits give the same bits as well
        for module in modules:
            model.apply(module, rank_one(model, module, seed=1000))
            model.apply(module, rank_one(model, module, seed=1001))
    assert not differing(bits(first), bits(second))


def test_restoring_a_foreign_total_is_refused(model: EditableModel) -> None:
    module = model.family.down_projection(0)
    model.edit([module])
    with pytest.raises(ConfigError, match="another model"):
        model.restore({module: Total((3, 4))})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_correction_applies_inside_the_block_only(dtype: str) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    modules = [model.family.down_projection(layer) for layer in (0, 1)]
    model.edit(modules)
    for seed in range(3):
        for module in modules:
            model.apply(module, rank_one(model, module, seed=seed))
    before, totals = (
        bits(model),
        {name: total.dense().clone() for name, total in model.totals().items()},
    )
    corrections = {
        modules[0]: -LowRank(
            rank_one(model, modules[0], seed=1).left_OR,
            rank_one(model, modules[0], seed=1).right_IR,
        )
    }
    with model.temporarily(corrections):
        expected = model.base(modules[0]).float() + (
            totals[modules[0]] + corrections[modules[0]].dense()
        )
        torch.testing.assert_close(model.weight(modules[0]), expected.to(model.dtype))
        assert differing(before, bits(model)) == {f"{modules[0]}.weight"}
        with pytest.raises(RuntimeError, match="apply inside"):
            model.apply(modules[0], rank_one(model, modules[0], seed=9))
        with pytest.raises(RuntimeError, match="does not nest"), model.temporarily({}):
            pass
    assert not differing(before, bits(model))
    with pytest.raises(ZeroDivisionError), model.temporarily({modules[1]: torch.ones(32, 128)}):
        raise ZeroDivisionError
    assert not differing(before, bits(model))
    assert all(torch.equal(model.total(name).dense(), total) for name, total in totals.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_inside_unedited_a_matrix_is_w0_until_an_update_is_written(kind: Kind, dtype: str) -> None:
    model, other = tiny_model(kind, dtype=dtype), tiny_model(kind, dtype=dtype)
    modules = [model.family.down_projection(layer) for layer in (0, 1, 2)]
    for each in (model, other):
        each.edit(modules)
        for module in modules[:2]:  # nothing is written into the third
            each.apply(module, rank_one(each, module, seed=1))
    before, update = bits(model), rank_one(model, modules[0], seed=2)
    with model.unedited(modules):
        assert all(torch.equal(model.weight(name), model.base(name)) for name in modules)
        assert torch.equal(model.edited_weight(modules[0]), other.weight(modules[0]))
        for block in (model.unedited(modules), model.temporarily({})):
            with pytest.raises(RuntimeError, match="does not nest"), block:
                pass
        assert model.apply(modules[0], update) == other.apply(modules[0], update)
        assert torch.equal(model.weight(modules[0]), other.weight(modules[0]))
        assert torch.equal(model.weight(modules[1]), model.base(modules[1]))
    assert not differing(bits(other), bits(model))
    assert differing(before, bits(model)) == {f"{modules[0]}.weight"}
    with pytest.raises(ZeroDivisionError), model.unedited(modules):
        raise ZeroDivisionError
    assert not differing(bits(other), bits(model))
    keys = torch.randn(model.weight(modules[0]).shape[1], 2, dtype=torch.float64)
    total = model.total(modules[0]).dense().double()
    torch.testing.assert_close(
        model.total_times(modules[0], keys), (total @ keys).float(), rtol=1e-4, atol=1e-5
    )


def test_a_nonfinite_update_is_found_and_named(model: EditableModel) -> None:
    modules = [model.family.down_projection(layer) for layer in (0, 1)]
    model.edit(modules)
    model.edit(modules[:1])  # declaring again changes nothing
    assert model.edited_modules == tuple(modules)
    assert model.nonfinite_module() is None
    update = rank_one(model, modules[1], seed=0)
    error = model.apply(modules[1], LowRank(update.left_OR * float("nan"), update.right_IR))
    assert error != error
    assert model.nonfinite_module() == modules[1]


def test_the_fingerprint_is_the_contents() -> None:
    assert tiny_model("llama").fingerprint == tiny_model("llama").fingerprint
    others = [
        tiny_model("llama", seed=1),
        tiny_model("llama", dtype="bfloat16"),
        tiny_model("llama", bos=False),
        tiny_model("gpt2"),
    ]
    assert len({tiny_model("llama").fingerprint, *(other.fingerprint for other in others)}) == 5


def test_the_fingerprint_notices_one_changed_value_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from editkit.model import fingerprint

    # Most of a tensor lies outside the sample.
    monkeypatch.setattr(fingerprint, "SAMPLE", 64)
    model = tiny_model("gpt2")
    before = fingerprint.fingerprint(model.network, model.tokenizer)
    assert before == fingerprint.fingerprint(model.network, model.tokenizer)
    with torch.no_grad():
        model.network.transformer.h[1].mlp.c_fc.weight[17, 5] += 1e-3
    assert fingerprint.fingerprint(model.network, model.tokenizer) != before


def test_the_fingerprint_does_not_depend_on_the_last_call_of_the_tokenizer() -> None:
    from editkit.model.fingerprint import fingerprint

    model = tiny_model("llama")
    model.tokenizer.pad_token = model.tokenizer.eos_token
    model.tokenizer(["Paris", "Paris is"], padding=True, truncation=True, max_length=3)
    assert fingerprint(model.network, model.tokenizer) == model.fingerprint


def test_final_hidden_and_head_respect_gemmas_soft_cap() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer: Any = tiny_tokenizer("llama")
    config = AutoConfig.for_model(
        "gemma2",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=len(tokenizer),
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model = EditableModel(
        AutoModelForCausalLM.from_config(config),
        tokenizer,
        name="gemma",
        family=family_of("gemma2"),
    )
    hidden = torch.randn(3, 32) * 10
    logits = model.hidden_to_logits(hidden)
    assert logits.shape == (3, len(tokenizer))
    assert 0.4 < logits.abs().max() <= 0.5


@pytest.mark.gpu
def test_a_model_moves_with_the_data_of_its_edits() -> None:
    model = tiny_model("gpt2", dtype="bfloat16")
    module = model.family.down_projection(0)
    model.edit([module])
    model.apply(module, rank_one(model, module, seed=0))
    before = bits(model)
    model.to("cuda")
    update = rank_one(model, module, seed=1)
    model.apply(module, update.to(device="cuda"))
    assert model.device.type == model.total(module).dense().device.type == "cuda"
    with model.temporarily({module: -update}):  # a correction may come from elsewhere
        pass
    model.apply(module, -update)
    model.to("cpu")
    assert model.base(module).device.type == "cpu"
    torch.testing.assert_close(bits(model)[f"{module}.weight"], before[f"{module}.weight"])


def test_moving_to_the_device_it_is_on_keeps_every_bit(model: EditableModel) -> None:
    module = model.family.down_projection(0)
    model.edit([module])
    model.apply(module, rank_one(model, module, seed=0))
    before = bits(model)
    model.to("cpu")
    model.apply(module, rank_one(model, module, seed=1))
    assert differing(before, bits(model)) == {f"{module}.weight"}
