"""Names of entities and concepts: those of the released ProsQA, and generated ones for graphs that need more."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import product


class Names(StrEnum):
    released = "released"
    generated = "generated"


_PERSONS = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
_CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus "
    "vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
)
PERSONS, CONCEPTS = tuple(_PERSONS.split()), tuple(_CONCEPTS.split())

_LETTERS = "b bl br d dr f fl fr g gl gr h j k kl kr l m n p pl pr r s sk sl sn sp st t tr v w y z"
_ONSETS = _LETTERS.split()
_NAMES = {
    Names.released: (PERSONS, CONCEPTS),
    Names.generated: (
        [f"{a}{b}{c}".capitalize() for a, b, c in product(_ONSETS, "aeiou", ("da", "lo", "mi", "ne", "ro"))],
        sorted({f"{a}{b}{c}pus" for a, b, c in product(_ONSETS, "aeiou", ["l", "m", "n", "r", "s"])} - set(CONCEPTS)),
    ),
}


def pools(names: Names) -> tuple[Sequence[str], Sequence[str]]:
    """The names of persons, for nodes without a parent, and those of concepts, for the others."""
    return _NAMES[names]
