"""README.zh.md and README.ja.md say what README.md says: the same commands, links, headings and rows."""

import re
from pathlib import Path

import pytest

from tests.commands import ROOT

README = ROOT / "README.md"
TRANSLATIONS = ["README.zh.md", "README.ja.md"]
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TREE = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")


def read_page(path: Path) -> tuple[str, list[str]]:
    """Return the text of a page without its blocks of commands, files and folders, and these blocks."""
    text = path.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    text = BLOCK.sub("", text)
    return TREE.sub("", text), [*blocks, *TREE.findall(text)]


def list_links(text: str) -> list[str]:
    """Return the targets of a page's links that lead to other files, without those to translations."""
    return sorted(
        target for target in LINK.findall(text) if target[0] != "#" and not target.startswith("README")
    )


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_a_translation_has_the_commands_links_and_rows_of_the_readme(name: str) -> None:
    text, blocks = read_page(README)
    translated, translated_blocks = read_page(ROOT / name)

    assert translated_blocks == blocks
    assert list_links(translated) == list_links(text)
    for start in ("## ", "| ", "- ", "**"):  # headings, rows, points and recipes
        lines = [sum(line.startswith(start) for line in page.split("\n")) for page in (translated, text)]
        assert lines[0] == lines[1], start


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_links_inside_a_translation_lead_to_its_headings(name: str) -> None:
    text, _ = read_page(ROOT / name)
    headings = {line.removeprefix("## ") for line in text.split("\n") if line.startswith("## ")}
    inside = [target[1:] for target in LINK.findall(text) if target.startswith("#")]

    assert inside
    assert set(inside) <= headings


def test_every_readme_leads_to_the_others() -> None:
    names = ["README.md", *TRANSLATIONS]
    for name in names:
        line = (ROOT / name).read_text(encoding="utf-8").split("\n")[2]
        assert LINK.findall(line) == [other for other in names if other != name]
