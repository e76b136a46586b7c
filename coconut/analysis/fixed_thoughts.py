"""Questions with equally many thoughts, where a model decides by itself whether it thinks and how long.

Most measurements exchange, count or compare thoughts, so that every question needs as many as the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from coconut.analysis.probes import Subject
from coconut.methods import parse_mode
from coconut.runs.study import NotApplicable


@dataclass(frozen=True)
class FixedThoughts:
    """A subject whose questions have equally many thoughts. `chosen`: the indices of its questions among all.

    `facts`, of a model that decides by itself: the `mode` that is forced; or `alike`, the number of `thoughts` that is
    forced, for how many `questions` `of` how many.
    """

    subject: Subject
    chosen: list[int]
    facts: dict[str, Any] = field(default_factory=dict)


def with_fixed_thoughts(subject: Subject) -> FixedThoughts:
    """The subject in settings in which every question has equally many thoughts.

    A hybrid model is in its mode with the most thoughts. A model that ends its thoughts itself takes the number that it
    most often takes by itself, of equally frequent ones the smallest; the questions are those for which it does so, so
    that their answers stay as they are. Other models stay as they are.

    Raises NotApplicable if no mode has thoughts, or if the model ends them before the first one in all questions.
    """
    reasoning = subject.lm.reasoning
    if reasoning.modes:
        thinking = [mode for mode in map(parse_mode, reasoning.modes) if mode.slot.thinks]
        if not thinking:
            raise NotApplicable(
                f"This model chooses among the modes {', '.join(reasoning.modes)}, and none of them has thoughts."
            )
        name = max(thinking, key=lambda mode: mode.num_thoughts).name
        lm = subject.lm.with_reasoning(reasoning.in_mode(name))
        return FixedThoughts(replace(subject, lm=lm, mode=name), list(range(len(subject.examples))), {"mode": name})
    if not reasoning.slot.merges or not reasoning.num_thoughts:
        return FixedThoughts(subject, list(range(len(subject.examples))))
    counts = [prediction.num_thoughts for prediction in subject.baseline.predictions]
    frequency = Counter(count for count in counts if count)
    if not frequency:
        raise NotApplicable(f"{reasoning.method} ends its thoughts before the first one, in all questions.")
    own = min(frequency, key=lambda count: (-frequency[count], count))
    chosen = [i for i, count in enumerate(counts) if count == own]
    lm = subject.lm.with_reasoning(replace(reasoning, num_thoughts=own, fixed_count=True))
    alike = {"thoughts": own, "questions": len(chosen), "of": len(counts)}
    examples = [subject.examples[i] for i in chosen]
    return FixedThoughts(replace(subject, lm=lm, examples=examples, free=subject.lm), chosen, {"alike": alike})
