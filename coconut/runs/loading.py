"""The model that a run made, or one that was saved, on its device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coconut.config import DataFiles, EngineConfig
from coconut.data.datasets import file_of_split
from coconut.data.examples import read_examples
from coconut.engine.base import set_up_device
from coconut.engine.world import World
from coconut.methods import REASONING_FILE, Curriculum, plan
from coconut.models.latent_lm import LatentLM
from coconut.runs.checkpoints import Checkpoints, load_state
from coconut.runs.description import read_config
from coconut.utils.console import log
from coconut.utils.pretrained import resolve_local_path

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM
from coconut.generation.stop_classifier import StopClassifier, fit_classifier, refuse_untrained


def starting_point(init: str) -> Path:
    """The weights that `init` names: a checkpoint's folder, or a run's best checkpoint, or else its last."""
    path = Path(init)
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path)
        try:
            return checkpoints.find("best")
        except ValueError:
            return checkpoints.find("last")
    return path


def resolve_weights(init: str) -> Path:
    """The folder that `init` names at this moment: a run that is trained further has another best checkpoint later."""
    return resolve_local_path(starting_point(init)).resolve()


def in_float32(lm: LatentLM) -> LatentLM:
    """As a training starts, whatever the weights were saved in; what LoRA corrects is left as it is."""
    return (lm if lm.adapter else lm.to(torch.float32)).eval()


def match_dtypes(reference: LatentLM, lm: LatentLM, device: torch.device) -> LatentLM:
    """The reference on the device, with the dtypes and the acceleration of `lm`: equal models give equal numbers."""
    reference.acceleration.mechanisms = lm.acceleration.mechanisms
    for weight, its in zip(reference.parameters(), lm.parameters(), strict=True):
        weight.data = weight.data.to(its.dtype)
    return reference.to(device).eval()


def run_folder_of(init: str) -> Path:
    """The folder of the run that `init` names, itself or one of its checkpoints."""
    path = Path(init)
    return path if (path / "checkpoints").is_dir() else path.parent.parent


@dataclass(frozen=True)
class LoadedRun:
    """A run's model at a checkpoint, on its device. `config` is what the run was made with."""

    lm: LatentLM
    config: dict[str, Any]
    step: int


def load_run(run: Path | str, checkpoint: str, engine: EngineConfig, world: World | None = None) -> LoadedRun:
    """Raises ValueError if the folder is no run, or has no such checkpoint."""
    world = world or World()
    config = read_config(run)
    path = world.on_main_process(lambda: Checkpoints(run).find(checkpoint))
    device = set_up_device(engine, world)
    lm = LatentLM.from_pretrained(path, config["model"]["attention"] if "model" in config else None)
    lm.to(device).acceleration.mechanisms = engine.mechanisms
    return LoadedRun(lm.eval(), config, load_state(path)["step"])


def load_model(place: str, checkpoint: str, engine: EngineConfig, world: World | None = None) -> LatentLM:
    """The model of a run, or one that was saved: a folder, or OWNER/NAME on the Hugging Face hub. On its device.

    Raises FileNotFoundError or ValueError if there is none.
    """
    if Path(place).exists() and not Path(place, REASONING_FILE).is_file():
        return load_run(place, checkpoint, engine, world).lm
    lm = LatentLM.from_pretrained(place)
    lm.acceleration.mechanisms = engine.mechanisms
    return lm.to(set_up_device(engine, world)).eval()


FOLDER = "stopping"


MOST_EXAMPLES = 8000  # that it is fitted to


def classifier_of(
    run: Path | str, trained: LoadedRun, batch_size: int = 64, data: DataFiles | None = None
) -> StopClassifier:
    """The classifier of a run's checkpoint; fitted, and kept in the run's folder, when it is first asked for.

    `data` names files to fit it on in place of the run's own. Raises ValueError if the run was not trained for it, or
    FileNotFoundError if its files are not where they were.
    """
    lm = trained.lm
    refuse_untrained(lm, plan(trained.config["method"], Curriculum.from_dict(trained.config["curriculum"])))
    file = Path(run) / FOLDER / f"step-{trained.step:07d}.safetensors"
    if file.is_file():
        return StopClassifier.load(file).to(lm.device)
    files = data or DataFiles()
    try:
        named = [file_of_split(trained.config["data"], split, getattr(files, split)) for split in ("train", "valid")]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"stop=classifier is fitted once on the run's data. {error} It is kept in the run's folder when it is "
            f"fitted by python -m coconut.analyze run={run} parts=[stopping] data.train=FILE data.valid=FILE"
        ) from None
    train, valid = (read_examples(file)[:MOST_EXAMPLES] for file in named)
    log(f"Fitting the stopping classifier, once, on {len(train):,} training examples")
    classifier = fit_classifier(lm, train, valid, batch_size)
    classifier.save(file)
    return classifier
