"""Generate ProntoQA: a chain of concepts with properties, an entity, and a statement that is true or false.

After Saparov and He, "Language Models Are Greedy Reasoners" (arXiv 2210.01240), and the rules of their generator
(fictional ontology, modus ponens). With the dials as they are, rows follow its distribution for 5 hops in random order:

- A chain of concepts, each with the next more general one as parent; all but the top have one property. Beside its
  parent in the chain each has a second parent, which has a property and no parents.
- A concept and a more general one, apart from all that, and the entity belongs to the lower one too.
- One more concept has the property asked about with the contrary sign. It is named nowhere else, so the answer can
  be had without a proof: of the two concepts with that property, believe the one that is named more than once.
- Every property comes from another of 13 families, each word of a family equally often. A third is negated. The
  generator keeps only proofs of the wanted length and ends a proof rather at a negated property (weight .7) than at
  another (.3), against 1 for going on; so of the properties passed on the way 27.7 % are negated and of those that
  the proof ends in 47.2 %.
- The query is the conclusion or its denial with equal odds, whatever else holds.
- A rule is in the plural half the time and begins with "Every" or "Each" a quarter of the time each, sentence by
  sentence; the proof repeats the sentence of the context. The two facts about the entity come last, either one first.
- Of fewer than 5 hops the original makes chains up to 5 levels long; the proof lies anywhere in them. It makes none of
  more than 5 hops: its property families run out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise, product

from data_builders.dataset_writer import Row
from data_builders.entity_names import Names
from data_builders.prover import ASKED, Claim, Sentence, parse_proof, parse_question
from data_builders.statistics import Measures

ENTITIES = ("Fae", "Rex", "Sally", "Max", "Alex", "Sam", "Polly", "Stella", "Wren")
FAMILIES = (
    ("blue", "red", "brown", "orange"), ("small", "large"), ("metallic", "wooden", "luminous", "liquid"),
    ("transparent", "opaque"), ("nervous", "happy", "feisty", "shy"), ("bright", "dull"),
    ("sweet", "sour", "spicy", "bitter"), ("floral", "fruity", "earthy"), ("hot", "cold", "temperate"),
    ("kind", "mean", "angry", "amenable", "aggressive"), ("melodic", "muffled", "discordant", "loud"),
    ("slow", "moderate", "fast"), ("windy", "sunny", "overcast", "rainy", "snowy"),
)  # fmt: skip
FAMILY_OF = {word: "/".join(family) for family in FAMILIES for word in family}

RELEASED_LEVELS = 5  # the longest chain that the original makes
NEGATED = 1 / 3  # of properties in general
GO_ON = {False: 1 / 1.3, True: 1 / 1.7}  # probability that a proof does not end at the property, by its negation


def _given(outcome: dict[bool, float]) -> float:
    """The share of negated properties, given an outcome with this probability by negation (Bayes)."""
    negated, plain = NEGATED * outcome[True], (1 - NEGATED) * outcome[False]
    return negated / (negated + plain)


NEGATED_ON_THE_WAY = _given(GO_ON)
NEGATED_AT_THE_END = _given({negated: 1 - going for negated, going in GO_ON.items()})


class Ordering(StrEnum):
    """How the rules of the chain are ordered. The contrary property stands anywhere, the facts always last.

    Forward and backward, the chain comes first, then the properties of the second parents, those of general concepts
    first, then the two rules apart.
    """

    random = "random"
    forward = "forward"  # from the most special concept up, as a proof reads them: the original's postorder
    backward = "backward"  # from the most general concept down: the original's preorder


# The 17 of the original; or hundreds of others, all of three syllables, which no released name has.
NAMES = {
    Names.released: (
        *("wumpus", "yumpus", "zumpus", "dumpus", "rompus", "numpus", "tumpus", "vumpus", "impus"),
        *("jompus", "gorpus", "shumpus", "lempus", "sterpus", "grimpus", "lorpus", "brimpus"),
    ),
    Names.generated: tuple(
        map("".join, product("bdfgklmnprstvz", "aeiou", ("bompus", "dilpus", "farpus", "lumpus", "nerpus", "tolpus")))
    ),
}


@dataclass
class OntologyDials:
    """The dials of the generator. Impossible values raise ValueError.

    hops_from, hops_to: rules that the proof applies, each number equally often.
    ordering, names: see there. Past the 13 families, which only generated names reach, these are dealt again, and no
    word comes twice.
    spare_levels: levels of the chain that the proof does not pass, below its first concept or above its last. None: as
    many as in the original, which makes up to 5 levels in all.
    distractors: if false, the context keeps only the rules of the proof and one fact of the ontology that was drawn.
    """

    hops_from: int = 5
    hops_to: int = 5
    ordering: Ordering = Ordering.random
    names: Names = Names.released
    spare_levels: int | None = None
    distractors: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.hops_from <= self.hops_to:
            raise ValueError(
                f"hops_from={self.hops_from}, hops_to={self.hops_to}: it must be 1 <= hops_from <= hops_to."
            )
        spare = self.spare_levels or 0
        if spare < 0:
            raise ValueError(f"spare_levels={spare}; it must be 0 or more, or left out.")
        if spare and not self.distractors:
            raise ValueError(
                f"spare_levels={spare} and distractors=false contradict each other: levels that the proof does not "
                "pass are distractors. Leave out one of them."
            )
        levels = self.hops_to + spare
        asked = f"hops_to={self.hops_to}" + (f" with spare_levels={spare}" if spare else "")
        concepts, properties = 2 * levels + 4, 2 * levels + 1
        if concepts > len(NAMES[self.names]):
            more = ", or set names=generated" if self.names is Names.released else ""
            raise ValueError(
                f"{asked} needs {concepts} names of concepts, and {len(NAMES[self.names])} are {self.names}. "
                f"Lower hops_to or spare_levels{more}."
            )
        if properties > len(FAMILY_OF):
            raise ValueError(
                f"{asked} needs {properties} properties, and there are {len(FAMILY_OF)}. Lower hops_to or spare_levels."
            )


def draw(rng: random.Random, dials: OntologyDials) -> Row:
    """One row: question, steps (the sentences of the proof two by two), answer, and what is known about it.

    hops; levels, of the chain; entity; chain, the concepts of the proof from the entity's own up; property, the word
    asked about; negated_query.
    """
    hops = rng.randint(dials.hops_from, dials.hops_to)
    levels = hops + _spare_levels(rng, dials, hops)
    names = rng.sample(NAMES[dials.names], 2 * levels + 4)
    chain, sides, (apart, above, elsewhere) = names[: levels + 1], names[levels + 1 : -3], names[-3:]
    start = rng.randint(0, levels - hops)
    passed = chain[start : start + hops]
    shares = dict.fromkeys(passed, NEGATED_ON_THE_WAY) | {passed[-1]: NEGATED_AT_THE_END}
    bearers = [*chain[:-1], *sides, apart]
    own = {
        concept: Claim(concept, word, False, rng.random() < shares.get(concept, NEGATED))
        for concept, word in zip(bearers, _properties(rng, len(bearers)), strict=True)
    }
    ending = own[passed[-1]]
    proof_rules = [*(_is_a(*pair) for pair in pairwise(passed)), ending]
    rules = _ordered(dials.ordering, chain, sides, (apart, above), own)
    if dials.ordering is Ordering.random:
        rng.shuffle(rules)
    entity = rng.choice(ENTITIES)
    facts = [_is_a(entity, passed[0])]
    if dials.distractors:
        rules.insert(rng.randrange(len(rules) + 1), ending.of(elsewhere).denied())
        facts.insert(rng.randrange(2), _is_a(entity, apart))
    else:
        rules = [rule for rule in rules if rule in proof_rules]
    told = {rule: _rule(rng, rule) for rule in rules}
    proof = [_fact(_is_a(entity, passed[0]))]
    for rule in proof_rules:
        proof += [told[rule], _fact(rule.of(entity))]
    true = rng.random() < 0.5
    query = ending.of(entity) if true else ending.of(entity).denied()
    return {
        "question": " ".join([*told.values(), *map(_fact, facts)]) + f" {ASKED}" + _fact(query),
        "steps": [" ".join(proof[i : i + 2]) for i in range(0, len(proof), 2)], "answer": str(true), "hops": hops,
        "levels": levels, "entity": entity, "chain": passed, "property": ending.word, "negated_query": query.negated,
    }  # fmt: skip


def _spare_levels(rng: random.Random, dials: OntologyDials, hops: int) -> int:
    """In the original a chain ends after each level with probability 1 / (2 hops + 4), or when families run out."""
    if not dials.distractors:
        return 0
    if dials.spare_levels is not None:
        return dials.spare_levels
    most = max(0, RELEASED_LEVELS - hops)
    return rng.choices(range(most + 1), [(1 - 1 / (2 * hops + 4)) ** spare for spare in range(most + 1)])[0]


def _properties(rng: random.Random, count: int) -> list[str]:
    """Different words, dealt from the families in rounds: each gives one word a round until it is used up."""
    families = [rng.sample(family, len(family)) for family in FAMILIES]
    words: list[str] = []
    while len(words) < count:
        rng.shuffle(families)
        words += [family.pop() for family in families]
        families = [family for family in families if family]
    return words[:count]


def _is_a(subject: str, concept: str) -> Claim:
    return Claim(subject, concept, True, False)


def _ordered(
    ordering: Ordering, chain: Sequence[str], sides: Sequence[str], pair: tuple[str, str], own: dict[str, Claim]
) -> list[Claim]:
    """The rules as the original orders them, `backward` or, for any other ordering, `forward`."""
    levels = [
        [own[concept], _is_a(concept, parent), _is_a(concept, side)]
        for concept, parent, side in zip(chain[:-1], chain[1:], sides, strict=True)
    ]
    apart = [own[pair[0]], _is_a(*pair)]
    if ordering is Ordering.backward:
        levels = [[*parents, mine] for mine, *parents in reversed(levels)]
        apart.reverse()
    return [rule for level in levels for rule in level] + [own[side] for side in reversed(sides)] + apart


def _rule(rng: random.Random, rule: Claim) -> str:
    form = rng.choice(("Every", "Each", None, None))
    sign = "not " if rule.negated else ""
    if form is None:
        return f"{rule.subject.capitalize()}es are {sign}{rule.word}{'es' if rule.noun else ''}."
    return f"{form} {rule.subject} is {sign}{_one(rule)}."


def _fact(fact: Claim) -> str:
    return f"{fact.subject} is {'not ' if fact.negated else ''}{_one(fact)}."


def _one(claim: Claim) -> str:
    article = "" if not claim.noun else "an " if claim.word[0] in "aeiou" else "a "
    return article + claim.word


def measure(row: Row) -> Measures:
    """Statistics of the text of one row, released or generated.

    Floats are averaged over rows, texts give shares over rows, lists are pooled. A place is 0 for the first sentence
    among the rules of the context and 1 for the last. The row must be one that `prover.check` accepts; text that cannot
    be parsed raises ValueError.
    """
    question, proof = parse_question(row["question"]), parse_proof(row["steps"])
    query, rules = question.query.claim, question.rules
    place = {rule.text: index / max(1, len(rules) - 1) for index, rule in enumerate(rules)}
    used = [sentence for sentence in proof if sentence.is_rule]
    passed = {rule.claim.subject for rule in used}
    end = used[-1].claim
    parents = [rule.claim for rule in rules if rule.claim.noun]
    own = [rule.claim for rule in rules if not rule.claim.noun]
    contrary = [rule for rule in rules if rule.claim[1:] == end.denied()[1:]]
    children = {claim.subject for claim in parents}
    others = [claim for claim in own if claim.subject not in passed and claim.word != end.word]
    places = [place[rule.text] for rule in used]
    lengths = [float(len(sentence.text.split())) for sentence in question.context]
    return {
        "sentences of the context": float(len(question.context)),
        "sentences of the proof": float(len(proof)),
        "steps": float(len(row["steps"])),
        "words of the question": float(len(row["question"].split())),
        "words of the proof": float(sum(len(step.split()) for step in row["steps"])),
        "words of a sentence of the context": lengths,
        "concepts": float(len({word for claim in parents + own for word in _nouns(claim)})),
        "properties": float(len({claim.word for claim in own})),
        "concepts with two parents": float(len(parents) - len(children)),
        "concepts with a property": float(len({claim.subject for claim in own})),
        "rules about a property": float(len(own)),
        "facts about the entity": float(len(question.facts)),
        "the fact of the proof is the last": float(question.context[-1].text == proof[0].text),
        "entity": query.subject,
        "answer": row["answer"],
        "query": "negated" if query.negated else "plain",
        "answer and query": f"{row['answer']}, query {'negated' if query.negated else 'plain'}",
        "conclusion": "negated" if end.negated else "plain",
        "property asked about": query.word,
        "family of the property asked about": FAMILY_OF.get(query.word, "other"),
        "family of a property": [FAMILY_OF.get(claim.word, "other") for claim in own],
        "name of the entity's concept": proof[0].claim.word,
        "name of the last concept of the proof": end.subject,
        "name of the concept with the contrary property": [rule.claim.subject for rule in contrary],
        "sentences that name the concept with the contrary property": [
            _mentions(question.context, rule.claim.subject) for rule in contrary
        ],
        "sentences that name the last concept of the proof": _mentions(question.context, end.subject),
        "name of a concept": sorted({word for claim in parents + own for word in _nouns(claim)}),
        "negated: properties passed by the proof": [
            float(claim.negated) for claim in own if claim.subject in passed and claim != end
        ],
        "negated: properties beside the proof": [float(claim.negated) for claim in others],
        "negated: sentences of the context": [float(rule.claim.negated) for rule in question.context],
        "form of a rule": [rule.form for rule in rules],
        "form of a rule of the proof": [rule.form for rule in used],
        "form of the contrary property": [rule.form for rule in contrary],
        "place of a rule of the proof": places,
        "place of the proof's first rule": places[0],
        "place of the proof's last rule": places[-1],
        "place of the contrary property": [place[rule.text] for rule in contrary],
        "contrary property before the asked one": [float(place[rule.text] < places[-1]) for rule in contrary],
        "rules of the proof read in order": [float(a < b) for a, b in pairwise(places)],
    }


def _nouns(claim: Claim) -> list[str]:
    return [claim.subject, claim.word] if claim.noun else [claim.subject]


def _mentions(context: Sequence[Sentence], concept: str) -> float:
    return float(sum(concept in _nouns(sentence.claim) for sentence in context))
