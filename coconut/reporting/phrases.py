"""Numbers in words, as the pages have them."""

from __future__ import annotations

import re
from datetime import UTC, datetime


def typeset(text: str) -> str:
    """Use minus signs in front of numbers, and no-break spaces in front of percent signs."""
    return re.sub(r"(?<![\w.\-])-(?=\d)", "−", text).replace(" %", "\N{NO-BREAK SPACE}%")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def between(low: float, high: float) -> str:
    """An interval of shares in percent, without the sign: "47.5 to 52.5"."""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def counted(count: float, noun: str) -> str:
    """A phrase such as "1 thought", "2.5 thoughts" or "1,500 thoughts"."""
    return f"{count:{',.0f' if count >= 100 else '.3g'}} {noun}{'s' * (count != 1)}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, "+0.50" or "−1.25"."""
    return f"{value:+.{digits}f}".replace("-", "−")


def whole_percent(share: float) -> str:
    """A whole percentage. A small share is not rounded to 0, and a share near 1 not to 100."""
    share = min(max(share, 0.0), 1.0)
    if 0.0005 < share < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 0.9995 else f"{100 * share:.0f} %"


def utc(time: str) -> str:
    """A time in ISO format as date and minute in UTC."""
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
