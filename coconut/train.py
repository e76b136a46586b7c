"""TODO"""

from __future__ import annotations

from coconut.config import TrainConfig
from coconut.training.trainer import run
from coconut.utils.hydra_app import application

main = application("train", TrainConfig, run)
