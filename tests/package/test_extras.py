"""The extras of pyproject.toml hold what our code imports."""

import tomllib

import pytest
from packaging.requirements import Requirement

from package.staging import find_rooms
from tests.commands import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
MODULES = {"scenedetect-headless": "scenedetect"}  # packages whose modules have another name
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"test"}))
def test_an_extra_holds_packages_that_are_imported_and_is_documented(extra: str) -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for room in find_rooms(ROOT) for path in (ROOT / room).rglob("*.py")
    )
    for line in EXTRAS[extra]:
        name = Requirement(line).name
        module = MODULES.get(name, name).replace("-", "_")
        assert f'"{module}' in sources or f"import {module}" in sources, name
        assert name in PAGE, name
    assert f"| `{extra}` |" in PAGE
