"""coconut reward: train a reward model; coconut reward compare: compare several reward models on the same answers."""

from __future__ import annotations

from coconut.rewards.config import CompareConfig, RewardModelConfig
from coconut.utils.hydra_app import application, subcommands


def run(config: RewardModelConfig) -> int:
    """Train a reward model, or resume its training. Gives the exit status."""
    from coconut.rewards.trainer import run

    return run(config)


def compare(config: CompareConfig) -> int:
    """Compare reward models. Gives the exit status."""
    from coconut.rewards.compare_runs import compare_runs

    return compare_runs(config)


main = subcommands(
    application("reward", RewardModelConfig, run), compare=application("reward_compare", CompareConfig, compare)
)

if __name__ == "__main__":
    main()
