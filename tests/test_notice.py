"""NOTICE names every folder of the program."""

from tests.commands import ROOT
from tests.test_imports import MAY_IMPORT


def test_every_folder_is_credited() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")

    folders = {name for name in MAY_IMPORT if (ROOT / name).is_dir()} | {"pocket", "benchmarks"}
    assert {name for name in folders if f"\n{name}/ " not in notice} == set()
