"""Check the arithmetic of calculator annotations such as `48/2=24`.

They are parsed here, never run as code, and evaluated exactly, as fractions. An annotation is the text between `<<`
and `>>` in the solutions of GSM8K (Cobbe et al., arXiv 2110.14168).

| written        | read as                                                    |
| -------------- | ---------------------------------------------------------- |
| 1,200  .5  5.  | numbers; commas as coconut.tasks.gsm8k reads them          |
| + - * / ( )    | as usual; also × x · for * and ÷ for / and − – for -       |
| //             | division down to a whole number, as GSM8K's calculator has |
| ^  **          | power with a whole exponent, to the right, before the sign |
| 20%            | 20/100, whatever stands before it                          |
| $ € £ ¥, space | nothing                                                    |

`a=b=c` states that b and c equal a. A number on its own is a rounded value: it is right if the exact value rounds to it
at its last written digit (halves away from zero). A truncated value (2/3=.66) is wrong. In the released GSM8K all
27,998 annotations of both splits are exact.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any

from coconut.tasks import gsm8k

LONGEST = 500  # characters of an equation
DEEPEST = 50  # nesting of parentheses, signs and powers
BITS = 4096  # of a numerator or a denominator

Number = int | Fraction


class Outcome(StrEnum):
    exact = "exact"
    rounded = "rounded"
    wrong = "wrong"
    unreadable = "unreadable"


@dataclass(frozen=True)
class Verdict:
    """The result of `check`. `value` and `written` are None if the equation is unreadable."""

    outcome: Outcome
    value: Fraction | None = None  # of the calculation, exact
    written: Fraction | None = None  # after the last '='
    operators: tuple[str, ...] = ()  # of the calculation, in the order of their use
    why: str = ""  # why it is unreadable

    @property
    def holds(self) -> bool:
        return self.outcome in (Outcome.exact, Outcome.rounded)


@lru_cache(maxsize=1 << 16)
def check(equation: str) -> Verdict:
    """Check whether all sides of the equation agree. Any text gets a verdict; nothing is raised."""
    try:
        if len(equation) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} characters")
        sides = [_Side(side) for side in equation.split("=")]
        if len(sides) == 1:
            raise ValueError("there is no '='")
    except ValueError as error:
        return Verdict(Outcome.unreadable, why=str(error))
    told = next((side for side in sides if side.place is None), sides[0])
    fits = {side.fits(told.value) for side in sides}
    outcome = next(found for found in (Outcome.wrong, Outcome.rounded, Outcome.exact) if found in fits)
    return Verdict(outcome, Fraction(told.value), Fraction(sides[-1].value), tuple(told.operators))


def shown(value: Fraction) -> str:
    """The value as text for messages: 0.25, or 10/3 (about 3.33333)."""
    near = Context(prec=28).divide(Decimal(value.numerator), Decimal(value.denominator))
    if Fraction(near) == value and abs(near.adjusted()) < 28:
        return f"{near.normalize():f}"
    about = f"about {near:.6g}"
    return f"{value} ({about})" if max(_bits(value)) < 64 else about


def _power(base: Number, exponent: Number) -> Number:
    if exponent.denominator != 1:
        raise ValueError("the exponent is not a whole number")
    if abs(exponent) * max(_bits(base)) > BITS:
        raise ValueError("the number is too large")
    return Fraction(base) ** int(exponent)


def _bits(value: Number) -> tuple[int, int]:
    return value.numerator.bit_length(), value.denominator.bit_length()


SIGN = 3  # binds closer than a product and less close than a power


@dataclass(frozen=True)
class _Operator:
    rank: int
    apply: Callable[[Any, Any], Number]
    right_rank: int  # the lowest rank of an operator in its right operand


OPERATORS = {
    "+": _Operator(1, operator.add, 2), "-": _Operator(1, operator.sub, 2), "*": _Operator(2, operator.mul, 3),
    "/": _Operator(2, Fraction, 3), "//": _Operator(2, operator.floordiv, 3), "^": _Operator(4, _power, 3),
}  # fmt: skip

_ALIKE = str.maketrans({**dict.fromkeys("×xX·⋅∙", "*"), "÷": "/", **dict.fromkeys("−–—", "-")})
_CURRENCY = str.maketrans(dict.fromkeys("$€£¥", " "))
_NUMBER = rf"{gsm8k.WHOLE}(?:\.[0-9]*)?|\.[0-9]+"
_TOKEN = re.compile(rf"\s*(?:({_NUMBER})|(\*\*|//|[-+*/^()%]))")
_LONE = re.compile(rf"\s*[-+]?\s*(?:{_NUMBER})\s*%?\s*")
END = ""


class _Side:
    """One side of an equation: its value, and the last written place if it is a number on its own.

    Raises ValueError if it cannot be read.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        plain = self.text.translate(_ALIKE).translate(_CURRENCY)
        self.operators: list[str] = []
        self.tokens = _tokens(plain)
        self.value = self._expression(1, 0)
        if self._next() != END:
            raise ValueError(f"an operator is missing in {self.text!r}")
        self.place: Fraction | None = None
        if _LONE.fullmatch(plain):
            decimals = len(plain.partition(".")[2].rstrip(" %"))
            self.place = Fraction(1, 10 ** (decimals + 2 * ("%" in plain)))

    def fits(self, exact: Number) -> Outcome:
        off = abs(self.value - exact)
        if off == 0:
            return Outcome.exact
        if self.place is None or 2 * off > self.place or (2 * off == self.place and abs(self.value) < abs(exact)):
            return Outcome.wrong
        return Outcome.rounded

    def _next(self) -> str:
        return self.tokens.pop()

    def _expression(self, rank: int, depth: int) -> Number:
        """Parse and evaluate by precedence climbing: operators of `rank` and above."""
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
        value = self._operand(depth)
        while (found := OPERATORS.get(self.tokens[-1])) and found.rank >= rank:
            sign = self._next()
            right = self._expression(found.right_rank, depth + 1)
            try:
                value = found.apply(value, right)
            except ZeroDivisionError:
                raise ValueError("a number is divided by zero") from None
            if max(_bits(value)) > BITS:
                raise ValueError("the number is too large")
            self.operators.append(sign)
        return value

    def _operand(self, depth: int) -> Number:
        token = self._next()
        if token in ("+", "-"):
            value = self._expression(SIGN, depth + 1)
            return -value if token == "-" else value
        if token == "(":
            value = self._expression(1, depth + 1)
            if self._next() != ")":
                raise ValueError(f"a ')' is missing in {self.text!r}")
        elif token[-1:].isdigit() or token.endswith("."):
            value = _number(token)
        else:
            raise ValueError(f"a number is missing in {self.text!r}")
        while self.tokens[-1] == "%":
            self._next()
            value = Fraction(value, 100)
        return value


def _tokens(text: str) -> list[str]:
    """The tokens in reverse order, so that the next one is popped from the end."""
    tokens, place = [], 0
    text = text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"{text[place:].lstrip()[0]!r} is no part of a calculation")
        tokens.append("^" if found[2] == "**" else found[1] or found[2])
        place = found.end()
    return [END, END, *reversed(tokens)]


def _number(token: str) -> Number:
    whole, _, decimals = token.replace(",", "").partition(".")
    return Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else int(whole)
