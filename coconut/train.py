"""The command that trains a model: python -m coconut.train experiment=NAME key=value ..."""

from coconut.config import TrainConfig
from coconut.utils.hydra_app import application


def run(config: TrainConfig) -> int:
    """Train one run, or go on with it. Gives the exit status."""
    from coconut.training.trainer import run

    return run(config)


main = application("train", TrainConfig, run)

if __name__ == "__main__":
    main()
