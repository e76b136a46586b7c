"""Atomic writes, folder locks, full disks and UTF-8 errors."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from helpers.models import build
from safetensors.torch import save_file

from coconut.runs.description import read_metrics
from coconut.runs.tracking import Tracking
from coconut.utils.files import (
    REPLACED,
    FileWriteError,
    atomic_file,
    atomic_folder,
    decode_utf8,
    exclusive_lock,
    lone_surrogate,
    read_json,
    write_json,
    write_text,
)


def fail_inside(context: AbstractContextManager[Path], write: Callable[[Path], object]) -> None:
    with context as part:
        write(part)
        raise OSError("the disk is full")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk"):
        fail_inside(atomic_file(path), lambda part: part.write_text("half"))
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_failed_write_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_folder(path) as part:
            (part / "sub").mkdir()
            write_text(part / "sub" / "file.txt", content)
        assert (path / "sub" / "file.txt").read_text() == content
    with pytest.raises(OSError, match="disk"):
        fail_inside(atomic_folder(path), lambda part: write_text(part / "other.txt", "half"))
    assert (path / "sub" / "file.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_written_files_have_default_permissions(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": 1})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert read_json(tmp_path / "a.json") == {"ü": 1}


def test_saved_models_have_default_permissions(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "b").write_text("")
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {(tmp_path / "b").stat().st_mode}


def test_writes_follow_symbolic_links(tmp_path: Path) -> None:
    write_text(tmp_path / "there" / "a.txt", "old")
    (tmp_path / "a.txt").symlink_to(tmp_path / "there" / "a.txt")
    (tmp_path / "folder").symlink_to(tmp_path / "there")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "there" / "a.txt").read_text() == "new"
    with atomic_folder(tmp_path / "folder") as part:
        write_text(part / "b.txt", "b")
    assert (tmp_path / "folder").is_symlink()
    assert os.listdir(tmp_path / "there") == ["b.txt"]


def test_writes_refuse_devices_and_wrong_types(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match=f"{place} exists and is not a file"):
            write_text(place, "text")
    assert Path("/dev/null").is_char_device()
    write_text(tmp_path / "a.txt", "text")
    with pytest.raises(OSError, match=r"a\.txt exists and is not a folder"):
        fail_inside(atomic_folder(tmp_path / "a.txt"), Path.touch)
    with pytest.raises(OSError, match=r"'\S+a\.txt/b\.txt'"):
        write_text(tmp_path / "a.txt" / "b.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


def save_with_torch(part: Path) -> None:
    with part.open("wb") as file:
        torch.save({"a": torch.zeros(9000)}, file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda part: part.write_text("a" * 9000),
    "safetensors": lambda part: save_file({"a": torch.zeros(9000)}, part),
    "torch": save_with_torch,
}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Limit the size of files, so that real writes fail in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_error_names_the_file(tmp_path: Path, kind: str) -> None:
    path, write = tmp_path / "result", WRITERS[kind]
    path.write_text("old")
    with pytest.raises(
        FileWriteError, match=rf"{path} could not be written: File too large \(.* MiB free there\).*Free some space"
    ):
        fail_inside(atomic_file(path), write)
    with pytest.raises(FileWriteError, match=rf"{tmp_path}/folder could not be written: File too large"):
        fail_inside(atomic_folder(tmp_path / "folder"), lambda part: write(part / "a"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.usefixtures("full_disk")
def test_full_disk_error_names_metrics_file(tmp_path: Path) -> None:
    with Tracking(tmp_path, 0) as tracking:
        tracking.log("train", 1, loss=1.0)
        with pytest.raises(FileWriteError, match=rf"{tmp_path}/metrics\.jsonl could not be written: File too large"):
            tracking.log("train", 2, names=["a" * 9000])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_utf8_errors_name_line_and_byte() -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        where = rf"FILE is not UTF-8 text \(.*\): line 2 holds 0xE9, byte {len(mark) + 8} of all.*iconv -f LATIN1"
        with pytest.raises(ValueError, match=where):
            decode_utf8(mark + "a b\ncaf\xe9\n".encode("latin-1"), "FILE")
    with pytest.raises(ValueError, match=r"line 1 holds 0xFF, byte 1 .*iconv -f UTF-16 -t UTF-8 OLD > NEW\.$"):
        decode_utf8("text".encode("utf-16"), "FILE")
    assert decode_utf8(b"\xef\xbb\xbfa\r\nb", "FILE") == "a\r\nb"
    assert lone_surrogate({"a": ["b", {"c": "d\ud800"}]}) == "d\ud800"
    assert lone_surrogate({"\udfff": 1}) == "\udfff"
    assert lone_surrogate([1, None, "\U0001f600"]) is None


def test_folder_lock_is_exclusive_and_removes_partial_files(tmp_path: Path) -> None:
    code = """
import sys, time
from coconut.utils.files import atomic_folder, exclusive_lock
with exclusive_lock(sys.argv[1]), atomic_folder(sys.argv[1] + "/x") as part:
    print(part, flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    partial = Path(other.stdout.readline().strip())
    with pytest.raises(OSError, match="Another process is using"), exclusive_lock(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert partial.is_dir()
    (tmp_path / ".mine.part").touch()
    with exclusive_lock(tmp_path):
        assert not partial.exists()
        assert sorted(os.listdir(tmp_path)) == [".lock", ".mine.part"], "only what tempfile named"


def test_lock_undoes_an_interrupted_replacement(tmp_path: Path) -> None:
    write_text(tmp_path / "x" / "old", "kept")
    code = """
import os, signal, sys
from pathlib import Path
from coconut.utils.files import atomic_folder, exclusive_lock
replace = os.replace
def replace_and_die(*paths):
    replace(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
with exclusive_lock(sys.argv[1]), atomic_folder(sys.argv[1] + "/x") as part:
    (part / "new").touch()
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    with exclusive_lock(tmp_path):
        assert (tmp_path / "x" / "old").read_text() == "kept"
        assert sorted(os.listdir(tmp_path)) == [".lock", "x"]


def test_replacement_succeeds_after_an_interrupted_one(tmp_path: Path) -> None:
    write_text(tmp_path / f".x{REPLACED}" / "older", "")
    write_text(tmp_path / "x" / "old", "")
    with atomic_folder(tmp_path / "x") as part:
        (part / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]
