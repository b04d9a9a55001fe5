"""Find the file of a module of an installed package, without importing anything. Standard library only.

A file that describes a training may come from somebody else. It may name what an installed package has, and
nothing else: no module of the working folder, next to the file or of Python itself, and none of a package
that begins with `_` (`unittest.__main__` would run).
"""

import functools
import importlib.util
import os
import site
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from urllib.parse import unquote, urlsplit

from modules.errors import OptionError
from modules.installation import IMPORTED_AS, describe_missing, own_name, read_requirements, requirement_name
from modules.text_files import real_path


def require_installed(place: str, name: str, remedy: str) -> None:
    """Raise OptionError if a file names a module that does not belong to an installed package.

    For the message, `place` is the option or file that states the name, and `remedy` is advice in case the
    code is the user's own.
    """
    if find_installed(own_name(name)) is not None:
        return
    package = name.partition(".")[0]
    if package.isidentifier() and _find_top(package) is None:
        why = describe_missing(ModuleNotFoundError(name=package))
    else:
        why = f"{name} is not a module of an installed package"
    raise OptionError(
        f"{place}: {why}.\n  A file may name code of installed packages only. If it is your own, {remedy}"
    )


def find_installed(name: str) -> Path | None:
    """Return the path of an installed package's module; None if no installed package contains it."""
    parts = name.split(".")
    if any(not part.isidentifier() or part.startswith("_") for part in parts):
        return None
    spec = _find_top(parts[0])
    is_required = spec is not None and parts[0] in _list_required_packages()
    for length in range(1, len(parts) + 1):
        if spec is None or not (is_required or _has_installed_file(spec)):
            return None
        if length < len(parts):
            folders = spec.submodule_search_locations
            spec = None if folders is None else PathFinder.find_spec(".".join(parts[: length + 1]), folders)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _find_top(package: str) -> ModuleSpec | None:
    spec = PathFinder.find_spec(package)  # not sys.modules, where another object may replace the package
    if spec is not None:
        return spec
    try:
        return importlib.util.find_spec(package)  # finds packages that are installed in place
    except (ImportError, ValueError):  # a loaded module without a spec
        return None


def _has_installed_file(spec: ModuleSpec) -> bool:
    """Return whether a module has a source file in an installed package; False for a folder without code."""
    if spec.origin is None:
        return spec.submodule_search_locations is not None
    return spec.has_location and is_installed_file(Path(spec.origin))


def is_installed_file(file: Path) -> bool:
    """Return whether a file belongs to an installed package, including editable installations."""
    if _is_below(file, _list_package_folders()):
        return True
    here = real_path(Path.cwd())
    return _is_below(file, _list_editable_folders()) and not real_path(file).is_relative_to(here)


def _is_below(file: Path, folders: Sequence[Path]) -> bool:
    absolute = Path(os.path.abspath(file))  # noqa: PTH100
    return any(absolute.is_relative_to(folder) for folder in folders)


@functools.cache
def _list_package_folders() -> tuple[Path, ...]:
    """Return the folders into which pip installs for this Python and this user."""
    texts = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        texts.append(site.getusersitepackages())
    absolute = [Path(os.path.abspath(text)) for text in texts]  # noqa: PTH100
    return tuple(dict.fromkeys([*absolute, *map(real_path, absolute)]))


@functools.cache
def _list_editable_folders() -> tuple[Path, ...]:
    """Return the source folders of packages that are installed with `pip install -e`."""
    # imported here to keep the start fast: options import this file
    import json
    from importlib.metadata import distributions

    folders = []
    for distribution in distributions():
        try:
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            is_editable = origin.get("dir_info", {}).get("editable", False)
            address = urlsplit(origin.get("url", "")) if is_editable else None
        except (ValueError, AttributeError):  # damaged metadata
            continue
        if address is not None and address.scheme == "file":
            path = unquote(address.path)
            # a URL has a slash before the drive of Windows: /C:/folder
            folders.append(Path(path.lstrip("/") if os.name == "nt" else path))
    return tuple(folders)


@functools.cache
def _list_required_packages() -> frozenset[str]:
    """Return the import names of the packages in requirements.txt."""
    names = [requirement_name(line) for line in read_requirements()]
    return frozenset(IMPORTED_AS.get(name, name.replace("-", "_")) for name in names)
