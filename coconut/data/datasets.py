"""Where a run's data lies: in files that are named, or in a set that a builder makes once, in the cache."""

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
    """The file of each split, "" if there is none, from the `data` part of a configuration.

    If it names no file to train on the set is made by `data_builders.TASK` with the keys of `data["build"]`, once for
    all runs that ask for the same. Raises ValueError if that fails.
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
    """The file of a split of a run's data, or the one that is `given` in its place.

    Raises FileNotFoundError that says where it was expected, and how another one is named.
    """
    if override:
        return override
    path = data_files(data)[split] or (f"{data['prefix']}_{split}.json" if data.get("prefix") else "")
    if path and Path(path).is_file():
        return path
    what = f"is not at {path}, where it was expected" if path else "was never named, and none was made"
    raise FileNotFoundError(f"The run's {split} file {what}. Name one with data.{split}=FILE.")


def default_cache_dir() -> Path:
    """COCONUT_CACHE, or `coconut` in the user's cache folder."""
    if named := os.environ.get("COCONUT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coconut"


def cache_folder(cache_dir: Path | str | None, name: str) -> Path:
    """The folder of this name in the cache, made if it is not there.

    Raises OSError if there is no place for it: no home folder, or one that cannot be written to.
    """
    try:
        folder = Path(cache_dir or default_cache_dir()).absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"There is no place to keep {name} between runs: {error} Name a folder that can be written to with the "
            "environment variable COCONUT_CACHE (and HF_HOME for what the Hugging Face libraries keep)."
        ) from error


def builders_code() -> str:
    """SHA-256 of the source files that decide what rows a builder makes: data_builders and coconut.tasks.

    Data are kept under it, so that a change to a builder makes them anew.
    """
    spec = find_spec("data_builders")
    places = [PACKAGE / "tasks", *map(Path, (spec and spec.submodule_search_locations) or ())]
    digest = hashlib.sha256()
    for file in (file for place in places for file in sorted(place.glob("*.py"))):
        code = file.read_bytes()
        digest.update(f"{file.name} {len(code)}\n".encode() + code)
    return digest.hexdigest()


def _built_dataset(task: str, build: dict[str, Any], cache_dir: str | None) -> Path:
    """The folder of this set, made if it is not there. It appears whole: two processes may make it at once."""
    content = json.dumps([task, build, builders_code()], sort_keys=True)
    cache = cache_folder(cache_dir, "data")
    folder = cache / f"{task}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    clear_abandoned(cache, f".{task}-*")
    log(" ".join([f"Making the data, once: python -m data_builders.{task}", *(f"{k}={v}" for k, v in build.items())]))
    keys = [f"{key}={_as_override(value)}" for key, value in build.items()]
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache, ignore_cleanup_errors=True) as part:
        if _run([f"data_builders.{task}", *keys, f"out_dir={folder.name}", f"name={task}"], part):
            raise ValueError(
                f"data_builders.{task} could not make the data; its message stands above. Change data.build, or name "
                "files: data.train=FILE data.valid=FILE, or data.prefix=FOLDER/NAME for what a builder wrote."
            )
        try:
            (Path(part) / folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    log(f"The data lie in {folder}")
    return folder


def _run(module_and_keys: list[str], folder: str) -> int:
    """The exit status of a module run in a folder. SIGTERM to this process ends that one, too."""
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
    """As SystemExit, so that what was begun is cleared away."""
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
