"""The facts of the embedded world: who is in which cluster, what each relation says, who is asked.

Plain Python from one seeded generator, so that the same seed gives the same facts everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suites.world import World

#: Between the question and its answer.
ARROW = "->"

Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """All that is true in a world, before and after its first relations get new tables."""

    #: Names, as "first3 last9"; an entity is its index here.
    entities: tuple[str, ...]
    #: The hidden cluster of each entity.
    clusters: tuple[int, ...]
    #: old[relation][cluster] is a value, and so is new[relation][cluster] for changed relations.
    old: tuple[tuple[int, ...], ...]
    new: tuple[tuple[int, ...], ...]
    #: Entities whose new facts are trained on, and the two halves of the others.
    shown: tuple[int, ...]
    dev: tuple[int, ...]
    test: tuple[int, ...]
    #: The two halves of `shown`, which only the retention questions ask about.
    shown_dev: tuple[int, ...]
    shown_test: tuple[int, ...]


def draw(world: World) -> Facts:
    """The facts of `world`, decided by its seed."""
    rng = random.Random(world.seed)
    side = name_side(world.num_entities)
    pairs = [(first, last) for first in range(side) for last in range(side)]
    entities = tuple(
        f"first{first} last{last}" for first, last in rng.sample(pairs, world.num_entities)
    )
    clusters = tuple(entity % world.num_clusters for entity in range(world.num_entities))
    old = tuple(_table(world, rng) for _ in range(world.num_relations))
    new = tuple(_table(world, rng, avoid=old[r]) for r in range(world.num_changed_relations))

    shown, others = [], []
    for cluster in range(world.num_clusters):
        members = list(range(cluster, world.num_entities, world.num_clusters))
        rng.shuffle(members)
        cut = round(world.shown_fraction * len(members))
        shown += members[:cut]
        others += members[cut:]
    shown_dev, shown_test = _halves(shown, rng)
    dev, test = _halves(others, rng)
    return Facts(
        entities, clusters, old, new, tuple(sorted(shown)), dev, test, shown_dev, shown_test
    )


def name_side(num_entities: int) -> int:
    """How many first names (and last names) there are: twice as many pairs as entities."""
    return math.isqrt(2 * num_entities - 1) + 1


def _table(world: World, rng: random.Random, avoid: tuple[int, ...] | None = None) -> tuple:
    """One value per cluster, all different, and none where `avoid` has it."""
    while True:
        table = tuple(rng.sample(range(world.num_values), world.num_clusters))
        if avoid is None or all(a != b for a, b in zip(table, avoid, strict=True)):
            return table


def _halves(entities: list[int], rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    mixed = rng.sample(entities, len(entities))
    middle = len(mixed) // 2
    return tuple(sorted(mixed[:middle])), tuple(sorted(mixed[middle:]))


def vocabulary(world: World) -> list[str]:
    """Every word of the world, in the order of the tokenizer's ids; special tokens are not here."""
    side = name_side(world.num_entities)
    counts = {
        "first": side,
        "last": side,
        "relation": world.num_relations,
        "value": world.num_values,
    }
    return [ARROW, *(f"{kind}{i}" for kind, count in counts.items() for i in range(count))]


def splits(world: World) -> dict[str, list[Row]]:
    """File name under data/ -> its rows: what is trained on, and what is asked."""
    facts = draw(world)
    changed = range(world.num_changed_relations)
    kept = range(world.num_changed_relations, world.num_relations)
    every = range(world.num_relations)
    rng = random.Random(f"questions {world.seed}")

    def questions(tables: tuple, entities: Iterable[int], relations: Iterable[int]) -> list[Row]:
        pairs = [(entity, relation) for entity in entities for relation in relations]
        pairs = rng.sample(pairs, min(world.num_questions, len(pairs)))
        return [_question(world, facts, tables, *pair, rng) for pair in pairs]

    return {
        "pretrain": _examples(facts, facts.old, range(world.num_entities), every),
        "train": _examples(facts, facts.new, facts.shown, changed),
        "target_dev": questions(facts.new, facts.dev, changed),
        "target_test": questions(facts.new, facts.test, changed),
        "retention_dev": questions(facts.old, facts.shown_dev + facts.dev, kept),
        "retention_test": questions(facts.old, facts.shown_test + facts.test, kept),
    }


def _prompt(facts: Facts, entity: int, relation: int) -> str:
    return f"{facts.entities[entity]} relation{relation} {ARROW}"


def _examples(
    facts: Facts, tables: tuple, entities: Iterable[int], relations: Iterable[int]
) -> list[Row]:
    return [
        {
            "prompt": _prompt(facts, entity, relation),
            "completion": f" value{tables[relation][facts.clusters[entity]]}",
        }
        for entity in entities
        for relation in relations
    ]


def _question(
    world: World, facts: Facts, tables: tuple, entity: int, relation: int, rng: random.Random
) -> Row:
    """A multiple-choice row; wrong choices are what the relation says of other clusters.

    So none can be ruled out by never having been an answer. The answer of before is no choice
    either: a model that has learnt nothing scores at chance and not below.
    """
    cluster = facts.clusters[entity]
    answer = tables[relation][cluster]
    wrong = [v for v in tables[relation] if v not in (answer, facts.old[relation][cluster])]
    choices = [*rng.sample(wrong, world.num_choices - 1), answer]
    rng.shuffle(choices)
    return {
        "query": _prompt(facts, entity, relation),
        "choices": [f"value{value}" for value in choices],
        "answer": choices.index(answer),
    }
