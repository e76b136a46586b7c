"""Parse and check ProntoQA's sentences, independently of the generator.

The language (Saparov and He, arXiv 2210.01240) has a rule in three forms, "Every X is ...", "Each X is ..." and
"Xes are ...", and a fact, "Max is ...". The predicate is a concept, with an article unless it is plural, or a property;
either may be negated. A concept ends in -pus, its plural in -puses, and no property does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from data_builders.dataset_writer import Row

ASKED = "True or false: "

SINGULAR = re.compile(
    r"(?:(?P<form>Every|Each) (?P<concept>[a-z]*pus)|(?P<entity>(?!\w*pus)[A-Z][a-z]+)) is (?P<rest>[a-z ]+)\."
)
PLURAL = re.compile(r"(?P<concept>[A-Z][a-z]*pus)es are (?P<rest>[a-z ]+)\.")
SAID = re.compile(r"(?P<negated>not )?(?:(?P<article>an?) )?(?P<word>[a-z]+)")


class Claim(NamedTuple):
    """`subject` (a concept or an entity) is, or is not, `word`: a concept if `noun`, otherwise a property."""

    subject: str
    word: str
    noun: bool
    negated: bool

    def denied(self) -> Claim:
        return Claim(self.subject, self.word, self.noun, not self.negated)

    def of(self, entity: str) -> Claim:
        return Claim(entity, self.word, self.noun, self.negated)


class Sentence(NamedTuple):
    """A sentence and its claim. `form` is "fact" (of an entity), "every", "each" or "plural" (of a concept)."""

    text: str
    form: str
    claim: Claim

    @property
    def is_rule(self) -> bool:
        return self.form != "fact"


class Question(NamedTuple):
    context: list[Sentence]
    query: Sentence

    @property
    def rules(self) -> list[Sentence]:
        return [sentence for sentence in self.context if sentence.is_rule]

    @property
    def facts(self) -> list[Sentence]:
        return [sentence for sentence in self.context if not sentence.is_rule]


@lru_cache(maxsize=1 << 15)
def parse_sentence(text: str) -> Sentence:
    """Parse a sentence with its full stop. Raises ValueError if it is not in the language."""
    plural = PLURAL.fullmatch(text)
    found = plural or SINGULAR.fullmatch(text)
    said = found and SAID.fullmatch(found["rest"])
    if not found or not said:
        raise ValueError(
            f"{text!r} is not a sentence of ProntoQA. Wanted is 'Every X is ...', 'Xes are ...' or the like."
        )
    word, article = said["word"], said["article"]
    if plural:
        noun = word.endswith("puses")
        right = article is None
        word = word.removesuffix("es") if noun else word
    else:
        noun = article is not None or word.endswith("pus")
        right = article == (("an" if word[0] in "aeiou" else "a") if noun else None)
    if not right or noun != word.endswith("pus"):
        raise ValueError(f"{text!r} has a wrong article or number before its last word. Mend the sentence.")
    fact = None if plural else found["entity"]
    form = "plural" if plural else "fact" if fact else found["form"].lower()
    return Sentence(text, form, Claim(fact or found["concept"].lower(), word, noun, said["negated"] is not None))


def parse_text(text: str) -> list[Sentence]:
    """The sentences of a paragraph, divided at full stops. Raises ValueError as parse_sentence does."""
    *others, last = text.split(". ")
    return [*(parse_sentence(f"{part}.") for part in others), parse_sentence(last)]


def parse_question(question: str) -> Question:
    """Parse a question, "<context> True or false: <statement about an entity>". Raises ValueError for another form."""
    context, mark, asked = question.partition(f" {ASKED}")
    if not mark:
        raise ValueError(f"the question has no {ASKED.strip()!r}: it ends in {question[-60:]!r}.")
    query = parse_sentence(asked)
    if query.is_rule:
        raise ValueError(f"the question asks {asked!r}; it must ask about an entity.")
    return Question(parse_text(context), query)


def parse_proof(steps: Iterable[str]) -> list[Sentence]:
    return [sentence for step in steps for sentence in parse_text(step)]


def closure(context: Iterable[Sentence]) -> set[Claim]:
    """All claims about entities that follow from the facts by the rules, forward, the facts among them."""
    rules: dict[str, list[Claim]] = {}
    waiting: list[Claim] = []
    for sentence in context:
        if sentence.is_rule:
            rules.setdefault(sentence.claim.subject, []).append(sentence.claim)
        else:
            waiting.append(sentence.claim)
    known: set[Claim] = set()
    while waiting:
        claim = waiting.pop()
        if claim in known:
            continue
        known.add(claim)
        if claim.noun and not claim.negated:
            waiting += [rule.of(claim.subject) for rule in rules.get(claim.word, [])]
    return known


def check(row: Row) -> None:
    """Raise ValueError unless question, steps and answer of a row agree, by their text alone.

    The context must not contradict itself about an entity and must decide the query; the answer must be right; every
    sentence of the proof must be in the context or follow from two earlier ones by one rule; the last must be the query
    or its negation.
    """
    question, proof = parse_question(row["question"]), parse_proof(row["steps"])
    query = question.query.claim
    known = closure(question.context)
    for claim in known:
        if not claim.negated and claim.denied() in known:
            raise ValueError(f"the context says both that {claim.subject} is and that it is not {claim.word!r}.")
    if query not in known and query.denied() not in known:
        raise ValueError(f"{question.query.text!r} neither follows from the context nor is contradicted by it.")
    answer = str(query in known)
    if row["answer"] != answer:
        raise ValueError(f"{question.query.text!r} is {answer}, and the row's answer is {row['answer']!r}.")
    _check_proof(proof, {sentence.text for sentence in question.context})
    end = query if query in known else query.denied()
    if proof[-1].claim != end:
        raise ValueError(f"the proof ends in {proof[-1].text!r}, which does not make {question.query.text!r} {answer}.")


def _check_proof(proof: list[Sentence], context: set[str]) -> None:
    if not proof:
        raise ValueError("the row has no proof: 'steps' is empty.")
    rules: list[Claim] = []
    facts: set[Claim] = set()
    for place, sentence in enumerate(proof, start=1):
        text, _, claim = sentence
        if text not in context:
            if sentence.is_rule:
                raise ValueError(f"sentence {place} of the proof, {text!r}, is a rule that the context does not have.")
            if not any(
                claim == rule.of(claim.subject) and Claim(claim.subject, rule.subject, True, False) in facts
                for rule in rules
            ):
                raise ValueError(f"sentence {place} of the proof, {text!r}, does not follow from two before it.")
        if sentence.is_rule:
            rules.append(claim)
        else:
            facts.add(claim)
