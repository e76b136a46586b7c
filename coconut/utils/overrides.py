"""KEY=VALUE arguments: a value that is text in the schema arrives to the letter.

Hydra's grammar would take `run=1.10` for a number and refuse `run=lr=0.1`. The annotations of a schema say what is
text, and which kind of text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from coconut.utils.files import decode_utf8

# Kinds of text in the annotations of a schema; a plain str is a name.
PathName = Annotated[str, "path"]  # a file or folder: ~ is the home folder
Place = Annotated[str, "place"]  # a folder, or a name elsewhere, such as OWNER/NAME on the Hugging Face hub
Text = Annotated[str, "text"]  # what a model reads: quotes, commas and ${ are part of it
Template = Annotated[str, "template"]  # text around {}: \n is a newline, \t a tab, \\ a backslash

QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
LISTED = rf"""\[(?:{QUOTED}|[^\]'"])*\]"""
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Kind:
    """`tag`: name, path, place, text or template. `optional`: null means none. `many`: a list of such texts."""

    tag: str
    optional: bool
    many: bool

    @classmethod
    def of(cls, annotation: Any) -> Kind | None:
        """None if the annotation is not of text."""
        options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        inner = [option for option in options if option is not NoneType]
        if len(inner) != 1:
            return None
        many = get_origin(inner[0]) is list
        one = get_args(inner[0])[0] if many else inner[0]
        tag = "name"
        if get_origin(one) is Annotated:
            one, tag = get_args(one)
        return cls(tag, NoneType in options, many) if one is str else None


def kind_of(key: str, schema: type) -> Kind | None:
    """Of the value of a dotted key. None if the schema has no such key, or its value is not text."""
    *sections, last = key.split(".")
    for section in sections:
        schema = get_type_hints(schema).get(section, NoneType)
        if not is_dataclass(schema):
            return None
    return Kind.of(get_type_hints(schema, include_extras=True).get(last))


def as_override(argument: str, schema: type, multirun: bool = False) -> str:
    """An argument in Hydra's grammar, which gives the text in it back to the letter.

    - A value in quotes is what stands in them.
    - `null` is none, for keys that may have none.
    - ${KEY} is filled in with the value of KEY in names and paths; `\\${` is those two signs.
    - In a multirun a comma outside of quotes separates the values of a sweep.
    - A list stands in brackets, its items separated by commas; without brackets those of paths also by spaces.

    Of these a question (`Text`) has none. Arguments that are not text are left to Hydra.
    """
    key, sign, value = argument.partition("=")
    kind = kind_of(key.lstrip("+"), schema) if sign else None
    if kind is None or (multirun and FUNCTION.fullmatch(value)):
        return argument
    return f"{key}={_many(value, kind, multirun) if kind.many else _swept(value, kind, multirun)}"


def _swept(value: str, kind: Kind, multirun: bool) -> str:
    values = _separated(value, QUOTED) if multirun and kind.tag != "text" else [value]
    return ",".join(_one(each, kind) for each in values)


def _many(value: str, kind: Kind, multirun: bool) -> str:
    lists = _separated(value, LISTED) if multirun else [value.strip()]
    if not all(re.fullmatch(LISTED, each) or _is_none(each, kind) for each in lists):
        lists = [value]
    return ",".join(each if _is_none(each, kind) else _list(each, kind) for each in lists)


def _list(value: str, kind: Kind) -> str:
    bracketed = value.startswith("[") and value.endswith("]")
    items = _separated(value[1:-1] if bracketed else value, QUOTED)
    if kind.tag == "path" and not bracketed:
        items = [part for item in items for part in ([item] if re.fullmatch(QUOTED, item) else item.split())]
    return f"[{','.join(_one(item, kind) for item in items if item)}]"


def _separated(value: str, whole: str) -> list[str]:
    """What stands between commas that are not inside of something whole."""
    part = re.compile(rf"\s*(?:{whole})\s*(?=,|$)|[^,]*", re.DOTALL)
    found, place = [], 0
    while place <= len(value):
        match = part.match(value, place)
        assert match
        found.append(match[0].strip())
        place = match.end() + 1
    return found


def _is_none(value: str, kind: Kind) -> bool:
    return kind.optional and value.lower() == "null"


def _one(value: str, kind: Kind) -> str:
    if _is_none(value, kind):
        return value
    if kind.tag == "text":
        return quoted(value)
    whole = re.fullmatch(QUOTED, value, re.DOTALL)
    if kind.tag == "template":
        inner = value[1:-1].replace(f"\\{value[0]}", value[0]) if whole else value
        return quoted(re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], inner))
    return value if whole else _in_quotes(value)


def quoted(text: str) -> str:
    """Any text as a value that Hydra's grammar and OmegaConf give back to the letter."""
    return _in_quotes(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text))


def _in_quotes(text: str) -> str:
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    text = re.sub(r"(\\+)$", lambda found: found[1] * 2, text)
    return f"'{text}'"


def map_texts(config: Any, change: Callable[[str, Kind, str], str], prefix: str = "") -> None:
    """Put `change(key, kind, text)` in the place of each text of a configuration and of those in it."""
    for name, annotation in get_type_hints(type(config), include_extras=True).items():
        value, kind, key = getattr(config, name), Kind.of(annotation), f"{prefix}{name}"
        if is_dataclass(value):
            map_texts(value, change, f"{key}.")
        elif kind and value is not None:
            new = [change(key, kind, item) for item in value] if kind.many else change(key, kind, value)
            setattr(config, name, new)


def expand_home(key: str, kind: Kind, text: str) -> str:
    """`~` at the beginning of a path as the home folder."""
    return os.path.expanduser(text) if kind.tag in ("path", "place") else text


def refuse_non_utf8(values: dict[str, Any], schema: type) -> None:
    """Raise ValueError if a text, or where a run is to lie, is not UTF-8, as the files that tell of it are."""
    around = {"The current folder": os.getcwd(), "COCONUT_CACHE": os.environ.get("COCONUT_CACHE", "")}
    for name, text in (*around.items(), *_texts(values)):
        if (kind := kind_of(name, schema)) and kind.tag in ("text", "template"):  # which is no path
            decode_utf8(os.fsencode(text), name)
            continue
        for seen in (text, str(Path(text).resolve()) if text and "\0" not in text else ""):
            try:
                seen.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{name} is {seen!a}, which is not UTF-8, and what is written of it must be. Give another "
                    "name, or rename the file or folder."
                ) from None


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a nested value, with their dotted keys."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner, name)
