"""Collect a folder's caption or tag files in a metadata file of sd-scripts, for --in_json."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.folders import walk_folders
from data_tools.masks.places import list_media
from modules.atomic_write import replace_surrogates, write_text
from modules.console import format_count, list_some
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, OptionError
from modules.limits import MAX_METADATA_BYTES
from modules.options import Options, option
from modules.text_files import bad_character, parse_json, read_text, real_path

logger = logging.getLogger(__name__)
CAPTION, TAGS = "caption", "tags"


class TextsToMetadataOptions(Options, title="what to do"):
    """Options for merging texts into a metadata file: which images, which texts, and the file."""

    train_data_dir: Path = option("folder of the images", positional=True, place="folder")
    out_json: Path = option(
        "file to write; if it exists, and without --in_json, the texts are added to it", positional=True
    )
    in_json: Path | None = option("file that the texts are added to", place="file")
    full_path: bool = option("name images by their whole paths; else by their names in the folder")
    recursive: bool = option("also take the folders below")
    debug: bool = option("print each image and its text")

    def __post_init__(self) -> None:
        check_name(self.out_json)


class CaptionsToMetadataOptions(TextsToMetadataOptions, title="what to do"):
    """Options for merging captions into a metadata file."""

    caption_extension: str = option(
        "suffix of the caption files",
        default=".caption",
        flags=("--caption_extension", "--caption_extention"),
    )


class TagsToMetadataOptions(TextsToMetadataOptions, title="what to do"):
    """Options for merging tags into a metadata file."""

    caption_extension: str = option(
        "suffix of the tag files", default=".txt", flags=("--caption_extension", "--caption_extention")
    )


def merge_captions(options: CaptionsToMetadataOptions) -> None:
    """Add the captions of a folder to a metadata file. Raises DatasetError if a file is unreadable."""
    _merge_texts(options, options.caption_extension, CAPTION)


def merge_tags(options: TagsToMetadataOptions) -> None:
    """Add the tags of a folder to a metadata file. Raises DatasetError if a file is unreadable."""
    _merge_texts(options, options.caption_extension, TAGS)


def _merge_texts(options: TextsToMetadataOptions, extension: str, name: str) -> None:
    """Write the texts next to a folder's images into a metadata file under the key `name`."""
    source = options.in_json
    if source is None and options.out_json.is_file():
        source = options.out_json  # texts are added to the output of an earlier run
    entries = {} if source is None else read_metadata(source)
    without_text = []
    num_texts = 0
    for image in _walk_images(options.train_data_dir, options.recursive):
        file = image.with_suffix(extension)
        if not file.is_file():
            without_text.append(str(image))
            continue
        # an image's key in the metadata: its absolute path, or its relative path without suffix
        if options.full_path:
            key = str(real_path(image))
        else:
            key = image.relative_to(options.train_data_dir).with_suffix("").as_posix()
        text = _read_caption(file)
        entries[key] = {**entries.get(key, {}), name: text}
        num_texts += 1
        if options.debug:
            sys.stdout.write(escape_control_codes(f"{key}: {text}") + "\n")
    if not num_texts:
        raise DatasetError(
            f"{options.train_data_dir}: no image has a file that ends in {extension}. Pass another "
            "--caption_extension, or --recursive"
        )
    if without_text:
        count = format_count(len(without_text), "image")
        logger.warning("%s without a %s file: %s", count, extension, list_some(without_text))
    write_metadata(options.out_json, entries)
    subject = f"{name} of {format_count(num_texts, 'image')}"
    origin = "" if source is None else f", added to the content of {source}"
    logger.info("wrote %s: %s%s", options.out_json, subject, origin)


def _walk_images(folder: Path, is_recursive: bool) -> Iterator[Path]:
    """Yield the images of a folder and, with `is_recursive`, of its subfolders."""
    for subfolder in walk_folders(folder, is_recursive):
        for path, kind in list_media(subfolder):
            if kind == "image":
                yield path


def check_name(path: Path) -> None:
    """Raise OptionError if the name of a metadata file to write does not end in .json."""
    if path.suffix.lower() != ".json":
        raise OptionError(f"{path}: the file to write ends in .json. Rename it")


def write_metadata(path: Path, content: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a metadata file, replacing an existing one.

    Args:
        path: Path of the file.
        content: Entry of each image, by its key.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_text(path, replace_surrogates(json.dumps(content, ensure_ascii=False, indent=2)) + "\n")


def read_metadata(path: Path) -> dict[str, Mapping[str, Any]]:
    """Read a metadata file: a dictionary of values for each image key.

    Raises:
        DatasetError: If the file is not a metadata file.
    """
    try:
        content = parse_json(read_text(path, MAX_METADATA_BYTES))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}. Pass another file as in_json") from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise DatasetError(
            f"{path} is not a metadata file: an object with an object for each image. Pass "
            "another file as in_json"
        )
    return content


def _read_caption(path: Path) -> str:
    """Read a caption or tag file. Raises DatasetError if it is not UTF-8 text."""
    try:
        text = read_text(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}. Save it as UTF-8") from None
    if bad_character(text):
        raise DatasetError(f"{path} contains {bad_character(text)}. Fix it")
    return text
