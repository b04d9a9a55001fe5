"""The file that prepare_dataset.py leaves beside its folders: the models and settings they were made with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modules.atomic_write import write_text
from modules.errors import DatasetError
from modules.text_files import parse_json, read_text

PREPARED = "reelsmith_prepared.json"
VERSION = 1


@dataclass(frozen=True)
class PreparedFolder:
    """Facts that all items of a prepared folder share. Values are those of JSON."""

    architecture: str | None  # `Family.name` of the model whose VAE made the moments; None: there are none
    vae: Mapping[str, str]  # identity of that VAE
    settings: Mapping[str, Any]  # what items depend on besides their sources


def write_prepared(folder: Path, prepared: PreparedFolder) -> None:
    """Write the file of a folder. Raises OutputError if that fails."""
    content = {"version": VERSION, **asdict(prepared)}
    write_text(folder / PREPARED, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def read_prepared(folder: Path) -> PreparedFolder | None:
    """Read the file of a folder; None if there is none: another program made it.

    Raises DatasetError if it cannot be read.
    """
    path = folder / PREPARED
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, this program knows {VERSION}")
        architecture = content["architecture"]
        if architecture is not None and not isinstance(architecture, str):
            raise ValueError("the architecture is no text")
        return PreparedFolder(architecture, dict(content["vae"]), dict(content["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({type(error).__name__}: {error}). prepare_dataset.py writes it; prepare "
            "the data into another folder, or remove this file if the data are of another program."
        ) from error
