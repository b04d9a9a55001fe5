"""What a browser sends for a form of a page: a user who fills in some fields and presses a button."""

from collections.abc import Mapping
from html.parser import HTMLParser
from urllib.parse import parse_qs, urlsplit


class _FormReader(HTMLParser):
    """Collect the fields of each form with its attributes, and the address of each link with its text."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[tuple[dict[str, str], dict[str, list[str]]]] = []
        self.links: list[tuple[str, str]] = []
        self._inside = False
        self._select: str | None = None
        self._textarea: str | None = None
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value if value is not None else "" for name, value in attrs}
        if tag == "a":
            self.links.append((named.get("href", ""), ""))
        if tag == "form":
            self.forms.append((named, {}))
            self._inside = True
        if not self._inside:
            return
        name = named.get("name", "")
        if tag == "input" and name and "disabled" not in named:
            kind = named.get("type", "text")
            if kind not in {"checkbox", "radio"} or "checked" in named:
                self._add(name, named.get("value", "on"))
        elif tag == "textarea":
            self._textarea, self._text = name, ""
        elif tag == "select":
            self._select = name
        elif tag == "option" and self._select:
            fields = self.forms[-1][1]
            if "selected" in named:
                fields[self._select] = [named.get("value", "")]
            else:
                fields.setdefault(self._select, [named.get("value", "")])

    def _add(self, name: str, value: str) -> None:
        self.forms[-1][1].setdefault(name, []).append(value)

    def handle_data(self, data: str) -> None:
        self._text += data
        if self.links and not self.links[-1][1]:
            self.links[-1] = (self.links[-1][0], data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False
        elif tag == "textarea" and self._textarea is not None:
            self._add(self._textarea, self._text.removeprefix("\n"))
            self._textarea = None
        elif tag == "select":
            self._select = None


def list_forms(text: str) -> list[tuple[Mapping[str, str], dict[str, list[str]]]]:
    """Return the attributes of each form of a page, and the fields that a browser would send for it."""
    reader = _FormReader()
    reader.feed(text)
    return [(attributes, fields) for attributes, fields in reader.forms]


def find_form(text: str, address: str) -> dict[str, list[str]]:
    """Return the fields of the form that is sent to an address."""
    (fields,) = [fields for attributes, fields in list_forms(text) if attributes.get("hx-post") == address]
    return fields


def list_links(text: str) -> list[tuple[str, str]]:
    """Return the address and the text of each link of a page."""
    reader = _FormReader()
    reader.feed(text)
    return reader.links


def query_of(address: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(address).query)
