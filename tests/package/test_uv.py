"""The extras of pyproject.toml that choose a build of torch for uv."""

import re
import tomllib

import pytest

from modules.environment import TORCH
from tests.commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
UV = PROJECT["tool"]["uv"]
(BUILDS,) = [[entry["extra"] for entry in group] for group in UV["conflicts"]]
SOURCES = {source["extra"]: source["index"] for source in UV["sources"]["torch"]}
ADDRESSES = {index["name"]: index["url"] for index in UV["index"]}


def test_each_build_excludes_all_others_and_the_page_lists_them() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name for name, lines in extras.items() if lines and lines[0].startswith("torch==")} == set(BUILDS)
    table = PAGE.partition("| card | build |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"\| `(\w+)` \|", table)) == sorted(BUILDS)
    assert all(index["explicit"] for index in UV["index"])  # no other package comes from there


@pytest.mark.parametrize("extra", BUILDS)
def test_a_build_is_that_of_the_table_for_pip(extra: str) -> None:
    (line,) = PROJECT["project"]["optional-dependencies"][extra]
    index = f" --index-url {ADDRESSES[SOURCES[extra]]}" if extra in SOURCES else ""
    assert f"`python -m pip install {line}{index}`" in PAGE
    if extra in ("cpu", "cu130", "mac"):
        assert line == TORCH
