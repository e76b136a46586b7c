"""coconut rl: reinforcement learning of a trained model."""

from coconut.rl.config import RLConfig
from coconut.utils.hydra_app import application


def run(config: RLConfig) -> int:
    """Train one run, or resume it. Gives the exit status."""
    from coconut.rl.trainer import run

    return run(config)


main = application("rl", RLConfig, run)

if __name__ == "__main__":
    main()
