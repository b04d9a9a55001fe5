"""Paths on shares of other machines: Windows logs in there as soon as one is looked at."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from modules.paths import is_on_foreign_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\\evil\share\x", True),
        ("//evil/share/x", True),
        (r"\/evil\share", True),
        (r"\\?\UNC\evil\share\x", True),
        (r"\\.\pipe\x", True),
        ("models/x", False),
        (r"..\x", False),
        (r"D:\models", False),
        (r"\models", False),
    ],
)
def test_a_share_is_told_from_a_folder(text: str, expected: bool) -> None:
    base = PureWindowsPath(r"C:\clips")
    assert is_on_foreign_share(base / text, base) is expected


def test_a_folder_on_a_share_may_name_its_own() -> None:
    base = PureWindowsPath(r"\\NAS\films\clips")
    assert not is_on_foreign_share(base / "models", base)
    assert not is_on_foreign_share(PureWindowsPath(r"\\nas\Films\models"), base)
    assert is_on_foreign_share(PureWindowsPath(r"\\nas\other\models"), base)


def test_other_systems_have_no_such_paths() -> None:
    assert not is_on_foreign_share(PurePosixPath("//evil/share"), PurePosixPath("/clips"))
    assert not is_on_foreign_share(Path.cwd(), Path.cwd())
