"""The layout of the code: which package may import which, and what stays small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx
import pytest
from helpers import ROOT
from helpers.processes import python

PACKAGE = ROOT / "coconut"
COMMANDS = [
    "analyze", "demo", "evaluate", "export", "generate", "lm_eval", "reward", "rollout", "serve", "train", "__main__",
]  # fmt: skip
LAYERS = [
    ["utils"],
    ["methods"],
    ["tasks"],
    ["config"],
    ["acceleration", "engine", "data"],
    ["models"],
    ["generation", "objectives"],
    ["evaluation", "completions"],
    ["runs"],
    ["hub", "analysis", "serving"],
    ["reporting"],
    ["training"],
    ["rewards"],
    ["rl"],
    ["adaptive"],
    COMMANDS,
]  # a package imports those above it in this list, also in functions and for types
ALLOWED = {
    ("coconut.models.latent_lm", "coconut.generation.generate"),  # LatentLM.generate, and Generated, its result
    ("coconut.models.latent_lm", "coconut.hub.push"),  # LatentLM.push_to_hub
}
MAX_COMMAND_LINES = 100
HEAVY = ("torch", "transformers", "datasets", "numpy")


@cache
def modules() -> dict[str, Path]:
    """All modules of the package, by name."""
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in files.items()}


def imports(path: Path) -> Iterator[str]:
    """Everything that a file imports: at its head, in functions, and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def edges() -> Iterator[tuple[str, str]]:
    """The imports within the package, without those that are allowed. `coconut` itself imports on first use."""
    for name, path in modules().items():
        for other in imports(path):
            if name != "coconut" and other.startswith("coconut.") and name != other and (name, other) not in ALLOWED:
                yield name, other


def test_packages_import_downwards() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    parts = ((name, other, name.split(".")[1], other.split(".")[1]) for name, other in edges())
    upwards = [f"{name} imports {other}" for name, other, a, b in parts if a != b and level[b] >= level[a]]
    assert not upwards


def test_modules_import_each_other_in_no_cycle() -> None:
    cycles = [sorted(found) for found in networkx.strongly_connected_components(networkx.DiGraph(edges())) if found]
    assert not [found for found in cycles if len(found) > 1]


def test_allowed_imports_are_still_needed() -> None:
    for name, other in ALLOWED:
        assert other in set(imports(modules()[name])), f"{name} does not import {other}: take it off the list"


def test_root_files_are_short_commands() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    assert set(lengths) == {*COMMANDS, "config", "__init__"}
    assert [name for name in COMMANDS if lengths[name] > MAX_COMMAND_LINES] == []


def test_only_the_engine_distributes() -> None:
    for name, path in modules().items():
        if not name.startswith("coconut.engine."):
            nodes = ast.walk(ast.parse(path.read_text()))
            names = {*imports(path), *(ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute))}
            assert not [one for one in names if one.startswith(("torch.distributed", "deepspeed"))], name


def test_reporting_and_analysis_are_apart() -> None:
    drawing = ("matplotlib", "jinja2", "coconut.reporting")
    for name, path in modules().items():
        if name.startswith("coconut.analysis."):
            assert not [one for one in imports(path) if one.startswith(drawing)], name


def test_builders_need_little_of_the_package() -> None:
    """Those of the import read by the rule of the configuration, and show rows as training lays them out."""
    of_import = {"tables": {"data"}, "columns": {"config", "data"}, "importing": {"config", "data", "methods"}}
    for path in (ROOT / "data_builders").glob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("coconut.")}
        assert ours <= {"utils", "tasks"} | of_import.get(path.stem, set()), path.name


@pytest.mark.parametrize(
    "arguments", [["--help"], ["data"], ["train"], ["train", "--help"], ["analyze", "--help"], ["rl", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = ["coconut", *{arguments}]
try:
    runpy.run_module("coconut", run_name="__main__", alter_sys=True)
finally:
    print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
    done = python("-c", code)
    assert done.stderr.strip().splitlines()[-1] == "[]", done.stderr
