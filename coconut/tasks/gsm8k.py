"""GSM8K, grade-school arithmetic (Cobbe et al., arXiv 2110.14168): the answer is a number."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from math import gcd

from coconut.tasks.chain import tidy

name = "gsm8k"
max_new_tokens = 64

WHOLE = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)"
"""A whole number: commas separate groups of three digits, or, as in India, the last three digits and pairs before."""

_MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9,
               "trillion": 10**12}  # fmt: skip
_MAGNITUDE = re.compile(rf"\b({'|'.join(_MAGNITUDES)})s?\b", re.IGNORECASE)
_NUMBER = re.compile(
    rf"""
    (?<![0-9^/×÷·,]) (?<![0-9][._'’]) (?<![A-Za-zÀ-ӿ])
    (?: (?: (?P<whole>[0-9]+) \s+ )? (?P<over>[0-9]+) \s*/\s* (?P<under>[0-9]+)
      | (?P<plain> {WHOLE} (?:\.[0-9]*)? | \.[0-9]+ ) (?P<power>[eE][-+]?[0-9]{{1,3}})? )
    (?![0-9]) (?![._'’,][0-9]) (?![^\W\d_]+[0-9])         # the complete numeral
    (?! \s* (?: [×÷^] | [/·*]\s*[0-9(.] ) )               # not an operand
    (?P<times> (?: [\s-]* (?:{"|".join(_MAGNITUDES)})s?\b (?!-\w) )* )
    (?! \s? (?-i:[kKMB]) (?![\w&]) )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SIGN = re.compile(r"([^\s+-]?)(\s*)([-+][-+\s]*)[(\[{*]*$")  # before a number: a character, spaces, signs
_BOUND = re.compile(r"(?:(?<![-=])[<>]=?|[≤≥±])[\s+-]*$")  # before a number: < > ±
_OPERATION = re.compile(
    r"[)\s]*(?:[-+*/^×÷·x:~'’]+|\.{2,}|plus|times|divided by|multiplied by|to)[(\s]*|\)?\(", re.IGNORECASE
)
_CODES = "USD|EUR|GBP|JPY|CNY|INR|AUD|CAD|CHF"
_CURRENCY = re.compile(rf"(?<![^\W_])(?:[A-Z]{{0,3}}¤\s?|Rs\.?\s?(?=[-+.0-9])|(?:{_CODES})\s?(?=[-+.0-9]))")
_TAG = re.compile(r"<[/|]?[a-z]\w*\|?>", re.IGNORECASE)
_SQUARE_UNIT = re.compile(r"(?<![^\W\d_])([kcdm]?m|ft|in|yd|mi)\^?[23](?![0-9])")  # m2, ft^3
_FRACTION_WORDS = re.compile(
    r"\b(?:half|halves|thirds|(?:fif|six|seven|eigh|nin|ten)ths)\b|\band (?:an?|one|two|three) (?:quarter|third)s?\b",
    re.IGNORECASE,
)
_EQUIVALENTS = {**dict.fromkeys("‐‑‒–—−﹣", "-"), **dict.fromkeys("⁄∕", "/"), "٫": ".", "٬": ","}
_MAX_LENGTH = 1000  # longer texts, in characters, are not read as numbers


def number(text: str) -> Fraction | None:
    """The exact value of the one number in a text: "$1,234.50", "-3", "72 clips", "15%", "3½", "2 million".

    None if there is no number, different numbers ("5 or 6"), a calculation ("48/2", "48+24"), or an ambiguous form
    ("1,5", "5k"). docs/data.md has a table of what is read and what is not.
    """
    text = _normalize(text)
    if len(text) > _MAX_LENGTH or _FRACTION_WORDS.search(text) or _has_non_digit_numeral(text):
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
    """Format a number: as a decimal if that is exact, else as a fraction. `number` reads it back."""
    places = next((n for n in range(_MAX_LENGTH) if 10**n % value.denominator == 0), None)
    if places is None:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    point = len(digits) - places
    return "-" * (value < 0) + digits[:point] + ("." + digits[point:] if places else "")


def key(answer: str) -> Fraction | str:
    """The answer's number; without one, its text in lower case and without the final full stop."""
    value = number(answer)
    return re.sub(r"\s*([/:])\s*", r"\1", tidy(answer).rstrip(".").casefold()) if value is None else value


def judge(predicted: str | None, gold: str) -> bool:
    """Whether two answers are exactly equal as numbers, or as text if they are not numbers."""
    return predicted is not None and key(predicted) == key(gold)


def candidates(question: str) -> list[str] | None:
    return None


def _normalize(text: str) -> str:
    """Rewrite a text with ASCII digits and signs, without currencies, tags and the exponents of units (m2)."""
    text = "".join(map(_normalize_character, text))
    text = re.sub(r"(?<=[^\W\d_])[²³]", "", text)
    text = _SQUARE_UNIT.sub(r"\1", _TAG.sub("", text))
    text = re.sub(r"(?<=[0-9])\s?¤", " ", text)
    text = _CURRENCY.sub("", text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=[.0-9])", "-", text, flags=re.IGNORECASE)
    return re.sub(r"(?<=[0-9]) ([.,]) (?=[0-9])", r"\1", text)  # spaces that a word-level tokenizer adds


def _normalize_character(sign: str) -> str:
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
    return _EQUIVALENTS.get(sign, sign)


def _has_non_digit_numeral(text: str) -> bool:
    """Whether a numeral that is not a decimal digit is next to one: the exponent in 10², the 百万 in 2百万."""
    return any(
        other.isdecimal() and not one.isdecimal() and unicodedata.numeric(one, None) is not None
        for pair in pairwise(text)
        for one, other in (pair, pair[::-1])
    )


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a match; None for a reducible fraction or an ambiguous sign."""
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
    last, space, signs = sign.groups()
    spaced = signs != signs.strip()
    binary = last not in "=:([{*~≈>" if spaced else not space and re.match(r"[\w)\]}%.]", last)
    if len(signs.split()) > 1 or len(signs.strip()) > 1 or (last and binary):
        return None
    return -value if "-" in signs else value
