"""The model that is edited: the one object that changes, through one method, `apply`.

Outside this file every matrix is (d_out, d_in); that GPT-2's Conv1D stores the transpose is known
here alone, and by the module's type: a square matrix would not tell. A stored weight is always W_0
+ total, rounded once, with the total summed in float32. Adding small updates to a bfloat16 weight
in place loses most of them.

Shape letters: O d_out, I d_in, N any leading shape, B rows, T tokens, D width of the residual
stream, V vocabulary.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.linalg.lowrank import Update, dense, frobenius
from editkit.linalg.total import Total
from editkit.model.families import Family, Outline, check_family
from editkit.model.fingerprint import fingerprint
from editkit.model.tokens import PromptBatch, require_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROWS_AT_ONCE = {
    "cpu": 128,
    "cuda": 1024,
}  # bounds the float64 copies that the rounding error needs; on a CPU they stay in its cache


@dataclass(slots=True, eq=False)
class _Edited:
    """One matrix under edit."""

    base_OI: torch.Tensor  # W_0, in the dtype it came in; on the CPU if it was asked for there
    total: Total
    sum_OI: (
        torch.Tensor
    )  # total.dense(), kept up to date: adding it up anew would cost more with every edit
    base_frobenius: float  # |W_0|_F


class EditableModel:
    """A causal language model, its tokenizer, and the matrices of it that are being edited.

    The network is put into evaluation mode and needs no gradients of its own. Its dropout never
    runs.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        family: Family,
    ) -> None:
        """Raises ConfigError for a slow tokenizer, or a family whose names are not in the
        network.
        """
        require_offsets(tokenizer)
        self.num_layers = check_family(family, network)
        self.name = name
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.family = family
        self.fingerprint = fingerprint(network, tokenizer)
        self._edited: dict[str, _Edited] = {}
        self._is_corrected = False

    # What it is

    @property
    def device(self) -> torch.device:
        result: torch.device = next(self.network.parameters()).device
        return result

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        result: torch.dtype = next(self.network.parameters()).dtype
        return result

    @property
    def max_length(self) -> int:
        """The number of positions that the network was made for."""
        result: int = self.network.config.max_position_embeddings
        return result

    def module(self, name: str) -> torch.nn.Module:
        """A module by its dotted name. Raises ConfigError, with the nearest names, where there is
        none.
        """
        try:
            result: torch.nn.Module = self.network.get_submodule(name)
            return result
        except AttributeError:
            near = difflib.get_close_matches(
                name, [known for known, _ in self.network.named_modules()], n=3
            )
            raise ConfigError(
                f"{self.name} ({self.num_layers} layers) has no module {name!r}. Nearest: "
                f"{', '.join(near) or 'none'}."
            ) from None

    def down_projections(self, layers: Sequence[int]) -> tuple[str, ...]:
        """The MLP down projections of some layers, in the order given. Raises ConfigError for a
        layer that is not there.
        """
        return self._outline.down_projections(layers)

    def mlp_matrices(self, layers: Sequence[int]) -> tuple[str, ...]:
        """All matrices of the MLPs of some layers, in the order in which a pass reaches them.
        Raises ConfigError as `down_projections`.
        """
        names = self._outline.mlp_matrices(layers)
        for name in names:
            self.module(name)  # the names of a family of a person's own may be wrong
        return names

    @property
    def _outline(self) -> Outline:
        return Outline(name=self.name, family=self.family, num_layers=self.num_layers)

    # What it computes

    def final_hidden(self, batch: PromptBatch) -> torch.Tensor:
        """(B, T, D): the hidden states behind the final norm, before the head. Under the caller's
        grad mode.
        """
        result: torch.Tensor = self.module(self.family.base)(
            **batch.arguments, use_cache=False
        ).last_hidden_state.to(self.device)
        return result

    def hidden_to_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) in the model's dtype, from `final_hidden` at the positions that matter: logits of
        all positions are never formed.
        """
        logits_NV = self.network.get_output_embeddings()(hidden_ND).to(hidden_ND.device)
        cap = getattr(self.network.config, "final_logit_softcapping", None)  # Gemma 2
        result: torch.Tensor = logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap
        return result

    # Its weights

    def weight(self, module: str) -> torch.Tensor:
        """(O, I): the matrix as it is used, a view of what is stored. Not to be written."""
        from transformers.pytorch_utils import Conv1D

        found = self.module(module)
        if isinstance(found, Conv1D):
            return found.weight.detach().T
        if isinstance(found, torch.nn.Linear):
            return found.weight.detach()
        raise ConfigError(
            f"{module} is a {type(found).__name__} - only Linear and Conv1D hold a matrix that "
            "can be edited."
        )

    def edit(self, modules: Sequence[str], *, base_device: str | None = None) -> None:
        """Declares which matrices will be edited: keeps their W_0 and a float32 total. Declaring
        one again changes nothing.

        Args:
            base_device: where W_0 is kept; None: beside the weights.

        Raises:
            ConfigError: other modules share a matrix (tied embeddings), or its weights are
                quantised, or elsewhere until they are needed.
        """
        for name in modules:
            if name not in self._edited:
                weight_OI = self.weight(name)
                self._require_editable(name, weight_OI)
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
        """(O, I): W_0, the matrix before all edits. Not to be written."""
        return self._edited[module].base_OI if module in self._edited else self.weight(module)

    def base_frobenius(self, module: str) -> float:
        """|W_0|_F of a matrix declared by `edit`, in float64."""
        return self._declared(module).base_frobenius

    def total(self, module: str) -> Total:
        """D = W_N - W_0 as the sum of all updates."""
        return self._declared(module).total

    def totals(self) -> dict[str, Total]:
        """The totals of all edited matrices."""
        return {name: edited.total for name, edited in self._edited.items()}

    def apply(self, module: str, update: Update) -> float:
        """Adds an update (O, I) to a matrix. The only write in the program that lasts.

        Returns the rounding error ||stored - (W_0 + total)||_F / ||update||_F: what the dtype of
        the weights loses, in units of this update; 0 for an update of zeros.
        """
        if self._is_corrected:
            raise RuntimeError(
                "apply inside `temporarily`: the update would be computed on weights that are "
                "about to go."
            )
        edited = self._declared(module)
        update = update.to(device=edited.sum_OI.device)
        edited.total = edited.total.plus(update)
        if edited.total.matrix is None:
            edited.sum_OI += dense(update).to(
                torch.float32
                # the addition that Total.dense makes, in its order: a restored model has the same
                # bits
            )
        else:
            edited.sum_OI = edited.total.matrix  # never written in place from here on
        error = self._store(module, edited.sum_OI)
        size = frobenius(update)
        return error / size if size else 0.0

    def restore(self, totals: Mapping[str, Total]) -> None:
        """Sets the totals to those of an earlier run: the weights get the same bits that they had
        there.
        """
        for name, total in totals.items():
            edited = self._declared(name)
            if tuple(total.shape) != tuple(edited.base_OI.shape):
                raise ConfigError(
                    f"the saved total of {name} is {tuple(total.shape)}, the matrix is "
                    f"{tuple(edited.base_OI.shape)}: another model."
                )
            edited.total = _moved(total, edited.sum_OI.device)
            sum_OI = edited.total.dense() if edited.total.matrix is None else edited.total.matrix
            edited.sum_OI = sum_OI.to(
                self.weight(name).device
            )  # an empty total does not know its device
            self._store(name, edited.sum_OI)

    @contextlib.contextmanager
    def temporarily(self, corrections: Mapping[str, Update]) -> Iterator[None]:
        """Inside, each named matrix is W_0 + (total + correction); afterwards it has its former
        bits again, also after an error.
        """
        if self._is_corrected:
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

    def nonfinite_module(self) -> str | None:
        """The first edited matrix that holds a nan or an infinity."""
        return next(
            (name for name in self._edited if not bool(torch.isfinite(self.weight(name)).all())),
            None,
        )

    def to(self, device: torch.device | str) -> None:
        """Moves the network, and what is kept of the edited matrices."""
        self.network.to(device)
        for edited in self._edited.values():
            edited.base_OI = edited.base_OI.to(device)  # W_0 too, wherever it was
            edited.total = _moved(edited.total, device)
            edited.sum_OI = (
                edited.sum_OI.to(device) if edited.total.matrix is None else edited.total.matrix
            )

    def _declared(self, module: str) -> _Edited:
        if module not in self._edited:
            raise KeyError(
                f"{module} was not declared by `edit`. Declared: "
                f"{', '.join(self._edited) or 'none'}."
            )
        return self._edited[module]

    def _store(self, module: str, total_OI: torch.Tensor) -> float:
        """Writes round(W_0 + total), in slices of rows; returns the Frobenius norm of what the
        rounding took away.
        """
        weight_OI, base_OI = self.weight(module), self._edited[module].base_OI
        squares = torch.zeros(
            (), dtype=torch.float64, device=weight_OI.device
        )  # looked at once: each look waits for a GPU
        rows = ROWS_AT_ONCE.get(weight_OI.device.type, 1024)
        with torch.no_grad():
            for weight, base, total in zip(
                *(matrix.split(rows) for matrix in (weight_OI, base_OI, total_OI)), strict=True
            ):
                base = base.to(total.device, non_blocking=True)
                weight.copy_(base.float() + total)
                squares += (weight.double() - (base.double() + total.double())).square().sum()
        result: float = float(squares) ** 0.5
        return result

    def _require_editable(self, module: str, weight_OI: torch.Tensor) -> None:
        if weight_OI.device.type == "meta":
            raise ConfigError(
                f"{module} lies elsewhere until it is needed (offloaded) - an edit has to be "
                "written: give it a device."
            )
        if not weight_OI.is_floating_point():
            raise ConfigError(
                f"{module} holds {weight_OI.dtype} values - quantised weights cannot be edited."
            )
        storage = weight_OI.untyped_storage().data_ptr()
        sharing = [
            name
            for name, parameter in self.network.named_parameters(remove_duplicate=False)
            if parameter.untyped_storage().data_ptr() == storage and name != f"{module}.weight"
        ]
        if sharing:
            raise ConfigError(
                f"{module} shares its weights with {', '.join(sharing)}: an edit would change "
                "those too."
            )


def _moved(total: Total, device: torch.device | str) -> Total:
    matrix = None if total.matrix is None else total.matrix.to(device)
    return Total(total.shape, tuple(block.to(device=device) for block in total.blocks), matrix)
