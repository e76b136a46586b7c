"""What a run writes about itself: metrics.jsonl, its configuration, where it was carried out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coconut.files import read_json, write_text

METRICS = "metrics.jsonl"
CONFIG = "config.json"
DESCRIPTION = "run.json"


class Metrics:
    """RUN/metrics.jsonl: one object a line, each with `kind`, `step` and `stage`.

    A resumed run drops what was written after the checkpoint that it goes on from.
    """

    def __init__(self, run: Path | str, step: int):
        self.path = Path(run) / METRICS
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, kind: str, step: int, **values: Any) -> None:
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off is left out."""
    path = Path(run) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_config(run: Path | str) -> dict[str, Any]:
    """The resolved configuration that a run was made with. Raises ValueError if the folder is no run."""
    path = Path(run) / CONFIG
    if not path.is_file():
        what = f"it holds no {CONFIG}" if Path(run).is_dir() else "there is no such folder"
        raise ValueError(f"{run} is no run: {what}. Name a folder that coconut.train wrote, such as runs/quickstart.")
    return read_json(path)


def surroundings() -> dict[str, Any]:
    """What a run was made with: command, time, code, versions, machine."""
    import torch

    names = ("torch", "transformers", "tokenizers", "datasets", "numpy", "coconut-latent")
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Revision of the code that runs, and whether it was changed since."""
    here = Path(__file__).parent
    try:
        ask = ["git", "-C", str(here)]
        subprocess.run([*ask, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        revision = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*ask, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision.stdout.strip(), "changed": bool(status.stdout.strip())}
