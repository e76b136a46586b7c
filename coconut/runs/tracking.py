"""What a run writes about itself: metrics.jsonl, samples, its configuration, where it was carried out.

W&B and TensorBoard are fed by a process of their own (`coconut.runs.tracker_process`) that reads the run's folder
while it grows. Training writes files and waits for nothing else, whatever a library or a network does.
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
from coconut.runs.description import METRICS, _version, read_metrics, samples_file
from coconut.utils.console import log
from coconut.utils.files import explain_full_disk, read_json, write_json, write_text
from coconut.utils.hydra_app import own_environment

TRACKING = "tracking.json"  # what the tracker is told, the id of the W&B run among it
TRACKING_LOG = "tracking.log"  # what the tracker and its library say
LOGIN_SECONDS = 30
QUIET_SECONDS = 5  # the end of training waits so long without a word


class Metrics:
    """RUN/metrics.jsonl: one object a line, each with `kind`, `step` and `stage`.

    A resumed run drops what was written after the checkpoint that it goes on from.
    """

    def __init__(self, run: Path | str, step: int):
        self.path = Path(run) / METRICS
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, kind: str, step: int, **values: Any) -> None:
        with explain_full_disk(self.path):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that `log` could not write, and said so
            self.file.close()


def check_tracker(config: TrackingConfig) -> None:
    """Raise ValueError if the tracker is not installed, or W&B is to be online and has no login."""
    if config.tracker is Tracker.none:
        return
    if _version(config.tracker) is None:
        raise ValueError(
            f"tracking={config.tracker} needs the package {config.tracker}, which is not installed here. Install it "
            "with "
            f"pip install {config.tracker}, or leave tracking={config.tracker} out."
        )
    if config.tracker is Tracker.wandb and config.mode is TrackingMode.online and (problem := _no_login()):
        raise ValueError(
            f"tracking=wandb is to send the run to W&B, and there is no login: {problem}\nLog in with `wandb login`, "
            "set WANDB_API_KEY, or keep the run here with tracking.mode=offline; `wandb sync` sends it later."
        )


def _no_login() -> str | None:
    """W&B's own word on why nobody is logged in. It looks for a key here and does not ask the server."""
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


def unsent(run: Path, online: bool = False) -> list[Path]:
    """The folders of the run's sessions that `wandb sync` has not sent, in their order; if asked, of `online` ones too.

    Each session of a run that was resumed has its own, and they make one run of W&B.
    """
    found = [*run.glob("wandb/offline-run-*"), *(run.glob("wandb/run-*") if online else ())]
    return sorted(
        (folder for folder in found if not any(folder.glob("*.wandb.synced"))),
        key=lambda folder: folder.name.removeprefix("offline-"),
    )


class TrackerProcess:
    """The process that sends a run's numbers on to W&B or TensorBoard.

    Nothing that it does or fails to do reaches training but its words, which are passed on. It begins with
    the rows after update `step`.
    """

    def __init__(self, config: TrackingConfig, folder: Path, step: int, about: dict[str, Any]):
        self.config, self.folder = config, folder
        earlier = read_json(folder / TRACKING) if (folder / TRACKING).is_file() else {}
        told = {
            **asdict(config),
            "id": earlier.get("id", secrets.token_hex(6)),
            "name": config.name or folder.resolve().name,
            "step": step,
            "process": os.getpid(),
            "about": about,
        }
        write_json(folder / TRACKING, told)
        with (folder / TRACKING_LOG).open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "coconut.runs.tracker_process", str(folder)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, env=own_environment(), start_new_session=True,
            )  # fmt: skip
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)

    def hear(self) -> None:
        """Pass on what the process has to say, without waiting for it."""
        assert self.process.stdout
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self.process.stdout.fileno(), 1 << 16).decode(errors="replace").splitlines():
                log(line)

    def finish(self, failed: bool, artifacts: dict[str, str]) -> None:
        """Tell the process that the run has ended, and give it `config.wait` seconds for what is left."""
        assert self.process.stdout
        assert self.process.stdin
        try:
            with contextlib.suppress(OSError):  # it may have ended
                self.process.stdin.write(json.dumps({"failed": failed, "artifacts": artifacts}).encode() + b"\n")
                self.process.stdin.close()
            if not self._ends_within(min(QUIET_SECONDS, self.config.finish_timeout)):
                log(
                    f"Waiting for {self.config.tracker} to take the rest, at most {self.config.finish_timeout:g} "
                    "seconds"
                )
                self._ends_within(self.config.finish_timeout - QUIET_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self.hear()
            self.process.stdout.close()
        if self.process.returncode:
            log(
                f"warning: {self.config.tracker} did not finish and was left behind. {METRICS} has all of the run; "
                f"{self.folder / TRACKING_LOG} tells more."
            )
            if self.config.tracker is Tracker.wandb:
                folders = shlex.join(map(str, unsent(self.folder, online=True)))
                log(f"  What W&B had taken is sent with: wandb sync --include-online {folders}")

    def _ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None


class Tracking:
    """What a run tells while it goes on: rows, samples, and at its end further files.

    A context manager. Of several processes of one run, one writes; to the others it does nothing.
    """

    def __init__(self, metrics: Metrics | None, sender: TrackerProcess | None):
        self.metrics, self.tracker_process = metrics, sender
        self.artifacts: dict[str, str] = {}

    def log(self, kind: str, step: int, **values: Any) -> None:
        """A row of metrics.jsonl. Numbers among the values go to the tracker as KIND/NAME."""
        if self.metrics:
            self.metrics.log(kind, step, **values)
        if self.tracker_process:
            self.tracker_process.hear()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Validation samples after this update, to RUN/samples; to be called before the row that belongs to them."""
        if self.metrics:
            write_json(samples_file(self.metrics.path.parent, step), rows)

    def artifact(self, path: Path | str, name: str) -> None:
        """A file or folder that belongs to the run, sent on when it ends."""
        self.artifacts[name] = str(Path(path).resolve())

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.metrics:
            self.metrics.close()
        if self.tracker_process:
            self.tracker_process.finish(kind is not None, self.artifacts)


def open_tracking(
    config: TrackingConfig, folder: Path | str, step: int, about: dict[str, Any], writes: bool = True
) -> Tracking:
    """The tracking of a run that stands at update `step`; `ready` has been asked before.

    `about`: its `config`, and what else W&B is to keep, under `about`. Only one of a run's processes `writes`.
    """
    if not writes:
        return Tracking(None, None)
    metrics = Metrics(folder, step)
    if config.tracker is Tracker.none:
        return Tracking(metrics, None)
    try:
        return Tracking(metrics, TrackerProcess(config, Path(folder), step, about))
    except OSError as error:
        log(f"warning: {config.tracker} could not be started: {error}. {METRICS} has all of the run.")
        return Tracking(metrics, None)
