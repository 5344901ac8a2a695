"""Further people of the bundled world, as many as are asked for, with requests that edit the facts
about them.

They live in the world's cities, work for its firms and have its names and objects, and their facts
have its relations. The bundled models know nothing of them: their true objects are drawn, too. What
is asked about an edit's neighbours, and about the second of two hops, the models know.

Requests come in chunks of 260 people, each shuffled, from generators of their own: those of a
smaller number are the first of a larger one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from editkit.datasets.world_words import (
    TWO_HOPS,
    Fact,
    Relation,
    World,
    invent_surnames,
    num_surnames,
)
from editkit.types import EditRequest, Probe

CHUNK = 260  # people
NEIGHBOURS = 6
PARAPHRASES = 3


def relations_of_people(world: World) -> tuple[Relation, ...]:
    """The relations whose subjects are people."""
    return tuple(relation for relation in world.relations if relation.subjects == "person")


def most_facts(world: World) -> int:
    """How many facts the world can have about people, all of different surnames. Half of the
    surnames are used, so that finding a new one stays quick.
    """
    return num_surnames() // 2 * len(relations_of_people(world))


def further_requests(world: World, *, first: int) -> Iterator[EditRequest]:
    """Requests about further people, without end but for the surnames; ids count from `first`."""
    relations = relations_of_people(world)
    surnames = _surnames(world)
    asked = _Asked(world)
    numbers = itertools.count(first)
    for chunk in itertools.count():
        rng = random.Random(f"people/{world.seed}/{chunk}")
        people = [
            f"{rng.choice(world.first_names)} {surname}"
            for surname in itertools.islice(surnames, CHUNK)
        ]
        pairs = [(person, relation) for person in people for relation in relations]
        rng.shuffle(pairs)
        for person, relation in pairs:
            yield asked.request(rng, person, relation, number=next(numbers))


def _surnames(world: World) -> Iterator[str]:
    """New surnames, one after another."""
    rng = random.Random(f"surnames/{world.seed}")
    used = {word for fact in world.facts for word in (*fact.subject.split(), *fact.object.split())}
    while True:
        yield from invent_surnames(rng, used, count=1)


class _Asked:
    """The requests of a world's relations. Probes about the world's own facts are made once."""

    def __init__(self, world: World) -> None:
        self._by_object: dict[tuple[str, str], list[Fact]] = {}
        self._by_relation: dict[str, list[Fact]] = {}
        self._probes: dict[str, Probe] = {}  # by prompt
        self._two_hops = {hop.first: hop for hop in TWO_HOPS}
        self._seconds: Mapping[str, Mapping[str, str]] = {
            hop.first: world.objects_of(hop.second) for hop in TWO_HOPS
        }
        for fact in world.facts:
            self._by_object.setdefault((fact.relation.name, fact.object), []).append(fact)
            self._by_relation.setdefault(fact.relation.name, []).append(fact)

    def request(
        self, rng: random.Random, person: str, relation: Relation, *, number: int
    ) -> EditRequest:
        old, target = rng.sample(relation.objects, 2)
        wordings = rng.sample(relation.wordings[1:], PARAPHRASES)
        hop = self._two_hops.get(relation.name)
        return EditRequest(
            id=f"world/{number}",
            prompt=relation.wordings[0],
            subject=person,
            target=target,
            target_old=old,
            paraphrases=tuple(wording.replace("{}", person) for wording in wordings),
            neighbours=tuple(
                self._probe(rng, fact) for fact in self._neighbours(rng, relation.name, old)
            ),
            portability={}
            if hop is None
            else {
                "two_hop": (
                    Probe(
                        prompt=hop.wording.replace("{}", person),
                        answer=self._seconds[hop.first][target],
                    ),
                )
            },
        )

    def _neighbours(self, rng: random.Random, relation: str, old: str) -> Sequence[Fact]:
        """Facts of the world with the same object, filled up with others of the relation."""
        same = self._by_object.get((relation, old), [])
        if len(same) >= NEIGHBOURS:
            return rng.sample(same, NEIGHBOURS)
        others = [
            fact
            for fact in rng.sample(self._by_relation[relation], 4 * NEIGHBOURS)
            if fact.object != old
        ]
        return [*same, *others][:NEIGHBOURS]

    def _probe(self, rng: random.Random, fact: Fact) -> Probe:
        prompt = rng.choice(fact.trained)
        probe = self._probes.get(prompt)
        if probe is None:
            probe = self._probes[prompt] = Probe(prompt=prompt, answer=fact.object)
        return probe
