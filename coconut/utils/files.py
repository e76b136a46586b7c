"""Files appear whole or not at all. Text is UTF-8."""

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
BEFORE = ".coconut-before"  # a folder that is being replaced
PART = re.compile(r"\..+\.[a-z0-9_]{8}\.part")  # what is being written, as tempfile names it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileWriteError(OSError):
    """There is no room for a file or folder. `reason`: in the system's words."""

    reason: str


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises Unwritten, which names `path` and says what to do, where there is no room for what the block writes."""
    try:
        yield
    except Exception as error:
        if not (reason := _no_room(error)):
            raise
        there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
        failure = FileWriteError(
            f"{path} could not be written: {reason} ({shutil.disk_usage(there).free / 2**20:,.0f} MiB free there). "
            "What was written before is whole. Make room, then run the same command again."
        )
        failure.reason = reason
        raise failure from error


def _no_room(error: BaseException | None) -> str | None:
    """The system's words for a full disk, also where a library has made an exception of its own of it."""
    while error:
        if isinstance(error, FileWriteError):
            return error.reason
        number = error.errno if isinstance(error, OSError) else None
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(told[1])
        if number in FULL:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when the block ends well.

    A link is followed. Raises OSError if there is something else than a file, or if it cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file, so it cannot be written as one. Name another.")
    with writing(path):
        with _naming(path):
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
    """As `whole_file` for a folder that does not exist yet, or is replaced."""
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise OSError(f"{path} is no folder, so it cannot be written as one. Name another.")
    with writing(path):
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield part
            for file in part.rglob("*"):
                _sync(file)
            _sync(part)
            apply_umask(part)
            _take_place(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _take_place(part: Path, path: Path) -> None:
    """Move a folder to its place; what was there before comes back if that fails."""
    before = path.with_name(f".{path.name}{BEFORE}")
    if before.exists():
        _put_back(before)
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
def _naming(path: Path) -> Iterator[None]:
    """An OSError names this path, not a temporary one beside it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def ensure_writable(folder: Path) -> None:
    """Make a folder. Raises OSError if nothing can be written there: before the work that it is for, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: {error.strerror}. Name another with output=.") from error


def apply_umask(path: Path) -> None:
    """Give a file or folder the permissions of one that is made without a temporary one."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


@contextlib.contextmanager
def exclusive_lock(folder: Path | str) -> Iterator[None]:
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
            if PART.fullmatch(left.name):
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
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_utf8(path: Path | str) -> str:
    """The text of a file, without a mark at its beginning. Raises ValueError, as `decoded`, if it is none."""
    return decode_utf8(Path(path).read_bytes(), str(path))


def decode_utf8(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, line ends as they are. Raises ValueError that names the first line and byte that is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, place) + 1
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(
            f"{name} is not UTF-8 text ({error.reason}): line {line} holds 0x{data[place]:02X}, "
            f"byte {place + 1:,} of all. Convert it with iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 OLD > NEW"
            + ("." if utf16 else ", if it is Latin-1.")
        ) from None


def lone_surrogate(value: Any) -> str | None:
    """The first text in a JSON value that holds half of a surrogate pair, which is no text and cannot be written."""
    if isinstance(value, str):
        return value if re.search(r"[\ud800-\udfff]", value) else None
    values = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for part in values if (found := lone_surrogate(part)) is not None), None)


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """To the disk. Not every file system does that for folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
