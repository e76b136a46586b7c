"""Which process this is, from what torchrun, deepspeed or SLURM's srun set."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field

from coconut.utils.console import listed


@dataclass(frozen=True)
class RankInfo:
    """Which of the processes this one is; `host` and `port` are where the first one is to be found.

    `told_by`: the variable without which this process would be alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = ""
    port: int = 0
    launcher: str = field(default="", compare=False)

    @property
    def alone(self) -> str:
        """What to do if there are no others."""
        named = f"{self.launcher}={os.environ.get(self.launcher, '')}"
        return (
            f"{named} in the environment says that this process is one of {self.size}. If it is the only one, as in a "
            f"shell of srun --pty, start it with: env -u {self.launcher} COMMAND"
        )


def read_launcher_env() -> RankInfo:
    """As torchrun, deepspeed or SLURM's srun tell it; alone if none of them started this process.

    Raises ValueError if what they tell is not enough.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        if missing := [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]:
            raise ValueError(
                f"RANK and WORLD_SIZE are set, as a launcher does, but not {listed(missing)}. Start with torchrun, "
                "deepspeed or srun; for one process unset RANK and WORLD_SIZE."
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
        local_size=_most_on_a_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        host=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "")),
        port=int(env.get("MASTER_PORT") or _port(int(env.get("SLURM_JOB_ID", 0)), int(env["SLURM_STEP_ID"]))),
        launcher="SLURM_STEP_ID",
    )


def _port(job: int, step: int) -> int:
    """The same in all tasks of a step, and below those that the system gives to outgoing connections."""
    return 20000 + (job + 97 * step) % 12000


def _most_on_a_node(tasks: str) -> int:
    """SLURM's tasks per node, such as "4(x2),3"."""
    return max(int(part.partition("(")[0]) for part in tasks.split(","))


def _first_host(nodes: str) -> str:
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"scontrol does not tell the first of SLURM's nodes {nodes!r} ({error}). Set MASTER_ADDR to its name; or, "
            "if this process is the only one, as in a shell of srun --pty, start it with: env -u SLURM_STEP_ID COMMAND"
        ) from error
    return told.stdout.split()[0]
