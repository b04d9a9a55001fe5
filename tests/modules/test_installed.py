"""What a file may name is the code of installed packages; it is found without running any."""

import sys
from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.installed import find_installed, require_installed


@pytest.mark.parametrize(
    "name", ["torch.optim", "transformers.optimization", "prodigyopt", "PIL.Image", "pytest"]
)
def test_modules_of_installed_packages_are_found(name: str) -> None:
    if name == "prodigyopt":
        pytest.importorskip(name)
    assert find_installed(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        *("os", "antigravity", "subprocess", "sys", "builtins"),  # Python's own
        *("unittest.__main__", "venv.__main__", "pip.__main__", "pip._internal", "_pytest"),
        *("nowhere", "torch.nowhere", "torch.optim.nowhere.more"),
        *("", ".", "..os", "torch.", "torch/optim", "torch optim", "tests.modules", "wan.model"),
    ],
)
def test_other_modules_are_not(name: str) -> None:
    loaded = set(sys.modules)
    assert find_installed(name) is None
    assert {one for one in set(sys.modules) - loaded if one.split(".")[0] == name.split(".")[0]} == set()


def test_no_module_of_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("hostile.py", "package/__init__.py", "package/inner.py", "spread/inner.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    for name in ("hostile", "package", "package.inner", "spread", "spread.inner"):
        assert find_installed(name) is None
        with pytest.raises(OptionError, match=f"{name} is not a module of an installed package"):
            require_installed("run.toml", name, "type it")
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(OptionError, match="a.toml: the package adam_mini is not installed. Run: pip install"):
        require_installed("a.toml", "adam_mini", "type it")
