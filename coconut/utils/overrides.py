"""Translate KEY=VALUE arguments to Hydra's grammar so that text values arrive unchanged.

By itself Hydra reads `run=1.10` as a number and refuses `run=lr=0.1`. The annotations of a schema's fields mark which
values are text, and of which kind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from coconut.utils.files import decode_utf8

# Annotations for the kinds of text in a schema; a plain str is a name.
PathName = Annotated[str, "path"]  # a file or folder: ~ is the home folder
Place = Annotated[str, "place"]  # a folder, or OWNER/NAME on the Hugging Face hub
Text = Annotated[str, "text"]  # input of a model: quotes, commas and ${ are kept as characters
Template = Annotated[str, "template"]  # text around {}: \n is a newline, \t a tab, \\ a backslash

QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
BRACKETED = rf"""\[(?:{QUOTED}|[^\]'"])*\]"""
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
TABLES = (dict[str, float], dict[str, dict[str, Any]])  # annotations of sections whose keys are not fixed
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Kind:
    """What a field's annotation says of its text.

    `tag`: name, path, place, text or template. `optional`: the value may be null. `is_list`: a list of such texts.
    """

    tag: str
    optional: bool
    is_list: bool

    @classmethod
    def of(cls, annotation: Any) -> Kind | None:
        """The kind that an annotation stands for; None if it is not text."""
        options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        inner = [option for option in options if option is not NoneType]
        if len(inner) != 1:
            return None
        is_list = get_origin(inner[0]) is list
        item = get_args(inner[0])[0] if is_list else inner[0]
        tag = "name"
        if get_origin(item) is Annotated:
            item, tag = get_args(item)
        return cls(tag, NoneType in options, is_list) if item is str else None


def kind_of(key: str, schema: type) -> Kind | None:
    """The kind of the value of a dotted key. None if the schema has no such key, or its value is not text."""
    return Kind.of(_annotation(key, schema))


def _annotation(key: str, schema: type) -> Any:
    """The annotation of a dotted key; None if the schema has no such key."""
    *sections, last = key.split(".")
    for section in sections:
        schema = get_type_hints(schema).get(section, NoneType)
        if not is_dataclass(schema):
            return None
    return get_type_hints(schema, include_extras=True).get(last)


def as_override(argument: str, schema: type, multirun: bool = False) -> str:
    """Rewrite an argument so that Hydra's grammar reads its text unchanged.

    - Quotes around a value are removed.
    - `null` is None for optional keys.
    - In names and paths ${KEY} is replaced by the value of KEY; `\\${` is a literal `${`.
    - In a multirun a comma outside of quotes separates the values of a sweep.
    - A list stands in brackets, its items separated by commas; without brackets paths may be separated by spaces.
    - An entry of a table of `TABLES` needs no + before it, whether the table has it already or not.

    None of these applies to a question (`Text`). Arguments that are not text are returned unchanged.
    """
    key, sign, value = argument.partition("=")
    if sign and "." in key and _annotation(key.partition(".")[0], schema) in TABLES:
        return f"++{argument}"
    kind = kind_of(key.lstrip("+"), schema) if sign else None
    if kind is None or (multirun and FUNCTION.fullmatch(value)):
        return argument
    if kind.is_list:
        return f"{key}={_encode_list(value, kind, multirun)}"
    values = _split_at_commas(value, QUOTED) if multirun and kind.tag != "text" else [value]
    return f"{key}={','.join(_encode(each, kind) for each in values)}"


def _encode_list(value: str, kind: Kind, multirun: bool) -> str:
    lists = _split_at_commas(value, BRACKETED) if multirun else [value.strip()]
    if not all(re.fullmatch(BRACKETED, each) or _is_none(each, kind) for each in lists):
        lists = [value]
    return ",".join(each if _is_none(each, kind) else _encode_items(each, kind) for each in lists)


def _encode_items(value: str, kind: Kind) -> str:
    bracketed = value.startswith("[") and value.endswith("]")
    items = _split_at_commas(value[1:-1] if bracketed else value, QUOTED)
    if kind.tag == "path" and not bracketed:
        items = [part for item in items for part in ([item] if re.fullmatch(QUOTED, item) else item.split())]
    return f"[{','.join(_encode(item, kind) for item in items if item)}]"


def _split_at_commas(value: str, unit: str) -> list[str]:
    """Split at the commas that are outside of matches of the regular expression `unit`."""
    part = re.compile(rf"\s*(?:{unit})\s*(?=,|$)|[^,]*", re.DOTALL)
    found, position = [], 0
    while position <= len(value):
        match = part.match(value, position)
        assert match
        found.append(match[0].strip())
        position = match.end() + 1
    return found


def _is_none(value: str, kind: Kind) -> bool:
    return kind.optional and value.lower() == "null"


def _encode(value: str, kind: Kind) -> str:
    if _is_none(value, kind):
        return value
    if kind.tag == "text":
        return quoted(value)
    is_quoted = re.fullmatch(QUOTED, value, re.DOTALL)
    if kind.tag == "template":
        inner = value[1:-1].replace(f"\\{value[0]}", value[0]) if is_quoted else value
        return quoted(re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], inner))
    return value if is_quoted else _add_quotes(value)


def quoted(text: str) -> str:
    """Quote a text so that Hydra's grammar and OmegaConf return it unchanged."""
    return _add_quotes(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text))


def _add_quotes(text: str) -> str:
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    text = re.sub(r"(\\+)$", lambda found: found[1] * 2, text)
    return f"'{text}'"


def as_arguments(config: Any, left_out: Sequence[str] = (), prefix: str = "") -> Iterator[str]:
    """Yield the KEY=VALUE arguments of a configuration's values that differ from their defaults and are not None.

    `as_override` reads them back as the same values; only a `Text` that is the word null cannot be written.
    """
    annotations = get_type_hints(type(config), include_extras=True)
    for each in fields(config):
        value, key = getattr(config, each.name), f"{prefix}{each.name}"
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if key in left_out or value is None or value == default:
            continue
        if is_dataclass(value):
            yield from as_arguments(value, left_out, f"{key}.")
        else:
            yield f"{key}={_as_value(value, Kind.of(annotations[each.name]))}"


def _as_value(value: Any, kind: Kind | None) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if kind is None:
        return json.dumps(value)
    if kind.is_list:
        items = [item if re.fullmatch(r"[\w.-]+", item) else quoted(item) for item in value]
        return f"[{','.join(items)}]"
    if kind.tag == "text":
        return value
    if kind.tag == "template":
        escaped = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
        plain = not re.fullmatch(QUOTED, escaped, re.DOTALL) and not _is_none(escaped, kind)
        return escaped if plain else "'" + escaped.replace("'", "\\'") + "'"
    plain = not re.fullmatch(QUOTED, value, re.DOTALL) and not _is_none(value, kind) and "${" not in value
    return value if plain else quoted(value)


def map_texts(config: Any, change: Callable[[str, Kind, str], str], prefix: str = "") -> None:
    """Replace each text of a configuration, nested ones included, by `change(key, kind, text)`."""
    for name, annotation in get_type_hints(type(config), include_extras=True).items():
        value, kind, key = getattr(config, name), Kind.of(annotation), f"{prefix}{name}"
        if is_dataclass(value):
            map_texts(value, change, f"{key}.")
        elif kind and value is not None:
            new = [change(key, kind, item) for item in value] if kind.is_list else change(key, kind, value)
            setattr(config, name, new)


def expand_home(key: str, kind: Kind, text: str) -> str:
    """Expand a `~` at the beginning of a path to the home folder."""
    return os.path.expanduser(text) if kind.tag in ("path", "place") else text


def refuse_non_utf8(values: dict[str, Any], schema: type) -> None:
    """Raise ValueError if a text or path is not UTF-8: a run's files, which record them, are."""
    environment = {"The current folder": os.getcwd(), "COCONUT_CACHE": os.environ.get("COCONUT_CACHE", "")}
    for name, text in (*environment.items(), *_texts(values)):
        if (kind := kind_of(name, schema)) and kind.tag in ("text", "template"):
            decode_utf8(os.fsencode(text), name)
            continue
        for form in (text, str(Path(text).resolve()) if text and "\0" not in text else ""):
            try:
                form.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{name} is {form!a}, which is not UTF-8, as the files of a run must be. Give another name, or "
                    "rename the file or folder."
                ) from None


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts of a nested value, each with its dotted key."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner, name)
