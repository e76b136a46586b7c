"""README and docs: width, links, pictures, and that every command that is shown exists and composes."""

from __future__ import annotations

import importlib
import re
import shlex
import unicodedata
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT

from coconut.__main__ import builder

PAGES = [
    page
    for pattern in ("*.md", "benchmarks/*.md", "docs/*.md", "examples/*.md", "tests/**/*.md")
    for page in sorted(ROOT.glob(pattern))
    if page.name != "CHANGELOG.md"
]
SHOWN = [page for page in PAGES if "tests" not in page.relative_to(ROOT).parts]  # to a user: with commands
WIDTH, README_LINES = 100, 150
LARGEST_PICTURE = 200_000  # bytes

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MODULE = r"python -m (?:coconut|data_builders|benchmarks)\.\w+"
COMMAND = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?(coconut|{MODULE})(?: (.*))?", re.DOTALL)
SCRIPT = re.compile(r"\b(?:bash|sbatch|python) (?:--\S+ )*((?:launch|examples|tests)/\S+)")
EXAMPLE_OF = {"rl": "thinkless_laptop", "adaptive": "adaptive_laptop", "reward": "rewards_laptop"}  # experiment=NAME
NO_KEYS = {"...", "key=value", "…"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return FENCE.sub("", text)


@each_page
def test_lines_fit(page: Path) -> None:
    long = [
        line
        for line in without_code(page.read_text(encoding="utf-8")).splitlines()
        if len(line) > WIDTH and not line.lstrip().startswith("|") and not re.search(r"https?://", line)
    ]
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


# --- links ------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        kept = "".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.add(kept.replace(" ", "-"))
    return found


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in anchors(other)):
            broken.append(target)
    assert broken == []


def test_pictures_are_shown_and_small() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if target.endswith(".png")
    }
    pictures = set((ROOT / "docs").glob("*.png"))
    assert pictures == linked
    assert all(picture.stat().st_size <= LARGEST_PICTURE for picture in pictures)


# --- commands ---------------------------------------------------------------------------------------


def shell_lines(text: str) -> list[str]:
    """The lines of shell blocks, and what stands in `code` outside of blocks."""
    blocks = "".join(block for kind, block in FENCE.findall(text) if kind in ("", "bash"))
    spans = [" ".join(span.split()) for span in SPAN.findall(without_code(text))]
    return blocks.replace("\\\n", " ").splitlines() + spans


def module_and_arguments(command: str, rest: str) -> tuple[str, list[str]] | None:
    """What a command runs, with examples in place of NAME; None for what only mentions a command."""
    words = [word for word in shlex.split(rest, comments=True) if word not in NO_KEYS]
    if command == "coconut":
        module = f"coconut.{words.pop(0) if words else 'NAME'}"
        if module == "coconut.data":
            module, first = builder((words.pop(0) if words else "NAME").replace("NAME", "prosqa"))
            words = first + words
    else:
        module = command.removeprefix("python -m ")
    if module in ("coconut.NAME", "coconut.COMMAND"):
        return None
    example = EXAMPLE_OF.get(module.partition(".")[2], "quickstart")
    examples = {"experiment=NAME": f"experiment={example}", "seed=N": "seed=0"}
    return module, [examples.get(word, word) for word in words]


def commands() -> list[tuple[str, list[str]]]:
    """All that are shown, once each."""
    found: dict[str, tuple[str, list[str]]] = {}
    for page in SHOWN:
        for line in shell_lines(page.read_text(encoding="utf-8")):
            match = COMMAND.fullmatch(line.strip())
            if match and (command := module_and_arguments(match[1], match[2] or "")):
                found[repr(command)] = command
    return list(found.values())


@pytest.mark.slow
def test_commands_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands()
    assert len(shown) > 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the harness imports
        from lm_eval._cli import HarnessCLI
    for module, arguments in shown:
        if module.startswith("benchmarks."):
            assert find_spec(module), module
            continue
        if module == "coconut.lm_eval":  # the harness's command: its parser exits if it does not know an argument
            monkeypatch.setattr("sys.argv", [module, *arguments])
            HarnessCLI().parse_args()
            continue
        if "--multirun" in arguments:  # the first of its runs
            arguments = [re.sub(r"^(seed|method)=([^,]*),.*", r"\1=\2", each) for each in arguments]
            arguments.remove("--multirun")
        spec = find_spec(module)
        assert spec, module
        main = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main
        monkeypatch.setattr("sys.argv", [module, *arguments, *([] if "--help" in arguments else ["--cfg", "job"])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, (module, arguments, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_scripts_exist() -> None:
    lines = [line for page in SHOWN for line in shell_lines(page.read_text(encoding="utf-8"))]
    named = {name for line in lines for name in SCRIPT.findall(line)}
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
