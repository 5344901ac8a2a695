"""Batched generation with a key-value cache: greedy decoding or seeded sampling.

transformers' sampling draws all rows from one generator, so a prompt's continuation would depend on
its neighbours in the batch. This loop gives each prompt its own draws. It ignores the sampling
settings in a checkpoint's generation_config, but respects its end-of-sequence ids.

Shape letters: B rows, T tokens, V vocabulary, N prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.continuation import continuation
from editkit.model.tokens import encode_prompts

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def generate(
    model: EditableModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    top_k: int | None = None,
    banned: Collection[int] = (),
    ends: Collection[int] | None = None,
    until: Sequence[str] = (),
    batch_size: int = 32,
) -> list[tuple[int, ...]]:
    """The new token ids of each prompt, without the token that ended the row.

    A row also ends once its text contains one of `until`, or at the context length. Texts beside
    the weights stand before the prompts.

    Args:
        generator: a CPU generator for sampling; greedy decoding if None. The batch size does not
            change the draws.
        top_k: sample from this many most probable tokens; from all if None.
        banned: ids that are never generated.
        ends: ids that end a row; `end_ids(model)` if None.
        until: texts that end a row. They stay in it.

    Raises:
        ValueError: a prompt is empty or as long as the context length.
    """
    if wrong := [len(ids) for ids in prompts if not 0 < len(ids) < model.max_length]:
        raise ValueError(
            f"prompts of {wrong[:3]} tokens cannot be continued: {model.name} has "
            f"{model.max_length} positions."
        )
    prompts = model.reader.prompted(prompts, longest=max(1, model.max_length - max_new_tokens))
    # All draws are made first, so that a prompt's draws do not depend on the device, its batch, or
    # the steps at which other rows end.
    draws_NT = (
        None
        if generator is None
        else torch.rand(len(prompts), max_new_tokens, generator=generator, dtype=torch.float64)
    )
    stops = torch.tensor(
        sorted(end_ids(model) if ends is None else ends), dtype=torch.long, device=model.device
    )
    stop_texts = _StopTexts(model, until) if until else None
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    new_ids: dict[int, tuple[int, ...]] = {}
    for first in range(0, len(by_length), batch_size):
        chosen = by_length[first : first + batch_size]
        choose = _Choice(
            top_k, sorted(banned), None if draws_NT is None else draws_NT[chosen].to(model.device)
        )
        rows = [prompts[index] for index in chosen]
        new = _continue(model, rows, max_new_tokens, choose, stops, stop_texts)
        new_ids.update(zip(chosen, new, strict=True))
    return [new_ids[index] for index in range(len(prompts))]


def generate_texts(
    model: EditableModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    top_k: int | None = None,
    batch_size: int = 32,
) -> list[str]:
    """`generate` for texts: each prompt's continuation without the prompt and special tokens."""
    ids = encode_prompts(model.tokenizer, prompts, chat=model.chat)
    rows = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        generator=generator,
        top_k=top_k,
        batch_size=batch_size,
    )
    return decode(model, rows)


def decode(model: EditableModel, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of ids, without special tokens and without clean-up of blanks."""
    return [
        str(
            model.tokenizer.decode(
                list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        for row in rows
    ]


def end_ids(model: EditableModel) -> frozenset[int]:
    """The ids that end a text: the tokenizer's EOS and those of the checkpoint's generation_config,
    for example a chat model's end of turn.
    """
    settings = model.network.generation_config
    declared = getattr(settings, "eos_token_id", None)
    listed = declared if isinstance(declared, list) else [declared]
    return frozenset(
        int(token) for token in (model.tokenizer.eos_token_id, *listed) if token is not None
    )


class _Choice:
    """Chooses the next token: the most probable one, or by each row's own draws in [0, 1)."""

    def __init__(
        self, top_k: int | None, banned: Sequence[int], draws_BT: torch.Tensor | None
    ) -> None:
        self.top_k, self.banned, self.draws_BT = top_k, list(banned), draws_BT

    def __call__(self, logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        """The token ids, (B,)."""
        logits_BV = logits_BV.float()
        logits_BV[:, self.banned] = -torch.inf
        if self.draws_BT is None:
            return logits_BV.argmax(-1)
        values_BK, ids_BK = logits_BV.topk(
            min(self.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
        )
        reached_BK = values_BK.double().softmax(-1).cumsum(-1)
        place_B1 = (reached_BK <= self.draws_BT[:, step, None] * reached_BK[:, -1:]).sum(
            -1, keepdim=True
        )
        return ids_BK.gather(-1, place_B1.clamp(max=ids_BK.shape[-1] - 1)).squeeze(-1)


class _StopTexts:
    """Finds the rows that contain a text that ends them.

    A row is decoded only if its last token could be the end of such a text.
    """

    def __init__(self, model: EditableModel, texts: Sequence[str]) -> None:
        self.model, self.texts = model, texts
        # The replacement character stands for a part of a character, which may complete a text.
        self.last = {text[-1] for text in texts} | {"\ufffd"}
        self.could_end: dict[int, bool] = {}  # by token

    def __call__(self, steps: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B,): whether a row contains one of the texts.

        `steps` holds the tokens (B,) of all steps, with -1 after a row's end.
        """
        ended = [token >= 0 and self._could_end(token) for token in steps[-1].tolist()]
        if any(ended):
            rows = torch.stack(list(steps), dim=1).tolist()
            texts = decode(
                self.model, [row if may else [] for row, may in zip(rows, ended, strict=True)]
            )
            ended = [any(stop in text for stop in self.texts) for text in texts]
        return torch.tensor(ended, device=steps[-1].device)

    def _could_end(self, token: int) -> bool:
        if token not in self.could_end:
            self.could_end[token] = not self.last.isdisjoint(decode(self.model, [[token]])[0])
        return self.could_end[token]


def _continue(
    model: EditableModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: _Choice,
    stops: torch.Tensor,
    stop_texts: _StopTexts | None,
) -> list[tuple[int, ...]]:
    """Continues one batch. Finished rows get padding tokens until all rows are done."""
    text, steps = continuation(model, rows), []
    length_B = torch.tensor([len(row) for row in rows], device=model.device)
    done_B = torch.zeros_like(length_B, dtype=torch.bool)
    with torch.inference_mode():
        for step in range(max_new_tokens):
            token_B = choose(model.hidden_to_logits(text.last_hidden()), step)
            done_B = done_B | torch.isin(token_B, stops) | (length_B >= model.max_length)
            steps.append(torch.where(done_B, -1, token_B))
            if stop_texts is not None:
                done_B = done_B | stop_texts(steps)
            if bool(done_B.all()):
                break
            text.append(token_B, done_B)
            length_B = length_B + 1
    return (
        [tuple(token for token in row if token >= 0) for row in torch.stack(steps, dim=1).tolist()]
        if steps
        else [()] * len(done_B)
    )
