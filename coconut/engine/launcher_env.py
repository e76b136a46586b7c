"""Read rank and world size from the environment variables of torchrun, deepspeed or SLURM's srun."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field

from coconut.utils.console import listed


@dataclass(frozen=True)
class RankInfo:
    """Rank and world size of this process, and the address of the first one (`host`, `port`).

    `launcher`: the environment variable that marks this process as one of several; "" for a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = ""
    port: int = 0
    launcher: str = field(default="", compare=False)

    @property
    def advice(self) -> str:
        """What to do if this process was not meant to be one of several."""
        named = f"{self.launcher}={os.environ.get(self.launcher, '')}"
        return (
            f"The environment variable {named} marks this process as one of {self.size}. If it is the only one, as in "
            f"a shell of srun --pty, start it with: env -u {self.launcher} COMMAND"
        )


def read_launcher_env() -> RankInfo:
    """Read the variables set by torchrun, deepspeed or SLURM's srun; a single process without them.

    Raises ValueError if some are missing.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        if missing := [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]:
            raise ValueError(
                f"RANK and WORLD_SIZE are set, but not {listed(missing)}. Start with torchrun, deepspeed or srun; for "
                "one process unset RANK and WORLD_SIZE."
            )
        size = int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)
        rank, local_rank = int(env["RANK"]), int(env["LOCAL_RANK"])
        return RankInfo(rank, size, local_rank, local_size, env["MASTER_ADDR"], int(env["MASTER_PORT"]), "RANK")
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_STEP_ID" not in env or size == 1:
        return RankInfo()
    return RankInfo(
        rank=int(env["SLURM_PROCID"]),
        size=size,
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=_max_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        host=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "")),
        port=int(env.get("MASTER_PORT") or _port(int(env.get("SLURM_JOB_ID", 0)), int(env["SLURM_STEP_ID"]))),
        launcher="SLURM_STEP_ID",
    )


def _port(job: int, step: int) -> int:
    """A port that is the same in all tasks of a SLURM step, and below the range of outgoing connections."""
    return 20000 + (job + 97 * step) % 12000


def _max_tasks_per_node(tasks: str) -> int:
    """The largest number in SLURM's tasks per node, such as "4(x2),3"."""
    return max(int(part.partition("(")[0]) for part in tasks.split(","))


def _first_host(nodes: str) -> str:
    """The first host of SLURM's node list. Raises ValueError if scontrol fails."""
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"scontrol could not expand SLURM's node list {nodes!r} ({error}). Set MASTER_ADDR to the first node; or, "
            "if this process is the only one, as in a shell of srun --pty, start it with: env -u SLURM_STEP_ID COMMAND"
        ) from error
    return result.stdout.split()[0]
