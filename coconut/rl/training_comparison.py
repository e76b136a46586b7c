"""How the policies among compared runs were trained: what it took, and how their rewards grew."""

from __future__ import annotations

from functools import partial

import numpy as np

from coconut.analysis.run_comparison import Comparison, Group, describe_seeds
from coconut.reporting.charts import curves_of_groups
from coconut.reporting.page import Section, Table, Text, figure_of
from coconut.rl.report import points
from coconut.runs.record import RunRecord

COLUMNS = [
    "policy", "seeds", "completions", "passes each", "passes in all", "updates", "minutes", "reward at first",
    "at best",
]  # fmt: skip
NOTE = (
    "Means over seeds. Completions: sampled in training. Passes: their forward passes with those of thoughts, without "
    "those of the updates. Minutes: sampling and updates, without validations. Reward: of greedy answers to the "
    "validation questions, before the first step and at the best checkpoint."
)


def training_sections(compared: Comparison) -> list[Section]:
    """The section of a table's page on how its policies were trained; none if there are no policies."""
    groups = [group for group in compared.groups if group.runs[0].record.is_policy]
    if not groups:
        return []
    alt = "Reward on validation questions over steps; the first and best values are in the table below."
    caption = "Reward of greedy answers to the validation questions: a line for each run."
    curves = {group.label: [points(run.record.valid, "reward") for run in group.runs] for group in groups}
    figure = figure_of(partial(curves_of_groups, curves, "steps"), "reward_curves", alt, caption)
    parts = [figure, Table(COLUMNS, list(map(cells, groups)), len(COLUMNS) - 2), Text(NOTE)]
    return [Section("policies", "How the policies were trained", parts)]


def cells(group: Group) -> list[str]:
    """The texts of a group of policies, in the order of COLUMNS."""
    costs = np.array([training_cost(run.record) for run in group.runs])
    completions, passes, updates, seconds, first, best = costs.mean(0)
    return [
        group.label, describe_seeds(group.seeds), f"{completions:,.0f}", f"{passes / completions:.1f}",
        f"{passes:,.0f}", f"{updates:,.0f}", f"{seconds / 60:.1f}", f"{first:.3f}", f"{best:.3f}",
    ]  # fmt: skip


def training_cost(record: RunRecord) -> tuple[float, ...]:
    """Completions, their forward passes, updates, seconds, and the reward before the first step and at the best one."""
    in_a_step = record.config["prompts_per_step"] * record.config["group_size"]
    passes = sum(in_a_step * row["passes"] for row in record.train)
    seconds = sum(row["seconds"] for row in record.train)
    rewards = [row["reward"] for row in record.valid]
    return in_a_step * len(record.train), passes, record.updates_done, seconds, rewards[0], max(rewards)
