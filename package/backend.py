"""The build backend that pyproject.toml names (PEP 517): setuptools, on a copy that is laid out for it."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import build_meta

import modules.interpreter  # noqa: F401
from package.staging import lay_out_package, lay_out_sources

ROOT = Path(__file__).resolve().parent.parent
Settings = dict[str, Any] | None


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel, which contains all code in the package `reelsmith`, and return its file name."""
    return _build(lay_out_package, build_meta.build_wheel, wheel_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Build the source distribution, with the layout of the checkout, and return its file name."""
    return _build(lay_out_sources, build_meta.build_sdist, sdist_directory, config_settings)


def _build(
    lay_out: Callable[[Path, Path], None], build: Callable[..., str], target: str, settings: Settings
) -> str:
    to = str(Path(target).absolute())
    with tempfile.TemporaryDirectory(prefix="reelsmith-build-") as folder:
        lay_out(ROOT, Path(folder))
        with contextlib.chdir(folder):
            return build(to, settings)
