"""Files appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from coconut.files import read_json, sole_owner, whole_file, whole_folder, write_json, write_text


def fail_in(context: AbstractContextManager[Path], write: Callable[[Path], object]) -> None:
    with context as part:
        write(part)
        raise OSError("the disk is full")


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk"):
        fail_in(whole_file(path), lambda part: part.write_text("half"))
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with whole_folder(path) as part:
            (part / "sub").mkdir()
            write_text(part / "sub" / "file.txt", content)
        assert (path / "sub" / "file.txt").read_text() == content
    with pytest.raises(OSError, match="disk"):
        fail_in(whole_folder(path), lambda part: write_text(part / "other.txt", "half"))
    assert (path / "sub" / "file.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_files_are_readable_as_others_are(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": 1})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert read_json(tmp_path / "a.json") == {"ü": 1}


def test_a_folder_has_one_owner_and_the_leftovers_of_a_killed_one_go(tmp_path: Path) -> None:
    code = """
import sys, time
from coconut.files import sole_owner, whole_folder
with sole_owner(sys.argv[1]), whole_folder(sys.argv[1] + "/x") as part:
    print(part, flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    left = Path(other.stdout.readline().strip())
    with pytest.raises(OSError, match="Another process is at work"), sole_owner(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert left.is_dir()
    with sole_owner(tmp_path):
        assert not left.exists()
        assert os.listdir(tmp_path) == [".lock"]


def test_a_replacement_killed_half_way_is_undone(tmp_path: Path) -> None:
    write_text(tmp_path / "x" / "old", "kept")
    code = """
import os, signal, sys
from pathlib import Path
from coconut.files import sole_owner, whole_folder
replace = os.replace
def replace_and_die(*paths):
    replace(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
with sole_owner(sys.argv[1]), whole_folder(sys.argv[1] + "/x") as part:
    (part / "new").touch()
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    with sole_owner(tmp_path):
        assert (tmp_path / "x" / "old").read_text() == "kept"
        assert sorted(os.listdir(tmp_path)) == [".lock", "x"]
