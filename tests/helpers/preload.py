"""What a process imports once, before it forks those of tests (processes.py): all that trainings import, and pytest."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, as for every run on CPUs

import hypothesis
import pytest

import coconut.adaptive.main
import coconut.rewards.trainer
import coconut.rl.trainer
import helpers.runs
from coconut.engine.deepspeed_import import import_deepspeed

__all__ = ["coconut", "helpers", "hypothesis", "pytest"]

import_deepspeed()
