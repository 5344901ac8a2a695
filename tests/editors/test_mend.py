"""MEND's update against plain computations, and what the editor refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.editors.mend import Mend
from editkit.errors import ConfigError
from editkit.hypernet.abstract import Factors, name_of
from editkit.hypernet.factors import gradient_factors, joined, questions, row_updates
from editkit.hypernet.network import Hypernetwork
from editkit.hypernet.store import read_header
from editkit.linalg.lowrank import LowRank
from editkit.model.chat import ChatTemplate
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode_with_target, encode_with_targets
from editkit.types import EditRequest
from tests.support.helpers import KINDS, Kind, requests, tiny_model
from tests.support.hypernets import facts, mend, network_options, random_network, saved
from tests.support.methods import step

LASTS = ("linear", "relu")


def asked(model: EditableModel, edits: list[EditRequest]) -> Any:
    probes = [each.probe() for each in edits]
    return questions(model, encode_with_targets(model.tokenizer, probes))


def plain_loss(model: EditableModel, request: EditRequest) -> torch.Tensor:
    """-log p of the target, mean over its tokens, from the logits of the whole unpadded text."""
    sequence = encode_with_target(model.tokenizer, request.full_prompt, request.target)
    logits_TV = model.network(torch.tensor([sequence.ids])).logits[0].log_softmax(dim=-1)
    places = range(sequence.start - 1, len(sequence.ids) - 1)
    return -torch.stack(
        [logits_TV[place, token] for place, token in zip(places, sequence.target_ids, strict=True)]
    ).mean()


def plain_pairs(
    model: EditableModel, request: EditRequest, module: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """x_t and d_t of every token, from autograd on the module's output."""
    seen: dict[str, Any] = {}

    def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen["input"], seen["extra"] = args[0][0], torch.zeros_like(output, requires_grad=True)
        return output + seen["extra"]

    handle = model.module(module).register_forward_hook(hook)
    loss = plain_loss(model, request)
    handle.remove()
    (gradient_1TO,) = torch.autograd.grad(loss, [seen["extra"]])
    return list(zip(seen["input"], gradient_1TO[0], strict=True))


def plain_transform(
    network: Hypernetwork, module: str, x_I: torch.Tensor, d_O: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token through Eq. 3, written out."""
    shape = network.shapes[module]
    tensors, place = network.tensors, network.modules_of(shape).index(module)

    def part(name: str) -> torch.Tensor:
        return tensors[f"{name_of(shape)}.{name}"].double()

    deviation_Z = (part("squares") / (part("count") - 1)).sqrt() + 1e-7
    z_Z = (torch.cat([x_I, d_O]).double() - part("mean")) / deviation_Z
    for layer in (1, 2):
        inner_Z = part(f"u{layer}") @ (part(f"v{layer}") @ z_Z) + part(f"b{layer}")
        added_Z = part(f"scale{layer}")[place] * inner_Z + part(f"shift{layer}")[place]
        is_relu = layer == 1 or network.options.last == "relu"
        z_Z = z_Z + (added_Z * (added_Z > 0) if is_relu else added_Z)
    return z_Z[: len(x_I)], z_Z[len(x_I) :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_multiply_out_to_the_gradient_of_the_matrix(kind: Kind) -> None:
    model = tiny_model(kind)
    modules = model.mlp_matrices((1, 2))
    factors, log_p_B = gradient_factors(model, modules, asked(model, requests()))
    for row, request in enumerate(requests()):
        parameters: list[Any] = [model.module(module).weight.requires_grad_() for module in modules]
        loss = plain_loss(model, request)
        gradients = torch.autograd.grad(loss, parameters)
        assert float(log_p_B[row]) == pytest.approx(-loss.item(), rel=1e-4)
        for parameter, module, gradient in zip(parameters, modules, gradients, strict=True):
            parameter.requires_grad_(False)
            each = factors[module]
            found_OI = each.gradients_NO[row].T @ each.inputs_NI[row]
            torch.testing.assert_close(
                found_OI, gradient.T if kind == "gpt2" else gradient, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_dense_sum_of_transformed_gradients(
    kind: Kind, last: Any, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    network = random_network(model, last=last)
    path = saved(model, tmp_path) if last == "linear" else None
    factors, _ = gradient_factors(model, network.modules, asked(model, requests(1)))
    updates = row_updates(network, factors)
    for index, module in enumerate(network.modules):
        wanted_OI = torch.zeros(network.shapes[module], dtype=torch.float64)
        pairs = plain_pairs(model, requests(1)[0], module)[:-1]  # the last token predicts nothing
        for x_I, d_O in pairs:
            if bool((d_O != 0).any()):
                x, d = plain_transform(network, module, x_I.detach(), d_O)
                wanted_OI -= network.tensors["step_sizes"][index].double() * torch.outer(d, x)
        left_BTO, right_BTI = updates[module]
        error = float((left_BTO[0].T @ right_BTI[0] - wanted_OI).norm() / wanted_OI.norm())
        assert error < 1e-4
        if path is not None:
            editor = mend(path)
            plan = editor.plan(step(model, requests(1), ("{}",), state=editor.init(model, None)))  # type: ignore[arg-type]
            update = editor.propose(step(model, requests(1)), module, plan)  # type: ignore[arg-type]
            assert isinstance(update, LowRank)
            assert update.rank == sum(bool((d_O != 0).any()) for _, d_O in pairs)
            assert float((update.dense() - wanted_OI).norm() / wanted_OI.norm()) < 1e-4


def test_conv1d_and_linear_give_the_same_update() -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2")
    for name in other.mlp_matrices((0, 1, 2)):
        parent, _, child = name.rpartition(".")
        conv: Any = other.module(name)
        linear = torch.nn.Linear(*conv.weight.shape)
        linear.load_state_dict({"weight": conv.weight.T.contiguous(), "bias": conv.bias})
        setattr(other.module(parent), child, linear.requires_grad_(False))
    network = random_network(model)
    assert random_network(other).shapes == network.shapes
    found = [
        row_updates(network, gradient_factors(each, network.modules, asked(each, requests()))[0])
        for each in (model, other)
    ]
    for module in network.modules:
        for first, second in zip(found[0][module], found[1][module], strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


class NewMatrices(TorchDispatchMode):
    """Notes tensors of a watched shape that are no views of what was there."""

    def __init__(self, shapes: set[tuple[int, ...]], known: set[int]) -> None:
        super().__init__()
        self.shapes, self.known, self.found = shapes, known, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if (
                torch.is_tensor(each)
                and tuple(each.shape) in self.shapes
                and each.untyped_storage().data_ptr() not in self.known
            ):
                self.found.append((func, tuple(each.shape)))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_and_no_update_is_ever_formed_as_a_matrix(kind: Kind, tmp_path: Path) -> None:
    model = tiny_model(kind)
    editor = mend(saved(model, tmp_path))
    state = editor.init(model, None)  # type: ignore[arg-type]
    shapes = {tuple(model.weight(module).shape) for module in editor.modules(model)}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}
    with NewMatrices(shapes | {shape[::-1] for shape in shapes}, known) as watch:
        editor.plan(step(model, requests(), ("{}",), state=state))
    assert not watch.found


def test_planning_leaves_the_weights_alone_and_a_batch_is_the_sum_of_its_requests(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    editor = mend(saved(model, tmp_path), step_scale=0.5)
    state = editor.init(model, None)  # type: ignore[arg-type]

    def plan(edits: list[EditRequest]) -> Any:
        return editor.plan(step(model, edits, ("{}",), state=state))

    together, alone = plan(requests()), [plan([each]) for each in requests()]
    for module in editor.modules(model):
        total = sum(each.updates[module].dense() for each in alone)
        torch.testing.assert_close(together.updates[module].dense(), total, rtol=1e-3, atol=1e-5)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items()
    )
    whole = mend(editor.hypernetwork)
    other = whole.plan(step(model, requests(1), ("{}",), state=state)).updates
    for module, update in alone[0].updates.items():
        assert torch.equal(update.dense() * 2, other[module].dense())


def test_rows_of_a_batch_are_models_of_their_own_with_their_own_earlier_edits() -> None:
    model = tiny_model("gpt2")
    network = random_network(model)
    first, _ = gradient_factors(model, network.modules, asked(model, requests(2)))
    updates = row_updates(network, first)
    second, log_p_B = gradient_factors(
        model, network.modules, asked(model, requests(2)), earlier=updates
    )
    both = joined(updates, row_updates(network, second))
    for row, request in enumerate(requests(2)):
        plain = tiny_model("gpt2")
        plain.edit(network.modules)
        for module, (left, right) in updates.items():
            plain.apply(module, LowRank(left[row].T.contiguous(), right[row].T.contiguous()))
        assert float(log_p_B[row]) == pytest.approx(-float(plain_loss(plain, request)), rel=1e-4)
        wanted, _ = gradient_factors(plain, network.modules, asked(plain, [request]))
        for module, each in wanted.items():
            tokens = each.gradients_NO.shape[1]
            torch.testing.assert_close(
                second[module].gradients_NO[row, :tokens],
                each.gradients_NO[0],
                rtol=1e-3,
                atol=1e-5,
            )
            assert both[module][0].shape[1] == 2 * updates[module][0].shape[1]


def test_running_statistics_are_those_of_all_tokens_that_count() -> None:
    model = tiny_model("gpt2")
    network = random_network(model)
    zeros = {
        name: torch.zeros_like(tensor)
        for name, tensor in network.tensors.items()
        if name.rpartition(".")[2] in ("mean", "squares", "count")
    }
    network = network.with_tensors(zeros)
    parts = [
        gradient_factors(model, network.modules, asked(model, [each]))[0] for each in requests()
    ]
    for part in parts:
        network = network.observed(part)
    for shape in set(network.shapes.values()):
        rows = [
            torch.cat([part[module].inputs_NI, part[module].gradients_NO], dim=-1)[
                part[module].counts_N
            ]
            for part in parts
            for module in network.modules_of(shape)
        ]
        tokens = torch.cat(rows).double()
        assert int(network.tensors[f"{name_of(shape)}.count"]) == len(tokens)
        torch.testing.assert_close(network.tensors[f"{name_of(shape)}.mean"], tokens.mean(dim=0))
        torch.testing.assert_close(
            network.tensors[f"{name_of(shape)}.squares"] / (len(tokens) - 1), tokens.var(dim=0)
        )


def test_an_untrained_network_is_a_step_down_the_normalised_gradient() -> None:
    from editkit.hypernet.network import new_hypernetwork

    network = new_hypernetwork({"m": (3, 2)}, network_options(step_size=0.5), seed=0)
    pairs = Factors(
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    )
    left, right = network.transform("m", pairs)
    torch.testing.assert_close(left, torch.tensor([[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(right, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


def test_a_hypernetwork_of_another_model_or_of_other_layers_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    path = saved(model, tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"hypernetwork: .* was trained for another model \(got 'tiny-gpt2, fingerprint .*; expected tiny-gpt2, fing",
    ):
        mend(path).init(tiny_model("gpt2", seed=1), None)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError,
        match=r"layers: .* was trained for other matrices \(got .\[0, 2\].*; expected .*h\.1\.mlp",
    ):
        mend(path, layers=(0, 2)).init(model, None)  # type: ignore[arg-type]
    model.chat = ChatTemplate(name="own", before="<", after=">", gap="", jinja="")
    with pytest.raises(
        ConfigError, match=r"hypernetwork: .* with another chat template \(got 'own "
    ):
        mend(path).init(model, None)  # type: ignore[arg-type]


def test_a_run_goes_on_with_the_hypernetwork_that_it_began_with_alone(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    path = saved(model, tmp_path)
    state = mend(path).init(model, None)  # type: ignore[arg-type]
    saved(model, tmp_path, trained=tuple(facts(1)))
    with pytest.raises(ConfigError, match="is not the file that this run began with"):
        mend(path).plan(step(model, requests(1), ("{}",), state=state))


def config(*overrides: str) -> dict[str, Any]:
    return compose(["editor=mend", "suite=none", "tracker=none", "edits=3", *overrides]).config


def test_no_file_and_a_file_of_something_else_are_told_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as raised:
            build(config(*overrides))
        return str(raised.value)

    assert (
        "editor.hypernetwork: not set, and MEND needs a trained one. Fix: train one with `editkit train editor=mend"
        in refused("editor.hypernetwork=null")
    )
    assert "there is no file" in refused(f"editor.hypernetwork={tmp_path / 'none'}")
    (tmp_path / "wrong.safetensors").write_bytes(b"12345678 no safetensors")
    assert "is not a hypernetwork of editkit" in refused(
        f"editor.hypernetwork={tmp_path / 'wrong.safetensors'}"
    )


def test_a_run_that_edits_what_was_trained_on_is_refused_with_the_ids(tmp_path: Path) -> None:
    from editkit.datasets import world

    model = tiny_model("gpt2")
    known = world.requests(world.generate_world(0))
    path = saved(model, tmp_path, trained=known[2:9])
    with pytest.raises(
        ConfigError,
        match=r"was trained on 1 of the 3 requests to edit \(got 'world/2'\).*first 3 of its dataset",
    ):
        build(config(f"editor.hypernetwork={path}"))
    build(config(f"editor.hypernetwork={path}", "edits=2"))
    assert read_header(str(path)).leaks(known[:2], "d") == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": ()}, "layers: unusable layers .*at least one layer"),
        ({"step_scale": 0.0}, "step_scale: must be positive"),
    ],
)
def test_what_is_out_of_range_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        mend(**changes)
    assert isinstance(mend(), Mend)
