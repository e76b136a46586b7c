"""The `coconut` command: `coconut COMMAND key=value ...` runs `python -m coconut.COMMAND`."""

from __future__ import annotations

import runpy
import sys

from coconut.utils.hydra_app import exits_cleanly, help_line, nearest, refuse_namesake
from data_builders.evaluation_sets import EVALUATION_SETS

COMMANDS = (
    "train",
    "evaluate",
    "generate",
    "analyze",
    "demo",
    "serve",
    "export",
    "rl",
    "rollout",
    "reward",
    "adaptive",
)
BUILDERS = ("prosqa", "prontoqa", "gsm8k", "gsm8k_aug_nl", "pointers", "import", *EVALUATION_SETS)
DATA = "Make a data set: coconut data NAME. Without a name, list the builders."
LM_EVAL = "Run lm-evaluation-harness with the model coconut: coconut lm_eval run --model coconut ..."


@exits_cleanly
def main() -> None:
    """Run the command that the first argument names."""
    refuse_namesake()
    name, *rest = sys.argv[1:] or [""]
    if name == "data":
        name, *rest = rest or [""]
        module, first = builder(name)
        lines = {each: _builder_line(each) for each in BUILDERS}
        _run("coconut data", "builder", lines, name, module, [*first, *rest])
    else:
        lines = {command: help_line(command) for command in COMMANDS} | {"data": DATA, "lm_eval": LM_EVAL}
        _run("coconut", "command", lines, name, f"coconut.{name}", rest)


def builder(name: str) -> tuple[str, list[str]]:
    """The module that `coconut data NAME` runs, and the arguments that choose the set in it."""
    if name in EVALUATION_SETS:
        return "data_builders.evaluation_builder", [f"dataset={name}"]
    return f"data_builders.{name}", []


def _builder_line(name: str) -> str:
    return EVALUATION_SETS[name].line if name in EVALUATION_SETS else help_line(f"build_{name}")


def _run(program: str, kind: str, lines: dict[str, str], name: str, module: str, arguments: list[str]) -> None:
    """Run `python -m MODULE` with these arguments, or list the names with a line each."""
    if name in lines:
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif name in ("", "-h", "--help"):
        width = max(map(len, lines))
        print(f"{program} {kind.upper()} key=value ...\n")
        for each, line in lines.items():
            print(f"  {each:<{width}} {line}")
        print(f"\n{program} {kind.upper()} --help lists the keys of a {kind}.")
        if kind == "command":
            print("A first run, a small model on a CPU: coconut train experiment=quickstart")
        sys.exit(0 if name else 2)
    else:
        message = f"There is no {kind} {name}. {nearest(name, list(lines))}The {kind}s are: {', '.join(lines)}."
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
