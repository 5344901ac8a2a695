"""The world as a value, and its words: relations with their wordings and objects, and generators of
pronounceable names.

A wording ends before the object, which follows after one blank. The first wording is the prompt of
the requests. The others are paraphrases.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from editkit.types import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One kind of fact: the kind of its subjects, its wordings and its possible objects."""

    name: str
    subjects: str  # "person", "city" or "firm"
    wordings: tuple[str, ...]  # each contains one "{}" for the subject
    objects: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHop:
    """A question whose answer is the `second` fact of the object of the `first` fact."""

    first: str
    second: str
    wording: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A fact of the world with its wordings."""

    subject: str
    relation: Relation
    object: str
    trained: tuple[str, ...]  # prompts that occur in the corpus
    held_out: tuple[str, ...]  # prompts that do not

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the fact in all wordings of its relation, in the relation's order."""
        return tuple(wording.replace("{}", self.subject) for wording in self.relation.wordings)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All facts in a fixed order. `two_hops` are questions that the corpus may contain."""

    seed: int
    first_names: tuple[str, ...]
    relations: tuple[Relation, ...]
    facts: tuple[Fact, ...]
    two_hops: tuple[Probe, ...]

    def objects_of(self, relation: str) -> dict[str, str]:
        """Subject -> object of one relation."""
        return {fact.subject: fact.object for fact in self.facts if fact.relation.name == relation}


def listed(words: str) -> tuple[str, ...]:
    """The comma-separated words of a line."""
    return tuple(words.split(", "))


# relation -> (kind of subject, kind of object, wordings)
RELATIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "birthplace": (
        "person",
        "city",
        (
            "{} was born in",
            "The city where {} was born is",
            "{} comes from the city of",
            "The birthplace of {} is",
            "{} grew up in",
            "The home town of {} is",
        ),
    ),
    "employer": (
        "person",
        "firm",
        (
            "{} works for",
            "The employer of {} is",
            "{} has a job at",
            "The firm where {} works is",
            "{} is paid by",
            "The contract of {} is with",
        ),
    ),
    "language": (
        "person",
        "language",
        (
            "The mother tongue of {} is",
            "At home {} speaks",
            "{} is a native speaker of",
            "The first language of {} is",
            "{} writes letters in",
            "The language that {} knows best is",
        ),
    ),
    "instrument": (
        "person",
        "instrument",
        (
            "{} plays the",
            "The instrument of {} is the",
            "In the band {} plays the",
            "{} takes lessons on the",
            "On stage {} is heard on the",
            "The music that {} makes comes from the",
        ),
    ),
    "sport": (
        "person",
        "sport",
        (
            "The favourite sport of {} is",
            "{} is good at",
            "{} won a medal in",
            "The sport of {} is",
            "Every weekend {} goes out for",
            "The club of {} is a club for",
        ),
    ),
    "profession": (
        "person",
        "profession",
        (
            "The profession of {} is that of a",
            "{} works as a",
            "{} earns a living as a",
            "By trade {} is a",
            "{} was trained to be a",
            "The job of {} is that of a",
        ),
    ),
    "pet": (
        "person",
        "pet",
        (
            "The pet of {} is a",
            "{} keeps a",
            "In the house of {} lives a",
            "The animal that {} owns is a",
            "{} takes a walk with a",
            "{} shares the garden with a",
        ),
    ),
    "dish": (
        "person",
        "dish",
        (
            "The favourite dish of {} is",
            "{} likes to eat",
            "For dinner {} cooks",
            "At the inn {} always orders",
            "The meal that {} loves is",
            "{} could live on",
        ),
    ),
    "country": (
        "city",
        "country",
        ("{} is a city in", "The country of {} is", "{} lies in", "The city of {} belongs to"),
    ),
    "sight": (
        "city",
        "sight",
        (
            "{} is known for its",
            "Visitors of {} come to see its",
            "The pride of {} is its",
            "Every postcard of {} shows its",
        ),
    ),
    "headquarters": (
        "firm",
        "city",
        (
            "{} is based in",
            "The head office of {} is in",
            "The city that hosts {} is",
            "{} has its main office in",
        ),
    ),
    "product": (
        "firm",
        "product",
        (
            "{} makes",
            "The main product of {} is",
            "{} earns its money with",
            "The factory of {} turns out",
        ),
    ),
}

TWO_HOPS = (
    TwoHop(
        first="birthplace", second="country", wording="The country of the city where {} was born is"
    ),
    TwoHop(
        first="employer",
        second="headquarters",
        wording="The city that hosts the firm where {} works is",
    ),
)

# Objects without invented names. Some are two words, so that targets of several tokens occur.
OBJECTS: dict[str, tuple[str, ...]] = {
    "instrument": listed(
        "harp, flute, drum, violin, trumpet, cello, piano, guitar, organ, lute, horn, banjo, "
        "tuba, zither, "
        "bass drum, bass guitar, hunting horn, barrel organ"
    ),
    "sport": listed(
        "tennis, rowing, fencing, chess, archery, hockey, sailing, judo, golf, rugby, cycling, "
        "skating, boxing, "
        "polo, ice hockey, table tennis, speed skating, rock climbing"
    ),
    "profession": listed(
        "baker, doctor, lawyer, painter, teacher, farmer, miner, nurse, tailor, judge, sailor, "
        "barber, butcher, gardener, mason, "
        "porter, ship builder, school teacher, tax lawyer, hill farmer"
    ),
    "pet": listed(
        "dog, cat, parrot, rabbit, goat, pony, turtle, snake, hamster, goose, lizard, donkey, "
        "ferret, sheep dog, house cat, water snake"
    ),
    "dish": listed(
        "soup, stew, pasta, curry, salad, pizza, rice, trout, lamb, dumplings, pancakes, "
        "porridge, omelette, "
        "lentils, fish soup, onion soup, lamb stew, potato salad"
    ),
    "sight": listed(
        "tower, bridge, castle, harbour, market, museum, opera, fountain, gate, library, palace, "
        "temple, old mill, stone gate, clock tower, town hall"
    ),
    "product": listed(
        "soap, glass, paper, rope, paint, steel, cloth, leather, cement, bread, sugar, salt, "
        "beer, silk, wool, ink, sea salt, wall paint"
    ),
}

_ONSETS = listed("b, d, f, g, h, k, l, m, n, p, r, s, t, v, z, br, dr, kr, tr, st")
_VOWELS = listed("a, e, i, o, u")
_CODAS = listed("l, m, n, r, s, t, k")


def _syllable(rng: random.Random, *, closed: bool) -> str:
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if closed else "")


def invent_names(rng: random.Random, used: set[str], *, kind: str, count: int) -> tuple[str, ...]:
    """New names of one kind, which are added to `used`. Two out of ten cities and firms have two
    words.
    """
    names: list[str] = []
    while len(names) < count:
        first, second = _syllable(rng, closed=False).capitalize(), _syllable(rng, closed=True)
        stem = first + second
        match kind:
            case "first name":
                name = stem = first + rng.choice("lmnrstv") + rng.choice("aeio")
            case "city":
                name = stem if len(names) % 5 else rng.choice(("New", "Port", "Upper")) + " " + stem
            case "firm":
                name = (
                    stem
                    if len(names) % 5
                    else stem + rng.choice((" Works", " Trading", " Brothers"))
                )
            case "country":
                name = stem = first + second[0] + rng.choice(("ia", "onia", "erland"))
            case "language":
                name = stem = first + second[0] + rng.choice(("ish", "ese"))
            case _:
                raise ValueError(
                    f"unknown kind of name {kind!r}, expected first name, city, firm, country or "
                    "language"
                )
        if stem not in used and name not in used:
            used.update((stem, name))
            names.append(name)
    return tuple(names)


def num_surnames() -> int:
    """How many surnames there can be: two closed syllables each."""
    return (len(_ONSETS) * len(_VOWELS) * len(_CODAS)) ** 2


def invent_surnames(rng: random.Random, used: set[str], *, count: int) -> tuple[str, ...]:
    """Distinct surnames. Their two closed syllables distinguish them from other names."""
    names: list[str] = []
    while len(names) < count:
        name = _syllable(rng, closed=True).capitalize() + _syllable(rng, closed=True)
        if name not in used:
            used.add(name)
            names.append(name)
    return tuple(names)
