"""Find the images that a metadata JSON of sd-scripts names."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.sources.captions import captions_in, not_utf8, split_lines
from dataset.sources.media_source import Fault, MediaSource, unique_stems
from dataset.sources.missing import explain_lookup
from dataset.table import DatasetTable
from modules.errors import DatasetError
from modules.limits import MAX_METADATA_BYTES
from modules.media.reading import image_suffixes
from modules.paths import check_length, compose_name, find_spelling
from modules.text_files import bad_character, parse_json, read_text

logger = logging.getLogger(__name__)

SIZE_KEY = "train_resolution"  # key of an entry, written by prepare_buckets_latents.py of sd-scripts


def list_metadata(table: DatasetTable, path: Path, faults: list[Fault]) -> list[MediaSource]:
    """Return the images that a table's metadata_file names, with their captions and tags.

        {"cat.png": {"caption": "a cat", "tags": "red, chair"}, "sub/dog": {"tags": "dog"}}

    A key is a path, or a name in the table's folder of images, with or without its suffix.

    Args:
        table: Table of the dataset file.
        path: Path of the metadata file.
        faults: List to which faults of single entries are added.

    Raises:
        DatasetError: If the file cannot be read.
    """
    entries = _read_entries(table, path)
    images_by_folder: dict[Path, dict[str, Path]] = {}  # `find_image` lists each folder once
    image_captions: list[tuple[Path, str | None]] = []
    for key, entry in entries.items():
        try:
            image = find_image(key, table.source.image_folder, images_by_folder)
            text = _join_caption_and_tags(entry, table)
        except (ValueError, OSError) as error:  # does not stop the other entries
            faults.append(Fault(f"entries of {path} cannot be used", f"{key[:200]!r}: {error}."))
            continue
        image_captions.append((image, text))
    if any(isinstance(entry, dict) and SIZE_KEY in entry for entry in entries.values()):
        logger.info("%s: %s is not needed: sizes are read from the images themselves", table.name, SIZE_KEY)
    return _make_sources(table, image_captions)


def _make_sources(
    table: DatasetTable, image_captions: Sequence[tuple[Path, str | None]]
) -> list[MediaSource]:
    """Return a source for each image with its text; None means that it has no caption."""
    images = [image for image, _ in image_captions]
    # images in different folders may have equal names, so stems get a hash
    stems = unique_stems([image.stem for image in images], [str(image) for image in images])
    sources = []
    for (image, text), stem in zip(image_captions, stems, strict=True):
        caption = None if text is None else captions_in(text, table)[0]
        source = MediaSource(
            path=image, stem=stem, caption=caption, caption_path=None, control=(), table=table
        )
        sources.append(source)
    return sources


def _read_entries(table: DatasetTable, path: Path) -> dict[str, Any]:
    """Return the entries of a metadata file by key. Raises DatasetError if the file cannot be read."""
    try:
        content = parse_json(read_text(path, MAX_METADATA_BYTES))
    except UnicodeDecodeError:
        raise not_utf8(path, 0) from None
    except OSError as error:
        raise DatasetError(
            f"{table.name}: metadata_file = {path}: {error.strerror}{explain_lookup(path, table.config_path)}"
        ) from error
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise DatasetError(
            f'{path}: the top level must be an object with a key for each image: {{"cat": {{"caption": '
            '"a cat"}}'
        )
    return content


def find_image(key: str, folder: Path | None, images_by_folder: dict[Path, dict[str, Path]]) -> Path:
    """Return the image that a key of a metadata file names.

    Args:
        key: Path or name of the image, with or without suffix.
        folder: Folder that relative paths refer to; None for the working folder.
        images_by_folder: Images of the folders listed so far, by folder and by name without suffix; new
            folders are added.

    Raises:
        ValueError: If there is no such image.
    """
    if bad_character(key) or not key.strip():
        raise ValueError("this is not a path")
    path = Path(key) if folder is None else folder / key
    if folder is not None and Path(key).is_relative_to(folder) and not path.parent.is_dir():
        path = Path(key)  # the key begins with the folder, spelled as in the dataset file
    check_length(path)
    image = find_spelling(path)
    if path.suffix.lower() in image_suffixes() and image.is_file():
        return image
    # the key has no suffix
    if path.parent not in images_by_folder:
        images_by_folder[path.parent] = _list_images(path.parent)
    image_by_stem = images_by_folder[path.parent]
    if compose_name(path.name) not in image_by_stem:
        in_folder = "" if folder is None else f" in {folder}"
        raise ValueError(f"there is no such image{in_folder}: fix the key or remove the entry")
    return image_by_stem[compose_name(path.name)]


def _list_images(folder: Path) -> dict[str, Path]:
    """Return the images in a folder by their names without suffix; {} if there is no such folder."""
    # in reverse order, so that the first of the files with the same stem stays
    entries = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
    return {compose_name(entry.stem): entry for entry in entries if entry.suffix.lower() in image_suffixes()}


def _join_caption_and_tags(entry: Any, table: DatasetTable) -> str | None:
    """Return the text of a metadata entry: its caption followed by its tags."""
    # Class_tokens if it has neither.
    # With wildcards, each line of the caption is an alternative, so the tags follow every line.
    if not isinstance(entry, dict):
        raise ValueError("its value is not an object with caption or tags")
    caption = _read_entry_text(entry, "caption")
    tags = _read_entry_text(entry, "tags")
    if not caption or not tags:
        return caption or tags or table.captions.class_tokens
    separator = table.captions.changes.separator
    lines = [caption]
    if table.captions.changes.wildcards:
        tags = separator.join(split_lines(tags))
        lines = split_lines(caption)
    return "\n".join(f"{line}{separator} {tags}" for line in lines)


def _read_entry_text(entry: dict[str, Any], name: str) -> str:
    """Return the string under a key of a metadata entry; "" if the key is missing."""
    text = entry.get(name)
    if text is None:
        return ""
    if not isinstance(text, str) or bad_character(text):
        raise ValueError(f"{name} is not text")
    return text.strip()
