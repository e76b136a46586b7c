"""Study: a table of measurements that is saved in a run's folder and drawn as a figure."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut.utils.files import write_text

FOLDER = "analysis"  # inside the run's folder


class NotApplicable(ValueError):
    """The run or its questions lack something that a study needs; the message says what."""


@dataclass(frozen=True)
class Study:
    """A table of measurements. `rows`: flat, all with the same keys. `facts`: values that hold for the whole table."""

    name: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write NAME.json, and NAME.csv with the rows only."""
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(self.rows[0]) if self.rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(folder / f"{self.name}.csv", table.getvalue())
        facts = json.dumps(self.facts, indent=2, ensure_ascii=False)
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        write_text(folder / f"{self.name}.json", f'{{"facts": {facts},\n"rows": [\n{rows}\n]}}\n')
