"""What every command shares: composing its configuration with Hydra, help, and errors for people."""

from __future__ import annotations

import difflib
import functools
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO, get_type_hints

from coconut.utils.overrides import as_override, expand_home, map_texts, refuse_non_utf8

PACKAGE = Path(__file__).parent.parent
CONF_DIR = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
PIPE_CLOSED = 128 + 13  # the status of what SIGPIPE ends


def application(config_name: str, schema: type, run: Callable[[Any], int | None]) -> Callable[[], None]:
    """The `main` of a Hydra application over conf/CONFIG_NAME.yaml.

    `schema` is the dataclass that the composed configuration must fit; `run` is given an instance and
    returns an exit status. ValueError and OSError are messages for the user and end with status 2, as does
    a configuration that cannot be composed, and a sweep of which a job failed.
    """

    @exits_cleanly
    def main() -> None:
        refuse_namesake()
        import hydra
        from hydra._internal.utils import get_args_parser
        from hydra.core.config_store import ConfigStore
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import CompactHydraException
        from hydra.types import RunMode
        from omegaconf import DictConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
        given = sys.argv[1:]
        multirun = get_args_parser().parse_args(given).multirun
        sys.argv[1:] = [as_override(argument, schema, multirun) for argument in given]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which are printed below
        status = 0

        def job(config: DictConfig) -> None:
            nonlocal status
            sys.argv[1:] = given  # for the workers, and for run.json
            several, failure = HydraConfig.get().mode is RunMode.MULTIRUN, ""
            try:
                if several and OmegaConf.select(config, "launch.num_processes", default=1) != 1:
                    raise ValueError(
                        "launch=local does not go with --multirun. Start one run after the other, or give each job its "
                        "processes: hydra/launcher=slurm hydra.launcher.tasks_per_node=NUMBER."
                    )
                status = run(to_dataclass(config, schema)) or 0
            except (ValueError, OSError, OmegaConfBaseException) as error:
                if isinstance(error, BrokenPipeError) and is_closed(sys.stdout):
                    sys.exit(PIPE_CLOSED)
                if os.environ.get("COCONUT_TRACEBACK"):
                    raise
                failure = f"error: {explain_error(error, schema)}"
                print(failure, file=sys.stderr)
                status = 2
            except KeyboardInterrupt:
                if os.environ.get("RANK", "0") == "0":
                    print("\ninterrupted", file=sys.stderr)
                status = 130
            if several and status > 128:  # a stop signal ends the whole sweep
                _pass_signal_on(status - 128)
                sys.exit(status)
            if several and status:
                raise CompactHydraException(failure or f"error: the run ended with status {status}")

        try:
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
        except (CompactHydraException, ValueError) as error:  # ValueError: a group's choice that is a number
            if os.environ.get("COCONUT_TRACEBACK"):
                raise
            words = explain_error(error, schema)
            print(words if words.startswith("error: ") else f"error: {words}", file=sys.stderr)
            status = 2
        sys.exit(status)

    return main


def exits_cleanly(command: Callable[[], None]) -> Callable[[], None]:
    """The command without a traceback if it is interrupted or if its output is closed."""

    @functools.wraps(command)
    def main() -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # coconut/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            try:
                command()
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not is_closed(sys.stdout):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left at its end
            sys.exit(PIPE_CLOSED)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)

    return main


def is_closed(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader is closed."""
    asked = select.poll()
    asked.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def subcommands(command: Callable[[], None], **others: Callable[[], None]) -> Callable[[], None]:
    """The `main` of a command with subcommands: the first argument names one, or else the command itself runs."""

    def main() -> None:
        other = others.get(next(iter(sys.argv[1:]), ""))
        if other:
            del sys.argv[1]
        (other or command)()

    return main


def help_line(config_name: str) -> str:
    """The first line of a command's --help."""
    text = (CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8")
    return text.partition("template: |-\n")[2].partition("\n")[0].strip()


def to_dataclass(config: Any, schema: type) -> Any:
    """The schema's instance, with `~` expanded in paths.

    Raises ValueError for a key that +KEY=VALUE added where the schema has none, and for text that is not UTF-8.
    """
    from omegaconf import OmegaConf

    if added := next(_unknown(config), None):
        raise ValueError(no_key(added, schema))
    made: Any = OmegaConf.to_object(config)
    map_texts(made, expand_home)
    refuse_non_utf8(asdict(made), schema)
    return made


def explain_error(error: Exception, schema: type) -> str:
    """An error's message; for an error of Hydra or OmegaConf with the value that came and the choices."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        choices = ", ".join(error.options)
        if name.startswith("submitit_") and not any(option.startswith("submitit_") for option in error.options):
            return f"{group}={name} needs submitit's plugin for Hydra. Install it: pip install hydra-submitit-launcher"
        return f"There is no {group}={name}. {nearest(name, error.options)}The choices are: {choices}."
    if isinstance(error, OverrideParseException):
        for group in (path for path in sorted(CONF_DIR.iterdir()) if path.is_dir() and path.name != "hydra"):
            choices = [path.stem for path in group.glob("*.yaml")]
            if found := difflib.get_close_matches(str(error.override), choices, n=1, cutoff=0.8):
                return f"{error.override} is not KEY=VALUE. Did you mean {group.name}={found[0]}?"
        return f"{error.override} cannot be read as KEY=VALUE. Quote a value with marks in it: 'KEY=\"a value\"'"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return str(error)
    if isinstance(cause, KeyError | AttributeError):
        inside = cause.full_key.rpartition(".")[0]
        if cause.object_type is dict:
            return f"{inside} has no key {cause.key}. To add it: +{cause.full_key}=VALUE"
        return no_key(cause.full_key, schema)
    given = cause.full_key if cause.value is None else f"{cause.full_key}={cause.value}"
    if keys := [key for key in _keys(schema) if key.startswith(f"{cause.full_key}.")]:
        return f"{given}: {cause.full_key} has keys of its own, and each gets its value: {', '.join(keys)}"
    return f"{given}: {str(cause).splitlines()[0]}"


def no_key(name: str, schema: type) -> str:
    """The message for an unknown key, with the closest known one."""
    known = [*_keys(schema), *(path.name for path in CONF_DIR.iterdir() if path.is_dir())]
    alike = [key for key in known if key.rpartition(".")[2] == name]
    alike = alike or [key for key in known if not name.startswith(f"{key}.")]
    return f"There is no key {name}. {nearest(name, alike)}All keys with their values: --cfg job; about them: --help"


def nearest(name: str, known: Sequence[str]) -> str:
    """A suggestion, with a space after it; nothing if no name is close."""
    found = known if len(known) == 1 else difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {found[0]}? " if found else ""


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All keys of a dataclass and of nested ones, with dots."""
    for name, kind in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{name}.")  # pyright: ignore


def _unknown(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys that +KEY=VALUE added without being in the schema."""
    from omegaconf import DictConfig, OmegaConf

    kind = OmegaConf.get_type(config)
    known = {field.name for field in fields(kind)} if kind and is_dataclass(kind) else config.keys()
    for name in config:
        if name not in known:
            yield f"{prefix}{name}"
        elif isinstance(node := config._get_node(name), DictConfig) and not node._is_none():
            yield from _unknown(node, f"{prefix}{name}.")


def _pass_signal_on(number: int) -> None:
    """Call the signal handler that was installed before ours, such as submitit's, which requeues the job."""
    if callable(signal.getsignal(number)) and number != signal.SIGINT:
        signal.raise_signal(number)


def own_environment() -> dict[str, str]:
    """Environment variables for a child process that runs `python -m coconut.NAME` outside of a launcher."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    launched = ("RANK", "SLURM_STEP_ID")
    return {name: value for name, value in os.environ.items() if name not in launched} | {"PYTHONPATH": path}


def package_version(name: str) -> str | None:
    """The version of an installed package; None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def refuse_namesake() -> None:
    """Exit if `coconut` is another package, such as the programming language's, in the same folder."""
    import coconut

    if "LatentLM" not in getattr(coconut, "__all__", ()):
        sys.exit(
            f"error: another package named coconut (the programming language, perhaps) shadows this one: "
            f"{coconut.__file__}\nTake it out of this environment: python -m pip uninstall coconut, then install "
            "this one again (pip install -e . in its checkout)."
        )
