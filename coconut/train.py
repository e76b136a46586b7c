"""coconut train: train a model that reasons in continuous thoughts, or one of its baselines."""

from coconut.config import TrainConfig
from coconut.utils.hydra_app import application


def run(config: TrainConfig) -> int:
    """Train one run, or resume it. Gives the exit status."""
    from coconut.training.trainer import run

    return run(config)


main = application("train", TrainConfig, run)

if __name__ == "__main__":
    main()
