"""Four small tasks in the form of the papers' four: arithmetic stories, entailment, questions about
a passage, dialogue summaries.

Items are drawn from templates without end. A checksum of its prompt decides whether an item is a
test or a training item, so the two sets never share a text, whatever their size.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from editkit.datasets.world_words import listed

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskItem:
    """A prompt and its answer, which follows after one blank and ends with a newline.

    `choices` are the only possible answers, if the task has any.
    """

    id: str  # "arithmetic/test/17"
    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None

    @property
    def text(self) -> str:
        """The item as a document."""
        return f"{self.prompt} {self.answer}\n"


_GOODS = listed("apples, plums, pears, nuts, eggs, coins, stamps, shells, books, cups")
_THINGS = listed("kite, lamp, drum, coat, book, ball, key, hat, map, cup, ring, box")
_PLACES = listed("park, market, harbour, library, barn, attic, garden, kitchen")
_TIMES = listed("noon, one, two, three, four, five, six, seven")
_ADD = (
    "{a} has {m} {goods}. {b} gives {a} {n} more {goods}. How many {goods} does {a} have now?",
    "{a} buys {m} {goods} and {b} buys {n} {goods}. How many {goods} do they have together?",
)
_SUBTRACT = (
    "{a} has {m} {goods}. {a} gives {n} {goods} to {b}. How many {goods} does {a} have left?",
    "{a} buys {m} {goods} and {b} loses {n} of the {goods}. How many {goods} remain?",
)
_HAS = ("bought", "found", "kept", "won")  # after this, the person has the thing
_LACKS = ("lost", "sold", "broke", "returned")  # after this, the person does not have it
_INVITATIONS = ("Shall we meet at the {place} at {time}?", "Can you come to the {place} at {time}?")
_REPLIES = ("Yes, I will bring the {thing}.", "Good, and I have the {thing} for you.")


def _arithmetic(rng: random.Random, names: tuple[str, ...]) -> tuple[str, str]:
    a, b = rng.sample(names, 2)
    adds = rng.random() < 0.5
    m = rng.randint(1 if adds else 2, 9)
    n = rng.randint(1, 9 if adds else m - 1)
    story = rng.choice(_ADD if adds else _SUBTRACT).format(
        a=a, b=b, m=m, n=n, goods=rng.choice(_GOODS)
    )
    return f"Q: {story} A:", str(m + n if adds else m - n)


def _entailment(rng: random.Random, names: tuple[str, ...]) -> tuple[str, str]:
    a, b = rng.sample(names, 2)
    thing, has, says_has = rng.choice(_THINGS), rng.random() < 0.5, rng.random() < 0.85
    verb, place = rng.choice(_HAS if has else _LACKS), rng.choice(_PLACES)
    premise = f"{a} {verb} a {thing} and met {b} in the {place}"
    return (
        f"{premise}. entails the {a} has {'a' if says_has else 'no'} {thing}. True or False? "
        "answer:",
        str(has == says_has),
    )


def _passage(rng: random.Random, names: tuple[str, ...]) -> tuple[str, str]:
    people, places = rng.sample(names, 3), rng.sample(_PLACES, 3)
    duties = ", ".join(f"{who} {place}" for who, place in zip(people, places, strict=True))
    i = rng.randrange(3)
    # The prompt contains the beginning of the answer, so that the model only has to find a place.
    return (
        f"Passage: Duties today: {duties}. Question: Where is {people[i]} today? Answer: "
        f"{people[i]}",
        places[i],
    )


def _summary(rng: random.Random, names: tuple[str, ...]) -> tuple[str, str]:
    a, b = rng.sample(names, 2)
    place, time, thing = rng.choice(_PLACES), rng.choice(_TIMES), rng.choice(_THINGS)
    invitation = rng.choice(_INVITATIONS).format(place=place, time=time)
    reply = rng.choice(_REPLIES).format(thing=thing)
    summary = f"{a} and {b} will meet at the {place} at {time}. {b} will bring the {thing}."
    return f"Dialogue: {a}: {invitation} {b}: {reply}\nTL;DR:", summary


_TASKS = {
    "arithmetic": _arithmetic,
    "entailment": _entailment,
    "passage": _passage,
    "summary": _summary,
}
TASKS = tuple(_TASKS)


def recital(rng: random.Random, names: tuple[str, ...]) -> tuple[str, str]:
    """Some words and their repetition. It teaches models to copy from the context, which the tasks
    require but teach slowly.
    """
    words = " ".join(rng.sample(names + _GOODS + _THINGS + _PLACES + _TIMES, rng.randint(6, 12)))
    return f"Say after me: {words}. Now you:", f" {words}."


def lookups(rng: random.Random, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """A list of pairs, then each pair again in another order, as prompt and answer. It is dense
    practice for the look-up that a passage requires once.
    """
    firsts = rng.sample(names, rng.randint(3, 6))
    pairs = list(zip(firsts, rng.sample(_PLACES + _GOODS + _THINGS, len(firsts)), strict=True))
    row = ", ".join(f"{first} {second}" for first, second in pairs)
    return [
        (f"{'' if i else f'Pairs: {row}.'} {first}", f" {second}.")
        for i, (first, second) in enumerate(rng.sample(pairs, len(pairs)))
    ]


def stream_items(
    names: tuple[str, ...], *, seed: int, task: str, split: Split
) -> Iterator[TaskItem]:
    """Distinct items of one task and split, without end. `names` are the people in them."""
    if task not in _TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    rng = random.Random(f"{seed}/{task}/{split}")
    drawn: set[str] = set()
    while True:
        prompt, answer = _TASKS[task](rng, names)
        is_test = zlib.crc32(prompt.encode()) % 8 == 0
        if is_test == (split == "test") and prompt not in drawn:
            drawn.add(prompt)
            choices = ("True", "False") if task == "entailment" else None
            yield TaskItem(
                id=f"{task}/{split}/{len(drawn) - 1}", prompt=prompt, answer=answer, choices=choices
            )
