"""The process that sends a run's metrics to W&B or TensorBoard: python -m coconut.runs.tracker_process RUN

It is started by `coconut.runs.tracking`. It reads RUN/tracking.json and follows RUN/metrics.jsonl until a line or the
end of standard input. Its standard output is shown to the user; everything else goes to RUN/tracking.log.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut.runs.description import METRICS, samples_file
from coconut.runs.tracking import TRACKING, TRACKING_LOG, unsynced_folders
from coconut.utils.console import log
from coconut.utils.files import read_json

INIT_TIMEOUT = "20"  # seconds that W&B has to answer; after them the run is kept offline
SECONDS_BETWEEN_LOOKS = 0.5
GRACE = 5  # seconds in addition to finish_timeout, after which this process ends itself


class Wandb:
    def __init__(self, folder: Path, tracking: dict[str, Any]):
        os.environ.setdefault("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it delays the end without a network
        import wandb

        self.wandb, self.folder = wandb, folder
        about = {name: value for name, value in tracking["about"].items() if name != "config"}
        settings = wandb.Settings(
            console="off", silent=True, disable_code=True, disable_git=True, disable_job_creation=True,
            x_stats_pid=tracking["process"],
        )  # fmt: skip

        def begin(mode: Any) -> Any:
            return wandb.init(
                id=tracking["id"], resume="allow", dir=folder, mode=mode, settings=settings,
                **{key: tracking[key] for key in ("project", "entity", "name", "group", "tags")},
                config={**tracking["about"].get("config", {}), "about": about},
            )  # fmt: skip

        try:
            self.run = begin(tracking["mode"])
        except wandb.Error as error:
            if tracking["mode"] == "offline":
                raise
            wandb.teardown()
            self.run = begin("offline")
            log(f"warning: W&B could not be reached ({error}). The run is kept here, to be sent later.")
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"update": step, **values})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns: list[Any] = list(rows[0])
        data: list[Any] = [[_cell(row[name]) for name in columns] for row in rows]
        table = self.wandb.Table(columns, data, allow_mixed_types=True)
        self.run.log({"update": step, "samples": table})

    def finish(self, failed: bool, artifacts: dict[str, str]) -> None:
        try:
            for name, path in artifacts.items():
                artifact = self.wandb.Artifact(f"{name}-{self.run.id}", type=name)
                artifact.add_dir(path) if Path(path).is_dir() else artifact.add_file(path)
                self.run.log_artifact(artifact)
        finally:
            self.run.finish(exit_code=int(failed))
            if self.run.offline:
                folders = shlex.join(map(str, unsynced_folders(self.folder)))
                log(f"This run has not been sent to W&B. Send it with: wandb sync {folders}")


class TensorBoard:
    def __init__(self, folder: Path, tracking: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=tracking["step"] + 1)
        self.writer.add_text("about", _indented_json(tracking["about"]), tracking["step"])

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.writer.add_text("samples", _indented_json(rows), step)

    def finish(self, failed: bool, artifacts: dict[str, str]) -> None:
        self.writer.close()


LIBRARIES = {"wandb": Wandb, "tensorboard": TensorBoard}


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)


def _indented_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(f"    {line}\n" for line in text.splitlines())


def tracker_values(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, with their names in a tracker. Those of a list are numbered from 1."""
    row = dict(row)
    kind, _ = row.pop("kind"), row.pop("step")
    position = {name: row.pop(name) for name in ("stage", "epoch") if name in row}
    if {"tokens", "seconds"} <= row.keys():
        row["tokens_per_second"] = row.pop("tokens") / max(row["seconds"], 1e-9)
    for name in [name for name, value in row.items() if isinstance(value, list)]:
        row |= {f"{name}_{place}": value for place, value in enumerate(row.pop(name), 1)}
    values = {f"{kind}/{name}": value for name, value in row.items()} | position
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


class EndListener(threading.Thread):
    """Wait for the end of the run (a line or the end of standard input), and then end this process in time."""

    def __init__(self, seconds: float):
        super().__init__(daemon=True)
        self.seconds = seconds
        self.message: dict[str, Any] = {"failed": True, "artifacts": {}}  # for a run that died
        self.ended = threading.Event()

    def run(self) -> None:
        if text := sys.stdin.readline():
            self.message = json.loads(text)
        self.ended.set()
        time.sleep(self.seconds)
        os._exit(1)


def follow_rows(path: Path, ended: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield the rows of a growing file until the event is set and all rows are read."""
    with path.open(encoding="utf-8") as file:
        pending = ""
        while True:
            was_ended = ended.is_set()
            for line in file:
                pending += line
                if pending.endswith("\n"):
                    yield json.loads(pending)
                    pending = ""
            if was_ended:
                return
            ended.wait(SECONDS_BETWEEN_LOOKS)


def send(folder: Path, library: Wandb | TensorBoard, tracking: dict[str, Any], ending: EndListener) -> None:
    """Send all rows after update tracking["step"] to the library, and samples until one fails."""
    takes_samples = True
    for row in follow_rows(folder / METRICS, ending.ended):
        if (step := row["step"]) <= tracking["step"]:
            continue
        library.numbers(step, tracker_values(row))
        file = samples_file(folder, step)
        if takes_samples and row["kind"] == "valid" and file.is_file():
            try:
                if samples := read_json(file):
                    library.samples(step, samples)
            except Exception as error:
                traceback.print_exc()
                log(
                    f"warning: {tracking['tracker']} failed on samples, and no more are sent to it ({error}). They are "
                    f"in {file}."
                )
                takes_samples = False
    library.finish(**ending.message)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run says when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    tracking = read_json(folder / TRACKING)
    ending = EndListener(tracking["finish_timeout"] + GRACE)
    ending.start()
    try:
        send(folder, LIBRARIES[tracking["tracker"]](folder, tracking), tracking, ending)
    except Exception as error:
        traceback.print_exc()
        log(
            f"warning: {tracking['tracker']} failed, and nothing more is sent to it ({error}). Training goes on. All "
            f"metrics are in {METRICS}; details are in {folder / TRACKING_LOG}."
        )
        os._exit(0)  # a library that failed may hang at exit


if __name__ == "__main__":
    main()
