"""Hooks on modules: reading their inputs and outputs, and changing their outputs. Other
files that register hooks are those of sides, whose hooks stay, and `editkit.model.path_passes`.

    with torch.no_grad(), capture(model, inputs=[down_projection], outputs=[mlp]) as captured:
        model.final_hidden(batch)  # stops once both tensors are captured
    captured.inputs[down_projection]  # (B, T, I)

Hooks exist only inside the `with` block. Some networks call their MLPs with rows of tokens,
(B x T, X): OPT, and the experts that all tokens share. Hooks see these as (B, T, X).

Shape letters: B rows, T tokens, R rank, I and O input and output width of a module.
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
    """Inputs and outputs by module name. They are part of the graph if one was recorded."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a forward pass whose remaining results are not needed."""

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

    Args:
        stop_after_last: end the forward pass once all tensors are captured. This also ends the
            `with` block, so statements after the call do not run. If false, a later pass overwrites
            the tensors of an earlier one.

    Raises:
        RuntimeError: no pass reached one of the modules.
    """
    captured, shape = Captured(), _Shape(model)
    # Looking up all names first raises an error before the first hook is registered.
    hooked = {name: model.module(name) for name in (*inputs, *outputs)}

    def stop_if_complete() -> None:
        if (
            stop_after_last
            and len(captured.inputs) == len(set(inputs))
            and len(captured.outputs) == len(set(outputs))
        ):
            raise _Stop(captured)

    def read_input(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.inputs[name] = shape.by_row(args[0] if args else next(iter(kwargs.values())))
            stop_if_complete()

        return hook

    def read_output(name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            captured.outputs[name] = shape.by_row(_tensor(output))
            stop_if_complete()
            # The rest of the pass may write into the output, as Falcon's blocks do.
            captured.outputs[name] = captured.outputs[name].clone()

        return hook

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(shape.noted())
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
    for tensors in (captured.inputs, captured.outputs):
        tensors.update({name: values.to(model.device) for name, values in tensors.items()})
    missing = [*(set(inputs) - set(captured.inputs)), *(set(outputs) - set(captured.outputs))]
    if missing:
        raise RuntimeError(f"the forward pass did not reach {', '.join(sorted(missing))}.")


@contextlib.contextmanager
def capture_arguments(
    model: EditableModel, modules: Sequence[str]
) -> Iterator[dict[str, tuple[Any, ...]]]:
    """All positional arguments of the modules, as they get them."""
    captured: dict[str, tuple[Any, ...]] = {}

    def reading(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            captured[name] = args

        return hook

    with contextlib.ExitStack() as hooks:
        for name in modules:
            hooks.callback(model.module(name).register_forward_pre_hook(reading(name)).remove)
        yield captured


@contextlib.contextmanager
def add_to_output(
    model: EditableModel, module: str, positions_B: torch.Tensor, delta_BO: torch.Tensor
) -> Iterator[None]:
    """Adds a vector to the module's output at one column of each row. Other columns keep their
    bits.

    Args:
        positions_B: columns of the padded batch (`PromptBatch.columns`).
        delta_BO: the vectors, or one vector (O,) for all rows. Gradients flow into it.
    """
    calls, shape = 0, _Shape(model)

    def hook(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        calls += 1
        output_BTO = shape.by_row(_tensor(output))
        rows_B = torch.arange(len(positions_B), device=output_BTO.device)
        columns_B = positions_B.to(output_BTO.device)
        moved_BTO = output_BTO.clone()  # an in-place change would invalidate the graph
        moved_BTO[rows_B, columns_B] = output_BTO[rows_B, columns_B] + delta_BO.to(output_BTO)
        moved_BTO = moved_BTO.view(_tensor(output).shape)
        return moved_BTO if torch.is_tensor(output) else (moved_BTO, *output[1:])

    handle = model.module(module).register_forward_hook(hook)
    try:
        with shape.noted():
            yield
    finally:
        handle.remove()
    if not calls:
        raise RuntimeError(f"the forward pass did not reach {module}.")


@contextlib.contextmanager
def add_to_matrix(model: EditableModel, module: str, update_OI: torch.Tensor) -> Iterator[None]:
    """Makes a linear module compute with the matrix W + update.

    Gradients flow into `update_OI`. The stored weights do not change.
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
    """Makes a linear module compute with the matrix W + left_b^T right_b for each row b of a batch.

    The matrix is never formed, and gradients flow into the factors. A zero row in either factor
    adds nothing.
    """

    shape = _Shape(model)

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        inputs_BTI = shape.by_row(args[0])
        added_BTO = (inputs_BTI @ right_BRI.to(output).mT) @ left_BRO.to(output)
        return output + added_BTO.view(output.shape)

    handle = model.module(module).register_forward_hook(hook)
    try:
        with shape.noted():
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced_input(module: torch.nn.Module, hidden_BTD: torch.Tensor) -> Iterator[None]:
    """Calls the module with this tensor in place of its first argument. Gradients flow into it."""

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden_BTD, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): hidden_BTD}

    # Before other hooks, which see the replacement.
    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def capture_for_gradients(model: EditableModel, modules: Sequence[str]) -> Iterator[Captured]:
    """Captures the detached inputs and the outputs of linear modules.

    The graph begins at the first of the modules and contains no weight. `torch.autograd.grad(loss,
    outputs)` then gives the output gradient of each module. Together with the inputs it is the
    gradient of the module's matrix in factors. Enter this context inside `torch.enable_grad()` and
    after `add_low_rank`.
    """
    captured, shape = Captured(), _Shape(model)

    def hook_of(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not output.requires_grad:
                output.requires_grad_()
            captured.inputs[name] = shape.by_row(args[0]).detach()
            captured.outputs[name] = shape.by_row(output)
            # A copy, because the network may write into it (Falcon).
            return captured.outputs[name].clone().view(output.shape)

        return hook

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(shape.noted())
        for name in modules:
            hooks.callback(model.module(name).register_forward_hook(hook_of(name)).remove)
        yield captured


@contextlib.contextmanager
def change_outputs(
    model: EditableModel, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Replaces the output of each module by the result of its function, which must not modify its
    argument.
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


class _Shape:
    """The rows and columns (B, T) of the batch that the base network is called with."""

    def __init__(self, model: EditableModel) -> None:
        self._base = model.module(model.family.base)
        self._shape = torch.Size()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the shape of every batch."""

        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
            self._shape = batch.shape[:2]

        handle = self._base.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of tokens, (B x T, X), as (B, T, X). Some of the tokens, (M, X), as (1, M, X)."""
        if values.dim() != 2:
            return values
        is_whole = len(values) == self._shape.numel()
        rows: torch.Tensor = values.unflatten(0, self._shape) if is_whole else values[None]
        return rows


def _tensor(output: Any) -> torch.Tensor:
    """The hidden states of a block's output: a tensor since transformers 5, before that a tuple
    whose first element is the tensor.
    """
    return output if torch.is_tensor(output) else output[0]
