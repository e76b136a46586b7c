"""Read a run's configuration, metrics and evaluations, and describe the environment it runs in."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coconut.methods import REASONING_FILE
from coconut.utils.files import read_json
from coconut.utils.hydra_app import package_version

METRICS = "metrics.jsonl"
CONFIG = "config.json"
DESCRIPTION = "run.json"


def samples_file(run: Path | str, step: int) -> Path:
    """The file of samples of the validation after this update."""
    return Path(run) / "samples" / f"step-{step:07d}.json"


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Incomplete lines, as a killed run leaves them, are skipped."""
    path = Path(run) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_config(run: Path | str) -> dict[str, Any]:
    """The resolved configuration of a run. Raises ValueError if the folder is not a run."""
    path = Path(run) / CONFIG
    if (Path(run) / REASONING_FILE).is_file():
        raise ValueError(
            f"{run} is a saved model and not a run: it has no record of its training. Ask it a question with coconut "
            f'generate run={run} question="..."; evaluate it with coconut evaluate run={run} '
            "judge=NAME data.test=FILE"
        )
    if not path.is_file():
        what = f"it has no {CONFIG}" if Path(run).is_dir() else "there is no such folder"
        raise ValueError(
            f"{run} is not a run: {what}. Name a folder written by coconut train, such as runs/quickstart."
        )
    return read_json(path)


def environment_info() -> dict[str, Any]:
    """The environment of this process: command, time, revision of the code, package versions, machine."""
    import torch

    names = ("torch", "transformers", "tokenizers", "datasets", "numpy", "coconut-latent")
    required = {name: package_version(name) for name in names}
    optional = {name: found for name in ("deepspeed", "wandb", "peft") if (found := package_version(name))}
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "versions": {"python": platform.python_version(), **required, **optional},
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _git() -> dict[str, Any] | None:
    """The Git revision of the running code, and whether files differ from it; None outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return None


def read_results(run: Path | str) -> dict[str, dict[str, Any]]:
    """All evaluations of a run, by name."""
    return {path.stem: read_json(path) for path in sorted((Path(run) / "evaluation").glob("*.json"))}
