"""Open a run's folder, check that it belongs to this configuration and data, and write its description."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coconut.config import TRAINING_SPLITS, Resume, RunConfig, identity, make_paths_absolute
from coconut.data.datasets import data_files
from coconut.data.examples import existing
from coconut.data.seen_questions import QUESTIONS, keep_questions
from coconut.engine.world import World
from coconut.runs.description import CONFIG, DESCRIPTION, environment_info, read_config
from coconut.runs.tracking import check_tracker
from coconut.utils.console import log
from coconut.utils.files import exclusive_lock, read_json, remove_if_empty, sha256, write_json


@contextmanager
def open_run_folder(config: RunConfig, world: World) -> Iterator[tuple[Path, dict[str, str]]]:
    """Lock the run's folder and yield it, with the file of each split.

    Raises ValueError if the run cannot start or be resumed there.
    """
    world.on_main_process(lambda: check_tracker(config.tracking))
    make_paths_absolute(config)
    files = world.on_main_process(lambda: data_files(asdict(config.data), TRAINING_SPLITS))
    folder = config.folder()
    world.on_main_process(lambda: check_folder(folder, config, files))
    log(f"Run folder: {folder}")
    with ExitStack() as held:
        world.on_main_process(lambda: held.enter_context(exclusive_lock(folder)) if world.is_main else None)
        if not folder.is_dir():
            raise ValueError(
                f"The run's folder {folder} does not exist on {platform.node()}. All nodes must share it: name a "
                "shared folder with run=DIR."
            )
        try:
            yield folder, files
        finally:
            if world.is_main and not (folder / DESCRIPTION).exists():
                remove_if_empty(folder)


_LENGTH = "a run's length is part of its plan, which ends with a validation and a checkpoint"
_VALIDATION = "validation chooses the best checkpoint, so it must be the same throughout a run"
REASONS = {
    "curriculum.total_length": _LENGTH, "num_steps": _LENGTH, "epochs": _LENGTH, "max_new_tokens": _VALIDATION,
    "valid_limit": _VALIDATION, "validate_every": _VALIDATION,
}  # fmt: skip


def _difference_message(folder: Path, differing: Sequence[str]) -> str:
    """An error message for a run that was started with another configuration."""
    keys = [difference.split(":")[0] for difference in differing]
    reasons: dict[str, list[str]] = {}
    for key in keys:
        if key in REASONS:
            reasons.setdefault(REASONS[key], []).append(key)
    why = "".join(f"\n{', '.join(keys)}: {reason}." for reason, keys in reasons.items())
    return (
        f"{folder} holds a run with another configuration:\n  " + "\n  ".join(differing)
        + "\nName another folder with run=DIR, use the same configuration to resume the run, or remove the folder. To "
        f"start a new run from its weights: init={folder} run=DIR." + why
    )  # fmt: skip


def differences(saved: dict[str, Any], requested: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two configurations differ, as "key: VALUE there, VALUE asked for"."""
    found = []
    for key in sorted(saved.keys() | requested.keys()):
        a, b = saved.get(key), requested.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b and not _is_same_path(a, b):
            found.append(f"{prefix}{key}: {a} there, {b} asked for")
    return found


def _is_same_path(saved: Any, requested: Any) -> bool:
    """Whether a requested relative path means the saved absolute one, even if the file is gone."""
    both_text = isinstance(saved, str) and isinstance(requested, str)
    return both_text and requested != "" and saved == str(Path(requested).resolve())


def check_folder(folder: Path, config: RunConfig, files: Mapping[str, str]) -> None:
    """Check that the folder is new, or holds a run with this configuration and these files.

    Raises ValueError if it holds another run or other files, if a data file has changed, or if there is a run and
    resume=never.
    """
    used = {split: existing(file) for split, file in files.items()}
    if (folder / CONFIG).is_file():
        if config.resume is Resume.never:
            raise ValueError(f"{folder} already holds a run, and resume=never. Name another folder with run=DIR.")
        if differing := differences(identity(read_config(folder), type(config)), config.identity()):
            raise ValueError(_difference_message(folder, differing))
        before = read_json(folder / DESCRIPTION)["data"]
        for split, file in used.items():
            if before[split]["sha256"] != sha256(file):
                raise ValueError(
                    f"{before[split]['file']} has changed since the run in {folder} was started. Restore the file, or "
                    "start another run with run=DIR."
                )
    elif folder.exists() and any(path.name != DESCRIPTION and path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and is not a run. Name another folder with run=DIR.")


def write_description(
    folder: Path, config: RunConfig, about: Mapping[str, Any], session: Mapping[str, Any],
    questions: Mapping[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """Write config.json and run.json, the description of a run: model, data, code and machine.

    `about` holds the entries of run.json; its "init" is kept from the start of the run. `session` is appended to the
    run's sessions; if it resumes an update, earlier sessions are kept. Hashes of `questions` (by split) are saved too.
    """
    earlier = read_json(folder / DESCRIPTION) if session["from_step"] else {}
    init = earlier.get("init", about["init"])
    if questions and not (session["from_step"] and (folder / QUESTIONS).is_file()):
        keep_questions(folder, questions, Path(init).parent.parent if init else None)
    sessions = [*earlier.get("sessions", []), {**environment_info(), **session}]
    write_json(folder / DESCRIPTION, {**about, "init": init, "sessions": sessions})
    write_json(folder / CONFIG, asdict(config))


def used_file(file: str, used: int) -> dict[str, Any]:
    """The entry of run.json for a data file. `used`: number of examples that are used."""
    return {"file": file, "sha256": sha256(file), "used": used}
