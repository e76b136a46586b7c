"""Locate a run's data files: named ones, or a data set that a builder makes once in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coconut.config import SPLITS, TRAINING_SPLITS
from coconut.utils.console import log
from coconut.utils.files import clear_abandoned
from coconut.utils.hydra_app import PACKAGE, own_environment
from coconut.utils.overrides import quoted


def data_files(data: Mapping[str, Any]) -> dict[str, str]:
    """The file of each split, "" if there is none, for the `data` section of a configuration.

    If it names no training file, `data_builders.TASK` is run with the keys in `data["build"]`, once for all runs with
    the same keys. Raises ValueError if that fails.
    """
    if any(data[split] for split in TRAINING_SPLITS):
        return {split: data[split] for split in SPLITS}
    if prefix := data.get("prefix"):
        found = {split: f"{prefix}_{split}.json" for split in SPLITS}
    else:
        folder = _built_dataset(str(data["task"]), data["build"], data["cache_dir"])
        built = {split: folder / f"{data['task']}_{split}.json" for split in SPLITS}
        found = {split: str(file) if file.is_file() else "" for split, file in built.items()}
    test = data["test"] or (found["test"] if Path(found["test"]).is_file() else "")
    return {**found, "test": test}


def file_of_split(data: Mapping[str, Any], split: str, override: str | None = None) -> str:
    """The file of a split of a run's data, or `override` if it is set.

    Raises FileNotFoundError if it does not exist, with advice how to name another one.
    """
    if override:
        return override
    path = data_files(data)[split] or (f"{data['prefix']}_{split}.json" if data.get("prefix") else "")
    if path and Path(path).is_file():
        return path
    what = f"is missing: {path}" if path else "was never named, and none was made"
    raise FileNotFoundError(f"The run's {split} file {what}. Name one with data.{split}=FILE.")


def default_cache_dir() -> Path:
    """The folder in COCONUT_CACHE, or `coconut` in the user's cache folder."""
    if named := os.environ.get("COCONUT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coconut"


def cache_folder(cache_dir: Path | str | None, name: str) -> Path:
    """The folder of this name in the cache, created if it does not exist.

    Raises OSError if it cannot be created or is not writable, for example without a home folder.
    """
    try:
        folder = Path(cache_dir or default_cache_dir()).absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"The cache folder for {name} cannot be used: {error} Name a writable folder with the environment "
            "variable COCONUT_CACHE (and HF_HOME for the Hugging Face libraries)."
        ) from error


def builders_code() -> str:
    """SHA-256 of the source files that determine a builder's rows: data_builders and coconut.tasks.

    It is part of a built data set's key, so a change to a builder rebuilds the data.
    """
    spec = find_spec("data_builders")
    folders = [PACKAGE / "tasks", *map(Path, (spec and spec.submodule_search_locations) or ())]
    digest = hashlib.sha256()
    for file in (file for folder in folders for file in sorted(folder.glob("*.py"))):
        code = file.read_bytes()
        digest.update(f"{file.name} {len(code)}\n".encode() + code)
    return digest.hexdigest()


def _built_dataset(task: str, build: dict[str, Any], cache_dir: str | None) -> Path:
    """The folder of a built data set; it is built if it does not exist.

    The folder is moved into place when it is complete, so two processes may build it at the same time.
    """
    content = json.dumps([task, build, builders_code()], sort_keys=True)
    cache = cache_folder(cache_dir, "data")
    folder = cache / f"{task}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    clear_abandoned(cache, f".{task}-*")
    log(" ".join([f"Building the data, once: coconut data {task}", *(f"{k}={v}" for k, v in build.items())]))
    keys = [f"{key}={_as_override(value)}" for key, value in build.items()]
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache, ignore_cleanup_errors=True) as part:
        if _run([f"data_builders.{task}", *keys, f"out_dir={folder.name}", f"name={task}"], part):
            raise ValueError(
                f"data_builders.{task} could not make the data; see its message above. Change data.build, or name "
                "files: data.train=FILE data.valid=FILE, or data.prefix=FOLDER/NAME for a builder's files."
            )
        try:
            (Path(part) / folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    log(f"The data are in {folder}")
    return folder


def _run(module_and_keys: list[str], folder: str) -> int:
    """Run a module in a folder and return its exit status. SIGTERM to this process ends it, too."""
    with (
        _sigterm_as_exit(),
        subprocess.Popen([sys.executable, "-m", *module_and_keys], cwd=folder, env=own_environment()) as process,
    ):
        try:
            return process.wait()
        finally:
            process.terminate()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that partial data are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_override(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else json.dumps(value)
