"""The space of configurations that a policy chooses from, as data: dimensions, each with its values.

A configuration takes one value of each dimension. Its number is the flat index (row-major) of an array with one axis
for each dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A value of a dimension: its label, and the backend settings that it stands for."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Dimension:
    name: str
    values: tuple[Value, ...]

    @classmethod
    def of(cls, name: str, spec: Any) -> Dimension:
        """A dimension from one of three forms of configuration:

        - a list: values of the setting that has the dimension's name;
        - a mapping to mappings: each name stands for several settings, `{greedy: {temperature: 0}, vote: {...}}`;
        - a mapping to lists of texts: each combination of them is one text (AdaReasoner's instruction, base x
          variation), a value of the setting that has the dimension's name.

        Raises ValueError for another form, or for fewer than two values or equal ones.
        """
        if isinstance(spec, Mapping) and spec and all(isinstance(part, Mapping) for part in spec.values()):
            values = [Value(str(label), dict(settings)) for label, settings in spec.items()]
        elif isinstance(spec, Mapping) and spec and all(_is_list(part) for part in spec.values()):
            texts = [" ".join(str(part) for part in parts if part) for parts in product(*spec.values())]
            values = [Value(text, {name: text}) for text in texts]
        elif _is_list(spec):
            values = [Value(str(value), {name: value}) for value in spec]
        else:
            raise ValueError(
                f"space.{name} is {spec!r}; it must be a list of values, such as [0, 1, 2], or names with settings, "
                "such as {greedy: {temperature: 0}, vote: {temperature: 1, samples: 5}}."
            )
        if len({value.label for value in values}) < max(len(values), 2):
            raise ValueError(
                f"space.{name} has the values {[value.label for value in values]}; there must be two or more, all "
                "different. Leave out a dimension with one value."
            )
        return cls(name, tuple(values))

    def index(self, label: Any) -> int:
        """The index of the value with this label. Raises ValueError if there is none."""
        labels = [value.label for value in self.values]
        if str(label) not in labels:
            raise ValueError(f"{self.name} has no value {label}; its values are {', '.join(labels)}.")
        return labels.index(str(label))


def _is_list(spec: Any) -> bool:
    return isinstance(spec, Sequence) and not isinstance(spec, str)


@dataclass(frozen=True)
class Space:
    """All combinations of the values of some dimensions."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Space:
        """A space from a configuration. Raises ValueError for an invalid dimension, or if there is none."""
        if not spec:
            raise ValueError("space is empty. Add a dimension, such as '+space.num_thoughts=[0,1,2]'.")
        dimensions = tuple(Dimension.of(str(name), values) for name, values in spec.items())
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
        """The names of all settings that the space sets."""
        return {key for dimension in self.dimensions for value in dimension.values for key in value.settings}

    def values(self, number: int) -> list[Value]:
        """The values of the configuration with this number, one for each dimension."""
        values = []
        for dimension in reversed(self.dimensions):
            number, index = divmod(number, len(dimension.values))
            values.append(dimension.values[index])
        return values[::-1]

    def number(self, indices: Sequence[Any]) -> Any:
        """The number of the configuration with these indices of values; of many, if they are arrays or tensors."""
        number = 0
        for size, index in zip(self.sizes, indices, strict=True):
            number = number * size + index
        return number

    def settings(self, number: int) -> Settings:
        """The backend settings of the configuration with this number."""
        return {key: setting for value in self.values(number) for key, setting in value.settings.items()}

    def label(self, number: int) -> str:
        return ", ".join(f"{name} {value.label}" for name, value in zip(self.names, self.values(number), strict=True))

    def find(self, labels: Mapping[str, Any]) -> int:
        """The number of the configuration with these labels; a dimension that is not named takes its first value.

        Raises ValueError for an unknown dimension or value.
        """
        if unknown := labels.keys() - set(self.names):
            raise ValueError(f"There is no dimension {min(unknown)}; the space has {', '.join(self.names)}.")
        return self.number([each.index(labels.get(each.name, each.values[0].label)) for each in self.dimensions])

    def as_data(self) -> dict[str, dict[str, dict[str, Any]]]:
        """JSON data from which `of` makes the space again."""
        return {d.name: {value.label: dict(value.settings) for value in d.values} for d in self.dimensions}
