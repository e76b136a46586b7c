"""Grade-school arithmetic (Cobbe et al., arXiv 2110.14168): the answer is a number."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from math import gcd

from coconut.tasks.chain import read_answer, read_steps, tidy

__all__ = ["WHOLE", "candidates", "judge", "key", "max_new_tokens", "name", "number", "read_answer", "read_steps",
           "written"]  # fmt: skip

name = "gsm8k"
max_new_tokens = 64

WHOLE = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)"
"""A whole number: commas separate groups of three digits, or, as in India, the last three and pairs before them."""

_MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9,
               "trillion": 10**12}  # fmt: skip
_MAGNITUDE = re.compile(rf"\b({'|'.join(_MAGNITUDES)})s?\b", re.IGNORECASE)
_NUMBER = re.compile(
    rf"""
    (?<![0-9^/×÷·,]) (?<![0-9][._'’]) (?<![A-Za-zÀ-ӿ])
    (?: (?: (?P<whole>[0-9]+) \s+ )? (?P<over>[0-9]+) \s*/\s* (?P<under>[0-9]+)
      | (?P<plain> {WHOLE} (?:\.[0-9]*)? | \.[0-9]+ ) (?P<power>[eE][-+]?[0-9]{{1,3}})? )
    (?![0-9]) (?![._'’,][0-9]) (?![^\W\d_]+[0-9])         # the whole of it
    (?! \s* (?: [×÷^] | [/·*]\s*[0-9(.] ) )               # and no operand
    (?P<times> (?: [\s-]* (?:{"|".join(_MAGNITUDES)})s?\b (?!-\w) )* )
    (?! \s? (?-i:[kKMB]) (?![\w&]) )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SIGN = re.compile(r"([^\s+-]?)(\s*)([-+][-+\s]*)[(\[{*]*$")  # before a number, and what stands before the sign
_BOUND = re.compile(r"(?:(?<![-=])[<>]=?|[≤≥±])[\s+-]*$")  # before a number
_OPERATION = re.compile(
    r"[)\s]*(?:[-+*/^×÷·x:~'’]+|\.{2,}|plus|times|divided by|multiplied by|to)[(\s]*|\)?\(", re.IGNORECASE
)
_CODES = "USD|EUR|GBP|JPY|CNY|INR|AUD|CAD|CHF"
_CURRENCY = re.compile(rf"(?<![^\W_])(?:[A-Z]{{0,3}}¤\s?|Rs\.?\s?(?=[-+.0-9])|(?:{_CODES})\s?(?=[-+.0-9]))")
_TAG = re.compile(r"<[/|]?[a-z]\w*\|?>", re.IGNORECASE)
_AREA = re.compile(r"(?<![^\W\d_])([kcdm]?m|ft|in|yd|mi)\^?[23](?![0-9])")  # m2, ft^3
_PARTS = re.compile(
    r"\b(?:half|halves|thirds|(?:fif|six|seven|eigh|nin|ten)ths)\b|\band (?:an?|one|two|three) (?:quarter|third)s?\b",
    re.IGNORECASE,
)
_ALIKE = {**dict.fromkeys("‐‑‒–—−﹣", "-"), **dict.fromkeys("⁄∕", "/"), "٫": ".", "٬": ","}
_LONGEST = 1000  # characters of a text with a number in it


def number(text: str) -> Fraction | None:
    """The one number that a text names, exactly: "$1,234.50", "-3", "72 clips", "15%", "3½", "2 million".

    None if there is no number, if there are different ones ("5 or 6"), if they are still to be calculated ("48/2",
    "48+24"), or if their form is not certain ("1,5", "5k"). docs/data.md has a table of what is read and what is not.
    """
    text = _plain_signs(text)
    if len(text) > _LONGEST or _PARTS.search(text) or _odd_numerals(text):
        return None
    found = list(_NUMBER.finditer(text))
    rest = _NUMBER.sub(" ", text)
    if not found or re.search("[0-9]", rest) or _MAGNITUDE.search(rest):
        return None
    if any(_OPERATION.fullmatch(text[one.end() : other.start()]) for one, other in pairwise(found)):
        return None
    values = {_value(match) for match in found}
    return values.pop() if len(values) == 1 else None


def written(value: Fraction) -> str:
    """A number in digits: with a point where that is exact, else as a fraction. `number` reads it again."""
    places = next((n for n in range(_LONGEST) if 10**n % value.denominator == 0), None)
    if places is None:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    point = len(digits) - places
    return "-" * (value < 0) + digits[:point] + ("." + digits[point:] if places else "")


def key(answer: str) -> Fraction | str:
    """Its number; if it is none, its text without what punctuation and capitals add."""
    value = number(answer)
    return re.sub(r"\s*([/:])\s*", r"\1", tidy(answer).rstrip(".").casefold()) if value is None else value


def judge(predicted: str | None, gold: str) -> bool:
    """Equal as numbers, exactly; as text if the gold answer is not a number."""
    return predicted is not None and key(predicted) == key(gold)


def candidates(question: str) -> list[str] | None:
    return None


def _plain_signs(text: str) -> str:
    """The same number in ASCII digits and signs, without currency, tags, and the 2 of square metres."""
    text = "".join(map(_plain_sign, text))
    text = re.sub(r"(?<=[^\W\d_])[²³]", "", text)
    text = _AREA.sub(r"\1", _TAG.sub("", text))
    text = re.sub(r"(?<=[0-9])\s?¤", " ", text)
    text = _CURRENCY.sub("", text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=[.0-9])", "-", text, flags=re.IGNORECASE)
    return re.sub(r"(?<=[0-9]) ([.,]) (?=[0-9])", r"\1", text)  # as word-level tokenizers write them


def _plain_sign(sign: str) -> str:
    if sign.isascii():
        return "¤" if sign == "$" else sign
    kind = unicodedata.category(sign)
    if kind == "Nd":
        return str(unicodedata.decimal(sign))
    if kind == "Sc":
        return "¤"
    if kind == "Cf":
        return ""
    if unicodedata.decomposition(sign).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", sign).replace("⁄", "/")
    if "！" <= sign <= "～":  # full-width
        return unicodedata.normalize("NFKC", sign)
    return _ALIKE.get(sign, sign)


def _odd_numerals(text: str) -> bool:
    """Whether a numeral that is no digit stands beside one: the exponent of 10², the 百万 of 2百万."""
    return any(
        other.isdecimal() and not one.isdecimal() and unicodedata.numeric(one, None) is not None
        for pair in pairwise(text)
        for one, other in (pair, pair[::-1])
    )


def _value(match: re.Match[str]) -> Fraction | None:
    """None if it is a fraction that can be reduced, or its sign is not certain."""
    if match["over"]:
        over, under = int(match["over"]), int(match["under"])
        if under < 2 or gcd(over, under) != 1 or (match["whole"] and over > under):
            return None
        value = Fraction(over, under) + int(match["whole"] or 0)
    else:
        value = Fraction(match["plain"].replace(",", "").rstrip(".") + (match["power"] or ""))
    for magnitude in _MAGNITUDE.finditer(match["times"]):
        value *= _MAGNITUDES[magnitude[1].lower()]
    before = match.string[: match.start()]
    if _BOUND.search(before):
        return None
    if not (sign := _SIGN.search(before)):
        return value
    last, space, told = sign.groups()
    apart = told != told.strip()
    binary = last not in "=:([{*~≈>" if apart else not space and re.match(r"[\w)\]}%.]", last)
    if len(told.split()) > 1 or len(told.strip()) > 1 or (last and binary):
        return None
    return -value if "-" in told else value
