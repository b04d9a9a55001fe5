"""Find the folder of a model that a user names: one that is here, or a repository of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from modules.control_codes import shorten
from modules.errors import CheckpointError, DownloadError
from modules.option_values import to_path


def find_model_folder(option: str, name: str, patterns: Sequence[str]) -> Path:
    """Return the folder `name`; if there is none, that of the repository `owner/name`, which is downloaded.

    patterns: of the files to download. Raises CheckpointError if it is neither a folder nor the name of a
    repository, DownloadError if the hub does not give it.
    """
    folder = to_path(option, name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise CheckpointError(
            f"{option} {name}: there is no such folder. Give the folder of a model, or the name of a "
            "repository, such as owner/name."
        )
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # no network, no such name, no rights: many classes, one remedy
        why = (
            "HF_HUB_OFFLINE is set and it is not here"
            if constants.HF_HUB_OFFLINE
            else shorten(str(error) or type(error).__name__, 300)
        )
        raise DownloadError(
            f"{option} {name}: there is no such folder, and it cannot be fetched from the hub: {why}. Give "
            "the folder of a model."
        ) from None
