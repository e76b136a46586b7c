"""The `coconut` command: `coconut COMMAND key=value ...` runs `python -m coconut.COMMAND`."""

from __future__ import annotations

import runpy
import sys

from coconut.utils.hydra_app import exits_cleanly, help_line, nearest, refuse_namesake

COMMANDS = ("train", "evaluate", "generate", "analyze", "demo", "export", "rl", "rollout", "reward", "adaptive")
BUILDERS = ("prosqa", "prontoqa", "gsm8k", "pointers")
DATA = "Make a data set: coconut data NAME. Without a name, list the builders."


@exits_cleanly
def main() -> None:
    """Run the command that the first argument names."""
    refuse_namesake()
    name, *rest = sys.argv[1:] or [""]
    if name == "data":
        name, *rest = rest or [""]
        lines = {builder: help_line(f"build_{builder}") for builder in BUILDERS}
        _run("coconut data", "builder", lines, "data_builders", name, rest)
    else:
        lines = {command: help_line(command) for command in COMMANDS} | {"data": DATA}
        _run("coconut", "command", lines, "coconut", name, rest)


def _run(program: str, kind: str, lines: dict[str, str], package: str, name: str, arguments: list[str]) -> None:
    """Run `python -m PACKAGE.NAME` with these arguments, or list the names with a line each."""
    if name in lines:
        sys.argv[1:] = arguments
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)
    elif name in ("", "-h", "--help"):
        print(f"{program} {kind.upper()} key=value ...\n")
        for each, line in lines.items():
            print(f"  {each:<10} {line}")
        print(f"\n{program} {kind.upper()} --help lists the keys of a {kind}.")
        if package == "coconut":
            print("A first run, a small model on a CPU: coconut train experiment=quickstart")
        sys.exit(0 if name else 2)
    else:
        message = f"There is no {kind} {name}. {nearest(name, list(lines))}The {kind}s are: {', '.join(lines)}."
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
