"""Atomic writes of files and folders, a lock on a folder, and UTF-8 text."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"
REPLACED = ".coconut-before"  # suffix of the old folder during a replacement
PARTIAL_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.part")  # temporary files and folders, named by tempfile
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileWriteError(OSError):
    """A file or folder does not fit on the disk. `reason` is the system's message."""

    reason: str


@contextlib.contextmanager
def explain_full_disk(path: Path | str) -> Iterator[None]:
    """Turn any error of a full disk inside this context into a FileWriteError with `path` and advice."""
    try:
        yield
    except Exception as error:
        if not (reason := _full_disk_reason(error)):
            raise
        folder = next(parent for parent in (Path(path).absolute(), *Path(path).absolute().parents) if parent.exists())
        failure = FileWriteError(
            f"{path} could not be written: {reason} ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there). "
            "Earlier files are intact. Free some space, then run the same command again."
        )
        failure.reason = reason
        raise failure from error


def _full_disk_reason(error: BaseException | None) -> str | None:
    """The system's message for a full disk, also if a library has wrapped the error in its own; None for others."""
    while error:
        if isinstance(error, FileWriteError):
            return error.reason
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
        if number in DISK_FULL_ERRORS:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block raises nothing.

    A symbolic link is followed. Raises OSError if `path` exists and is not a file, or cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} exists and is not a file. Name another file.")
    with explain_full_disk(path):
        with _naming_path(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            _sync(part)
            apply_umask(part)
            os.replace(part, path)
            _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """The same as `atomic_file` for a folder; an existing one is replaced."""
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise OSError(f"{path} exists and is not a folder. Name another folder.")
    with explain_full_disk(path):
        with _naming_path(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield part
            for file in part.rglob("*"):
                _sync(file)
            _sync(part)
            apply_umask(part)
            _replace_folder(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _replace_folder(part: Path, path: Path) -> None:
    """Move the folder `part` to `path`; if that fails, the old folder is restored."""
    before = path.with_name(f".{path.name}{REPLACED}")
    if before.exists():
        _undo_replacement(before)
    if path.exists():
        os.replace(path, before)
    try:
        os.replace(part, path)
    except OSError:
        if before.exists():
            os.replace(before, path)
        raise
    _sync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


@contextlib.contextmanager
def _naming_path(path: Path) -> Iterator[None]:
    """Let an OSError name this path in place of the temporary one beside it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def ensure_writable(folder: Path) -> None:
    """Make a folder. Raises OSError if it is not writable, so that a command can fail before its work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: {error.strerror}. Name another with output=.") from error


def apply_umask(path: Path) -> None:
    """Give a file or folder the default permissions; tempfile restricts them to the owner."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def exclusive_lock(folder: Path | str) -> Iterator[None]:
    """Lock a folder for this process, and remove what killed processes left half-written in it.

    Raises OSError if another process on this machine holds the lock. On Windows nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"Another process is using {folder}. Wait for it to end, or stop it first.") from None
        for before in folder.rglob(f".*{REPLACED}"):
            _undo_replacement(before)
        for partial in folder.rglob(".*.part"):
            if PARTIAL_NAME.fullmatch(partial.name):
                shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink()
        yield


def _undo_replacement(before: Path) -> None:
    """Complete or undo the replacement of a folder by a process that was killed between its two renames."""
    path = before.with_name(before.name[1:].removesuffix(REPLACED))
    shutil.rmtree(before) if path.exists() else os.replace(before, path)


def clear_abandoned(folder: Path, pattern: str) -> None:
    """Remove what killed processes left half-written: entries that match the pattern and are over a day old."""
    for entry in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > 86400:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def remove_if_empty(folder: Path | str) -> None:
    """Remove the lock file, and then the folder if it is empty."""
    (Path(folder) / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


def write_text(path: Path | str, text: str) -> None:
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_utf8(path: Path | str) -> str:
    """Read a text file, without a byte order mark. Raises ValueError as `decode_utf8` does."""
    return decode_utf8(Path(path).read_bytes(), str(path))


def decode_utf8(data: bytes, name: str) -> str:
    """Decode UTF-8 bytes, line ends unchanged. Raises ValueError with the line and position of the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, offset) + 1
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(
            f"{name} is not UTF-8 text ({error.reason}): line {line} holds 0x{data[offset]:02X}, "
            f"byte {offset + 1:,} of all. Convert it with iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 OLD > NEW"
            + ("." if utf16 else ", if it is Latin-1.")
        ) from None


def lone_surrogate(value: Any) -> str | None:
    """The first string in a JSON value with half of a surrogate pair, which UTF-8 cannot encode; None without one."""
    if isinstance(value, str):
        return value if re.search(r"[\ud800-\udfff]", value) else None
    values = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for item in values if (found := lone_surrogate(item)) is not None), None)


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk. Not every file system can do so for folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
