"""Load the model of a run or a saved model, and a run's stop classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coconut.config import DataFiles, EngineConfig
from coconut.data.datasets import file_of_split
from coconut.data.examples import read_examples
from coconut.engine.base import set_up_device
from coconut.engine.world import World
from coconut.generation.stop_classifier import StopClassifier, fit_classifier, refuse_untrained
from coconut.methods import REASONING_FILE, Curriculum, plan
from coconut.models.latent_lm import LatentLM
from coconut.runs.checkpoints import Checkpoints, load_state
from coconut.runs.description import DESCRIPTION, read_config
from coconut.utils.console import log
from coconut.utils.files import read_json
from coconut.utils.pretrained import resolve_local_path


def starting_point(init: str) -> Path:
    """The folder of weights for `init`: of a run its best checkpoint, or else the last; other folders unchanged."""
    path = Path(init)
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path)
        try:
            return checkpoints.find("best")
        except ValueError:
            return checkpoints.find("last")
    return path


def resolve_weights(init: str) -> Path:
    """The folder of weights for `init`, absolute. A run that is trained further may have another one later."""
    return resolve_local_path(starting_point(init)).resolve()


def to_float32(lm: LatentLM) -> LatentLM:
    """Cast a model to float32 for training, in eval mode. The base of a LoRA model keeps its dtype."""
    return (lm if lm.adapter else lm.to(torch.float32)).eval()


def match_dtypes(reference: LatentLM, lm: LatentLM, device: torch.device) -> LatentLM:
    """The reference on the device, with the dtypes and the acceleration of `lm`: equal models give equal numbers."""
    reference.acceleration.mechanisms = lm.acceleration.mechanisms
    for weight, its in zip(reference.parameters(), lm.parameters(), strict=True):
        weight.data = weight.data.to(its.dtype)
    return reference.to(device).eval()


def run_folder_of(init: str) -> Path:
    """The folder of the run for `init`, a run or one of its checkpoints."""
    path = Path(init)
    return path if (path / "checkpoints").is_dir() else path.parent.parent


def supervised_config(run: Path | str) -> dict[str, Any] | None:
    """The configuration of coconut train for a run; of a policy, that of the run from which its weights come.

    None if that one is gone, or if the policy began with weights that are not of a run.
    """
    folder = Path(run)
    while "method" not in (config := read_config(folder)):
        weights = Path(read_json(folder / DESCRIPTION)["init"])
        folder = run_folder_of(str(weights))
        if weights.parent.name != "checkpoints" or not (folder / DESCRIPTION).is_file():
            return None
    return config


@dataclass(frozen=True)
class LoadedRun:
    """A run's model at a checkpoint, on its device, and the configuration of the run."""

    lm: LatentLM
    config: dict[str, Any]
    step: int


def load_run(run: Path | str, checkpoint: str, engine: EngineConfig, world: World | None = None) -> LoadedRun:
    """Load a run's model. Raises ValueError if the folder is not a run, or has no such checkpoint."""
    world = world or World()
    config = read_config(run)
    path = world.on_main_process(lambda: Checkpoints(run).find(checkpoint))
    device = set_up_device(engine, world)
    lm = LatentLM.from_pretrained(path, config["model"]["attention"] if "model" in config else None)
    lm.to(device).acceleration.mechanisms = engine.mechanisms
    return LoadedRun(lm.eval(), config, load_state(path)["step"])


def load_model(name_or_path: str, checkpoint: str, engine: EngineConfig, world: World | None = None) -> LatentLM:
    """Load a run's model or a saved one, from a folder or OWNER/NAME on the Hugging Face hub, onto its device.

    Raises FileNotFoundError or ValueError if there is none.
    """
    if Path(name_or_path).exists() and not Path(name_or_path, REASONING_FILE).is_file():
        return load_run(name_or_path, checkpoint, engine, world).lm
    lm = LatentLM.from_pretrained(name_or_path)
    lm.acceleration.mechanisms = engine.mechanisms
    return lm.to(set_up_device(engine, world)).eval()


CLASSIFIER_FOLDER = "stopping"
MAX_EXAMPLES = 8000  # to fit the classifier on


def classifier_of(
    run: Path | str, trained: LoadedRun, batch_size: int = 64, data: DataFiles | None = None
) -> StopClassifier:
    """The stop classifier of a run's checkpoint. It is fitted on first use and saved in the run's folder.

    `data` names files to fit it on instead of the run's. Raises ValueError if the run's training does not allow
    stopping early, or is not known, and FileNotFoundError if the run's files are gone.
    """
    lm = trained.lm
    supervised = supervised_config(run)
    if supervised is None:
        raise ValueError(
            f"The run from which {run} started is gone, so it is not known whether it was trained with fewer thoughts "
            "than its own, as stop=classifier needs. Leave it out."
        )
    refuse_untrained(lm, plan(supervised["method"], Curriculum.from_dict(supervised["curriculum"])))
    file = Path(run) / CLASSIFIER_FOLDER / f"step-{trained.step:07d}.safetensors"
    if file.is_file():
        return StopClassifier.load(file).to(lm.device)
    try:
        paths = [file_of_split(trained.config["data"], split, data) for split in ("train", "valid")]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"stop=classifier is fitted once on the run's data. {error} To fit and save it on other files: coconut "
            f"analyze run={run} parts=[stopping] data.train=FILE data.valid=FILE"
        ) from None
    train, valid = (read_examples(file)[:MAX_EXAMPLES] for file in paths)
    log(f"Fitting the stop classifier, once, on {len(train):,} training examples")
    classifier = fit_classifier(lm, train, valid, batch_size)
    classifier.save(file)
    return classifier
