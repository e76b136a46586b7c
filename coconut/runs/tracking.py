"""Write a run's metrics and samples, and start the process that sends them to a tracker.

W&B and TensorBoard run in a separate process (`coconut.runs.tracker_process`) that follows the run's files. Training
only writes files and never waits for a library or a network.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coconut.config import Tracker, TrackingConfig, TrackingMode
from coconut.runs.description import METRICS, read_metrics, samples_file
from coconut.utils.console import log
from coconut.utils.files import explain_full_disk, read_json, write_json, write_text
from coconut.utils.hydra_app import own_environment, package_version

TRACKING = "tracking.json"  # settings of the tracker process, with the id of the W&B run
TRACKING_LOG = "tracking.log"  # output of the tracker process and its library
LOGIN_SECONDS = 30
SECONDS_UNTIL_MESSAGE = 5  # while the end of training waits for the tracker


def check_tracker(config: TrackingConfig) -> None:
    """Raise ValueError if the tracker is not installed, or W&B is to be online and has no login."""
    if config.tracker is Tracker.none:
        return
    if package_version(config.tracker) is None:
        raise ValueError(
            f"tracking={config.tracker} needs the package {config.tracker}, which is not installed. Install it with "
            f"pip install {config.tracker}, or leave out tracking={config.tracker}."
        )
    if config.tracker is Tracker.wandb and config.mode is TrackingMode.online and (problem := _login_problem()):
        raise ValueError(
            f"tracking=wandb sends the run to W&B, but there is no login: {problem}\nLog in with `wandb login`, set "
            "WANDB_API_KEY, or keep the run here with tracking.mode=offline; `wandb sync` sends it later."
        )


def _login_problem() -> str | None:
    """W&B's message if there is no valid API key on this machine, else None. The server is not contacted."""
    code = (
        "import wandb, sys\n"
        "try: there = wandb.login(verify=False)\n"
        "except Exception as error: sys.exit(' '.join(str(error).split('For further')[0].split()))\n"
        "there or sys.exit('W&B is switched off by its settings.')"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env={**os.environ, "WANDB_SILENT": "true", "WANDB_MODE": "online"}, timeout=LOGIN_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def unsynced_folders(run: Path, online: bool = False) -> list[Path]:
    """The W&B folders of a run's sessions that `wandb sync` has not sent, in order; with `online`, also online ones.

    Each session of a resumed run has its own folder; together they are one run in W&B.
    """
    found = [*run.glob("wandb/offline-run-*"), *(run.glob("wandb/run-*") if online else ())]
    return sorted(
        (folder for folder in found if not any(folder.glob("*.wandb.synced"))),
        key=lambda folder: folder.name.removeprefix("offline-"),
    )


class TrackerProcess:
    """Starts and ends the process that sends metrics to W&B or TensorBoard, beginning after update `step`.

    Its failures never affect training; its messages are shown to the user.
    """

    def __init__(self, config: TrackingConfig, folder: Path, step: int, about: dict[str, Any]):
        self.config, self.folder = config, folder
        earlier = read_json(folder / TRACKING) if (folder / TRACKING).is_file() else {}
        tracking = {
            **asdict(config), "id": earlier.get("id", secrets.token_hex(6)),
            "name": config.name or folder.resolve().name, "step": step, "process": os.getpid(), "about": about,
        }  # fmt: skip
        write_json(folder / TRACKING, tracking)
        with (folder / TRACKING_LOG).open("a") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "coconut.runs.tracker_process", str(folder)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log_file, env=own_environment(), start_new_session=True,
            )  # fmt: skip
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)

    def relay_output(self) -> None:
        """Log the lines that the process has printed, without waiting."""
        assert self.process.stdout
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self.process.stdout.fileno(), 1 << 16).decode(errors="replace").splitlines():
                log(line)

    def finish(self, failed: bool, artifacts: dict[str, str]) -> None:
        """Tell the process that the run has ended, and wait at most `config.finish_timeout` seconds for it."""
        assert self.process.stdout
        assert self.process.stdin
        try:
            with contextlib.suppress(OSError):  # it may have ended
                self.process.stdin.write(json.dumps({"failed": failed, "artifacts": artifacts}).encode() + b"\n")
                self.process.stdin.close()
            if not self._ends_within(min(SECONDS_UNTIL_MESSAGE, self.config.finish_timeout)):
                timeout = f"{self.config.finish_timeout:g}"
                log(f"Waiting for {self.config.tracker} to receive the rest, at most {timeout} seconds")
                self._ends_within(self.config.finish_timeout - SECONDS_UNTIL_MESSAGE)
        finally:
            self.process.kill()
            self.process.wait()
            self.relay_output()
            self.process.stdout.close()
        if self.process.returncode:
            log(
                f"warning: {self.config.tracker} did not finish and was stopped. All metrics are in {METRICS}; details "
                f"are in {self.folder / TRACKING_LOG}."
            )
            if self.config.tracker is Tracker.wandb:
                folders = shlex.join(map(str, unsynced_folders(self.folder, online=True)))
                log(f"  Send the rest to W&B with: wandb sync --include-online {folders}")

    def _ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None


class Tracking:
    """Records metrics and samples during a run, and files at its end. A context manager.

    RUN/metrics.jsonl has one object per line, each with `kind`, `step` and `stage`. A resumed run first removes the
    rows after its checkpoint. Without a `run`, as on all processes of a run but the main one, nothing is recorded.
    """

    def __init__(self, run: Path | None, step: int):
        self.run = run
        self.tracker_process: TrackerProcess | None = None
        self.artifacts: dict[str, str] = {}
        if run:
            rows = [row for row in read_metrics(run) if row["step"] <= step]
            write_text(run / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
            self.file = (run / METRICS).open("a", encoding="utf-8")

    def log(self, kind: str, step: int, **values: Any) -> None:
        """A row of metrics.jsonl. Numbers among the values go to the tracker as KIND/NAME."""
        if self.run:
            with explain_full_disk(self.run / METRICS):
                self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
                self.file.flush()
        if self.tracker_process:
            self.tracker_process.relay_output()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write the validation samples of this update to RUN/samples. Call it before `log` for the same update."""
        if self.run:
            write_json(samples_file(self.run, step), rows)

    def artifact(self, path: Path | str, name: str) -> None:
        """Send a file or folder to the tracker at the end of the run."""
        self.artifacts[name] = str(Path(path).resolve())

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.run:
            with contextlib.suppress(OSError):  # a row that `log` has already failed to write
                self.file.close()
        if self.tracker_process:
            self.tracker_process.finish(kind is not None, self.artifacts)


def open_tracking(
    config: TrackingConfig, folder: Path | str, step: int, about: dict[str, Any], writes: bool = True
) -> Tracking:
    """The Tracking of a run that starts or resumes after update `step`. Call `check_tracker` first.

    `about`: the run's `config`, and further entries for W&B. `writes` is true on one process of a run only.
    """
    tracking = Tracking(Path(folder) if writes else None, step)
    if writes and config.tracker is not Tracker.none:
        try:
            tracking.tracker_process = TrackerProcess(config, Path(folder), step, about)
        except OSError as error:
            log(f"warning: {config.tracker} could not be started: {error}. All metrics are in {METRICS}.")
    return tracking
