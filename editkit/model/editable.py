"""The model under edit. `EditableModel.apply` is the only operation that changes weights for good.

Outside `editkit.model.matrices` every matrix is (d_out, d_in). A stored weight is always
W_0 + total, rounded once, with the total summed in float32. In-place addition of small updates to
a bfloat16 weight would lose most of them.

Shape letters: O d_out, I d_in, N any leading shape, B rows, T tokens, D width of the residual
stream, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import Update, dense, frobenius
from editkit.linalg.total import Total
from editkit.model.architecture import context_length
from editkit.model.beside import Attached, Routing, routing_of
from editkit.model.chat import ChatTemplate
from editkit.model.editability import require_editable
from editkit.model.experts import expose_expert
from editkit.model.families import Family, Outline, check_family
from editkit.model.fingerprint import fingerprint
from editkit.model.head import is_matrix, own_logits
from editkit.model.history import Mark
from editkit.model.matrices import find_module, find_parameter, matrix_of, rows_of
from editkit.model.shortcuts import Shortcuts
from editkit.model.side_value import AbstractBeside
from editkit.model.texts import Reader
from editkit.model.tokens import PromptBatch, require_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Rows of a slice. It bounds the float64 copies for the rounding error, which stay in a CPU's cache.
ROWS_AT_ONCE = {"cpu": 128, "cuda": 1024}


@dataclass(slots=True, eq=False)
class _Edited:
    """One matrix under edit."""

    base_OI: torch.Tensor  # W_0 in its original dtype, on the requested device
    total: Total
    # total.dense(), updated with every edit, because a new sum would cost more with every edit
    sum_OI: torch.Tensor
    base_frobenius: float  # |W_0|_F


class EditableModel:
    """A causal language model in evaluation mode, its tokenizer, and its matrices under edit. The
    parameters need no gradients.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        family: Family,
        chat: ChatTemplate | None = None,  # how prompts are put to the model; None: as they are
    ) -> None:
        """Raises ConfigError for a slow tokenizer, or for a family whose names do not exist in the
        network.
        """
        require_offsets(tokenizer)
        expose_expert(network, family)
        self.num_layers = check_family(family, network)
        self.name, self.family = name, family
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.chat = tokenizer, chat
        self.fingerprint = fingerprint(network, tokenizer)
        self.shortcuts = Shortcuts()  # set once, by the check at the beginning of a run
        self._edited: dict[str, _Edited] = {}
        self._is_corrected = False
        self._at_base: set[str] = set()  # matrices that are W_0 for a while, without their total
        self._marks: list[Mark] = []
        self._attached = Attached(network, family.base, (), tokenizer)

    # Properties of the model

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights."""
        dtype: torch.dtype = next(self.network.parameters()).dtype
        return dtype

    @property
    def max_length(self) -> int:
        """The context length: the number of positions of the network."""
        return context_length(self.network.config.get_text_config())

    def module(self, name: str) -> torch.nn.Module:
        """The module of that dotted name. Raises ConfigError, with the nearest names, for an
        unknown one.
        """
        return find_module(self.network, name, of=f"{self.name} ({self.num_layers} layers)")

    def down_projections(self, layers: Sequence[int]) -> tuple[str, ...]:
        """The MLP down projections of the given layers, in the given order. Raises ConfigError for
        a layer that the model does not have.
        """
        return self._outline.down_projections(layers)

    def mlp_matrices(self, layers: Sequence[int]) -> tuple[str, ...]:
        """All MLP matrices of the given layers, in the order of a forward pass. Raises ConfigError
        for a layer or module that the model does not have.
        """
        names = self._outline.mlp_matrices(layers)
        for name in names:
            self.module(name)  # the names of a user's own family may be wrong
        return names

    @property
    def _outline(self) -> Outline:
        return Outline(name=self.name, family=self.family, num_layers=self.num_layers)

    # Forward passes

    def final_hidden(self, batch: PromptBatch) -> torch.Tensor:
        """(B, T, D): the hidden states after the final norm, before the head. The caller decides
        whether gradients are recorded.
        """
        with self.routed(routing_of(batch)):
            hidden_BTD: torch.Tensor = self.module(self.family.base)(
                **batch.arguments, use_cache=False
            ).last_hidden_state.to(self.device)
        return hidden_BTD

    def routed(self, routing: Routing | None) -> contextlib.AbstractContextManager[None]:
        """Passes inside take this routing of their prompts (`Attached.routed`)."""
        return self._attached.routed(routing)

    @property
    def reader(self) -> Reader:
        """What is read in place of prompts, with texts beside the weights."""
        return self._attached.reader

    def hidden_to_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) logits in the model's dtype.

        `hidden_ND` holds the rows of `final_hidden` at the positions that are read, so that logits
        of all positions are never computed.
        """
        if not self.head_is_matrix:
            return own_logits(self.network, self.module(self.family.base), hidden_ND)
        head: Any = self.network.get_output_embeddings()
        return head(hidden_ND).to(hidden_ND.device)  # type: ignore[no-any-return]

    @cached_property
    def head_is_matrix(self) -> bool:
        """Whether logits are the head's product alone: not capped (Gemma 2) or scaled (Cohere)."""
        return is_matrix(self.network, self.module(self.family.base))

    # Weights

    def weight(self, module: str) -> torch.Tensor:
        """(O, I): the current matrix, as a view of the stored weights. Callers must not
        write it.

        The name may also be that of a parameter (a bias, a norm, embeddings), as rows.
        """
        parameter = find_parameter(self.network, module)
        return matrix_of(module, self.module(module)) if parameter is None else rows_of(parameter)

    def edit(self, modules: Sequence[str], *, base_device: str | None = None) -> None:
        """Declares matrices that will be edited, and stores their W_0 and a float32 total.

        A second declaration of the same matrix has no effect.

        Args:
            base_device: the device of W_0; the device of the weights if None.

        Raises:
            ConfigError: other modules share a matrix (tied embeddings), or its weights are
                quantised or offloaded.
        """
        for name in modules:
            if name not in self._edited:
                weight_OI = self.weight(name)
                require_editable(self.network, name, weight_OI)
                zeros_OI = torch.zeros(
                    weight_OI.shape, dtype=torch.float32, device=weight_OI.device
                )
                base_OI, total = (
                    weight_OI.clone().to(base_device or weight_OI.device),
                    Total((weight_OI.shape[0], weight_OI.shape[1])),
                )
                self._edited[name] = _Edited(
                    base_OI, total, zeros_OI, base_frobenius=frobenius(weight_OI)
                )

    @property
    def edited_modules(self) -> tuple[str, ...]:
        """The matrices declared by `edit`."""
        return tuple(self._edited)

    def base(self, module: str) -> torch.Tensor:
        """(O, I): W_0, the matrix before all edits. Callers must not write it."""
        return self._edited[module].base_OI if module in self._edited else self.weight(module)

    def base_frobenius(self, module: str) -> float:
        """The Frobenius norm of W_0 of a declared matrix, in float64."""
        return self._declared(module).base_frobenius

    def total(self, module: str) -> Total:
        """D = W_N - W_0, the sum of all updates of a declared matrix."""
        return self._declared(module).total

    def totals(self) -> dict[str, Total]:
        """The totals of all declared matrices."""
        return {name: edited.total for name, edited in self._edited.items()}

    def total_times(self, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
        """D @ keys, (O, N) float32."""
        return self._declared(module).sum_OI @ keys_IN.float()

    def edited_weight(self, module: str) -> torch.Tensor:
        """(O, I): the matrix with its total, as `weight` outside `unedited`. Callers must not write
        it.
        """
        weight_OI = self.weight(module)
        if module not in self._at_base:
            return weight_OI
        sum_OI = self._edited[module].sum_OI
        return (self.base(module).to(sum_OI) + sum_OI).to(weight_OI.dtype)

    def apply(self, module: str, update: Update) -> float:
        """Adds an update (O, I) to a declared matrix. No other method changes weights for good.

        Returns the rounding error ||stored - (W_0 + total)||_F / ||update||_F, which measures the
        loss in the dtype of the weights relative to this update. It is 0 for an update of zeros.
        """
        if self._is_corrected:
            raise RuntimeError("apply inside `temporarily` would belong to temporary weights.")
        edited = self._declared(module)
        update = update.to(device=edited.sum_OI.device)
        edited.total = edited.total.plus(update)
        if edited.total.matrix is None:
            # The same addition in the same order as in Total.dense, so that a restored model has
            # the same bits.
            edited.sum_OI += dense(update).to(torch.float32)
        else:
            edited.sum_OI = edited.total.matrix  # not written in place from here on
        error = self._store(module, edited.sum_OI)
        size = frobenius(update)
        return error / size if size else 0.0

    def restore(self, totals: Mapping[str, Total]) -> None:
        """Sets the totals to saved ones. The weights get the same bits as in the saved run."""
        for name, total in totals.items():
            edited = self._declared(name)
            if tuple(total.shape) != tuple(edited.base_OI.shape):
                problem = "the saved total belongs to another model"
                got, expected = tuple(total.shape), f"shape {tuple(edited.base_OI.shape)}"
                raise ConfigError(message(name, problem, got=got, expected=expected))
            edited.total = total.to(device=edited.sum_OI.device)
            sum_OI = edited.total.dense() if edited.total.matrix is None else edited.total.matrix
            # An empty total does not know its device.
            edited.sum_OI = sum_OI.to(self.weight(name).device)
            self._store(name, edited.sum_OI)

    @contextlib.contextmanager
    def temporarily(self, corrections: Mapping[str, Update]) -> Iterator[None]:
        """Sets each named matrix to W_0 + (total + correction) inside the block.

        The former bits are restored at the end of the block, also after an error.
        """
        if self._is_corrected or self._at_base:
            raise RuntimeError("`temporarily` does not nest.")
        declared = {name: self._declared(name) for name in corrections}
        self._is_corrected = True
        try:
            for name, correction in corrections.items():
                edited = declared[name]
                self._store(name, edited.sum_OI + dense(correction).to(edited.sum_OI))
            yield
        finally:
            for name, edited in declared.items():
                self._store(name, edited.sum_OI)
            self._is_corrected = False

    @contextlib.contextmanager
    def unedited(self, modules: Collection[str]) -> Iterator[None]:
        """Sets each named matrix to W_0 inside the block. The totals stay as they are.

        `apply` ends this for its matrix, which becomes W_0 + total. At the end of the block, also
        after an error, all matrices are W_0 + total.
        """
        if self._is_corrected or self._at_base:
            raise RuntimeError("`unedited` does not nest.")
        self._at_base = {name for name in modules if not self.total(name).is_zero}
        try:
            with torch.no_grad():
                for name in self._at_base:
                    self.weight(name).copy_(self.base(name))
            yield
        finally:
            for name in tuple(self._at_base):
                self._store(name, self._edited[name].sum_OI)

    @property
    def sides(self) -> tuple[AbstractBeside, ...]:
        """What stands beside the weights."""
        return self._attached.sides

    def attach(self, *sides: AbstractBeside) -> None:
        """Puts sides beside the weights, in place of all earlier ones; none: the weights alone."""
        self._attached.detach()
        self._attached = Attached(self.network, self.family.base, sides, self.tokenizer)

    def mark(self) -> Mark:
        """Remembers the present totals and sides: the next `undo` returns to them."""
        self._marks.append(Mark.of(self.totals(), self.sides))
        return self._marks[-1]

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The edits that `undo` can take back, oldest first."""
        return tuple(self._marks)

    def undo(self) -> None:
        """Takes the last edit back: the weights have the bits from before it.

        Raises:
            ConfigError: there is no edit to take back.
        """
        if not self._marks:
            raise ConfigError(message("undo", f"{self.name} has no edit to take back"))
        self._return_to(self._marks[-1])
        self._marks.pop()

    def reset(self) -> None:
        """Takes all edits back: every matrix is W_0, and nothing stands beside them."""
        self._return_to(Mark({}))
        self._marks.clear()

    def nonfinite_module(self) -> str | None:
        """The first declared matrix with a nan or an infinity; None if all are finite."""
        return next(
            (name for name in self._edited if not bool(torch.isfinite(self.weight(name)).all())),
            None,
        )

    def to(self, device: torch.device | str) -> None:
        """Moves the network and the stored data of the declared matrices."""
        self.network.to(device)
        expose_expert(self.network, self.family)
        for edited in self._edited.values():
            edited.base_OI = edited.base_OI.to(device)
            edited.total = edited.total.to(device=device)
            edited.sum_OI = (
                edited.sum_OI.to(device) if edited.total.matrix is None else edited.total.matrix
            )
        self.attach(*(side.to(device) for side in self.sides))

    def _return_to(self, mark: Mark) -> None:
        zero = {name: Total(total.shape) for name, total in self.totals().items()}
        self.restore(zero | dict(mark.totals))
        self.attach(*mark.sides)

    def _declared(self, module: str) -> _Edited:
        if module not in self._edited:
            raise KeyError(
                f"{module} was not declared by `edit`. Declared: "
                f"{', '.join(self._edited) or 'none'}."
            )
        return self._edited[module]

    def _store(self, module: str, total_OI: torch.Tensor) -> float:
        """Writes round(W_0 + total) in slices of rows. Returns the Frobenius norm of the rounding
        error.
        """
        weight_OI, base_OI = self.weight(module), self._edited[module].base_OI
        # Read once at the end, because each read waits for a GPU.
        squares = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
        rows = ROWS_AT_ONCE.get(weight_OI.device.type, 1024)
        with torch.no_grad():
            for weight, base, total in zip(
                *(matrix.split(rows) for matrix in (weight_OI, base_OI, total_OI)), strict=True
            ):
                base = base.to(total.device, non_blocking=True)
                weight.copy_(base.float() + total)
                squares += (weight.double() - (base.double() + total.double())).square().sum()
        self._at_base.discard(module)
        norm: float = float(squares) ** 0.5
        return norm
