"""Reading pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser


def words(html: str) -> str:
    """What a reader sees, figures left out."""
    html = re.sub(r"<(style|svg).*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


class Loads(HTMLParser):
    """Everything by which a page names something outside itself."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.add(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.names.append(value or "")
            if key == "id":
                self.ids.append(value or "")
