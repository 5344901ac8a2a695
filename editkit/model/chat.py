"""Chat templates: how a prompt is put to a model that was trained on dialogues.

The prompt is the user's turn, and the answer is the beginning of the assistant's. A template is
rendered once, around a mark, and the texts before and after the mark are kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message

KEY = "model.chat_template"
TOKENIZER = "tokenizer"  # the choice of the template that the tokenizer brings
USER, ANSWER = "editkit's <user> & turn", "editkit's <answer>"
FIX = f"choose another file, or set {KEY}=null"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """The texts around a prompt, with the special tokens that the template writes."""

    name: str  # "tokenizer", or the file's name
    before: str
    after: str  # up to where the assistant's text begins
    gap: str  # what the template puts before the assistant's text: a blank or nothing
    jinja: str

    @property
    def label(self) -> str:
        """Name and digest, for records: `chatml.jinja 1f0a52cc`. The digest is of what the model
        reads.
        """
        content = "\0".join((self.before, self.after, self.gap))
        return f"{self.name} {hashlib.sha256(content.encode()).hexdigest()[:8]}"


def file_problem(choice: str | None) -> str | None:
    """Why the file of a template cannot be read; None for a choice without a file."""
    if choice is None or choice == TOKENIZER or Path(choice).expanduser().is_file():
        return None
    expected = f"null, {TOKENIZER} or a file with a Jinja template"
    return message(KEY, "there is no such file", got=choice, expected=expected)


def chat_template(tokenizer: Any, choice: str) -> ChatTemplate:
    """The template of the tokenizer, or of a file.

    Raises:
        ConfigError: the tokenizer has none, the file is missing, or it does not render.
    """
    if problem := file_problem(choice):
        raise ConfigError(problem)
    if choice == TOKENIZER:
        try:
            name, jinja = TOKENIZER, str(tokenizer.get_chat_template())
        except ValueError:  # none, or several without a default
            raise ConfigError(
                message(
                    KEY,
                    "the tokenizer has no chat template",
                    got=choice,
                    fix=f"name a file with a Jinja template, or set {KEY}=null",
                )
            ) from None
    else:
        path = Path(choice).expanduser()
        try:
            name, jinja = path.name, path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(message(KEY, f"cannot be read ({error})", got=choice)) from None
    asked = _rendered(tokenizer, jinja, choice, [("user", USER)])
    before, mark, after = asked.partition(USER)
    if not mark or USER in after:
        problem = "the template does not write the user's text once, as it is"
        raise ConfigError(message(KEY, problem, got=choice, fix=FIX))
    answered = _rendered(tokenizer, jinja, choice, [("user", USER), ("assistant", ANSWER)])
    between = answered.partition(USER)[2].partition(ANSWER)[0]
    gap = " " if between == f"{after} " else ""
    return ChatTemplate(name=name, before=before, after=after, gap=gap, jinja=jinja)


def _rendered(tokenizer: Any, jinja: str, choice: str, turns: list[tuple[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=jinja,
            tokenize=False,
            add_generation_prompt=turns[-1][0] == "user",
        )
    # Python's own errors come from expressions in the template.
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        problem = f"the template does not render ({type(error).__name__}: {error})"
        raise ConfigError(message(KEY, problem, got=choice, fix=FIX)) from None
    return text
