"""ProntoQA made from scratch: every row can be proved, and the shares are those of the original generator."""

from __future__ import annotations

import random
from collections import Counter
from math import sqrt
from pathlib import Path

import pytest
from helpers import DATA, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.utils.files import read_json
from data_builders import prontoqa
from data_builders.dataset_writer import Row
from data_builders.ontology import ENTITIES, FAMILIES, NAMES, Names, OntologyDials, Ordering, draw, measure
from data_builders.prover import check, closure, parse_proof, parse_question, parse_sentence

EXCERPT = DATA / "prontoqa_generated.json"
REAL = SHARED / "prontoqa" / "5hop_0shot_random.json"
RELEASED = [path for path in (EXCERPT, REAL) if path.exists()]


@st.composite
def dials(pick: st.DrawFn) -> OntologyDials:
    names = pick(st.sampled_from(Names))
    most = 6 if names is Names.released else 22
    low = pick(st.integers(1, most))
    high = pick(st.integers(low, most))
    distractors = pick(st.booleans())
    spare = pick(st.none() | st.integers(0, most - high if distractors else 0))
    return OntologyDials(low, high, pick(st.sampled_from(Ordering)), names, spare, distractors)


@settings(max_examples=300, deadline=None)
@given(dials(), st.integers(0, 10_000))
def test_generated_prontoqa_rows_are_verified(dials: OntologyDials, seed: int) -> None:
    row = draw(random.Random(seed), dials)
    check(row)
    assert row == draw(random.Random(seed), dials)
    question, proof = parse_question(row["question"]), parse_proof(row["steps"])
    hops, levels = row["hops"], row["levels"]
    assert dials.hops_from <= hops <= dials.hops_to
    assert len(proof) == 2 * hops + 1
    assert [len(parse_proof([step])) for step in row["steps"]] == [2] * hops + [1]
    assert [sentence.claim.word for sentence in proof if not sentence.is_rule] == [*row["chain"], row["property"]]
    assert question.query.claim == (row["entity"], row["property"], False, row["negated_query"])
    rules = [rule.claim for rule in question.rules]
    assert len(set(rules)) == len(rules)
    assert {word for rule in rules if rule.noun for word in rule[:2]} <= set(NAMES[dials.names])
    if dials.distractors:
        assert levels == hops + dials.spare_levels if dials.spare_levels is not None else hops <= levels <= max(5, hops)
        assert (len(rules), len(question.facts)) == (4 * levels + 3, 2)
        words = Counter(rule.word for rule in rules if not rule.noun)
        assert Counter(words.values()) == {1: 2 * levels, 2: 1}, "the property asked about has a contrary, no other"
        assert words[row["property"]] == 2
        if levels <= 6:
            assert max(Counter(family for family in FAMILIES for word in words if word in family).values()) == 1
    else:
        assert (len(rules), len(question.facts)) == (hops, 1)
    assert [sentence.is_rule for sentence in question.context] == [True] * len(rules) + [False] * len(question.facts)


@pytest.mark.parametrize("distractors", [True, False])
def test_orderings_of_rules(distractors: bool) -> None:
    for seed in range(20):
        places = {}
        for ordering in Ordering:
            row = draw(random.Random(seed), OntologyDials(3, 3, ordering, distractors=distractors))
            context = [sentence.text for sentence in parse_question(row["question"]).context]
            places[ordering] = [context.index(rule.text) for rule in parse_proof(row["steps"]) if rule.is_rule]
        passed_up = places[Ordering.forward]
        passed_down = places[Ordering.backward]
        assert passed_up[:-1] == sorted(passed_up[:-1])
        assert passed_down[:-1] == sorted(passed_down[:-1], reverse=True)
        assert passed_up[-1] > passed_up[-2]
        assert passed_down[-1] < passed_down[-2]


def test_generated_names_are_new() -> None:
    made, released = NAMES[Names.generated], NAMES[Names.released]
    assert len(set(made)) == len(made) >= 48
    assert not set(made) & set(released)
    assert all(parse_sentence(f"{name.capitalize()}es are large.").claim.subject == name for name in made)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"hops_from": 0}, "hops_from=0, hops_to=5: it must be 1 <="),
        ({"hops_from": 6}, "hops_from=6, hops_to=5"),
        ({"hops_to": 7}, "hops_to=7 needs 18 names of concepts, and 17 are released.*or set names=generated"),
        ({"spare_levels": 2}, "hops_to=5 with spare_levels=2 needs 18 names"),
        ({"spare_levels": -1}, "spare_levels=-1; it must be 0 or more"),
        ({"spare_levels": 1, "distractors": False}, "spare_levels=1 and distractors=false"),
        ({"hops_to": 23, "names": Names.generated}, "hops_to=23 needs 47 properties, and there are 45"),
        ({"hops_to": 999, "names": Names.generated}, "and 420 are generated. Lower hops_to or spare_levels.$"),
    ],
)
def test_prontoqa_refuses_impossible_dials(keys: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        OntologyDials(**keys)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rng = random.Random(11)
    return [draw(rng, OntologyDials()) for _ in range(3000)]


def test_statistics_equal_those_of_the_original_generator(rows: list[Row]) -> None:
    """Within 5 standard errors of the original's rules; statistics that are constant there are constant here."""
    measured = [measure(row) for row in rows]

    def shares(key: str, expected: dict) -> None:
        pooled: list = []
        for measures in measured:
            value = measures[key]
            pooled += value if isinstance(value, list) else [value]
        found = Counter(pooled)
        assert found.keys() == expected.keys(), key
        for value, share in expected.items():
            error = sqrt(share * (1 - share) / len(pooled))
            assert abs(found[value] / len(pooled) - share) < 5 * error, (key, value, found[value] / len(pooled))

    def odds(key: str, share: float) -> None:
        shares(key, {1.0: share, 0.0: 1 - share})

    forms = {"plural": 0.5, "every": 0.25, "each": 0.25}
    shares("form of a rule", forms)
    shares("form of a rule of the proof", forms)
    shares("entity", dict.fromkeys(ENTITIES, 1 / 9))
    shares("name of the entity's concept", dict.fromkeys(NAMES[Names.released], 1 / 17))
    shares("name of the concept with the contrary property", dict.fromkeys(NAMES[Names.released], 1 / 17))
    shares("family of the property asked about", {"/".join(family): 1 / 13 for family in FAMILIES})
    shares("property asked about", {word: 1 / 13 / len(family) for family in FAMILIES for word in family})
    at_the_end = 91 / 193  # (1/3 * .7/1.7) of that and (2/3 * .3/1.3)
    shares("conclusion", {"negated": at_the_end, "plain": 1 - at_the_end})
    same, other = at_the_end / 2, (1 - at_the_end) / 2
    joint = {"True, query negated": same, "False, query plain": same}
    shares("answer and query", joint | {"True, query plain": other, "False, query negated": other})
    odds("negated: properties passed by the proof", 13 / 47)  # (1/3 / 1.7) of that and (2/3 / 1.3)
    odds("negated: properties beside the proof", 1 / 3)
    odds("the fact of the proof is the last", 0.5)
    odds("contrary property before the asked one", 0.5)
    odds("rules of the proof read in order", 0.5)
    constant = {
        "sentences of the context": 25, "sentences of the proof": 11, "steps": 6, "concepts": 14, "properties": 11,
        "concepts with two parents": 5, "concepts with a property": 12, "facts about the entity": 2,
        "sentences that name the concept with the contrary property": [1],
        "sentences that name the last concept of the proof": 4,
    }  # fmt: skip
    for measures in [*measured, *(measure(row) for path in RELEASED for row in prontoqa.released_rows(str(path)))]:
        assert {key: measures[key] for key in constant} == constant


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_spare_levels_follow_the_original_distribution(hops: int) -> None:
    """A chain ends after each level with probability 1 / (2 hops + 4), and after the fifth; the proof lies anywhere."""
    rng = random.Random(hops)
    rows = [draw(rng, OntologyDials(hops, hops)) for _ in range(1000)]
    weights = [(1 - 1 / (2 * hops + 4)) ** spare for spare in range(6 - hops)]
    for spare, weight in enumerate(weights):
        share = weight / sum(weights)
        found = sum(row["levels"] == hops + spare for row in rows) / len(rows)
        assert abs(found - share) < 5 * sqrt(share * (1 - share) / len(rows))
    below = Counter(_levels_below(row) for row in rows if row["levels"] == 5)
    assert below.keys() == set(range(6 - hops))
    share = 1 / len(below)
    assert all(abs(count - share * below.total()) < 5 * sqrt(share * below.total()) for count in below.values())


def _levels_below(row: Row) -> int:
    children = {rule.claim.word: rule.claim.subject for rule in parse_question(row["question"]).rules}
    concept, levels = row["chain"][0], 0
    while concept in children:
        concept, levels = children[concept], levels + 1
    return levels


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.name)
def test_released_prontoqa_rows_are_verified(path: Path) -> None:
    examples = [example["test_example"] for example in read_json(path).values()]
    for row, example in zip(prontoqa.released_rows(str(path)), examples, strict=True):
        check(row)
        question = parse_question(row["question"])
        context = " ".join(sentence.text for sentence in question.context)
        assert row["question"] == f"{context} True or false: {question.query.text}"
        assert row["question"] == f"{example['question']} {example['query']}"
        assert [sentence.text for sentence in parse_proof(row["steps"])] == example["chain_of_thought"]
        assert (len(row["steps"]), row["answer"]) == (6, example["answer"])


def test_closure_derives_claims_forward() -> None:
    row = prontoqa.released_rows(str(EXCERPT))[0]
    question = parse_question(row["question"])
    known = closure(question.context)
    assert {claim.subject for claim in known} == {"Max"}
    assert {claim.word for claim in known if claim.noun} == {
        *("vumpus", "brimpus", "grimpus", "shumpus", "numpus"),  # the proof
        *("lempus", "zumpus", "rompus", "gorpus", "sterpus", "impus"),  # the other parents, and the top
        *("lorpus", "wumpus"),  # apart
    }
    assert len([claim for claim in known if not claim.noun]) == 11
    assert sum(claim.negated for claim in known) == 6
    measures = measure(row)
    assert measures["answer and query"] == "True, query negated"
    assert measures["family of the property asked about"] == "metallic/wooden/luminous/liquid"
    assert measures["name of the concept with the contrary property"] == ["yumpus"]


@settings(max_examples=60, deadline=None)
@given(dials(), st.integers(0, 10_000), st.data())
def test_check_refuses_corrupted_rows(dials: OntologyDials, seed: int, data: st.DataObject) -> None:
    row = draw(random.Random(seed), dials)
    question, proof = parse_question(row["question"]), parse_proof(row["steps"])
    texts = [sentence.text for sentence in proof]
    hop = 2 * data.draw(st.integers(0, row["hops"] - 1)) + 1
    rule = texts[hop]

    def refused(complaint: str, **change: object) -> None:
        with pytest.raises(ValueError, match=complaint):
            check(row | change)

    refused("the row's answer is", answer=str(row["answer"] == "False"))
    refused("neither follows", question=row["question"].replace(f"{rule} ", "", 1))
    refused("neither follows", question=row["question"].replace(f" {texts[0]}", "", 1))
    refused("the row's answer is", question=_with_query(row, texts[-1], same=row["answer"] == "False"))
    refused("both that", question=row["question"].replace(" True", f" {_denied(texts[-1])} True", 1))
    refused("does not follow", steps=[*texts[:hop], texts[hop + 1], rule, *texts[hop + 2 :]])
    refused("does not follow", steps=[*texts[:hop], *texts[hop + 1 :]])
    refused(
        "that the context does not have", steps=[*texts[:hop], f"Every {row['chain'][0]} is an emptypus.", *texts[hop:]]
    )
    refused("does not follow", steps=[*texts[: hop + 1], f"{row['entity']} is absent.", *texts[hop + 2 :]])
    refused("which does not make", steps=texts[:-1])
    refused("which does not make", steps=texts[:-2])
    refused("has no proof", steps=[])
    refused("has no 'True or false:'", question=row["question"].replace("True or false", "Say"))
    refused("must ask about an entity", question=row["question"].replace(question.query.text, rule))


def _denied(statement: str) -> str:
    return statement.replace(" is not ", " is ") if " is not " in statement else statement.replace(" is ", " is not ")


def _with_query(row: Row, conclusion: str, same: bool) -> str:
    context, mark, _ = row["question"].partition(" True or false: ")
    return context + mark + (conclusion if same else _denied(conclusion))


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("Every impus is a lempus.", ("every", ("impus", "lempus", True, False))),
        ("Each lempus is not an impus.", ("each", ("lempus", "impus", True, True))),
        ("Impuses are lempuses.", ("plural", ("impus", "lempus", True, False))),
        ("Impuses are not nervous.", ("plural", ("impus", "nervous", False, True))),
        ("Fae is an impus.", ("fact", ("Fae", "impus", True, False))),
        ("Fae is not nervous.", ("fact", ("Fae", "nervous", False, True))),
    ],
)
def test_parse_sentence(text: str, claim: tuple) -> None:
    assert parse_sentence(text) == (text, *claim)


@pytest.mark.parametrize(
    "text",
    [
        "Every impus is an lempus.", "Every lempus is a impus.", "Every impus is lempus.", "Fae is impus.",
        "Fae is a nervous.", "Impuses are lempus.", "Impuses are a lempus.", "Every impuses are hot.",
        "Impuses is hot.", "Impus is hot.", "every impus is hot.", "Fae is hot", "Fae is  hot.", "Fae is very hot.",
        "Fae was hot.", "",
    ],
)  # fmt: skip
def test_parse_sentence_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a sentence of ProntoQA|has a wrong article or number"):
        parse_sentence(text)
