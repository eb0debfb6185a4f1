"""A page of ours, taken apart: what a browser would find in it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "img", "input", "br", "link"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    parts: list[object] = field(default_factory=list)  # texts and elements

    @property
    def text(self) -> str:
        return "".join(part.text if isinstance(part, Element) else str(part) for part in self.parts)

    def all(self, name: str = "", **attributes: str) -> list[Element]:
        """Elements below, by name and attributes; class_="x" is one of its classes."""
        found = []
        for part in self.parts:
            if isinstance(part, Element):
                if (not name or part.name == name) and all(part._has(*pair) for pair in attributes.items()):
                    found.append(part)
                found += part.all(name, **attributes)
        return found

    def _has(self, name: str, value: str) -> bool:
        if name == "class_":
            return value in (self.attributes.get("class") or "").split()
        return self.attributes.get(name.replace("_", "-")) == value


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.stack[-1].parts.append(element)
        if tag not in _VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].parts.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while tag not in _VOID and self.stack.pop().name != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.stack[-1].parts.append(data)


def page_read(html: str) -> Element:
    reader = _Reader()
    reader.feed(html)
    return reader.stack[0]


def check_harmless(html: str) -> None:
    """Nothing of the page reaches for anything, or runs but its own script."""
    page = page_read(html)
    [policy] = page.all("meta", http_equiv="Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in (policy.attributes["content"] or "").split(";"))
    [script] = page.all("script")
    assert set(script.attributes) == set()
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not {"iframe", "object", "embed", "form", "base", "link", "audio", "video"} & {e.name for e in page.all()}
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.name, name)
            if name == "src":
                assert element.name == "img" and re.fullmatch(r"data:image/webp;base64,[\w+/=]+", value or "")
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), value
            assert "javascript:" not in (value or "") or name in ("alt", "title", "aria-label")
