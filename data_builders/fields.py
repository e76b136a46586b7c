"""Read fields of a released record: text, numbers, yes or no. Each raises ValueError that names the field."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any


def field_of(record: Any, name: str) -> Any:
    """The value of a field, which may be null."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, and this is {type(record).__name__}.")
    if name not in record:
        raise ValueError(f"it has no {name!r}.")
    return record[name]


def text_field(record: Any, name: str) -> str:
    """A field of a record that must be text and not be blank."""
    value = field_of(record, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is {value!r}; it must be text.")
    return value.strip()


def number_field(record: Any, name: str) -> str:
    """A field that some files have as a number, and others as its text; 51.0 and "51.0" become "51"."""
    value = field_of(record, name)
    if isinstance(value, str):
        text = text_field(record, name)
        return text.removesuffix(".0") if re.fullmatch(r"-?[0-9]+\.0", text) else text
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name!r} is {value!r}; it must be a number.")
    return f"{Decimal(repr(value)):f}".removesuffix(".0")


def flag_field(record: Any, name: str) -> bool:
    value = field_of(record, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name!r} is {value!r}; it must be true or false.")
    return value
