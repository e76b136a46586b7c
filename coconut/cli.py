"""What every command shares: composing its configuration with Hydra, help, and errors for people."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
CONF_DIR = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"

# Values of these keys are text, taken to the letter: no quoting, lists or interpolation.
TEXT_KEYS = ("question",)
# Values of these, or of keys that end in one of them after a dot, are names of files and folders: what Hydra's
# grammar would not take is quoted for them. Lists for a multirun and quotes of one's own stay.
PATH_KEYS = ("run", "init", "output", "out_dir", "source", "train", "valid", "test", "compare", "tokenizer", "files",
             "cache_dir", "base", "hub")  # fmt: skip
# Values of these are such names or patterns of them, several parted by commas or spaces. A list of Hydra's stays.
LIST_KEYS = ("runs",)
PLAIN = re.compile(r"[A-Za-z0-9_./:~+@%=,\-?]*|['\"\[{].*|.*\$\{.*", re.DOTALL)


def application(config_name: str, schema: type, run: Callable[[Any], int | None]) -> Callable[[], None]:
    """The `main` of a Hydra application over conf/CONFIG_NAME.yaml.

    `schema` is the dataclass that the composed configuration must fit; `run` is given an instance and
    returns an exit status. ValueError and OSError are messages for the user and end with status 2.
    """

    def main() -> None:
        refuse_namesake()
        import hydra
        from hydra.core.config_store import ConfigStore
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import CompactHydraException
        from hydra.types import RunMode
        from omegaconf import DictConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
        sys.argv[1:] = [quote_text(argument) for argument in sys.argv[1:]]
        status = 0

        def job(config: DictConfig) -> None:
            nonlocal status
            several, failure = HydraConfig.get().mode is RunMode.MULTIRUN, ""
            try:
                if several and OmegaConf.select(config, "launch.num_processes", default=1) != 1:
                    raise ValueError(
                        "launch=local does not go with --multirun. Start one run after the other, or give each job its "
                        "processes: hydra/launcher=slurm hydra.launcher.tasks_per_node=NUMBER."
                    )
                status = run(OmegaConf.to_object(config)) or 0
            except (ValueError, OSError, OmegaConfBaseException) as error:
                if os.environ.get("COCONUT_TRACEBACK"):
                    raise
                failure = f"error: {error}"
                print(failure, file=sys.stderr)
                status = 2
            except KeyboardInterrupt:
                print("\ninterrupted", file=sys.stderr)
                status = 130
            if several and status > 128:  # asked to stop: so are the jobs after this one
                hand_on(status - 128)
                sys.exit(status)
            if several and status:
                raise CompactHydraException(failure or f"error: the run ended with status {status}")

        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
        sys.exit(status)

    return main


def hand_on(number: int) -> None:
    """Tell whoever listened to this signal before us, such as submitit, which can start the job again."""
    if callable(signal.getsignal(number)) and number != signal.SIGINT:
        signal.raise_signal(number)


def own_environment() -> dict[str, str]:
    """In which `python -m coconut.NAME` is found from any folder, and is one process of no launcher."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    launched = ("RANK", "SLURM_STEP_ID")
    return {name: value for name, value in os.environ.items() if name not in launched} | {"PYTHONPATH": path}


def own_version() -> str:
    """Of this package, as it is installed."""
    try:
        return version("coconut-latent")
    except PackageNotFoundError:
        return "not installed"


def refuse_namesake() -> None:
    """Stop if `coconut` is the programming language's package, whose files may lie in the same folder."""
    import coconut

    if "LatentLM" not in getattr(coconut, "__all__", ()):
        sys.exit(
            f"error: another package named coconut (the programming language, perhaps) shadows this one: "
            f"{coconut.__file__}\nTake it out of this environment: python -m pip uninstall coconut, then install "
            "coconut-latent again."
        )


def quote_text(argument: str) -> str:
    """`question=any text` as an override that Hydra's grammar and OmegaConf give back to the letter."""
    key, sign, text = argument.partition("=")
    if sign and key in LIST_KEYS:
        return f"{key}={_as_list(text)}"
    is_path = key.lstrip("+").split(".")[-1] in PATH_KEYS and not PLAIN.fullmatch(text)
    if not sign or not (key in TEXT_KEYS or is_path):
        return argument
    return f"{key}={quoted(text)}"


def _as_list(text: str) -> str:
    body = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if re.search(r"""(^|[,\s])['"]""", body):  # items in quotes of one's own
        return f"[{body}]"
    items = [quoted(item) for item in re.split(r"[,\s]+", body) if item]
    return f"[{','.join(items)}]"


def quoted(text: str) -> str:
    """Any text as a value that Hydra's grammar and OmegaConf give back to the letter."""
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    text = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", text)
    text = re.sub(r"(\\+)$", lambda m: m[1] * 2, text)
    return f"'{text}'"
