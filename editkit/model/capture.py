"""The only file that registers hooks: reading what goes into and out of modules, and adding to what
comes out.

    with torch.no_grad(), capture(model, inputs=[down_projection], outputs=[mlp]) as captured:
        model.final_hidden(batch)  # ends as soon as both are known
    captured.inputs[down_projection]  # (B, T, I)

Hooks exist inside the `with` block only. Shape letters: B rows, T tokens, O the module's output
width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What passed through, by module name; as part of the graph, if one was recorded."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a forward pass whose rest nobody wants."""

    def __init__(self, owner: Captured) -> None:
        self.owner = owner


@contextlib.contextmanager
def capture(
    model: EditableModel,
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    stop_after_last: bool = True,
) -> Iterator[Captured]:
    """Captures the first argument of the modules `inputs` and the output of the modules `outputs`.

    With `stop_after_last` the forward pass ends once everything wanted is known, and with it the
    `with` block: what follows the call in there does not run. Without, a later pass overwrites an
    earlier one. Raises RuntimeError for a module that no pass reached.
    """
    captured = Captured()
    hooked = {
        name: model.module(name) for name in (*inputs, *outputs)
    }  # names are checked before the first hook is set

    def stop_if_complete() -> None:
        if (
            stop_after_last
            and len(captured.inputs) == len(set(inputs))
            and len(captured.outputs) == len(set(outputs))
        ):
            raise _Stop(captured)

    def read_input(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.inputs[name] = (args[0] if args else next(iter(kwargs.values()))).to(
                model.device
            )
            stop_if_complete()

        return hook

    def read_output(name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            captured.outputs[name] = _tensor(output).to(model.device)
            stop_if_complete()

        return hook

    with contextlib.ExitStack() as hooks:
        for name in inputs:
            hooks.callback(
                hooked[name].register_forward_pre_hook(read_input(name), with_kwargs=True).remove
            )
        for name in outputs:
            hooks.callback(hooked[name].register_forward_hook(read_output(name)).remove)
        try:
            yield captured
        except _Stop as stop:
            if stop.owner is not captured:
                raise
    missing = [*(set(inputs) - set(captured.inputs)), *(set(outputs) - set(captured.outputs))]
    if missing:
        raise RuntimeError(f"the forward pass did not reach {', '.join(sorted(missing))}.")


@contextlib.contextmanager
def add_to_output(
    model: EditableModel, module: str, positions_B: torch.Tensor, delta_BO: torch.Tensor
) -> Iterator[None]:
    """Adds a vector to the module's output at one column a row; gradients reach `delta_BO`, which
    may also be one vector (O,) for all rows.

    `positions_B` are columns of the padded batch (`PromptBatch.columns`). Other positions keep
    their bits.
    """
    calls = 0

    def hook(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        calls += 1
        output_BTO = _tensor(output)
        rows_B = torch.arange(len(positions_B), device=output_BTO.device)
        columns_B = positions_B.to(output_BTO.device)
        moved_BTO = output_BTO.clone()  # in place would spoil the graph
        moved_BTO[rows_B, columns_B] = output_BTO[rows_B, columns_B] + delta_BO.to(output_BTO)
        return moved_BTO if torch.is_tensor(output) else (moved_BTO, *output[1:])

    handle = model.module(module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise RuntimeError(f"the forward pass did not reach {module}.")


@contextlib.contextmanager
def add_to_matrix(model: EditableModel, module: str, update_OI: torch.Tensor) -> Iterator[None]:
    """Lets a linear module compute as if its matrix were W + update; gradients reach `update_OI`,
    the weights stay as they are.
    """

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output + torch.nn.functional.linear(args[0], update_OI.to(output))

    handle = model.module(module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def add_low_rank(
    model: EditableModel, module: str, left_BRO: torch.Tensor, right_BRI: torch.Tensor
) -> Iterator[None]:
    """Lets a linear module compute, for each row b of a batch, as if its matrix were W + left_b^T
    right_b; gradients reach the factors.

    The matrix itself is never formed. A row of zeros in either factor adds nothing.
    """

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output + (args[0] @ right_BRI.to(output).mT) @ left_BRO.to(output)

    handle = model.module(module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def capture_for_gradients(model: EditableModel, modules: Sequence[str]) -> Iterator[Captured]:
    """Captures the inputs, detached, and the outputs of linear modules; the graph begins at the
    first of them, and holds no weight.

    `torch.autograd.grad(loss, outputs)` then gives each module's output gradient: with the inputs,
    the gradient of its matrix in factors. Enter it within `torch.enable_grad()`, and after
    `add_low_rank`.
    """
    captured = Captured()

    def hook_of(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            captured.inputs[name], captured.outputs[name] = args[0].detach(), output

        return hook

    with contextlib.ExitStack() as hooks:
        for name in modules:
            hooks.callback(model.module(name).register_forward_hook(hook_of(name)).remove)
        yield captured


@contextlib.contextmanager
def change_outputs(
    model: EditableModel, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Inside, what each of these modules gives is what the function makes of it; the function
    leaves what it is given as it was.
    """

    def changing(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            changed = change(_tensor(output))
            return changed if torch.is_tensor(output) else (changed, *output[1:])

        return hook

    with contextlib.ExitStack() as hooks:
        for module, change in changes.items():
            hooks.callback(model.module(module).register_forward_hook(changing(change)).remove)
        yield


def _tensor(output: Any) -> torch.Tensor:
    """Blocks return a tensor since transformers 5, a tuple that begins with it before."""
    return output if torch.is_tensor(output) else output[0]
