"""Lay out the files of a distribution: the checkout's for the sdist, below `reelsmith` for the wheel."""

import shutil
from collections.abc import Collection
from pathlib import Path

from modules.version import VERSION
from package.reelsmith.commands import OF_A_CHECKOUT, find_commands
from package.rewriting import PACKAGE, add_entry_point, package_name, rename_scripts, rewrite_imports

# folders of Python that are for work on Reelsmith, or for its quickstart
NOT_INSTALLED = {"benchmarks", "package", "pocket", "tests"}
FRONT = Path("package", "reelsmith")
# read by setuptools, or carried along
TEXTS = ("pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE*", "NOTICE*")
CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def find_rooms(root: Path) -> list[str]:
    """Return the folders of a checkout that are installed: all Python packages but those for work on it."""
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    return sorted(folders - NOT_INSTALLED)


def find_own_names(root: Path) -> set[str]:
    """Return the top-level names that a checkout imports its own modules by."""
    return {*find_rooms(root), *(path.stem for path in root.glob("*.py")), "package"} - {PACKAGE}


def lay_out_sources(root: Path, folder: Path) -> None:
    """Copy the sources of a wheel into `folder`, unchanged from the checkout, and the documents."""
    _copy_texts(root, folder)
    for name in [*find_rooms(root), "package", "docs"]:
        shutil.copytree(root / name, folder / name, ignore=CACHES)
    for path in _top_modules(root):
        shutil.copy(path, folder / path.name)
    (folder / "MANIFEST.in").write_text("global-include *\n", encoding="utf-8")


def lay_out_package(root: Path, folder: Path) -> None:
    """Copy the installed files into `folder`/reelsmith, with the imports and texts that it has there.

    Raises ValueError, naming the file, if one of them cannot be rewritten.
    """
    _copy_texts(root, folder)
    package = folder / "reelsmith"
    shutil.copytree(root / FRONT, package, ignore=CACHES)
    for name in find_rooms(root):
        shutil.copytree(root / name, package / name, ignore=CACHES)
    for path in _top_modules(root):
        shutil.copy(path, package / path.name)
    shutil.copy(root / "requirements.txt", package / "requirements.txt")
    version = f'"""The version of Reelsmith."""\n\nVERSION = "{VERSION}"\n'
    (package / "modules" / "version.py").write_text(version, encoding="utf-8")
    commands, ours = find_commands(root), find_own_names(root)
    scripts = {command.script for command in commands}
    places = {package / command.path.relative_to(root) for command in commands}
    for path in sorted(package.rglob("*.py")):
        _rewrite(path, ours, scripts, is_script=path in places)


def _rewrite(path: Path, ours: Collection[str], scripts: Collection[str], is_script: bool) -> None:
    text = path.read_text(encoding="utf-8")
    try:
        text = rename_scripts(rewrite_imports(text, ours), scripts)
        if is_script:
            text = add_entry_point(text, path.stem)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    path.write_text(text, encoding="utf-8")


def _copy_texts(root: Path, folder: Path) -> None:
    for pattern in TEXTS:
        for path in root.glob(pattern):
            shutil.copy(path, folder / path.name)
    entries = [f"{name} = {target}" for name, target in sorted(entry_points(root).items())]
    text = "\n".join(("[console_scripts]", *entries, ""))
    (folder / "entry_points.txt").write_text(text, encoding="utf-8")


def entry_points(root: Path) -> dict[str, str]:
    """Return the console commands of the package: `reelsmith`, and each script by its name."""
    return {
        "reelsmith": "reelsmith.commands:main",
        **{command.script: f"{package_name(command.module)}:run" for command in find_commands(root)},
    }


def _top_modules(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("*.py")) if path.stem not in OF_A_CHECKOUT]
