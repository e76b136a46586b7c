"""A run's folder: it holds one run on one set of files, and says which."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coconut.config import Resume, RunConfig, identity, make_paths_absolute
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
    """The run's folder, which no other process may enter meanwhile, and the file of each split.

    Raises ValueError if the run cannot begin or go on there.
    """
    world.on_main_process(lambda: check_tracker(config.tracking))
    make_paths_absolute(config)
    files = world.on_main_process(lambda: data_files(asdict(config.data)))
    folder = config.folder()
    read = {split: files[split] for split in ("train", "valid")}
    world.on_main_process(lambda: open_folder(folder, config, read))
    log(f"Run folder: {folder}")
    with ExitStack() as held:
        world.on_main_process(lambda: held.enter_context(exclusive_lock(folder)) if world.is_main else None)
        if not folder.is_dir():
            raise ValueError(
                f"{folder}, the run's folder, is not to be seen from {platform.node()}. All nodes need it: name a "
                "folder that they share with run=DIR."
            )
        try:
            yield folder, files
        finally:
            if world.is_main and not (folder / DESCRIPTION).exists():
                remove_if_empty(folder)


_LONGER = "the length of a run is part of its plan, and the last validation and checkpoint are at its end"
_MEASURED = "what validation measures chooses the best checkpoint, and that of one run is measured in one way"
WHY = {
    "curriculum.total_length": _LONGER, "num_steps": _LONGER, "epochs": _LONGER, "max_new_tokens": _MEASURED,
    "valid_limit": _MEASURED, "validate_every": _MEASURED,
}  # fmt: skip


def _refusal(folder: Path, differing: Sequence[str]) -> str:
    """Why a run does not go on with another configuration, and what can be done."""
    keys = [told.split(":")[0] for told in differing]
    reasons: dict[str, list[str]] = {}
    for key in keys:
        if key in WHY:
            reasons.setdefault(WHY[key], []).append(key)
    why = "".join(f"\n{', '.join(keys)}: {reason}." for reason, keys in reasons.items())
    return (
        f"{folder} holds a run with another configuration:\n  " + "\n  ".join(differing)
        + "\nName another folder with run=DIR, give the same configuration to go on, or remove the folder. A run that "
        f"begins with the weights of this one: init={folder} run=DIR." + why
    )  # fmt: skip


def differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two configurations differ, as "key: VALUE there, VALUE asked for"."""
    found = []
    for key in sorted(there.keys() | asked.keys()):
        a, b = there.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b and not _led_to(a, b):
            found.append(f"{prefix}{key}: {a} there, {b} asked for")
    return found


def _led_to(there: Any, asked: Any) -> bool:
    """Whether a relative path led to what a run was made with, which may have gone since."""
    return isinstance(there, str) and isinstance(asked, str) and asked != "" and there == str(Path(asked).resolve())


def open_folder(folder: Path, config: RunConfig, files: Mapping[str, str]) -> None:
    """Make sure that the folder is new, or holds this very run on these files.

    Raises ValueError if the folder holds another one, or something else, if a file has changed since, or if there is
    a run and resume=never.
    """
    used = {split: existing(file) for split, file in files.items()}
    if (folder / CONFIG).is_file():
        if config.resume is Resume.never:
            raise ValueError(f"{folder} already holds a run, and resume=never. Name another folder with run=DIR.")
        if differing := differences(identity(read_config(folder), type(config)), config.identity()):
            raise ValueError(_refusal(folder, differing))
        before = read_json(folder / DESCRIPTION)["data"]
        for split, file in used.items():
            if before[split]["sha256"] != sha256(file):
                raise ValueError(
                    f"{before[split]['file']} has changed since the run in {folder} began. Restore the file, or start "
                    "another run with run=DIR."
                )
    elif folder.exists() and any(path.name != DESCRIPTION and path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run. Name another folder with run=DIR.")


def describe(
    folder: Path,
    config: RunConfig,
    about: Mapping[str, Any],
    session: Mapping[str, Any],
    questions: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write config.json and run.json: what exactly is trained, on what, with which code, where.

    Which `questions` it sees in training and validation is kept beside them.

    `about` is said of the run as it is now, but for its "init", which stays what it was when the run began. `session`
    is added to the run's sessions, the earlier of which are kept if it goes on from an update.
    """
    earlier = read_json(folder / DESCRIPTION) if session["from_update"] else {}
    init = earlier.get("init", about["init"])
    if questions and not (session["from_update"] and (folder / QUESTIONS).is_file()):
        keep_questions(folder, questions, Path(init).parent.parent if init else None)
    write_json(
        folder / DESCRIPTION,
        {
            **about,
            "init": init,
            "sessions": [*earlier.get("sessions", []), {**environment_info(), **session}],
        },
    )
    write_json(folder / CONFIG, asdict(config))


def used_file(file: str, used: int) -> dict[str, Any]:
    """What run.json says of a data file, of which so many examples were used."""
    return {"file": file, "sha256": sha256(file), "used": used}
