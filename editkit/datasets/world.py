"""The bundled world: facts about invented people, cities and firms, requests that edit them, and a
corpus that states them.

The seed determines everything. Requests edit the facts about people. For a fifth of a relation's
subjects some wordings never occur in the corpus, so that a model has to generalise to them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from editkit.datasets.base import AbstractDataset, LoadedDataset, Order, arrange
from editkit.datasets.world_people import further_requests, most_facts
from editkit.datasets.world_tasks import TASKS, Split, TaskItem, lookups, recital, stream_items
from editkit.datasets.world_words import (
    OBJECTS,
    RELATIONS,
    TWO_HOPS,
    Fact,
    Relation,
    TwoHop,
    World,
    invent_names,
    invent_surnames,
)
from editkit.errors import ConfigError, OptionError, message
from editkit.types import EditRequest, Probe


def generate_world(
    seed: int = 0, *, num_people: int = 260, num_cities: int = 30, num_firms: int = 30
) -> World:
    """The world of a seed. The bundled models know that of seed 0 in its default size."""
    rng = random.Random(f"world/{seed}")
    used: set[str] = set()
    names = {
        kind: invent_names(rng, used, kind=kind, count=count)
        for kind, count in (
            ("first name", 40),
            ("city", num_cities),
            ("firm", num_firms),
            ("country", 15),
            ("language", 20),
        )
    }
    subjects = {
        "person": tuple(
            f"{rng.choice(names['first name'])} {surname}"
            for surname in invent_surnames(rng, used, count=num_people)
        ),
        "city": names["city"],
        "firm": names["firm"],
    }
    objects = OBJECTS | names
    relations = tuple(
        Relation(name=name, subjects=subject_kind, wordings=wordings, objects=objects[object_kind])
        for name, (subject_kind, object_kind, wordings) in RELATIONS.items()
    )
    facts = tuple(
        fact
        for relation in relations
        for fact in _facts(rng, relation, subjects[relation.subjects])
    )
    world = World(
        seed=seed, first_names=names["first name"], relations=relations, facts=facts, two_hops=()
    )
    probes = [probe for hop in TWO_HOPS for probe in _two_hop_probes(world, hop)]
    # A fifth of the two-hop questions is held out as well.
    trained = tuple(rng.sample(probes, len(probes) * 4 // 5))
    return World(
        seed=seed, first_names=world.first_names, relations=relations, facts=facts, two_hops=trained
    )


def _facts(rng: random.Random, relation: Relation, subjects: tuple[str, ...]) -> Iterator[Fact]:
    tested = set(rng.sample(subjects, len(subjects) // 5))
    for subject in subjects:
        prompts = [wording.replace("{}", subject) for wording in relation.wordings]
        # The first wording is always trained, because the requests edit it.
        held_out = rng.sample(prompts[1:], len(prompts) // 3) if subject in tested else []
        yield Fact(
            subject=subject,
            relation=relation,
            object=rng.choice(relation.objects),
            trained=tuple(prompt for prompt in prompts if prompt not in held_out),
            held_out=tuple(held_out),
        )


def _two_hop_probes(world: World, hop: TwoHop) -> Iterator[Probe]:
    second = world.objects_of(hop.second)
    for subject, middle in world.objects_of(hop.first).items():
        yield Probe(prompt=hop.wording.replace("{}", subject), answer=second[middle])


def requests(world: World) -> tuple[EditRequest, ...]:
    """One request for each fact about a person, in a shuffled order. Ids follow this order."""
    rng = random.Random(f"requests/{world.seed}")
    seconds = {hop.second: world.objects_of(hop.second) for hop in TWO_HOPS}
    groups: dict[str, list[Fact]] = {}
    for fact in world.facts:
        groups.setdefault(fact.relation.name, []).append(fact)
    edited = [fact for fact in world.facts if fact.relation.subjects == "person"]
    rng.shuffle(edited)
    return tuple(
        _request(rng, fact, groups[fact.relation.name], seconds, index=index)
        for index, fact in enumerate(edited)
    )


def _request(
    rng: random.Random,
    fact: Fact,
    same_relation: list[Fact],
    seconds: dict[str, dict[str, str]],
    *,
    index: int,
    num_neighbours: int = 6,
) -> EditRequest:
    target = rng.choice([name for name in fact.relation.objects if name != fact.object])
    others = [other for other in fact.trained if other != fact.prompts[0]]
    paraphrases = [*fact.held_out, *rng.sample(others, len(others))][:3]
    neighbours = rng.sample(same_relation, len(same_relation))
    # A stable sort puts subjects with the same object first.
    neighbours = sorted(
        (other for other in neighbours if other != fact),
        key=lambda other: other.object != fact.object,
    )
    return EditRequest(
        id=f"world/{index}",
        prompt=fact.relation.wordings[0],
        subject=fact.subject,
        target=target,
        target_old=fact.object,
        paraphrases=tuple(paraphrases),
        neighbours=tuple(
            Probe(prompt=rng.choice(other.trained), answer=other.object)
            for other in neighbours[:num_neighbours]
        ),
        portability={
            "two_hop": tuple(
                Probe(
                    prompt=hop.wording.replace("{}", fact.subject),
                    answer=seconds[hop.second][target],
                )
                for hop in TWO_HOPS
                if hop.first == fact.relation.name
            )
        },
    )


def task_items(world: World, task: str, *, split: Split = "test", n: int) -> tuple[TaskItem, ...]:
    """The first `n` items of a task. Test and training items share no prompt."""
    return tuple(
        itertools.islice(
            stream_items(world.first_names, seed=world.seed, task=task, split=split), n
        )
    )


# A text, and whether it is an answer, which follows from the text before it and can be learned.
Part = tuple[str, bool]


def documents(
    world: World,
    *,
    seed: int = 0,
    task_share: float = 0.42,
    recital_share: float = 0.08,
    lookup_share: float = 0.0,
) -> Iterator[tuple[Part, ...]]:
    """The training documents of the bundled models, without end, as parts.

    A document is a training item, a recital, lookups, or some facts.
    """
    rng = random.Random(f"corpus/{world.seed}/{seed}")
    items = {
        task: stream_items(world.first_names, seed=seed, task=task, split="train") for task in TASKS
    }
    by_subject: dict[str, list[Fact]] = {}
    for fact in world.facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    while True:
        kind = rng.random()
        if kind < task_share:
            item = next(items[rng.choice(TASKS)])
            yield (item.prompt, False), (f" {item.answer}\n", True)
        elif kind < task_share + recital_share:
            prompt, answer = recital(rng, world.first_names)
            yield (prompt, False), (answer, True)
        elif kind < task_share + recital_share + lookup_share:
            yield tuple(
                part
                for prompt, answer in lookups(rng, world.first_names)
                for part in ((prompt, False), (answer, True))
            )
        else:
            pool = (
                by_subject[rng.choice(world.facts).subject] if rng.random() < 0.5 else world.facts
            )
            facts = rng.sample(pool, min(rng.randint(2, 4), len(pool)))
            pairs = [(rng.choice(fact.trained), fact.object) for fact in facts]
            if rng.random() < 0.2:
                probe = rng.choice(world.two_hops)
                pairs.append((probe.prompt, probe.answer))
            yield tuple(
                part
                for index, (prompt, answer) in enumerate(pairs)
                for part in ((f"{' ' if index else ''}{prompt}", False), (f" {answer}.", True))
            )


def corpus(world: World, *, seed: int = 0, num_documents: int) -> Iterator[str]:
    """The same documents as plain text."""
    return (
        "".join(text for text, _ in parts)
        for parts in itertools.islice(documents(world, seed=seed), num_documents)
    )


def _as_first(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The fields without those that came later, so that the digest is that of earlier runs."""
    return {name: value for name, value in pairs if name != "separator"}


@dataclass(frozen=True, kw_only=True)
class WorldDataset(AbstractDataset):
    """Requests about the people of a generated world. It needs no download."""

    name: str
    world_seed: int  # the bundled models know the world of seed 0
    # The facts about people that can be edited; None: those of the world. Further ones are about
    # people whom the models do not know.
    facts: int | None = None
    order: Order
    limit: int | None

    def __post_init__(self) -> None:
        if self.facts is not None and self.facts < 1:
            expected = "at least 1, or null for the world's own"
            raise OptionError(message("facts", "out of range", got=self.facts, expected=expected))

    def load(self, seed: int) -> LoadedDataset:
        world = generate_world(self.world_seed)
        all_requests = list(requests(world))
        content = json.dumps(
            [dataclasses.asdict(request, dict_factory=_as_first) for request in all_requests],
            sort_keys=True,
            ensure_ascii=False,
        )
        digest = hashlib.sha256(content.encode())
        if self.facts is not None:
            all_requests = self._with_further(world, all_requests)
            # The rest of a request follows from these. Whole ones would take minutes.
            for request in all_requests:
                parts = (request.subject, request.prompt, request.target, *request.paraphrases)
                digest.update("\0".join(parts).encode())
        return LoadedDataset(
            name=self.name,
            requests=arrange(all_requests, order=self.order, seed=seed, limit=self.limit),
            digest=digest.hexdigest(),
            origin=f"generated world of seed {self.world_seed}",
            variant={} if self.facts is None else {"facts": str(self.facts)},
        )

    def _with_further(self, world: World, own: list[EditRequest]) -> list[EditRequest]:
        """As many requests as are asked for: the world's own, then those of further people."""
        assert self.facts is not None
        if self.facts > (most := most_facts(world)):
            expected = f"at most {most}, so that names stay different"
            raise ConfigError(
                message("dataset.facts", "out of range", got=self.facts, expected=expected)
            )
        number = max(0, self.facts - len(own))
        further = itertools.islice(further_requests(world, first=len(own)), number)
        return [*own[: self.facts], *further]
