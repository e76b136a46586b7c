"""One page about a run: what was trained, how it learned, how good it is, and some of its answers."""

from __future__ import annotations

from pathlib import Path

from coconut.analysis.page import percent
from coconut.analysis.report import answers, headline, learning, provenance, read_run, report
from coconut.cli import application
from coconut.config import AnalyzeConfig
from coconut.files import write_text
from coconut.screen import say

SECTIONS = (headline, learning, answers, provenance)  # in the order of the page


def run(config: AnalyzeConfig) -> int:
    """Write the report of a run."""
    record = read_run(config.run)
    path = Path(config.output) if config.output else record.folder / "report.html"
    write_text(path, report(record, SECTIONS))
    if record.test:
        found = record.evaluations[record.test]
        say(f"accuracy {percent(found['accuracy'])} on {found['count']:,} unseen questions")
    say(f"Report: {path}")
    return 0


main = application("analyze", AnalyzeConfig, run)

if __name__ == "__main__":
    main()
