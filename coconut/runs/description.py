"""What a run writes about itself: its configuration, its metrics, the environment it was carried out in."""

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

from coconut.methods import REASONING_FILE
from coconut.utils.files import read_json

METRICS = "metrics.jsonl"


CONFIG = "config.json"


DESCRIPTION = "run.json"


def samples_file(run: Path | str, step: int) -> Path:
    """Where the samples of the validation after this update lie."""
    return Path(run) / "samples" / f"step-{step:07d}.json"


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off is left out."""
    path = Path(run) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_config(run: Path | str) -> dict[str, Any]:
    """The resolved configuration that a run was made with. Raises ValueError if the folder is no run."""
    path = Path(run) / CONFIG
    if (Path(run) / REASONING_FILE).is_file():
        raise ValueError(
            f"{run} is a saved model and no run: it does not record its task or data. Ask it: "
            f'coconut generate run={run} question="..." Evaluate it: coconut evaluate run={run} task=TASK '
            "data.test=FILE"
        )
    if not path.is_file():
        what = f"it holds no {CONFIG}" if Path(run).is_dir() else "there is no such folder"
        raise ValueError(f"{run} is no run: {what}. Name a folder that coconut train wrote, such as runs/quickstart.")
    return read_json(path)


def environment_info() -> dict[str, Any]:
    """What a run was made with: command, time, code, versions, machine."""
    import torch

    names = ("torch", "transformers", "tokenizers", "datasets", "numpy", "coconut-latent")
    optional = {name: found for name in ("deepspeed", "wandb", "peft") if (found := _version(name))}
    return {
        "command": shlex.join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}, **optional},
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


def read_results(run: Path | str) -> dict[str, dict[str, Any]]:
    """All evaluations of a run, by name."""
    return {path.stem: read_json(path) for path in sorted((Path(run) / "evaluation").glob("*.json"))}
