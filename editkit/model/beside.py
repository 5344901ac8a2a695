"""What stands beside the weights: sides at a module, texts before a prompt, and a stand-in.

A side at a module reads the module's input and changes its output. It chooses once for each prompt,
from the prompt's tokens and the module's input there. The choice holds for the tokens of this
prompt and for all that follow. A memory of texts (`editkit.model.texts`) changes the prompt itself.
A stand-in (`editkit.model.stand_in`) is another model that answers some prompts.
So each sequence is routed by itself: its batch, padding and a cache of keys and values change no
choice. An unrouted side chooses nothing: every token of every text goes through it.

Hooks of sides stay until the sides are detached. All other hooks are those of
`editkit.model.capture`.

Shape letters: B rows, T tokens (padded), P prompts, N tokens of all prompts, I and O input and
output width of a module, C numbers of a choice, X any width.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.errors import message
from editkit.lazy import torch
from editkit.model.side_value import AbstractBeside
from editkit.model.stand_in import AbstractStandIn, Head, Text, paths, widened
from editkit.model.texts import AbstractTexts, Reader

if TYPE_CHECKING:
    from editkit.model.tokens import PromptBatch

# The files of an exported folder that hold it, beside those of the model itself.
SIDE_TENSORS, SIDE_CONFIG = "editkit_side.safetensors", "editkit_side.json"
NONE = -1  # the choice of a prompt that a side leaves alone; the end of a token of padding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """Where the tokens of a pass stand."""

    ends_BT: torch.Tensor  # the column of the last token of a token's prompt; NONE: not in the pass
    columns_T: torch.Tensor

    @property
    def is_end_BT(self) -> torch.Tensor:
        """Whether a token is the last one of its prompt."""
        return self.ends_BT == self.columns_T

    @property
    def is_prompt_BT(self) -> torch.Tensor:
        """Whether a token belongs to its prompt."""
        return self.columns_T <= self.ends_BT


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """The prompts of a pass, in the order of their last tokens, as a side reads them."""

    inputs_BTI: torch.Tensor  # of the module
    ids_BT: torch.Tensor
    place: Place

    def __len__(self) -> int:
        return len(self.last_PI)

    @cached_property
    def last_PI(self) -> torch.Tensor:
        """The module's inputs at the last tokens."""
        return self.inputs_BTI[self.place.is_end_BT]

    @cached_property
    def of_BT(self) -> torch.Tensor:
        """(B, T) int64: the prompt that a token belongs to or follows; NONE for padding."""
        at_end_BT, is_end_BT = torch.full_like(self.place.ends_BT, NONE), self.place.is_end_BT
        at_end_BT[is_end_BT] = torch.arange(len(self), device=at_end_BT.device)
        of_BT = at_end_BT.gather(1, self.place.ends_BT.clamp(min=0))
        return of_BT.masked_fill(self.place.ends_BT < 0, NONE)

    @cached_property
    def of_N(self) -> torch.Tensor:
        """(N,) int64: the prompt of each token that `tokens` returns."""
        return self.tokens(self.of_BT)

    def tokens(self, values_BTX: torch.Tensor) -> torch.Tensor:
        """(N, X): values of a pass at the tokens of the prompts."""
        return values_BTX[self.place.is_prompt_BT]

    def means(self, values_NX: torch.Tensor) -> torch.Tensor:
        """(P, X) float32: the mean over the tokens of each prompt, as one matrix product."""
        own_NP = torch.nn.functional.one_hot(self.of_N, len(self)).float()
        return own_NP.T @ values_NX.float() / own_NP.sum(0)[:, None]

    def ids(self) -> list[tuple[int, ...]]:
        """The tokens of each prompt.

        Raises:
            RuntimeError: the network was called with embeddings in place of tokens.
        """
        if self.ids_BT.dim() != 2:
            raise RuntimeError("what stands beside the weights reads tokens: pass input_ids.")
        found: list[list[int]] = [[] for _ in range(len(self))]
        tokens = self.tokens(self.ids_BT).tolist()
        for prompt, token in zip(self.of_N.tolist(), tokens, strict=True):
            found[prompt].append(token)
        return [tuple(ids) for ids in found]


class AbstractSide(AbstractBeside):
    """A side at one module."""

    belongs: ClassVar[str]  # for messages: "the codebook belongs to a module"

    module: str  # whose input it reads and whose output it changes

    @property
    def place(self) -> str:
        return self.module

    @abc.abstractmethod
    def choose(self, prompts: Prompts) -> torch.Tensor:
        """(P,): what each prompt is sent to, NONE if it is left alone. Or (P, C), if more has to be
        kept of a prompt: the first number is the same.
        """

    @abc.abstractmethod
    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        """(B, T, O): the module's outputs. `outputs_BTO` itself, where nothing changes.

        Args:
            chosen_BT: the choice of each token's prompt, (B, T) or (B, T, C); NONE for padding.
        """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix beside which it fits."""

    def problems(self, shape: tuple[int, int]) -> list[str]:
        """Why it does not fit beside a matrix of this shape, (d_out, d_in)."""
        if self.shape == tuple(shape):
            return []
        problem, expected = f"{self.belongs} of another shape", f"shape {tuple(shape)}"
        return [message(self.module, problem, got=self.shape, expected=expected)]


class AbstractUnroutedSide(AbstractSide):
    """A side that every token of every text goes through, as an adapter's."""

    @abc.abstractmethod
    def changed(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """The module's outputs, of any leading shape, as those that are given."""

    def choose(self, prompts: Prompts) -> torch.Tensor:
        return torch.zeros(len(prompts), dtype=torch.long, device=prompts.ids_BT.device)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        return self.changed(inputs_BTI, outputs_BTO)


def added_at(
    outputs_BTO: torch.Tensor, where_BT: torch.Tensor, added_NO: torch.Tensor
) -> torch.Tensor:
    """The outputs with these vectors added at some tokens."""
    changed_BTO = outputs_BTO.clone()
    changed_BTO[where_BT] += added_NO.to(outputs_BTO)
    return changed_BTO


def is_routed(sides: Sequence[AbstractBeside]) -> bool:
    """Whether it matters to one of the sides where a prompt ends."""
    return not all(isinstance(side, AbstractUnroutedSide) for side in sides)


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Where the prompts of a batch of texts end, and what was chosen for them."""

    # As in `Place`; None: the pass continues texts whose prompts ran before.
    ends_BT: torch.Tensor | None
    # By place of a side, the choice of each row, which the rest of the row's text follows.
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    # What a stand-in read last of each row, which the rest of the row's text follows.
    texts: list[Text] = field(default_factory=list)

    def after(self) -> Routing:
        """The routing of further passes over the same texts, one text a row."""
        return Routing(None, self.chosen, self.texts)


class Attached:
    """Sides on a network: their hooks, and the routing of the pass that runs."""

    def __init__(
        self,
        network: torch.nn.Module,
        base: str,
        sides: Sequence[AbstractBeside] = (),
        tokenizer: Any = None,
    ) -> None:
        """Registers a hook for each side; none without sides.

        Args:
            base: the name of the network without its head, which is called with the tokens.
            tokenizer: the network's, for texts.
        """
        self.sides = tuple(sides)
        self._given: Routing | None = None
        self._routing = Routing(None)
        self._ids = torch.empty(0, 0)  # of the pass that runs
        self._handles: list[Any] = []
        module = network.get_submodule(base)
        self._tokenizer = tokenizer
        at_modules = [side for side in sides if isinstance(side, AbstractSide)]
        texts = [side for side in sides if isinstance(side, AbstractTexts)]
        stand_ins = [side for side in sides if isinstance(side, AbstractStandIn)]
        self.reader = Reader(network, tokenizer, texts, lambda ends: self.routed(Routing(ends)))
        if texts:  # first: sides read the tokens that the texts lead to
            self._handles += self.reader.hooks(module, is_stated=lambda: self._given is not None)
        if at_modules or stand_ins:
            hook = module.register_forward_pre_hook
            self._handles.append(hook(self._begin, with_kwargs=True))
        for stand_in in stand_ins[-1:]:  # the latest: logits have one place
            self._handles.append(
                # Before texts return the columns that were given.
                module.register_forward_hook(
                    self._answering(stand_in), with_kwargs=True, prepend=True
                )
            )
            head: Any = network.get_output_embeddings()  # type: ignore[operator]
            self._handles += Head(head, stand_in).handles
        for number, side in enumerate(at_modules):
            module = network.get_submodule(side.module)
            self._handles.append(module.register_forward_hook(self._changing(number, side)))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextlib.contextmanager
    def routed(self, routing: Routing | None) -> Iterator[None]:
        """Passes inside take this routing. With None, a row without cached tokens is a prompt up to
        its last token, and a row with cached tokens continues the text before.
        """
        before, self._given = self._given, routing
        try:
            yield
        finally:
            self._given = before

    def _begin(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        self._ids = batch
        if self._given is not None:
            self._routing = self._given
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self._routing = self._routing.after()
            return
        mask_BT = kwargs.get("attention_mask")
        if mask_BT is None or mask_BT.dim() != 2:
            mask_BT = torch.ones(batch.shape[:2], dtype=torch.long, device=batch.device)
        self._routing = Routing(ends_of_rows(mask_BT))

    def _changing(self, number: int, side: AbstractSide) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], output: Any) -> Any:
            values = output if torch.is_tensor(output) else output[0]
            if isinstance(side, AbstractUnroutedSide):
                changed = side.changed(args[0], values)
                return changed if torch.is_tensor(output) else (changed, *output[1:])
            inputs_BTI, outputs_BTO = self._by_row(args[0]), self._by_row(values)
            found = self._chosen(number, side, inputs_BTI)
            if found is None:
                return None
            changed_BTO = side.change(inputs_BTI, outputs_BTO, *found)
            if changed_BTO is outputs_BTO:
                return None
            changed = changed_BTO.view(values.shape)
            return changed if torch.is_tensor(output) else (changed, *output[1:])

        return hook

    def _answering(self, stand_in: AbstractStandIn) -> Any:
        def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            hidden_BTD = output.last_hidden_state
            texts = self._texts(stand_in, kwargs.get("attention_mask"))
            self._routing.texts[:] = {text.row: text for text in texts}.values()  # the last ones
            with torch.no_grad():
                wide = widened(stand_in, hidden_BTD, texts)
            if wide is hidden_BTD:
                return None
            output["last_hidden_state"] = wide
            return output

        return hook

    def _texts(self, stand_in: AbstractStandIn, mask: torch.Tensor | None) -> list[Text]:
        """The texts of the pass that runs, and what the stand-in does with each."""
        ends_BT, ids_BT = self._routing.ends_BT, self._ids
        if ends_BT is None:
            if len(self._routing.texts) != len(ids_BT):
                return []
            rows = zip(self._routing.texts, ids_BT.tolist(), strict=True)
            return [text.followed_by(ids) for text, ids in rows]
        columns_T = torch.arange(ids_BT.shape[1], device=ends_BT.device)
        place = Place(ends_BT=ends_BT, columns_T=columns_T)
        prompts = Prompts(
            inputs_BTI=ids_BT[..., None], ids_BT=ids_BT.to(ends_BT.device), place=place
        )
        asked = prompts.ids()
        answers = stand_in.answers(asked, self._tokenizer)
        attends_BTT = None if mask is None or mask.dim() != 4 else mask[:, 0].cpu() == 0
        of_BT, found = prompts.of_BT.cpu(), list[Text]()
        for number, answered in enumerate(answers):
            rows_N, columns_N = torch.where(of_BT == number)
            row, ids = int(rows_N[0]), ids_BT[int(rows_N[0])].tolist()
            attends_TT = None if attends_BTT is None else attends_BTT[row]
            found += [
                Text(answered, tuple(ids[column] for column in path), row, tuple(path))
                for path in paths(columns_N.tolist(), attends_TT)
            ]
        return found

    def _by_row(self, values: torch.Tensor) -> torch.Tensor:
        """Some networks call their MLPs with rows of tokens, (B x T, X): here (B, T, X)."""
        return values if values.dim() == 3 else values.unflatten(0, self._ids.shape[:2])

    def _chosen(
        self, number: int, side: AbstractSide, inputs_BTI: torch.Tensor
    ) -> tuple[torch.Tensor, Place] | None:
        """The choice of each token's prompt, and where the tokens stand."""
        shape, device = inputs_BTI.shape[:2], inputs_BTI.device
        columns_T, ends_BT = torch.arange(shape[1], device=device), self._routing.ends_BT
        if ends_BT is None:
            chosen_B = self._routing.chosen.get(number)
            if chosen_B is None or len(chosen_B) != shape[0]:
                return None
            ends_BT = torch.full(shape, NONE, device=device)
            chosen_BT = chosen_B[:, None].expand(*shape, *chosen_B.shape[1:])
            return chosen_BT, Place(ends_BT=ends_BT, columns_T=columns_T)
        place = Place(ends_BT=ends_BT.to(device), columns_T=columns_T)
        prompts = Prompts(inputs_BTI=inputs_BTI, ids_BT=self._ids.to(device), place=place)
        if not len(prompts):
            return None
        chosen_P, of_BT = side.choose(prompts), prompts.of_BT
        chosen_BT = chosen_P[of_BT.clamp(min=0)]
        chosen_BT[of_BT < 0] = NONE
        self._routing.chosen[number] = chosen_P[of_BT.amax(1).clamp(min=0)].detach()
        return chosen_BT, place


def ends_of_rows(mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T): the column of the last token of each row, whose text is a prompt as a whole."""
    last_B1 = mask_BT.shape[1] - 1 - mask_BT.flip(1).argmax(1, keepdim=True)
    return torch.where(mask_BT > 0, last_B1, NONE)


def routing_of(batch: PromptBatch) -> Routing | None:
    """The routing that a batch states; None if it does not say where its prompts end."""
    return None if batch.ends_BT is None else Routing(batch.ends_BT)
