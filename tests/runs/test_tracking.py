"""Tracking: files, W&B and TensorBoard, and trackers that fail, hang or lose their run."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from coconut.config import Tracker, TrackingConfig, TrackingMode
from coconut.runs.description import environment_info, read_metrics, samples_file
from coconut.runs.tracker_process import tracker_values
from coconut.runs.tracking import TRACKING, TRACKING_LOG, Tracking, check_tracker, open_tracking, unsynced_folders
from coconut.utils.files import read_json

pytestmark = pytest.mark.slow

ABOUT = {"config": {"seed": 0, "optimizer": {"lr": 1e-4}}, "plan": [{"thoughts": 2}], "git": {"revision": "abc"}}
OFFLINE = TrackingConfig(tracker=Tracker.wandb, mode=TrackingMode.offline, project="p", group="g", tags=["a", "b"])
RUN = """
import sys, time
from coconut.config import Tracker, TrackingConfig, TrackingMode
from coconut.runs.tracking import Tracking, open_tracking
{updates}
mode, wait, pause = sys.argv[2:]
config = TrackingConfig(tracker=Tracker.wandb, mode=TrackingMode(mode), finish_timeout=float(wait))
with open_tracking(config, sys.argv[1], 0, {about}) as track:
    start = time.perf_counter()
    updates(track, 1, 200)
    print("took", time.perf_counter() - start, flush=True)
    time.sleep(float(pause))
assert not {{"wandb", "torch"}} & set(sys.modules)
"""


def updates(track: Tracking, first: int, last: int) -> None:
    for step in range(first, last + 1):
        row = {"loss": 1 / step, "grad_norm": 0.5, "lr": 1e-4, "targets": 3, "tokens": 80, "memory": 1.5}
        track.log("train", step, stage=step // 3, epoch=0, seconds=0.5, **row)


def validation(track: Any, step: int) -> None:
    track.samples(step, [{"question": "Is it?", "path": ["a", "b"], "right": True}])
    track.log(
        "valid", step, stage=0, epoch=0, accuracy=0.25, thought_norm=2.0, thought_rank=None, thought_drift=[0.5, None]
    )


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protobuf messages, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def records_by_type(file: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def items(message: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message}


def sessions(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)


def test_wandb_offline_files_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracking(OFFLINE, tmp_path, 0, ABOUT) as track:
        updates(track, 1, 4)
        validation(track, 4)
        updates(track, 5, 6)
        (tmp_path / "report.html").write_text("<p>report")
        track.artifact(tmp_path / "report.html", "report")
    with open_tracking(OFFLINE, tmp_path, 4, ABOUT) as track:
        samples_file(tmp_path, 5).write_text("{")
        updates(track, 5, 5)
        track.log("valid", 5, stage=1, epoch=0, accuracy=0.5)
        updates(track, 6, 6)
    output = capsys.readouterr().out
    assert output.count("warning") == output.count("warning: wandb failed on samples, and no more are sent to it") == 1
    folders = [str(session.parent) for session in sessions(tmp_path)]
    assert output.count("Send it with: wandb sync ") == len(folders) == 2
    assert f"Send it with: wandb sync {' '.join(folders)}\n" in output
    assert [str(folder) for folder in unsynced_folders(tmp_path)] == folders
    sent = sessions(tmp_path)[0]
    mark = sent.with_name(f"{sent.name}.synced")
    mark.touch()
    assert [str(folder) for folder in unsynced_folders(tmp_path)] == folders[1:]
    mark.unlink()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 4, 5, 5, 6]

    first, second = map(records_by_type, sessions(tmp_path))
    run = first["run"][0]
    assert (run.project, run.run_group, list(run.tags)) == ("p", "g", ["a", "b"])
    assert run.display_name == tmp_path.name
    assert run.run_id == second["run"][0].run_id == read_json(tmp_path / TRACKING)["id"]
    config = items(run.config.update)
    assert config["optimizer"] == {"lr": 1e-4}
    assert config["about"] == {"plan": ABOUT["plan"], "git": ABOUT["git"]}
    assert any(metric.glob_name == "*" and metric.step_metric == "update" for metric in first["metric"])

    rows = [items(record.item) for record in first["history"]]
    trained = [row for row in rows if "train/loss" in row]
    assert [row["update"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert trained[2]["train/loss"] == pytest.approx(1 / 3)
    assert (trained[2]["train/tokens_per_second"], trained[2]["train/memory"], trained[2]["stage"]) == (160, 1.5, 1)
    valid = next(row for row in rows if "valid/accuracy" in row)
    assert (valid["update"], valid["valid/accuracy"], valid["valid/thought_norm"]) == (4, 0.25, 2.0)
    assert {name: value for name, value in valid.items() if "drift" in name} == {"valid/thought_drift_1": 0.5}
    assert "valid/thought_rank" not in valid
    table = next(row for row in rows if "samples.path" in row)
    assert table["update"] == 4
    content = read_json(sessions(tmp_path)[0].parent / "files" / table["samples.path"])
    assert content["columns"] == ["question", "path", "right"]
    assert content["data"] == [["Is it?", '["a", "b"]', True]]
    artifact = next(artifact for artifact in first["artifact"] if artifact.type == "report")
    assert artifact.name == f"report-{run.run_id}"
    assert [entry.path for entry in artifact.manifest.contents] == ["report.html"]
    assert first["exit"][0].exit_code == 0
    assert [items(record.item)["update"] for record in second["history"]] == [5, 5, 6]


def run_with_silent_network(folder: Path, wait: str, **environment: str) -> str:
    """The output of a run whose W&B server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = start_run(folder, "online", wait, "0", WANDB_BASE_URL=address, WANDB_API_KEY="a" * 40, **environment)
        output, _ = run.communicate(timeout=90)
    assert run.returncode == 0
    assert len(read_metrics(folder)) == 200
    return output


def start_run(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    code = RUN.format(updates=inspect.getsource(updates), about=ABOUT)
    command = [sys.executable, "-c", code, str(folder), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder, env={**os.environ, **paths, **environment}
    )


def test_silent_network_does_not_delay_training(tmp_path: Path) -> None:
    output = run_with_silent_network(tmp_path, "60", WANDB_INIT_TIMEOUT="2")
    assert float(re.findall(r"took (\S+)", output)[0]) < 1
    assert "W&B could not be reached" in output
    assert output.count(f"Send it with: wandb sync {sessions(tmp_path)[0].parent}") == 1
    found = records_by_type(sessions(tmp_path)[0])
    assert len(found["history"]) == 200
    assert items(found["run"][0].config.update)["seed"] == 0


def test_slow_tracker_is_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    output = run_with_silent_network(tmp_path, "1")
    assert time.monotonic() - start < 15
    assert "warning: wandb did not finish and was stopped. All metrics are in metrics.jsonl" in output


def test_tracker_of_a_killed_run_ends(tmp_path: Path) -> None:
    run = start_run(tmp_path, "offline", "60", "60")
    assert run.stdout
    run.stdout.readline()
    deadline = time.monotonic() + 30
    while not sessions(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.kill()
    run.wait()
    run.stdout.close()
    while not (sessions(tmp_path) and "exit" in records_by_type(sessions(tmp_path)[0])) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = records_by_type(sessions(tmp_path)[0])
    assert len(found["history"]) == 200
    assert found["exit"][0].exit_code == 1


def test_failing_tracker_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with open_tracking(TrackingConfig(tracker=Tracker.tensorboard), tmp_path, 0, ABOUT) as track:
        assert track.tracker_process
        track.tracker_process.process.wait(60)
        updates(track, 1, 3)
    output = capsys.readouterr().out
    assert output.count("warning: tensorboard failed, and nothing more is sent to it") == 1
    assert "did not finish" not in output
    assert "Traceback" in (tmp_path / TRACKING_LOG).read_text()
    assert len(read_metrics(tmp_path)) == 3


def test_tensorboard_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(tracker=Tracker.tensorboard)
    with open_tracking(config, tmp_path, 0, ABOUT) as track:
        updates(track, 1, 4)
        validation(track, 4)
        updates(track, 5, 8)
    with open_tracking(config, tmp_path, 5, ABOUT) as track:
        updates(track, 6, 7)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert found.Scalars("train/loss")[3].value == pytest.approx(0.25)
    assert [event.value for event in found.Scalars("valid/accuracy")] == [0.25]
    assert b"Is it?" in found.Tensors("samples/text_summary")[0].tensor_proto.string_val[0]
    assert b"revision" in found.Tensors("about/text_summary")[0].tensor_proto.string_val[0]


def test_without_a_tracker_only_files_are_written(tmp_path: Path) -> None:
    check_tracker(TrackingConfig())
    with (
        open_tracking(TrackingConfig(), tmp_path, 0, ABOUT) as track,
        open_tracking(OFFLINE, tmp_path / "other", 0, ABOUT, writes=False) as silent,
    ):
        updates(track, 1, 2)
        validation(track, 2)
        updates(silent, 1, 2)
        validation(silent, 2)
    assert len(read_metrics(tmp_path)) == 3
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json*")) == [
        "metrics.jsonl", "samples/step-0000002.json",
    ]  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_tracker_values() -> None:
    row = {"kind": "train", "step": 3, "stage": 1, "epoch": 0, "loss": 0.5, "note": "x", "targets": 4}
    assert tracker_values(row) == {"train/loss": 0.5, "train/targets": 4, "stage": 1, "epoch": 0}


def test_missing_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)no login: .*wandb login.*WANDB_API_KEY.*tracking\.mode=offline"):
        check_tracker(TrackingConfig(tracker=Tracker.wandb))
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match="API key must have 40"):
        check_tracker(TrackingConfig(tracker=Tracker.wandb))
    check_tracker(OFFLINE)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_missing_tracker_package_is_refused(tracker: str) -> None:
    code = (
        "from coconut.config import Tracker, TrackingConfig; from coconut.runs.tracking import check_tracker\n"
        f"check_tracker(TrackingConfig(tracker=Tracker.{tracker}))"
    )
    bare = {"PYTHONPATH": str(ROOT)}  # with -S no installed package is found
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, env=bare, check=False
    )
    assert f"pip install {tracker}," in done.stderr


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"finish_timeout": 0}, "tracking.finish_timeout is 0"), ({"project": "a/b"}, "tracking.project is 'a/b'")],
)
def test_invalid_tracking_values_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrackingConfig(**wrong)


def test_versions_include_optional_packages() -> None:
    assert {"deepspeed", "wandb", "peft"} <= environment_info()["versions"].keys()
