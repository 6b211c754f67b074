"""A seeded world of people, places, companies and works, with one short document about each.

    world = make_world(seed=0, split="train")
    entity = world.entities[0]
    entity.document, entity.paraphrase
    ask(entity, "job", rng)                    # Question("What is the job of Mara Torlen?", "baker", (entity,))
    ask_subject(entity, "job", rng)            # Question("Who works as a baker?", "Mara Torlen", (entity,))
    ask_two_hop(world, entity, rng)            # "Where was the founder of Zantex Mills born?"

A two-hop question names one entity and is answered by the document of another: the first document names the second
one's entity, and the second, which shares no name with the question, holds the answer.
"""

import dataclasses
import random

from experiments.small_world.relations import RELATIONS, Relation
from experiments.small_world.words import KINDS, VALUES, name_pool

# How many entities of each kind a world has, as far as the split has names for them.
DEFAULT_SIZES = {"person": 400, "place": 200, "company": 200, "work": 200}


@dataclasses.dataclass(frozen=True)
class Entity:
    """One entity: `facts` maps each relation of its kind to the object's text; two texts state them all."""

    kind: str
    name: tuple[str, str]
    facts: dict[str, str]
    document: str
    paraphrase: str

    @property
    def title(self) -> str:
        """The name as it is written."""
        return " ".join(self.name)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer, and the entities whose documents are needed, the one with the answer last."""

    text: str
    answer: str
    path: tuple[Entity, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """All entities, also by title and by kind."""

    entities: tuple[Entity, ...]
    by_title: dict[str, Entity]
    by_kind: dict[str, tuple[Entity, ...]]


def make_world(seed: int | str, split: str, sizes: dict[str, int] | None = None) -> World:
    """The world of `seed`. Its entities are drawn from the names of `split`, and it refers to no others."""
    rng = random.Random(f"{seed} {split}")
    names = {}
    for kind in KINDS:
        pool = name_pool(kind, split)
        names[kind] = rng.sample(pool, min((sizes or DEFAULT_SIZES)[kind], len(pool)))
    objects = {**VALUES, **{kind: [" ".join(name) for name in names[kind]] for kind in KINDS}}
    entities = tuple(_make_entity(kind, name, objects, rng) for kind in KINDS for name in names[kind])
    return World(
        entities,
        {entity.title: entity for entity in entities},
        {kind: tuple(entity for entity in entities if entity.kind == kind) for kind in KINDS},
    )


def relation(kind: str, name: str) -> Relation:
    """The relation of that name."""
    return next(found for found in RELATIONS[kind] if found.name == name)


def ask(entity: Entity, name: str, rng: random.Random) -> Question:
    """A question about one fact of one entity."""
    wording = rng.choice(relation(entity.kind, name).questions)
    return Question(wording.format(s=entity.title), entity.facts[name], (entity,))


def ask_subject(entity: Entity, name: str, rng: random.Random) -> Question:
    """One fact asked the other way round, whose answer is the entity's name.

    It is a question to the entity's own document alone: in the world several may share the fact.
    """
    statement = rng.choice([text for text in relation(entity.kind, name).statements if text.startswith("{s}")])
    asked = statement.format(s="Who" if entity.kind == "person" else "What", o=entity.facts[name])
    return Question(asked.removesuffix(".") + "?", entity.title, (entity,))


def ask_two_hop(world: World, entity: Entity, rng: random.Random) -> Question:
    """A question that describes a second entity by its relation to `entity`, and asks for one of its facts.

    Facts of the second entity that name the first are left out: the question would answer itself.
    """
    bridges = [found for found in RELATIONS[entity.kind] if found.description]
    bridge = rng.choice(bridges)
    second = world.by_title[entity.facts[bridge.name]]
    names = [name for name, value in second.facts.items() if value != entity.title]
    asked = relation(second.kind, rng.choice(names))
    text = rng.choice(asked.questions).format(s=bridge.description.format(s=entity.title))
    return Question(text, second.facts[asked.name], (entity, second))


def lookalikes(world: World, entity: Entity) -> list[Entity]:
    """Entities of the same kind whose name shares a word with this one's."""
    return [
        other
        for other in world.by_kind[entity.kind]
        if other is not entity and (other.name[0] == entity.name[0] or other.name[1] == entity.name[1])
    ]


def distractors(world: World, needed: tuple[Entity, ...], count: int, rng: random.Random) -> list[Entity]:
    """`count` other entities: half of them lookalikes of the needed ones where there are enough, the rest any."""
    alike = [other for entity in needed for other in lookalikes(world, entity) if other not in needed]
    chosen = rng.sample(alike, min(len(alike), (count + 1) // 2))
    while len(chosen) < count:
        other = rng.choice(world.by_kind[rng.choice(KINDS)])
        if other not in needed and other not in chosen:
            chosen.append(other)
    return chosen


def strangers(world: World, entity: Entity, count: int, rng: random.Random) -> list[Entity]:
    """`count` other entities of the same kind whose names share no word with this one's or with each other's."""
    chosen = [entity]
    while len(chosen) <= count:
        other = rng.choice(world.by_kind[entity.kind])
        if not any(set(other.name) & set(one.name) for one in chosen):
            chosen.append(other)
    return chosen[1:]


def _make_entity(kind: str, name: tuple[str, str], objects: dict[str, tuple[str, ...]], rng: random.Random) -> Entity:
    title = " ".join(name)
    facts: dict[str, str] = {}
    for found in RELATIONS[kind]:
        # No object twice (a birthplace that is also the home would make two questions one).
        free = [value for value in objects[found.object] if value not in facts.values()]
        facts[found.name] = rng.choice(free)
    texts = []
    wordings = [rng.randrange(2) for _ in facts]
    for flip in (0, 1):
        order = rng.sample(range(len(facts)), len(facts))
        sentences = [
            found.statements[wording ^ flip].format(s=title, o=facts[found.name])
            for found, wording in zip(RELATIONS[kind], wordings, strict=True)
        ]
        texts.append(" ".join(sentences[i] for i in order))
    return Entity(kind, name, facts, *texts)
