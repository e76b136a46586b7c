"""coconut adaptive: learn how to answer each question; coconut adaptive table: only the table of outcomes."""

from coconut.adaptive.config import AdaptiveConfig
from coconut.utils.hydra_app import application, subcommands


def run(config: AdaptiveConfig) -> int:
    """Make the table of outcomes and learn policies from it. Gives the exit status."""
    from coconut.adaptive.main import run

    return run(config)


def table(config: AdaptiveConfig) -> int:
    """Make the table of outcomes. Gives the exit status."""
    from coconut.adaptive.main import run

    return run(config, only_table=True)


main = subcommands(application("adaptive", AdaptiveConfig, run), table=application("adaptive", AdaptiveConfig, table))

if __name__ == "__main__":
    main()
