"""The process that sends a run's numbers on to W&B or TensorBoard: python -m coconut.runs.tracker_process RUN

`coconut.runs.tracking` starts it. It reads RUN/tracking.json and follows RUN/metrics.jsonl, until standard input
brings a line or ends. Lines of standard output reach the user; the rest goes to RUN/tracking.log.
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
from typing import Any, Protocol

from coconut.runs.description import METRICS, samples_file
from coconut.runs.tracking import TRACKING, TRACKING_LOG, unsent
from coconut.utils.console import log
from coconut.utils.files import read_json

SECONDS_TO_ANSWER = "20"  # that W&B has at the beginning; after them the run is kept offline
SECONDS_BETWEEN_LOOKS = 0.5
GRACE = 5  # seconds beyond those that the run waits, for what a killed run left


class Library(Protocol):
    def numbers(self, step: int, values: dict[str, float]) -> None: ...
    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...
    def finish(self, failed: bool, artifacts: dict[str, str]) -> None: ...


class Wandb:
    def __init__(self, folder: Path, told: dict[str, Any]):
        os.environ.setdefault("WANDB_INIT_TIMEOUT", SECONDS_TO_ANSWER)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would hold up the end where no network answers
        import wandb

        self.wandb, self.folder = wandb, folder
        beside = {name: value for name, value in told["about"].items() if name != "config"}
        settings = wandb.Settings(
            console="off", silent=True, disable_code=True, disable_git=True, disable_job_creation=True,
            x_stats_pid=told["process"],
        )  # fmt: skip

        def begin(mode: Any) -> Any:
            return wandb.init(
                id=told["id"], resume="allow", dir=folder, mode=mode, settings=settings, project=told["project"],
                entity=told["entity"], name=told["name"], group=told["group"], tags=told["tags"],
                config={**told["about"].get("config", {}), "about": beside},
            )  # fmt: skip

        try:
            self.run = begin(told["mode"])
        except wandb.Error as error:
            if told["mode"] == "offline":
                raise
            wandb.teardown()
            self.run = begin("offline")
            log(f"warning: W&B was not reached ({error}). The run is kept here, to be sent later.")
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"update": step, **values})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns: list[Any] = list(rows[0])
        data: list[Any] = [[_plain(row[name]) for name in columns] for row in rows]
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
                folders = shlex.join(map(str, unsent(self.folder)))
                log(f"W&B has not got this run yet. Send it with: wandb sync {folders}")


class TensorBoard:
    def __init__(self, folder: Path, told: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=told["step"] + 1)
        self.writer.add_text("about", _block(told["about"]), told["step"])

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.writer.add_text("samples", _block(rows), step)

    def finish(self, failed: bool, artifacts: dict[str, str]) -> None:
        self.writer.close()


LIBRARIES = {"wandb": Wandb, "tensorboard": TensorBoard}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)


def _block(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(f"    {line}\n" for line in text.splitlines())


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers by the names that they have in a tracker."""
    row = dict(row)
    kind, _ = row.pop("kind"), row.pop("step")
    place = {name: row.pop(name) for name in ("stage", "epoch") if name in row}
    if {"tokens", "seconds"} <= row.keys():
        row["tokens_per_second"] = row.pop("tokens") / max(row["seconds"], 1e-9)
    values = {f"{kind}/{name}": value for name, value in row.items()} | place
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


class Ending(threading.Thread):
    """Waits for the run's last word, or for its death, and then sees to it that this process ends in time."""

    def __init__(self, seconds: float):
        super().__init__(daemon=True)
        self.seconds = seconds
        self.message: dict[str, Any] = {"failed": True, "artifacts": {}}  # of a run that died
        self.came = threading.Event()

    def run(self) -> None:
        if text := sys.stdin.readline():
            self.message = json.loads(text)
        self.came.set()
        time.sleep(self.seconds)
        os._exit(1)


def rows(path: Path, came: threading.Event) -> Iterator[dict[str, Any]]:
    """The rows of a file that grows, until the event came and all is read."""
    with path.open(encoding="utf-8") as file:
        cut = ""
        while True:
            last = came.is_set()
            for line in file:
                cut += line
                if cut.endswith("\n"):
                    yield json.loads(cut)
                    cut = ""
            if last:
                return
            came.wait(SECONDS_BETWEEN_LOOKS)


def send(folder: Path, library: Library, told: dict[str, Any], ending: Ending) -> None:
    """Hand all rows after update told["step"] to the library, and samples as long as it takes them."""
    takes_samples = True
    for row in rows(folder / METRICS, ending.came):
        if (step := row["step"]) <= told["step"]:
            continue
        library.numbers(step, numbers(row))
        file = samples_file(folder, step)
        if takes_samples and row["kind"] == "valid" and file.is_file():
            try:
                if samples := read_json(file):
                    library.samples(step, samples)
            except Exception as error:
                traceback.print_exc()
                log(
                    f"warning: {told['tracker']} took no samples, and no more are sent to it ({error}). {file} "
                    "holds them."
                )
                takes_samples = False
    library.finish(**ending.message)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that is interrupted says when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    told = read_json(folder / TRACKING)
    ending = Ending(told["finish_timeout"] + GRACE)
    ending.start()
    try:
        send(folder, LIBRARIES[told["tracker"]](folder, told), told, ending)
    except Exception as error:
        traceback.print_exc()
        log(
            f"warning: {told['tracker']} failed, and nothing more is sent to it ({error}). Training goes on. "
            f"{METRICS} has "
            f"all of it; {folder / TRACKING_LOG} tells more."
        )
        os._exit(0)  # a library that failed may wait for ever in what it does at exit


if __name__ == "__main__":
    main()
