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

Settings = dict[str, Any]  # of a backend, by their names


@dataclass(frozen=True)
class Space:
    """All combinations of the values of some dimensions. `dimensions`: the settings of each value by its label."""

    dimensions: dict[str, dict[str, Settings]]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Space:
        """A space from a configuration, which has one of three forms for each dimension:

        - a list: values of the setting that has the dimension's name;
        - a mapping to mappings: each name stands for several settings, `{greedy: {temperature: 0}, vote: {...}}`;
        - a mapping to lists of texts: each combination of them is one text (AdaReasoner's instruction, base x
          variation), a value of the setting that has the dimension's name.

        Raises ValueError if there is no dimension, or if one has another form, fewer than two values or equal ones.
        """
        if not spec:
            raise ValueError("space is empty. Add a dimension, such as '+space.num_thoughts=[0,1,2]'.")
        dimensions = {str(name): _dimension(str(name), values) for name, values in spec.items()}
        owner: dict[str, str] = {}
        for name, values in dimensions.items():
            for key in {key for settings in values.values() for key in settings}:
                if owner.setdefault(key, name) != name:
                    raise ValueError(f"space.{owner[key]} and space.{name} both set {key}.")
        return cls(dimensions)

    def __len__(self) -> int:
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.dimensions.values()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.dimensions)

    @property
    def keys(self) -> set[str]:
        """The names of all settings that the space sets."""
        return {key for values in self.dimensions.values() for settings in values.values() for key in settings}

    def labels(self, number: int) -> dict[str, str]:
        """The labels of the configuration with this number, by dimension."""
        labels = {}
        for name, values in reversed(self.dimensions.items()):
            number, index = divmod(number, len(values))
            labels[name] = list(values)[index]
        return {name: labels[name] for name in self.dimensions}

    def number(self, indices: Sequence[Any]) -> Any:
        """The number of the configuration with these indices of values; of many, if they are arrays or tensors."""
        number = 0
        for size, index in zip(self.sizes, indices, strict=True):
            number = number * size + index
        return number

    def settings(self, number: int) -> Settings:
        """The backend settings of the configuration with this number."""
        values = [self.dimensions[name][label] for name, label in self.labels(number).items()]
        return {key: setting for settings in values for key, setting in settings.items()}

    def label(self, number: int) -> str:
        return ", ".join(f"{name} {label}" for name, label in self.labels(number).items())

    def find(self, labels: Mapping[str, Any]) -> int:
        """The number of the configuration with these labels; a dimension that is not named takes its first value.

        Raises ValueError for an unknown dimension or value.
        """
        if unknown := labels.keys() - set(self.names):
            raise ValueError(f"There is no dimension {min(unknown)}; the space has {', '.join(self.names)}.")
        indices = []
        for name, values in self.dimensions.items():
            known = list(values)
            label = str(labels.get(name, known[0]))
            if label not in known:
                raise ValueError(f"{name} has no value {label}; its values are {', '.join(known)}.")
            indices.append(known.index(label))
        return self.number(indices)


def _dimension(name: str, spec: Any) -> dict[str, Settings]:
    if isinstance(spec, Mapping) and spec and all(isinstance(part, Mapping) for part in spec.values()):
        values = [(str(label), dict(settings)) for label, settings in spec.items()]
    elif isinstance(spec, Mapping) and spec and all(map(_is_list, spec.values())):
        texts = [" ".join(str(part) for part in parts if part) for parts in product(*spec.values())]
        values = [(text, {name: text}) for text in texts]
    elif _is_list(spec):
        values = [(str(value), {name: value}) for value in spec]
    else:
        raise ValueError(
            f"space.{name} is {spec!r}; it must be a list of values, such as [0, 1, 2], or names with settings, "
            "such as {greedy: {temperature: 0}, vote: {temperature: 1, samples: 5}}."
        )
    if len(dict(values)) < max(len(values), 2):
        raise ValueError(
            f"space.{name} has the values {[label for label, _ in values]}; there must be two or more, all different. "
            "Leave out a dimension with one value."
        )
    return dict(values)


def _is_list(spec: Any) -> bool:
    return isinstance(spec, Sequence) and not isinstance(spec, str)
