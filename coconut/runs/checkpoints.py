"""Write, verify and find checkpoints.

A checkpoint is a folder RUN/checkpoints/step-NNNNNNN. It opens with LatentLM.from_pretrained (weights in safetensors,
tokenizer, reasoning), and also has

    trainer.pt      state of the optimizer and of the random generators, and what else of tensors the trainer needs
    state.json      progress of training, and which checkpoint is the best so far
    manifest.json   size and SHA-256 of every other file

A further model that is trained with this one has a subfolder with its own trainer.pt.

Checkpoints are written atomically, so no pointer file is needed: the last checkpoint is the one with the highest
number and a valid manifest, and its state names the best.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coconut.models.latent_lm import LatentLM
from coconut.utils.files import FileWriteError, atomic_folder, read_json, sha256, write_json

MANIFEST = "manifest.json"
TRAINER = "trainer.pt"
STATE = "state.json"


class Checkpoints:
    """The checkpoints of one run.

    The newest `keep` are kept, the best one, and those whose step is a multiple of `keep_every`. A step is an update,
    or in reinforcement learning a batch of questions, which may take several.
    """

    def __init__(self, run: Path | str, keep: int = 2, keep_every: int = 0):
        self.folder = Path(run) / "checkpoints"
        self.keep, self.keep_every = keep, keep_every

    def save(
        self, step: int, lm: LatentLM, trainer: dict[str, Any], state: dict[str, Any],
        on_file: Callable[[], None] = lambda: None,
        extra_models: Mapping[str, tuple[LatentLM, dict[str, Any]]] | None = None,
    ) -> Path:  # fmt: skip
        """Write a checkpoint, then remove old ones that need not be kept.

        `on_file` is called after each file, as a heartbeat. `extra_models`: further models and the states of their
        trainers, by the names of their subfolders. Raises OSError if the checkpoint cannot be written; earlier ones
        are then left unchanged.
        """
        path = self.path(step)
        try:
            with atomic_folder(path) as part:
                for name, (model, trainer_state) in {"": (lm, trainer), **(extra_models or {})}.items():
                    model.save_pretrained(part / name)
                    on_file()
                    torch.save(trainer_state, part / name / TRAINER)
                write_json(part / STATE, {"step": step, **state})
                manifest = {}
                for file in sorted(file for file in part.rglob("*") if file.is_file()):
                    on_file()
                    manifest[str(file.relative_to(part))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
                write_json(part / MANIFEST, manifest)
        except Exception as error:
            free = shutil.disk_usage(self.folder).free / 2**20
            before = self.steps()
            advice = f"The checkpoint of step {before[-1]} is intact." if before else "There is no earlier one."
            reason = error.reason if isinstance(error, FileWriteError) else error
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({free:,.0f} MiB free there): {reason}. {advice} Free some space if the disk is full, then run the "
                "same command again."
            ) from error
        best = (state.get("best") or {}).get("step")
        for old in [earlier for earlier in self.steps() if earlier <= step][: -self.keep]:
            if old != best and not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(self.path(old))
        return path

    def quarantine_after(self, step: int) -> None:
        """Rename the checkpoints after `step`. They are damaged, and a run resumed at `step` writes them again."""
        for later in self.steps():
            if later > step:
                path = self.path(later)
                path.replace(path.with_name(f"damaged-{path.name}-{int(path.stat().st_mtime)}"))

    def steps(self) -> list[int]:
        """The steps of all checkpoints, damaged ones included, in ascending order."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def newest_valid(self) -> Path | None:
        """The newest valid checkpoint, None if there is none. Warns on standard error of damaged ones."""
        for step in reversed(self.steps()):
            if not (damage := damage_of(self.path(step))):
                return self.path(step)
            _warn_damaged(self.path(step), damage)
        return None

    def require_newest_valid(self) -> Path | None:
        """The newest valid checkpoint, None if there are no checkpoints. Raises ValueError if all are damaged."""
        found = self.newest_valid()
        if not found and self.steps():
            raise ValueError(
                f"Every checkpoint in {self.folder} is damaged, so the run cannot be resumed. Restore one, or remove "
                f"{self.folder.parent} to start the run again."
            )
        return found

    def find(self, which: str) -> Path:
        """The checkpoint named by "best", "last", or the number of its step.

        If the best one is damaged, the newest valid one is used, with a warning on standard error. Raises ValueError
        if there is no such checkpoint, or if one named by number is damaged.
        """
        last = self.newest_valid()
        if last is None:
            raise ValueError(f"{self.folder} has no valid checkpoint. Train first, or name another run.")
        if which == "last":
            return last
        if which == "best":
            best = read_json(last / STATE).get("best")
            if not best:
                raise ValueError(
                    f"{self.folder.parent} has no best checkpoint yet: no validation has chosen one (with a curriculum "
                    "one of the last stage does). Use checkpoint=last."
                )
            step = best["step"]
        elif which.isdigit():
            step = int(which)
        else:
            raise ValueError(f"checkpoint is {which!r}; it must be best, last, or the number of a step.")
        if step not in self.steps():
            raise ValueError(
                f"{self.folder} has no checkpoint of step {step}; it has: {', '.join(map(str, self.steps()))}."
            )
        path = self.path(step)
        if damage := damage_of(path):
            if which.isdigit():
                raise ValueError(f"The checkpoint {path} is damaged: {damage}. Use another, or checkpoint=last.")
            _warn_damaged(path, damage)
            print(f"Using the newest valid checkpoint instead: {last}", file=sys.stderr)
            return last
        return path


def load_state(path: Path) -> dict[str, Any]:
    return read_json(path / STATE)


def load_trainer(path: Path) -> dict[str, Any]:
    """A checkpoint's trainer state, memory-mapped, so that the processes of one machine share it."""
    return torch.load(path / TRAINER, map_location="cpu", weights_only=True, mmap=True)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = read_json(path / MANIFEST)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected["bytes"]:
            return f"{name} has {size:,} of {expected['bytes']:,} bytes"
        if sha256(file) != expected["sha256"]:
            return f"the checksum of {name} does not match"
    return None


def _warn_damaged(path: Path, damage: str) -> None:
    print(f"warning: the checkpoint {path} is damaged: {damage}.", file=sys.stderr)
