"""Whether training runs use the masks of a folder: the key mask_directory in its dataset.toml."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from browser.folders.described_folder import DATASET_FILE, DraftFile, is_described, read_own_file
from browser.folders.offered_folders import MEDIA_KEYS
from browser.pages.masks.mask_review import find_masks_folder
from browser.runs.runs import Runs
from data_tools.masks.places import FOLDER_NAME, find_mask_entries
from modules.pages.language import refusal
from modules.text_files import real_path

MASKS = "mask_directory"  # key of a table


@dataclass(frozen=True)
class MaskUse:
    """Number of files in a folder that have a mask, and whether dataset.toml uses the masks."""

    config: DraftFile  # dataset.toml that uses the folder
    folder: Path
    masks: Path  # folder of the masks
    num_masks: int
    num_media: int
    is_used: bool

    def enable(self) -> bool:
        """Set `mask_directory` in dataset.toml, and return whether that changed the file.

        Raises OptionError or ValueError if dataset.toml cannot be edited or there are no masks yet, or
        ChangedMeanwhileError if dataset.toml has changed since it was read.
        """
        if not self.num_masks:
            raise refusal("There are no masks yet: generate or draw one first.")
        document = _parse(self.config.text)
        base = self.config.path.parent
        mask_path = self.masks.relative_to(base) if self.masks.is_relative_to(base) else self.masks
        for table in _list_folder_tables(document, base, self.folder):
            table[MASKS] = mask_path.as_posix()
        return self._save(document)

    def disable(self) -> bool:
        """Remove `mask_directory` from dataset.toml, and return whether that changed the file.

        Raises OptionError or ValueError if dataset.toml cannot be edited, or ChangedMeanwhileError if it has
        changed since it was read.
        """
        document = _parse(self.config.text)
        for table in _list_folder_tables(document, self.config.path.parent, self.folder):
            table.pop(MASKS, None)
        return self._save(document)

    def _save(self, document: Any) -> bool:
        new_text = tomlkit.dumps(document)
        if new_text == self.config.text:
            return False
        self.config.save(new_text)
        return True


def read_mask_use(runs: Runs, folder: Path) -> MaskUse | None:
    """Return whether the dataset.toml of a media folder (a real path) uses the folder's masks.

    Returns None if no dataset.toml next to a run.toml, in the folder or its parent, names the media folder.
    """
    for outer in (folder, folder.parent):
        path = outer / DATASET_FILE
        if not is_described(outer) or not runs.is_inside(path):
            continue
        try:
            config = DraftFile(path, read_own_file(path))
            tables = list(_list_folder_tables(_parse(config.text), outer, folder))
        except (OSError, ValueError):
            continue
        if tables:
            masks = find_masks_folder(runs, folder) or folder / FOLDER_NAME
            media_files = find_mask_entries(folder, masks)
            return MaskUse(
                config=config,
                folder=folder,
                masks=masks,
                num_masks=sum(media_file.mask is not None for media_file in media_files),
                num_media=len(media_files),
                is_used=all(MASKS in table for table in tables),
            )
    return None


def use_first_mask(runs: Runs, folder: Path) -> bool:
    """Enable a folder's masks in dataset.toml if its first mask was just written; return whether it did.

    Raises OptionError or ValueError if dataset.toml cannot be edited.
    """
    use = read_mask_use(runs, folder)
    return use is not None and use.num_masks == 1 and not use.is_used and use.enable()


def _parse(text: str) -> Any:
    try:
        return tomlkit.parse(text)
    except TOMLKitError as error:
        raise ValueError(f"{DATASET_FILE} is not TOML: {error}") from None


def _list_folder_tables(document: Any, base: Path, folder: Path) -> Iterator[Any]:
    """Yield the dataset tables and subsets for a media folder. Relative paths refer to `base`."""
    entries = document.get("datasets")
    tables = list(entries) if isinstance(entries, list) else []
    for table in tables:
        subsets = table.get("subsets") if isinstance(table, dict) else None
        for inner_table in (table, *(subsets if isinstance(subsets, list) else ())):
            media = [inner_table.get(key) for key in MEDIA_KEYS] if isinstance(inner_table, dict) else []
            if any(isinstance(text, str) and real_path(base / text) == folder for text in media):
                yield inner_table
