"""Compare runs over the sets of a suite: the tests of all sets and pairs are corrected together."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

from coconut.analysis.comparable_runs import expand_patterns
from coconut.analysis.config import TableConfig
from coconut.analysis.run_comparison import Comparison, Pair, command_of, compare_evaluations, warnings_of
from coconut.analysis.statistics import holm


@dataclass(frozen=True)
class SuiteComparison:
    """The comparisons of the same runs on each set that all of them were evaluated on, by the set's name."""

    suite: str
    sets: dict[str, Comparison]
    warnings: list[str]
    command: str

    @property
    def first(self) -> Comparison:
        """The comparison on the first set. Groups and runs are the same in all, their evaluations are not."""
        return next(iter(self.sets.values()))

    @property
    def pairs(self) -> list[tuple[str, Pair]]:
        """(set, pair) of all sets."""
        return [(name, pair) for name, compared in self.sets.items() for pair in compared.pairs]


def compare_suite(config: TableConfig) -> SuiteComparison:
    """Compare the runs on every set of the suite that all of them were evaluated on.

    Each pair of methods is tested on each set, and p is corrected over all sets and pairs (Holm). Raises ValueError if
    no set is common to all runs, or as `comparable_runs` does.
    """
    folders = expand_patterns(config.runs)
    usual = config.precision is TableConfig.precision
    named = {name: name if usual else f"{name}-{config.precision.value}" for name in config.suite.sets}
    without = {
        name: [run for run in folders if not (run / "evaluation" / f"{evaluation}.json").is_file()]
        for name, evaluation in named.items()
    }
    sets = [name for name, missing in without.items() if not missing]
    left_out = [
        f"{name} is left out, since these runs were not evaluated on it: {', '.join(map(str, missing))}."
        for name, missing in without.items()
        if missing
    ]
    if not sets:
        more = "" if usual else f" engine.precision={config.precision.value}"
        commands = [f"coconut evaluate run={shlex.quote(str(run))} suite={config.suite.name}{more}" for run in folders]
        raise ValueError("\n".join([*left_out, "Nothing is left to compare. Evaluate first:", *commands]))
    command = command_of(config)
    compared = corrected({name: compare_evaluations(config.runs, named[name], command) for name in sets})
    _refuse_other_protocols(compared)
    said = {name: warnings_of(each.groups, each.pairs) for name, each in compared.items()}
    alike = Counter(warning for warnings in said.values() for warning in set(warnings))
    of_all = [warning for warning in next(iter(said.values())) if alike[warning] == len(said) > 1]
    of_one = [f"{name}: {text}" for name, texts in said.items() for text in texts if text not in of_all]
    return SuiteComparison(config.suite.name, compared, [*left_out, *of_all, *of_one], command)


def _refuse_other_protocols(sets: Mapping[str, Comparison]) -> None:
    """Raise ValueError if runs were evaluated on a set with different judges or limits of new tokens."""
    for name, compared in sets.items():
        for key in ("judge", "max_new_tokens"):
            values = {str(run.folder): run.evaluation["key"][key] for run in compared.runs}
            if len(set(values.values())) > 1:
                raise ValueError(
                    f"The runs were evaluated on {name} with different values of {key}: "
                    f"{', '.join(f'{folder} {value}' for folder, value in values.items())}. Evaluate them again, with "
                    "the same suite."
                )


def corrected(sets: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons with p corrected over the pairs of all of them (Holm)."""
    p_values = iter(holm([pair.p for compared in sets.values() for pair in compared.pairs]))
    return {
        name: replace(
            compared,
            pairs=[
                replace(pair, p_holm=p)
                for pair, p in zip(compared.pairs, islice(p_values, len(compared.pairs)), strict=True)
            ],
        )
        for name, compared in sets.items()
    }
