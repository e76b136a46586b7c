"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"
BEFORE = ".before"  # a folder that is being replaced


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        _sync(part)
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """As `whole_file` for a folder that does not exist yet, or is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield part
        for file in part.rglob("*"):
            _sync(file)
        _sync(part)
        part.chmod(0o777 & ~_umask())
        before = path.with_name(f".{path.name}{BEFORE}")
        if path.exists():
            os.replace(path, before)
        os.replace(part, path)
        _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def sole_owner(folder: Path | str) -> Iterator[None]:
    """Hold a folder for this process, and clear away what killed ones left half-written.

    Raises OSError if another process on this machine holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"Another process is at work in {folder}. Wait for it to end, or stop it first.") from None
        for before in folder.rglob(f".*{BEFORE}"):
            _put_back(before)
        for left in folder.rglob(".*.part"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        yield


def _put_back(before: Path) -> None:
    """Undo a replacement of a folder that was killed between its two steps."""
    path = before.with_name(before.name[1:].removesuffix(BEFORE))
    shutil.rmtree(before) if path.exists() else os.replace(before, path)


def clear_abandoned(folder: Path, pattern: str) -> None:
    """Remove what killed processes left half-written: hidden entries of this pattern, a day old or more."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def release(folder: Path | str) -> None:
    """Take back a folder in which nothing was written but its lock. What else it holds stays."""
    (Path(folder) / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


def write_text(path: Path | str, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
