"""lm-evaluation-harness on the model that is being edited: an HFLM over the same network.

The HFLM shares the network and with it every edit. It loads and copies nothing, and does not use
the harness's request cache, whose key does not cover the weights. Three things differ from a plain
HFLM. Texts are tokenised once. Continuations are scored by
`editkit.evaluation.scoring.teacher_forcing`, which computes only the logits that it needs.
Generations come from `editkit.model.generate` and are greedy, whatever the generation_config of a
checkpoint says. Both are batched by tokens, and padding changes no result. The results are those of
a plain HFLM.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.errors import message
from editkit.evaluation.harness.catalogue import no_room
from editkit.evaluation.scoring.teacher_forcing import score_sequences
from editkit.evaluation.tasks.data import MAX_SHOWN
from editkit.model.generate import generate
from editkit.model.tokens import Encoded, TargetSequence

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

NO_LIMIT = 10**30  # as in transformers
ROWS_OF_A_GENERATION = 64  # more rows gain little, and all of them wait for the longest


def harness_model(
    model: EditableModel, *, tokens_per_batch: int, max_new_tokens: int | None = None
) -> Any:
    """The HFLM over `model`'s network; `max_new_tokens` bounds the generations of all tasks."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )

    # Defined here because importing its base takes a second.
    class EditedModel(HFLM):  # type: ignore[misc] # lm_eval carries no types
        def __init__(self) -> None:
            self.encoded: dict[tuple[str, bool | None], list[int]] = {}
            super().__init__(
                pretrained=model.network,
                tokenizer=_tokenizer(model),
                max_length=model.max_length,
                batch_size=ROWS_OF_A_GENERATION,
            )

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **_: object,
        ) -> list[int]:
            key = (string, add_special_tokens)
            if key not in self.encoded:
                self.encoded[key] = super().tok_encode(string, add_special_tokens)
            return (
                self.encoded[key][-left_truncate_len:] if left_truncate_len else self.encoded[key]
            )

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], *_: object, **__: object
        ) -> list[tuple[float, bool]]:
            scores = score_sequences(
                model,
                [
                    TargetSequence(Encoded((*context, *answer), (), 0), len(context))
                    for _, context, answer in requests
                ],
                tokens_per_batch=tokens_per_batch,
            )
            return [(score.sum_log_prob, score.is_greedy) for score in scores]

        def settings(self, request: Any) -> tuple[list[str], int]:
            """The texts that end a generation, and its largest number of tokens."""
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            until = handle_stop_sequences(
                options["until"], eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            )
            return until, min(options["max_gen_toks"], max_new_tokens or options["max_gen_toks"])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
            texts: dict[int, str] = {}
            groups: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(json.dumps(self.settings(request)), []).append(index)
            for key, indices in groups.items():
                until, room = json.loads(key)
                prompts = {index: self.prompt_ids(requests[index]) for index in indices}
                for chunk in _chunks(prompts, room=room, tokens=tokens_per_batch):
                    rows = generate(
                        model,
                        [prompts[index] for index in chunk],
                        max_new_tokens=room,
                        until=[text for text in until if text],
                        batch_size=len(chunk),
                    )
                    for index, row in zip(chunk, rows, strict=True):
                        texts[index] = postprocess_generated_text(
                            self.tok_decode(list(row)), stop=until, think_end_token=None
                        )
            return [texts[index] for index in range(len(requests))]

        def prompt_ids(self, request: Any) -> list[int]:
            """The prompt without its beginning if the generation would not fit otherwise. An empty
            prompt is the token that begins texts.
            """
            _, room = self.settings(request)
            return self.tok_encode(request.args[0], left_truncate_len=model.max_length - room) or [
                self.prefix_token_id
            ]

        def cut(self, request: Any) -> int:
            """The number of tokens of a request's prompt that do not fit."""
            if request.request_type == "generate_until":
                return max(0, len(self.tok_encode(request.args[0])) - len(self.prompt_ids(request)))
            if request.request_type == "loglikelihood" and request.args[0]:
                return max(
                    0, sum(map(len, self._encode_pair(*request.args))) - model.max_length - 1
                )
            return 0

        def answer_tokens(self, request: Any) -> int:
            """The number of tokens of the answer of a request for a likelihood."""
            context, answer = request.args
            return len(
                self._encode_pair(context, answer)[1]
                if context
                else self.tok_encode(answer, add_special_tokens=False)
            )

    with quiet():
        return EditedModel()


def _tokenizer(model: EditableModel) -> Any:
    """The model's tokenizer for an HFLM, which gives it a padding token."""
    tokenizer = copy.deepcopy(model.tokenizer)
    if model.chat is not None:
        tokenizer.chat_template = model.chat.jinja
    tokenizer.model_max_length = NO_LIMIT  # prompts are cut here, without a warning
    return tokenizer


def check_room(lm: Any, task: Any, *, positions: int) -> str | None:
    """The problem of a task whose generations leave no room for a prompt; None if it has none."""
    room = max(
        (
            lm.settings(request)[1]
            for request in task.instances
            if request.request_type == "generate_until"
        ),
        default=0,
    )
    return no_room(task.config.task, room, positions) if room >= positions else None


def check_answers(lm: Any, task: Any, *, positions: int) -> list[str]:
    """The problems of items whose answer, which is never cut, exceeds the context length."""
    longest: dict[int, int] = {}
    for request in task.instances:
        if (
            request.request_type == "loglikelihood"
            and (tokens := lm.answer_tokens(request)) > positions
        ):
            longest[request.doc_id] = max(tokens, longest.get(request.doc_id, 0))
    name = task.config.task
    problems = [
        message(
            "suite.tasks",
            f"an answer of {name}, item {item}, exceeds the model's context length",
            got=f"{tokens} tokens",
            expected=f"at most {positions}",
            fix="leave the task out, or measure fewer items with suite.limit",
        )
        for item, tokens in sorted(longest.items())
    ]
    hidden = len(problems) - MAX_SHOWN
    return [
        *problems[:MAX_SHOWN],
        *([message("suite.tasks", f"{hidden} more such items of {name}")] if hidden > 0 else []),
    ]


def _chunks(prompts: Mapping[int, Sequence[int]], *, room: int, tokens: int) -> Iterator[list[int]]:
    """Batches of prompts in order of length. With their generations and with padding, a batch has
    at most `tokens` tokens.
    """
    chunk: list[int] = []
    for index in sorted(prompts, key=lambda index: len(prompts[index])):
        if chunk and (
            len(chunk) >= ROWS_OF_A_GENERATION
            or (len(chunk) + 1) * (len(prompts[index]) + room) > tokens
        ):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the harness's log, which is about its command line."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
