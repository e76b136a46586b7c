"""Where a run's data lies: in files that are named, or in a set that a builder makes once, in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coconut.config import SPLITS
from coconut.screen import say


def data_files(data: Mapping[str, Any]) -> dict[str, str]:
    """The file of each split, "" if there is none, from the `data` part of a configuration.

    If it names no file the set is made by `data_builders.TASK` with the keys of `data["build"]`, once for
    all runs that ask for the same. Raises ValueError if that fails.
    """
    if common := data.get("files"):
        named = {split: f"{common}_{split}.json" for split in SPLITS}
        return {split: file if split != "test" or Path(file).is_file() else "" for split, file in named.items()}
    if any(data[split] for split in SPLITS):
        return {split: data[split] for split in SPLITS}
    folder = _made(str(data["task"]), {k: v for k, v in data["build"].items() if v is not None}, data["cache_dir"])
    made = {split: folder / f"{data['task']}_{split}.json" for split in SPLITS}
    return {split: str(file) if file.is_file() else "" for split, file in made.items()}


def default_cache_dir() -> Path:
    """COCONUT_CACHE, or `coconut` in the user's cache folder."""
    if named := os.environ.get("COCONUT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coconut"


def _made(task: str, build: dict[str, Any], cache_dir: str | None) -> Path:
    """The folder of this set, made if it is not there. It appears whole: two processes may make it at once."""
    asked = json.dumps([task, build, _version()], sort_keys=True)
    cache = Path(cache_dir or default_cache_dir()).absolute() / "data"
    folder = cache / f"{task}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    keys = [f"{key}={json.dumps(value)}" for key, value in build.items()]
    say(f"Making the data, once: python -m data_builders.{task} {' '.join(keys)}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache, ignore_cleanup_errors=True) as part:
        place = Path(part) / folder.name
        command = [sys.executable, "-m", f"data_builders.{task}", *keys, f"out_dir={json.dumps(str(place))}"]
        if subprocess.run([*command, f"name={task}"], check=False).returncode:
            raise ValueError(
                f"data_builders.{task} could not make the data; its message stands above. Change data.build, or name "
                "files: data.train=FILE data.valid=FILE, or data.files=FOLDER/NAME for what a builder wrote."
            )
        try:
            place.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    say(f"The data lie in {folder}")
    return folder


def _version() -> str:
    try:
        return version("coconut-latent")
    except PackageNotFoundError:
        return "not installed"
