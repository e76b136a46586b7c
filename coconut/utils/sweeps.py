"""Log what a sweep is going to run. A Hydra callback, configured in conf/."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from coconut.utils.console import log

LAUNCHERS = {
    "BasicLauncher": "here, one after the other",
    "SlurmLauncher": "each a SLURM job, listed by squeue",
    "LocalLauncher": "all at once, each a process on this machine",
}


class Sweep(Callback):
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Log how many runs there are, their values, the launcher, and where their output goes."""
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
        jobs = BasicSweeper.split_arguments(overrides, None)[0]
        launcher = str(config.hydra.launcher._target_).rpartition(".")[2]
        where = LAUNCHERS.get(launcher, f"by {launcher}")
        log(f"A sweep of {len(jobs)} run{'s' * (len(jobs) != 1)}, {where}:")
        for number, job in enumerate(jobs):
            values = [each for each in job if each.partition("=")[0] in swept]
            log(f"  {number}: {' '.join(values) or 'the only one'}")
        if folder := OmegaConf.select(config, "hydra.launcher.submitit_folder"):
            logs = str(folder).replace("%j", "JOB")
            log(f"Their output is in {logs}, in *_log.out and *_log.err. This command waits for them.")
