"""The ways to answer among which a policy chooses, as data: dimensions, each with its values.

A configuration takes one value of each dimension. It has a number, counted as in an array with one axis a dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """What a value is called, and the settings of a backend that it stands for."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Dimension:
    name: str
    values: tuple[Value, ...]

    @classmethod
    def of(cls, name: str, given: Any) -> Dimension:
        """From one of three forms:

        - a list: values of the setting that has the dimension's name;
        - a mapping to mappings: each name stands for several settings, `{greedy: {temperature: 0}, vote: {...}}`;
        - a mapping to lists of texts: each combination of them is one text (AdaReasoner's instruction, base x
          variation), a value of the setting that has the dimension's name.

        Raises ValueError if it is none of these, or has not two different values.
        """
        if isinstance(given, Mapping) and given and all(isinstance(part, Mapping) for part in given.values()):
            values = [Value(str(label), dict(settings)) for label, settings in given.items()]
        elif isinstance(given, Mapping) and given and all(_is_list(part) for part in given.values()):
            texts = [" ".join(str(part) for part in parts if part) for parts in product(*given.values())]
            values = [Value(text, {name: text}) for text in texts]
        elif _is_list(given):
            values = [Value(str(value), {name: value}) for value in given]
        else:
            raise ValueError(
                f"space.{name} is {given!r}; it is a list of values, such as [0, 1, 2], or names with their settings, "
                "such as {greedy: {temperature: 0}, vote: {temperature: 1, samples: 5}}."
            )
        if len({value.label for value in values}) < max(len(values), 2):
            raise ValueError(
                f"space.{name} has the values {[value.label for value in values]}; there must be two or more, all "
                "different. What has one value is no choice: leave the dimension out."
            )
        return cls(name, tuple(values))

    def index(self, label: Any) -> int:
        """Raises ValueError if no value is called so."""
        labels = [value.label for value in self.values]
        if str(label) not in labels:
            raise ValueError(f"{self.name} has no value {label}; its values are {', '.join(labels)}.")
        return labels.index(str(label))


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


@dataclass(frozen=True)
class Space:
    """All combinations of the values of some dimensions."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Space:
        """From what a configuration file holds. Raises ValueError for a dimension that is none, or for none at all."""
        if not given:
            raise ValueError("space is empty. Name what there is to choose, such as '+space.num_thoughts=[0,1,2]'.")
        dimensions = tuple(Dimension.of(str(name), values) for name, values in given.items())
        owner: dict[str, str] = {}
        for dimension in dimensions:
            for key in {key for value in dimension.values for key in value.settings}:
                if owner.setdefault(key, dimension.name) != dimension.name:
                    raise ValueError(f"space.{owner[key]} and space.{dimension.name} both set {key}.")
        return cls(dimensions)

    def __len__(self) -> int:
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(dimension.values) for dimension in self.dimensions)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def keys(self) -> set[str]:
        """The settings that are chosen."""
        return {key for value in self._values() for key in value.settings}

    def _values(self) -> Iterator[Value]:
        return (value for dimension in self.dimensions for value in dimension.values)

    def values(self, number: int) -> list[Value]:
        """Of a configuration."""
        found = []
        for dimension in reversed(self.dimensions):
            number, place = divmod(number, len(dimension.values))
            found.append(dimension.values[place])
        return found[::-1]

    def number(self, places: Sequence[Any]) -> Any:
        """Of the configuration with these values; of many, if the places are arrays or tensors."""
        number = 0
        for size, place in zip(self.sizes, places, strict=True):
            number = number * size + place
        return number

    def settings(self, number: int) -> Settings:
        """What a backend is asked for."""
        return {key: setting for value in self.values(number) for key, setting in value.settings.items()}

    def label(self, number: int) -> str:
        named = zip(self.names, self.values(number), strict=True)
        return ", ".join(f"{name} {value.label}" for name, value in named)

    def find(self, labels: Mapping[str, Any]) -> int:
        """The configuration with these values; a dimension that is not named takes its first.

        Raises ValueError for a dimension or value that there is not.
        """
        if unknown := labels.keys() - set(self.names):
            raise ValueError(f"There is no dimension {min(unknown)}; the space has {', '.join(self.names)}.")
        return self.number([dimension.index(labels.get(dimension.name, dimension.values[0].label))
                            for dimension in self.dimensions])  # fmt: skip

    def as_data(self) -> dict[str, dict[str, dict[str, Any]]]:
        """From which `of` makes it again."""
        return {d.name: {value.label: dict(value.settings) for value in d.values} for d in self.dimensions}
