"""What the site has beyond docs/: the pages of the repository's root, one for each method, the API, and files.

Links are written for the repository, where they are relative paths. On the site a link to a page leads to the page,
and one to another file leads to the repository's address (`project.urls.Repository` in pyproject.toml), or, where none
is given, to a page that shows the file. MkDocs calls the functions on_*.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import coconut
from coconut.methods import METHODS, Method, Slot, Term

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {  # pages of the site that are not in docs/
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
GOLDEN = "tests/golden_layouts.txt"
TERM = ("term", "objective", "learns", "held to", "reads", "divided by the number of", "weight", "options")
PAPER = "https://arxiv.org/abs/"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
MODULE = re.compile(r"\bcoconut(?:[./][a-z0-9_]+)+")
LANGUAGES = {".sh": "bash", ".sbatch": "bash", ".txt": "text", ".j2": "jinja", ".yml": "yaml"}
log = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> None:
    """Take the repository's address from pyproject.toml, and append the generated pages to the navigation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.repo_url = project.get("urls", {}).get("Repository", "")
    assert config.nav is not None
    config.nav.append({"Methods": ["methods.md", *({name: f"methods/{name}.md"} for name in METHODS)]})
    config.nav.append(
        {"API": ["api/index.md", *({name.removeprefix("coconut."): f"api/{name}.md"} for name in public_modules())]}
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    repository = config.repo_url or ""
    for name, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    for name, method in METHODS.items():
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name, method, repository)))
    for place, text in api_pages(repository):
        files.append(File.generated(config, place, content=text))
    if not repository:
        for path in linked_files():
            place, outside = f"source/{path}.md", InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place, content=source_page(path, place), inclusion=outside))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page that is written for the repository into those of the site."""
    place = page.file.src_uri
    if page.file.generated_by and place not in OUTSIDE.values():
        return markdown
    return for_site(markdown, repository_path(place), place, config.repo_url or "")


# --- links ------------------------------------------------------------------------------------------


def repository_path(place: str) -> str:
    """Where in the repository the page of a place on the site is written."""
    return next((name for name, other in OUTSIDE.items() if other == place), f"docs/{place}")


def address(path: str, repository: str) -> str:
    """Where a file or folder of the repository is: a place on the site, or an address in the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/") and path.endswith((".md", ".png")):
        return path.removeprefix("docs/")
    if repository:
        return f"{repository.rstrip('/')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return f"source/{path}.md"


def for_site(text: str, path: str, place: str, repository: str) -> str:
    """A text of the file `path` of the repository as it must be at a place on the site: its links, and its lists."""

    def turned(link: re.Match[str]) -> str:
        label, target = link.groups()
        if re.match(r"https?:|mailto:", target):
            return link[0]
        name, _, anchor = target.partition("#")
        other = posixpath.normpath(posixpath.join(posixpath.dirname(path), name)) if name else path
        if not (ROOT / other).exists():
            log.warning("%s links to %s, and there is no such file.", path, target)
        leads = address(other, repository)
        if not leads.startswith("http"):
            leads = posixpath.relpath(leads, posixpath.dirname(place) or ".")
        return f"{label}({leads}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(text)
    parts[::2] = (LINK.sub(turned, as_on_github(part)) for part in parts[::2])
    return "".join(parts)


def as_on_github(text: str) -> str:
    """A text without code for Python-Markdown.

    It wants further paragraphs of an item indented by four, and a blank line between them and the next item. A line
    that begins with a large number and a stop would be an item.
    """
    blocks = text.split("\n\n")
    for number, block in enumerate(blocks):
        if re.match(r" {2,3}\S", block):
            block = re.sub(r"\n(?=- |\d\. )", "\n\n", block, count=1)
            blocks[number] = re.sub(r"(?m)^ {2,3}(?=\S)", " " * 4, block)
    return re.sub(r"(?m)^( *\d\d+)\. ", r"\1\. ", "\n\n".join(blocks))


def written_pages() -> Iterator[tuple[str, str]]:
    """The path and the text of each page that is written in the repository."""
    for path in (*OUTSIDE, *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))):
        yield path, (ROOT / path).read_text(encoding="utf-8")


def linked_files() -> list[str]:
    """The files and folders outside of the site that its pages link to, with all files in these folders."""
    found = {module_file(name) for name in public_modules()}
    for path, text in written_pages():
        for _, target in LINK.findall(FENCE.sub("", text)):
            name = target.partition("#")[0]
            other = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
            if name and "://" not in target and address(other, "").startswith("source/") and (ROOT / other).exists():
                found |= {other, *contents(other)}
    return sorted(found)


def contents(path: str) -> list[str]:
    """The files below a folder; none if it is a file."""
    files = (file for file in (ROOT / path).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def source_page(path: str, place: str) -> str:
    """A page that shows a file, or lists those of a folder. It is not searched."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        here = posixpath.dirname(path) or "."
        return head + "\n".join(f"- [`{each}`]({posixpath.relpath(each, here)}.md)" for each in contents(path))
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        parts = (fenced(each, "python") if kind == "code" else for_site(each, path, place, "") for kind, each in cells)
        return head + "\n\n".join(parts)
    suffix = Path(path).suffix
    return head + fenced(text, LANGUAGES.get(suffix, suffix.removeprefix(".")))


def fenced(text: str, language: str) -> str:
    return f"``````{language}\n{text.rstrip()}\n``````"


# --- methods ----------------------------------------------------------------------------------------


def method_page(name: str, method: Method, repository: str) -> str:
    """What docs/methods.md says of a method, its entry in the table of methods, and its layouts."""
    place = f"methods/{name}.md"
    section, text = described(name)
    described_at = f"../methods.md#{section}"
    return f"""# `{name}`

{method.summary[0].upper()}{method.summary[1:]}.

Source: arXiv [{method.paper}]({PAPER}{method.paper}). In context: [Methods]({described_at}).

```bash
coconut train experiment=quickstart method={name}
```

## What it is

{for_site(text, "docs/methods.md", place, repository)}

## Its entry in the table

{table(("field", "value"), entry(method))}

## The terms of its loss

The loss is their sum, each with its weight and divided by its own count over the whole update.

{table(TERM, map(term_row, method.terms))}

## What it sees at every stage

{layout(name)}
"""


def described(name: str) -> tuple[str, str]:
    """The anchor of the section of docs/methods.md that introduces a method, and what stands there about it."""
    section = ""
    paragraphs = re.split(r"\n\n+", (ROOT / "docs/methods.md").read_text(encoding="utf-8"))
    found: list[str] = []
    for paragraph in paragraphs:
        if found and re.match(r"#|\*\*", paragraph):
            break
        if heading := re.match(r"#+ (.*)", paragraph):
            section = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
        if found or re.match(rf"(?:\*\*[^*]+\*\* \([^)]*)?`{name}`[ ;,)]", paragraph):
            found.append(paragraph)
    if not found:
        log.warning("docs/methods.md introduces no method %s: **Its name** (`%s`; authors, year).", name, name)
    return section, "\n\n".join(found)


def entry(method: Method) -> Iterator[tuple[str, str]]:
    """What a method has in the table: the slot with all that is not its default, and the rest."""
    slot = method.slot
    yield "slot", f"`{slot.source}`" + (f": {slot.describe()}" if slot.thinks else "")
    for each in fields(Slot):
        value = getattr(slot, each.name)
        if each.default is not MISSING and value != each.default:
            yield f"`slot.{each.name}`", f"`{value}`"
    yield "cut", f"`{method.cut}`"
    for key in ("markers", "teacher", "fixed_length", "iterations_per_step"):
        yield f"`{key}`", "yes" if getattr(method, key) else "no"


def term_row(term: Term) -> tuple[str, ...]:
    options = ", ".join(f"`{key}={value}`" for key, value in term.options.items())
    module = f"coconut.objectives.{term.objective}"
    return (
        f"`{term.name}`", f"[{term.objective}](../api/{module}.md)", term.of, term.to, f"`{term.at}`",
        f"`{term.per}`", f"{term.weight:g}", options,
    )  # fmt: skip


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """In Markdown, without the columns in which nothing stands."""
    columns = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    lines = list(zip(*columns, strict=True))
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(columns), *lines[1:]))


def layout(name: str) -> str:
    """The rows of one example in the golden file, stage by stage."""
    about, *sections = re.split(r"^(?=\w+: )", (ROOT / GOLDEN).read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next(each for each in sections if each.startswith(f"{name}: "))
    kept, question, shown = [about.partition("\n")[2].strip(), ""], "", True
    for line in section.splitlines()[2:]:
        if line.startswith(" " * 4) and not line.startswith(" " * 8):
            question = question or line.partition("?")[0]
            shown = line.startswith(question)
        if shown or not line.startswith(" " * 4):
            kept.append(line)
    blank = re.sub(r"\n{3,}", "\n\n", "\n".join(kept))
    return fenced(blank, "{.text .layout}")


# --- the API ----------------------------------------------------------------------------------------


def public_modules() -> list[str]:
    """The modules that pages name, and the objectives, to which pages of methods link."""
    text = "\n".join(text for path, text in written_pages() if path != "CHANGELOG.md")
    named = {match.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for match in MODULE.findall(text)}
    named |= {f"coconut.objectives.{path.stem}" for path in (ROOT / "coconut/objectives").glob("[a-z]*.py")}
    return sorted(filter(is_module, named))


def is_module(name: str) -> bool:
    """Whether a dotted name is a module, or a package that defines something itself, and no command."""
    file = module_file(name)
    if file.endswith("__init__.py"):
        package = ROOT / file
        return package.is_file() and bool(re.search(r"(?m)^(class|def) ", package.read_text(encoding="utf-8")))
    return file.count("/") > 1 or name == "coconut.config"


def module_file(name: str) -> str:
    """The path of the module or package of a dotted name."""
    path = name.replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__init__.py"


def api_pages(repository: str) -> Iterator[tuple[str, str]]:
    """The place and the text of the page of each public module, and of what `import coconut` offers."""
    options = "\n    options:\n      show_root_heading: true\n      show_attribute_values: false"
    offered = "\n\n".join(f"::: coconut.{name}{options}" for name in coconut.__all__)
    yield "api/index.md", f"# API\n\nWhat `from coconut import ...` offers.\n\n{offered}\n"
    for name in public_modules():
        place, file = f"api/{name}.md", module_file(name)
        source = for_site(f"[{file}]({file})", "README.md", place, repository)
        yield place, f"# `{name}`\n\n{source}\n\n::: {name}\n    options:\n      show_root_toc_entry: false\n"
