"""The site of the documentation: it builds strictly, says what GitHub says, and leads nowhere that is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from helpers import ROOT
from helpers.installed import done
from markdown_it import MarkdownIt

import coconut
from coconut.methods import METHODS

pytest.importorskip("mkdocstrings", reason="the site needs the extra docs: pip install -e '.[docs]'")
pytestmark = pytest.mark.slow
COUNTED = (
    "h1",
    "h2",
    "h3",
    "h4",
    "li",
    "ul",
    "ol",
    "table",
    "tr",
    "td",
    "pre",
    "blockquote",
    "img",
    "strong",
    "em",
    "code",
)


class Html(HTMLParser):
    """What a page says and loads. With `article`, tags are counted within this element only."""

    def __init__(self, text: str, article: bool = True):
        super().__init__()
        self._text = text
        self.tags: Counter[str] = Counter()
        self.ids: set[str] = set()
        self.links: list[str] = []  # where a reader may go
        self.loads: list[str] = []  # what a browser fetches by itself
        self.words = ""
        self._inside, self._article = not article, article
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        fetched = given.get("rel") != "canonical" if tag == "link" else tag != "a"
        self.loads += [given[name] for name in ("src", "href") if fetched and name in given]
        self._inside |= tag == "article"
        self.tags[tag] += self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside &= not (self._article and tag == "article")

    def handle_data(self, data: str) -> None:
        self.words += data if self._inside else ""


class Site:
    """The built pages, by their place."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def pages(self) -> dict[str, Html]:
        files = sorted(self.folder.rglob("*.html"))
        return {file.relative_to(self.folder).as_posix(): Html(file.read_text(encoding="utf-8")) for file in files}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": path}
    done(sys.executable, "-m", "mkdocs", "build", "--site-dir", folder, cwd=ROOT, env=env)
    return Site(folder)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_have_the_structure_that_github_shows(site: Site, hooks: ModuleType) -> None:
    """As many headings, items, tables and blocks of code as a renderer of GitHub's Markdown finds."""
    github = MarkdownIt("gfm-like", {"linkify": False})
    written = [*hooks.OUTSIDE, *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    assert len(written) > 20
    for path in written:
        expected = Html(github.render((ROOT / path).read_text(encoding="utf-8")), article=False).tags
        place = hooks.address(path, "").replace(".md", ".html")
        found = site.pages[place].tags
        assert {tag: found[tag] for tag in COUNTED} == {tag: expected[tag] for tag in COUNTED}, path


def test_links_and_anchors_lead_somewhere(site: Site) -> None:
    broken: set[tuple[str, str]] = set()
    followed = 0
    for place, page in site.pages.items():
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or place == "404.html":
                continue
            followed += 1
            other = (
                posixpath.normpath(posixpath.join(posixpath.dirname(place), unquote(parts.path)))
                if parts.path
                else place
            )
            exists = (site.folder / other).is_file()
            anchor = unquote(parts.fragment)
            if not exists or (anchor and other in site.pages and anchor not in site.pages[other].ids):
                broken.add((place, target))
    assert broken == set()
    assert followed > 5000


def test_nothing_is_loaded_from_elsewhere(site: Site) -> None:
    outside = {load for page in site.pages.values() for load in page.loads if re.match(r"(https?:)?//", load)}
    assert outside == set()
    for style in site.folder.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def first_rows() -> Iterator[tuple[str, str]]:
    """Each section of the golden file: its method, and its first row."""
    golden = (ROOT / "tests" / "golden_layouts.txt").read_text(encoding="utf-8")
    return iter(re.findall(r"^(\w+): .*\n\n.*\n    (.*)", golden, re.MULTILINE))


def test_every_method_has_a_page(site: Site) -> None:
    rows = dict(first_rows())
    assert set(rows) == set(METHODS)
    methods = site.pages["methods.html"]
    for name, method in METHODS.items():
        page = site.pages[f"methods/{name}.html"]
        assert f"methods/{name}.html" in methods.links
        assert rows[name] in page.words
        assert f"https://arxiv.org/abs/{method.paper}" in page.links
        assert any(link.startswith("../methods.html#") for link in page.links)
        for term in method.terms:
            assert f"../api/coconut.objectives.{term.objective}.html" in page.links


def test_the_paper_of_a_method_is_the_one_that_its_section_cites(hooks: ModuleType) -> None:
    for name, method in METHODS.items():
        _, text = hooks.described(name)
        assert text, name
        cited = re.findall(r"https://arxiv.org/abs/([\d.]+)", text)
        assert not cited or method.paper in cited, name


def test_the_api_shows_what_the_package_offers(site: Site) -> None:
    assert {f"coconut.{name}" for name in coconut.__all__} <= site.pages["api/index.html"].ids
    assert "coconut.models.latent_lm.LatentLM.forward" in site.pages["api/coconut.models.latent_lm.html"].ids
    assert "../source/coconut/models/latent_lm.py.html" in site.pages["api/coconut.models.latent_lm.html"].links


def test_all_but_sources_can_be_searched(site: Site) -> None:
    index = json.loads((site.folder / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == {place for place in site.pages if not place.startswith("source/")} - {"404.html"}


def test_links_lead_to_the_repository_where_its_address_is_known(hooks: ModuleType) -> None:
    there = "https://example.org/us/coconut"
    text = (
        "[a](../coconut/config.py), [b](../conf/suite), [c](data.md#judges), [d](#e), [f](https://g.h), ![i](demo.png)"
    )
    assert hooks.for_site(text, "docs/methods.md", "methods/codi.md", there) == (
        f"[a]({there}/blob/main/coconut/config.py), [b]({there}/tree/main/conf/suite), [c](../data.md#judges), "
        "[d](../methods.md#e), [f](https://g.h), ![i](../demo.png)"
    )
    assert hooks.for_site("[a](docs/data.md)", "README.md", "index.md", there) == "[a](data.md)"
    assert hooks.for_site("[a](../coconut)", "examples/README.md", "examples.md", "") == "[a](source/coconut.md)"
    assert hooks.for_site("```\n[a](../coconut)\n```", "docs/data.md", "data.md", "") == "```\n[a](../coconut)\n```"
