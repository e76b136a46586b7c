"""The verdict on a run: what its measurements say together about whether its thoughts reason.

It is computed from studies that have been made, never measured. Each finding speaks for thoughts that do work, against
it, or for neither; the rule of each stands at its function and in docs/analysis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import norm

from coconut.analysis.interventions import PARTLY_USED
from coconut.runs.study import Study
from coconut.utils.console import listed

SMALL_EFFECT = 0.01  # nats; a smaller divergence is no effect
CLEAR_FALL = 0.05  # a smaller difference of accuracy is no shortcut
MOST = 0.5  # more changed answers, though the truth stays, are one even where no accuracy is lost
CONTROLS = ("majority", "other", "shuffled")  # what a probe has to beat for a step to count as readable
AT_ONCE = 0.1  # nats that all thoughts after the first add, at most, where the answer is there at once
PLACES = ("before", "pauses")  # where a step must not be read as well
SHOWN_ARCS = 6  # of more pairs the number is given
SAME = 0.01  # thoughts whose spread over questions is smaller are the same whatever the question

# What is said of models without thoughts, by what stands before their answers.
WITHOUT_THOUGHTS = {
    "steps": "This method reasons in words, not in thoughts.",
    "nothing": "This method has neither thoughts nor the whole written chain before its answers.",
    "pauses": "This method has pauses, which hold no state of the one before; only attention can use them.",
    "modes": "This model chooses by its first token how to answer, so there is no one answer to this question.",
}

Studies = Mapping[str, Study]
Row = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What one measurement says. `value`: in few words. `speaks`: for (True), against (False) or neither (None)."""

    name: str
    value: str
    speaks: bool | None


@dataclass(frozen=True)
class Verdict:
    """`headline`: one sentence. `kind`: its key. `findings`: in the order of FINDINGS."""

    kind: str
    headline: str
    findings: list[Finding]


@dataclass(frozen=True)
class Roles:
    """What the thoughts do by the study `influence`, as numbers of thoughts.

    `tried`: those that were changed, of `count`. `missed`: another question's in its place costs right answers (the
    paired interval excludes 0). `unneeded`: it surely costs less than CLEAR_FALL. `necessary`: missed, and with clearly
    more effect than the control. `sufficient`: kept alone it restores some. `through_later`: with later thoughts kept,
    its replacement clearly costs less. `arcs`: pairs of thoughts of which the first acts on the second, of `pairs`.
    `recomputed`: whether later thoughts were computed from what was changed.
    """

    count: int
    tried: list[int]
    missed: list[int]
    unneeded: list[int]
    necessary: list[int]
    sufficient: list[int]
    through_later: list[int]
    arcs: list[tuple[int, int]]
    pairs: int
    recomputed: bool

    @property
    def of_how_many(self) -> str:
        """ "6", or "the 8 tried of 24"."""
        return str(self.count) if len(self.tried) == self.count else f"the {len(self.tried)} tried of {self.count}"

    @property
    def in_sequence(self) -> bool:
        """Whether a thought acts on a later one, and through later ones on the answer."""
        return any(unit in self.through_later for unit, _ in self.arcs)


def later_of(study: Study, of: str) -> str:
    """How later units are treated in the rows of `influence` that count: computed anew where they can be."""
    return "recomputed" if any(row["of"] == of and row["later"] == "recomputed" for row in study.rows) else "kept"


def effects(study: Study, of: str, change: str, *, control: bool = False, later: str = "kept") -> dict[int, Row]:
    """The rows of `influence` with the effect on the answer, by unit."""
    return {row["unit"]: row for row in _rows_of(study, of, change, control, later) if row["on"] is None}


def effects_between(
    study: Study, of: str, change: str, *, control: bool = False, later: str = "kept"
) -> dict[tuple[int, int], Row]:
    """The rows of `influence` with the effect of a unit on a later one, by these two."""
    return {(row["unit"], row["on"]): row for row in _rows_of(study, of, change, control, later) if row["on"]}


def _rows_of(study: Study, *key: Any) -> list[Row]:
    names = ("of", "change", "control", "later")
    return [row for row in study.rows if tuple(row[name] for name in names) == key]


def roles(study: Study, of: str) -> Roles:
    """The roles of the units of a kind."""
    later = later_of(study, of)
    on_answer, turned, kept = (
        effects(study, of, "other", control=control, later=its) for control, its in
        ((False, later), (True, later), (False, "kept"))
    )  # fmt: skip
    between, turned_between = (effects_between(study, of, "other", control=control, later=later)
                               for control in (False, True))  # fmt: skip
    missed = [unit for unit, row in on_answer.items() if row["difference_high"] < 0]
    return Roles(
        count=study.facts["units"][of],
        tried=list(on_answer),
        missed=missed,
        unneeded=[unit for unit, row in on_answer.items() if row["difference_low"] > -CLEAR_FALL],
        necessary=[unit for unit in missed if _acts(on_answer[unit], turned[unit])],
        sufficient=[unit for unit, row in effects(study, of, "only").items() if row["difference_low"] > 0],
        through_later=[unit for unit in missed if kept[unit]["right_low"] > on_answer[unit]["right_high"]],
        arcs=[pair for pair, row in between.items() if _acts(row, turned_between[pair])],
        pairs=len(between),
        recomputed=later == "recomputed",
    )


def _acts(row: Row, turned: Row) -> bool:
    """Whether an effect is no small one, and clearly larger than that of its control."""
    return row["kl"] > SMALL_EFFECT and row["kl_low"] > turned["kl_high"]


def describe_arcs(found: Roles) -> str:
    """The pairs of which the first acts on the second; how many there are, if they are more than SHOWN_ARCS."""
    if len(found.arcs) > SHOWN_ARCS:
        return f"{len(found.arcs)} of {found.pairs} pairs"
    return listed(f"{unit} → {on}" for unit, on in found.arcs)


def verdict(studies: Studies, of: str, *, above_chance: bool | None = None) -> Verdict:
    """Weigh the studies of a run.

    `of`: what stands before its answers, a key of WITHOUT_THOUGHTS or "thoughts". `above_chance`: whether its accuracy
    is clearly above chance; None if that was not measured.
    """
    findings = [found for finding in FINDINGS.values() if (found := finding(studies, of))]
    if above_chance is False:
        return Verdict("chance", "Nothing can be said: the accuracy is not clearly above chance.", findings)
    kind, headline = (of, WITHOUT_THOUGHTS[of]) if of in WITHOUT_THOUGHTS else _of_thoughts(studies, findings)
    if any(found.name == SHORTCUTS and found.speaks is False for found in findings):
        headline += f" {'It' if kind == 'unmeasured' else 'Besides, it'} relies on a shortcut of its data."
    return Verdict(kind, headline, findings)


def _of_thoughts(studies: Studies, findings: list[Finding]) -> tuple[str, str]:
    """The kind and the headline for a model with thoughts that is above chance, or not known to be at it."""
    exchanged = next((found for found in findings if found.name == EXCHANGE), None)
    if exchanged is None:
        return "unmeasured", "Whether the thoughts are used was not measured (audit_thoughts)."
    if exchanged.speaks is False:
        return "unused", "The thoughts are hardly used: with those of another question about as many answers are right."
    if exchanged.speaks is None:
        return "unclear", "It is not clear whether the thoughts are used."
    study = studies.get("influence")
    if study is None or "thoughts" not in study.facts["units"]:
        return "used", "The thoughts are used; parts=[influence] would say which."
    found = roles(study, "thoughts")
    many = f"number{'s' * (len(found.necessary) > 1)}"
    needed = f"{many} {listed(map(str, found.necessary))}" if found.necessary else ""
    if len(found.necessary) == 1 and found.sufficient == found.necessary:
        others = set(found.tried) - set(found.necessary)
        rest = "; the others are not needed" if others and others <= set(found.unneeded) else ""
        return "single", f"One thought carries the answer, {needed} of {found.of_how_many}{rest}."
    if _answer_is_there_at_once(studies):
        return "at_once", "The answer is there from the first thought on; later ones make it hardly likelier."
    if len(found.necessary) > 1 and found.in_sequence:
        return "sequence", (
            f"The thoughts work in sequence: {needed} of {found.of_how_many} are needed, and earlier ones act through "
            "later ones."
        )
    if found.necessary:
        are = "are" if len(found.necessary) > 1 else "is"
        return "together", f"The thoughts are used: {needed} of {found.of_how_many} {are} needed."
    return "together", "The thoughts are used together: no single one was seen to be needed."


def _answer_is_there_at_once(studies: Studies) -> bool:
    """Whether the first thought clearly adds to the right answer, given the mark, and all others less than AT_ONCE."""
    if not (study := studies.get("prefix_values")):
        return False
    rows = of_all_questions(study, "after_mark")
    return len(rows) > 2 and rows[1]["gain_low"] > 0 and rows[1]["left_high"] < AT_ONCE


def of_all_questions(study: Study, of: str) -> list[Row]:
    """The rows of `prefix_values` that are over all questions, by the number of thoughts."""
    return [row for row in study.rows if row["of"] == of and row["steps"] is None]


@dataclass(frozen=True)
class Reliance:
    """Rows of the study `shortcuts`: shortcuts that the model uses, that it does not, and of which too little is known.

    One is used if the accuracy falls by at least CLEAR_FALL without it and the interval, widened for the number of
    shortcuts that are tried (Bonferroni), excludes 0; or if surely more than MOST of the answers change with a change
    that keeps the truth, in a model that is above chance, or of whose answers surely fewer change with another such
    change: the answers of a weak model may change with anything. It is not if the interval excludes such a fall.
    """

    used: list[Row]
    unused: list[Row]
    unclear: list[Row]
    above_chance: bool


def reliance(study: Study) -> Reliance:
    """Sort the shortcuts of a study."""
    own = next(row for row in study.rows if row["kind"] == "unchanged")
    above_chance = own["low"] > (own["chance_accuracy"] or 0.0)
    tests = [row for row in study.rows if row["kind"] in ("edit", "rule", "hint") and row["difference"] is not None
             and row["change"] not in ("hint_right", "hint_removed")]  # fmt: skip
    wider = float(norm.ppf(1 - 0.025 / max(len(tests), 1)) / norm.ppf(0.975))
    steady = above_chance or any(row["kind"] == "edit" and row["changed_high"] < MOST for row in tests)
    used = [row for row in tests if _falls(row, wider) or (steady and mostly_changed(row))]
    unused = [row for row in tests if row["difference_low"] > -CLEAR_FALL and row not in used]
    return Reliance(used, unused, [row for row in tests if row not in used and row not in unused], above_chance)


def _falls(row: Row, wider: float) -> bool:
    high = row["difference"] + wider * (row["difference_high"] - row["difference"])
    return row["difference"] <= -CLEAR_FALL and high < 0


def mostly_changed(row: Row) -> bool:
    """Whether surely more than MOST of the answers change, although the truth does not."""
    return row["kind"] == "edit" and row["changed_low"] > MOST


def readable(row: Row) -> bool:
    """Whether a probe is surely better than the most frequent token and both controls without information."""
    return all(row[f"over_{name}_low"] > 0 for name in CONTROLS)


# The findings.


def _exchange(studies: Studies, of: str) -> Finding | None:
    """For: at least PARTLY_USED of what is above chance is surely lost with another question's thoughts."""
    if not (study := studies.get("audit_thoughts")):
        return None
    if not (lost := study.facts["lost"]):
        return Finding(EXCHANGE, "not above chance", None)
    share, low, high = lost
    speaks = True if low >= PARTLY_USED else (False if high < PARTLY_USED else None)
    lost_share = "all" if share >= 1 else f"{100 * share:.0f} %"
    value = f"{lost_share} of what is above chance is lost ({100 * low:.0f} to {100 * high:.0f} %)"
    return Finding(EXCHANGE, value, speaks)


def _gain(studies: Studies, of: str) -> Finding | None:
    """Against: no thought clearly makes the right answer likelier, given the mark. Places without content may do so."""
    if not (study := studies.get("prefix_values")):
        return None
    rows = of_all_questions(study, "after_mark")
    first, last = rows[0]["value"], rows[-1]["value"]
    raising = [str(row["thoughts"]) for row in rows[1:] if row["gain_low"] > 0]
    value = f"log-probability {first:+.2f} without, {last:+.2f} with all"
    value += f"; raised by number {listed(raising)}" if raising else ""
    return Finding(GAIN, value, None if raising else False)


def _needed(studies: Studies, of: str) -> Finding | None:
    """For: a unit is necessary. Against: all that were tried surely cost less than CLEAR_FALL."""
    study = studies.get("influence")
    if of == "pauses" or not study or of not in study.facts["units"]:
        return None
    found = roles(study, of)
    if not found.tried:
        return None
    kept = "" if found.recomputed else ", later ones kept"
    alone = f"; enough alone to help: {listed(map(str, found.sufficient))}" if found.sufficient else ""
    if found.necessary:
        value = f"{listed(map(str, found.necessary))} of {found.of_how_many}{kept}{alone}"
        return Finding(NEEDED, value, True)
    if found.unneeded == found.tried:
        return Finding(NEEDED, f"none of {found.of_how_many}{kept}", False)
    return Finding(NEEDED, f"none more than at random, of {found.of_how_many}{kept}{alone}", None)


def _sequence(studies: Studies, of: str) -> Finding | None:
    """For: a unit clearly acts on a later one, and through later ones on the answer."""
    study = studies.get("influence")
    if of == "pauses" or not study or study.facts["units"].get(of, 0) < 2:
        return None
    found = roles(study, of)
    value = describe_arcs(found) if found.arcs else "none"
    if found.through_later:
        value += f"; through later ones on the answer: {listed(map(str, found.through_later))}"
    return Finding(SEQUENCE, value, True if found.in_sequence else None)


def _alike(studies: Studies, of: str) -> Finding | None:
    """Against: thoughts that are the same whatever the question."""
    if of != "thoughts" or not (study := studies.get("geometry")):
        return None
    spreads = [row["spread"] for row in study.rows]
    value = f"by {100 * min(spreads):.0f} to {100 * max(spreads):.0f} % of their length"
    return Finding(SPREAD, value, False if max(spreads) < SAME else None)


def _read(studies: Studies, of: str) -> Finding | None:
    """For: a step is read from a thought, and better than before the slot and after pauses. Against: none is read."""
    if not (study := studies.get("readout")):
        return None
    best = [row for row in study.rows if row["best"]]
    steps = [str(row["step"]) for row in best if readable(row)]
    better = [
        str(row["step"]) for row in best
        if readable(row) and all((row[f"over_{name}_low"] or 0) > 0 or row[name] is None for name in PLACES)
    ]  # fmt: skip
    any_place = [row for row in study.rows if row["place"] and readable(row)]
    value = f"step {listed(steps)} of {len(best)}" if steps else "no step"
    if steps:
        value += f"; better than before the slot and than after pauses: {listed(better) if better else 'none'}"
    return Finding(READOUT, value, True if better else (None if any_place else False))


def _varied(studies: Studies, of: str) -> Finding | None:
    """Neither: variety is no search."""
    if not (study := studies.get("rollouts")):
        return None
    rows = [row for row in study.rows if row["measure"] == "effective_next_steps" and not row["chain"]]
    first, last = rows[0]["value"], rows[-1]["value"]
    value = f"{first:.1f}" if len(rows) == 1 else f"{first:.1f} without thoughts, {last:.1f} after all"
    return Finding(VARIETY, f"effective number {value}", None)


def _shortcuts(studies: Studies, of: str) -> Finding | None:
    """Against: the model uses a shortcut. For: of none is that possible, in a model that is above chance."""
    if not (study := studies.get("shortcuts")):
        return None
    found = reliance(study)
    beyond = [f"{row['label']} {100 * row['accuracy']:.1f} %" for row in study.rows if row["kind"] == "distribution"]
    value = f"{len(found.used)} used, {len(found.unused)} not, {len(found.unclear)} unclear"
    if beyond:
        value += f"; right elsewhere: {'; '.join(beyond)}"
    clean = found.above_chance and found.unused and not found.unclear
    return Finding(SHORTCUTS, value, False if found.used else (True if clean else None))


def _bears(studies: Studies, of: str) -> Finding | None:
    """Neither: a model may bear noise on thoughts that it uses."""
    if not (study := studies.get("noise")):
        return None
    rows = noise_rows(study, of)
    if not rows:
        return None
    fallen = clearly_fallen(rows)
    return Finding(NOISE, f"clear fall from size {fallen[0]['sigma']:g} on" if fallen else "no clear fall", None)


def noise_rows(study: Study, where: str) -> list[Row]:
    """The rows of `noise` at one place, from no noise to the largest."""
    return sorted((row for row in study.rows if row["where"] == where), key=lambda row: row["sigma"])


def clearly_fallen(rows: list[Row]) -> list[Row]:
    """The rows whose accuracy is clearly below that of the first."""
    return [row for row in rows[1:] if row["high"] < rows[0]["low"]]


EXCHANGE, GAIN, NEEDED = "thoughts of another question", "what thoughts add", "needed for the answer"
SEQUENCE, SPREAD, NOISE = "acts on a later one", "differ between questions", "under noise"
READOUT, VARIETY, SHORTCUTS = "steps that can be read", "variety of next steps", "shortcuts"
FINDINGS: dict[str, Callable[[Studies, str], Finding | None]] = {
    EXCHANGE: _exchange, GAIN: _gain, NEEDED: _needed, SEQUENCE: _sequence, READOUT: _read, SPREAD: _alike,
    SHORTCUTS: _shortcuts, VARIETY: _varied, NOISE: _bears,
}  # fmt: skip
