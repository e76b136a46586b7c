"""Locate a run's data files: named ones, or data that a builder makes or converts once in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coconut.config import SPLITS, TRAINING_SPLITS, DataFiles, RowRule
from coconut.utils.console import log
from coconut.utils.files import clear_abandoned, sha256
from coconut.utils.hydra_app import PACKAGE, own_environment
from coconut.utils.overrides import as_arguments, quoted

TABLES = (".csv", ".tsv", ".parquet", ".gz")  # suffixes of files that `read_examples` does not read


def data_files(data: Mapping[str, Any], splits: Sequence[str] = SPLITS) -> dict[str, str]:
    """The file of each split, "" if there is none, for the `data` section of a configuration.

    If it names no training file, `data_builders.TASK` is run with the keys in `data["build"]`, once for all runs with
    the same keys. Files that are named are converted as `in_own_format` does. Raises ValueError if either fails.
    """
    found, rule = _files(data), RowRule.from_dict(data)
    return {
        split: in_own_format(file, rule, split, data["cache_dir"]) if file and file == data[split] else file
        for split, file in found.items()
        if split in splits
    }


def _files(data: Mapping[str, Any]) -> dict[str, str]:
    """The file of each split as it is named or built."""
    if any(data[split] for split in TRAINING_SPLITS):
        return {split: data[split] for split in SPLITS}
    if prefix := data.get("prefix"):
        found = {split: f"{prefix}_{split}.json" for split in SPLITS}
    else:
        name = str(data["task"])
        folder = built_dataset(name, name, data["build"], data["cache_dir"])
        built = {split: folder / f"{name}_{split}.json" for split in SPLITS}
        found = {split: str(file) if file.is_file() else "" for split, file in built.items()}
    test = data["test"] or (found["test"] if Path(found["test"]).is_file() else "")
    return {**found, "test": test}


def file_of_split(data: Mapping[str, Any], split: str, files: DataFiles | None = None) -> str:
    """The file of a split of a run's data, or the one that `files` names, in the project's own format.

    A file of `files` is read by the rule that stands there, or else by the run's. Raises FileNotFoundError if the
    run's file does not exist, with advice how to name another one, and ValueError if a file cannot be converted.
    """
    if files and (override := getattr(files, split)):
        rule = files if files.rule() else RowRule.from_dict(data)
        return in_own_format(override, rule, split, data.get("cache_dir"))
    path = data_files(data, [split])[split] or (f"{data['prefix']}_{split}.json" if data.get("prefix") else "")
    if path and Path(path).is_file():
        return path
    what = f"is missing: {path}" if path else "was never named, and none was made"
    raise FileNotFoundError(f"The run's {split} file {what}. Name one with data.{split}=FILE.")


def in_own_format(file: str, rule: RowRule, split: str, cache_dir: str | None) -> str:
    """The file itself, or what `data_builders.import` makes of a table or of a file that a rule is given for.

    It is converted once for all uses with the same content and rule. A file that does not exist is returned as it is.
    Raises ValueError if it cannot be converted.
    """
    path, rule = Path(file), RowRule.from_dict(asdict(rule))
    if not path.is_file() or not (rule.rule() or path.suffix.lower() in TABLES):
        return file
    name = re.sub(r"[^\w.-]", "_", path.name.partition(".")[0]) or "rows"
    folder = _made_once(
        name, [path.name, sha256(path), split, rule.rule()], "import",
        [f"{split}={quoted(str(path.resolve()))}", *as_arguments(rule), "preview=0"], cache_dir,
        f"Converting {file}, once",
        f"{file} could not be converted; see the message above. The keys that it names begin with data. here: "
        "data.columns.question=NAME. If the columns are question, answer and steps, data.columns.question=question "
        "alone replaces the run's rule. coconut data import --help explains them.",
    )  # fmt: skip
    return str(folder / f"{name}_{split}.json")


def file_of_set(
    name: str, builder: str, build: Mapping[str, Any], hub: Mapping[str, Any], folders: Sequence[Path | str],
    cache_dir: str | None,
) -> str:  # fmt: skip
    """The file of an evaluation set, which `coconut data BUILDER` makes with the keys `build`.

    The first of `folders` that holds the set counts. It holds NAME_test.json as `coconut data` writes it; or else the
    released file: NAME.jsonl, NAME.json, or the test file in a sub-folder NAME without a train file; or a sub-folder
    NAME in the hub's layout. The builder converts what was released, once, into the cache. Without folders it takes the
    set from the hub, once, with the further keys `hub`. Raises FileNotFoundError if a folder does not exist or none
    holds the set, and BuilderFailed.
    """
    if absent := [str(folder) for folder in folders if not Path(folder).is_dir()]:
        raise FileNotFoundError(f"There is no folder {absent[0]}")
    for folder in map(Path, folders):
        if (built := folder / f"{name}_test.json").is_file():
            return str(built)
        stems = [name] if any((folder / name).glob("train*")) else [name, f"{name}/test"]
        released = (folder / f"{stem}{end}" for stem in stems for end in (".jsonl", ".json"))
        path = next((path for path in released if path.is_file()), folder / name)
        if path.exists():
            source = {"test" if path.is_file() else "hub": str(path.absolute())}
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            build = {**build, **source}
            return str(built_dataset(name, builder, build, cache_dir, list(map(sha256, files))) / f"{name}_test.json")
    if folders:
        raise FileNotFoundError(
            f"{', '.join(map(str, folders))} {'hold' if len(folders) > 1 else 'holds'} no {name}_test.json, "
            f"{name}.jsonl, {name}.json or folder {name}"
        )
    return str(built_dataset(name, builder, {**build, **hub}, cache_dir) / f"{name}_test.json")


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
    """SHA-256 of the source files that determine a builder's rows: data_builders, coconut.tasks, the reader of JSON.

    It is part of a built data set's key, so a change to a builder rebuilds the data.
    """
    spec = find_spec("data_builders")
    folders = [PACKAGE / "tasks", *map(Path, (spec and spec.submodule_search_locations) or ())]
    digest = hashlib.sha256()
    for file in (PACKAGE / "data" / "examples.py", *(file for each in folders for file in sorted(each.glob("*.py")))):
        code = file.read_bytes()
        digest.update(f"{file.name} {len(code)}\n".encode() + code)
    return digest.hexdigest()


class BuilderFailed(ValueError):
    """A builder could not make a data set. `reason`: its message."""

    reason: str


def built_dataset(
    name: str, builder: str, build: Mapping[str, Any], cache_dir: str | None, sources: Sequence[str] = ()
) -> Path:
    """The folder of a data set NAME_SPLIT.json that `coconut data BUILDER` makes; it is built if it does not exist.

    `sources`: digests of the local files that `build` names, so that changed files are read anew. Raises BuilderFailed.
    """
    return _made_once(
        name, [builder, dict(build), *sources], builder,
        [f"{key}={_as_override(value)}" for key, value in build.items()], cache_dir,
        " ".join([f"Building the data, once: coconut data {builder}", *(f"{k}={v}" for k, v in build.items())]),
        f"data_builders.{builder} could not make the data; see its message above. Change data.build, or name "
        "files: data.train=FILE data.valid=FILE, or data.prefix=FOLDER/NAME for a builder's files.",
    )  # fmt: skip


def _made_once(
    name: str, content: list[Any], builder: str, keys: list[str], cache_dir: str | None, announced: str, failure: str
) -> Path:
    """The folder in the cache with the files NAME_SPLIT.json, which the builder makes if it does not exist.

    `content` and the code of the builders are the folder's key. The folder is moved into place when it is complete, so
    two processes may make it at the same time. Raises BuilderFailed with the text `failure`.
    """
    key = json.dumps([*content, builders_code()], sort_keys=True)
    cache = cache_folder(cache_dir, "data")
    folder = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    clear_abandoned(cache, f".{name}-*")
    log(announced)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache, ignore_cleanup_errors=True) as part:
        status, told = _run(["coconut", "data", builder, *keys, f"out_dir={folder.name}", f"name={name}"], part)
        if status:
            failed = BuilderFailed(failure)
            failed.reason = told.rpartition("error: ")[2].strip() or f"coconut data {builder} ended with {status}"
            raise failed
        try:
            (Path(part) / folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    log(f"The data are in {folder}")
    return folder


def _run(module_and_keys: list[str], folder: str) -> tuple[int, str]:
    """Run a module in a folder: its exit status, and its standard error, which is also shown.

    SIGTERM to this process ends it, too.
    """
    command = [sys.executable, "-m", *module_and_keys]
    told = b""
    with (
        _sigterm_as_exit(),
        subprocess.Popen(command, cwd=folder, env=own_environment(), stderr=subprocess.PIPE, bufsize=0) as process,
    ):
        assert process.stderr
        try:
            while part := process.stderr.read(4096):
                told += part
                sys.stderr.write(part.decode(errors="replace"))
                sys.stderr.flush()
            return process.wait(), told.decode(errors="replace")
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
