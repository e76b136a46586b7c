"""coconut train: train a model that reasons in continuous thoughts, or one of its baselines."""

from __future__ import annotations

import re
import sys

from coconut.config import TrainConfig
from coconut.utils.hydra_app import CONF_DIR, application


def run(config: TrainConfig) -> int:
    """Train one run, or resume it; with config.dry_run say what it would cost. Gives the exit status."""
    if config.dry_run:
        from coconut.training.dry_run import run
    else:
        from coconut.training.trainer import run

    return run(config)


def main() -> None:
    """Train with the given arguments. Without arguments, list the experiments and exit with status 2."""
    if len(sys.argv) > 1:
        application("train", TrainConfig, run)()
    print("Name an experiment: coconut train experiment=NAME key=value ...\n")
    for name, line in experiments().items():
        print(f"  {name:<23} {line}")
    print("\nA first run: coconut train experiment=quickstart")
    print("Your own data: coconut train model=tiny data=own data.task=TASK data.train=FILE data.valid=FILE")
    print("All keys: coconut train --help")
    sys.exit(2)


def experiments() -> dict[str, str]:
    """The one-line description of each experiment, by name."""
    found = {}
    for file in sorted((CONF_DIR / "experiment").glob("*.yaml")):
        if head := re.match(r"#.*\n# coconut train .*\n# (.*)\n", file.read_text(encoding="utf-8")):
            found[file.stem] = head[1]
    return found


if __name__ == "__main__":
    main()
