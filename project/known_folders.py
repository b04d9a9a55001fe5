"""Remember which folders this user has described or read here, outside of these folders. No torch.

A folder's own files prove nothing, because they may come from somebody else.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.text_files import parse_json, real_path
from modules.user_files import read_user_file, write_user_file

logger = logging.getLogger(__name__)
KIND = "folders"


@dataclass(frozen=True)
class KnownFolder:
    """Facts about a dataset folder that are stored among the user's own files."""

    models: Path | None = None  # download folder in its description; None if only read


def remember_folder(folder: Path, models: Path | None = None) -> None:
    """Store that the user trusts a folder's run.toml, so that `run` starts without asking.

    Called when `new` has written that file, or when the user has confirmed what the run does. `models` is the
    download folder that run.toml names. If nothing can be stored on this machine, `run` asks again.
    """
    info = {"models": None if models is None else str(real_path(models))}
    remember_info(KIND, folder, info)


def recall_folder(folder: Path) -> KnownFolder | None:
    """Return what is stored about a folder; None if there is nothing, or if the folder was replaced."""
    try:
        info = recall_info(KIND, folder)
        models = info["models"]
        return KnownFolder(None if models is None else Path(models))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def remember_info(kind: str, folder: Path, facts: Mapping[str, Any]) -> None:
    """Store facts about a folder among the user's files; write errors are ignored.

    `kind` is the kind of facts; the file name begins with it.
    """
    with contextlib.suppress(OSError):
        write_user_file(get_user_file_name(kind, folder), json.dumps({**identify_folder(folder), **facts}))
        return
    logger.debug("%s is not remembered", folder)


def recall_info(kind: str, folder: Path) -> Mapping[str, Any]:
    """Return the stored facts about a folder; {} if the path now leads to another folder.

    Raises OSError, ValueError, TypeError or LookupError if the folder or the stored file cannot be read.
    """
    text = read_user_file(get_user_file_name(kind, folder))
    if text is None:
        return {}
    info: Mapping[str, Any] = parse_json(text)
    is_same = all(info[name] == value for name, value in identify_folder(folder).items())
    return info if is_same else {}


def get_user_file_name(kind: str, folder: Path) -> str:
    """Return the name of the user file that stores facts about a folder.

    `kind` is the kind of facts; the name begins with it.
    """
    text = os.path.normcase(real_path(folder))
    return f"{kind}/{hashlib.sha256(os.fsencode(text)).hexdigest()[:32]}.json"


def identify_folder(folder: Path) -> dict[str, str | int]:
    """Return numbers that identify a folder in its file system, to notice when another folder replaced it.

    Raises OSError if the folder is gone.
    """
    status = folder.stat()
    return {
        "folder": os.path.normcase(real_path(folder)),
        "device": status.st_dev,
        "number": status.st_ino,
    }
