"""Regularization images of a described folder: options, captions of the class, and their table. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from dataset.subset_options import SUBSET, SUBSET_KEYS
from modules.errors import DatasetError, OptionError
from modules.integers import round_up
from modules.options import Options, option
from modules.text_files import read_text
from project.options import check_trigger
from project.prompt_lines import plain

FOLDER_NAME = "regularization_images"  # `new` recognizes it, too
CAPTION_SUFFIX = ".txt"
# keys of tables of images in our own layout, by their names in subsets
_OWN_NAMES = {"image_directory": "image_dir"}
_SIDE_STEP = 64  # of the sizes of subsets
_MIN_SIDE = 256  # the default of min_bucket_reso
_OWN_RESOLUTION = [960, 544]  # default in our own layout


class RegularizationOptions(Options):
    """Options of tools/regularize.py: the folder, and the words of its subject and of the class."""

    folder: Path = option(
        "folder that `new` described", positional=True, place="folder", hint="the folder that `new` described"
    )
    class_word: str | None = option("word for the class of the subject, such as cat", metavar="WORD")
    trigger_word: str | None = option(
        "word in the captions that the class word replaces; default: that of dataset.toml", metavar="WORD"
    )
    dry_run: bool = option("print the prompts and the command that would be run, and make nothing")

    def __post_init__(self) -> None:
        if self.class_word is None or not plain(self.class_word):
            raise OptionError(
                "--class_word is missing: pass the word for the class, such as --class_word cat"
            )
        if self.trigger_word is not None:
            check_trigger(self.trigger_word)


def write_class_caption(caption: str, trigger_word: str, class_word: str) -> str:
    """Return a caption of the class on one line, without the trigger word.

    A caption that has neither word gets the class word in front. `zwolf cat` becomes `cat`, not `cat cat`.
    """
    word, class_pattern = re.escape(trigger_word), re.escape(class_word)
    subject = re.compile(rf"(?<!\w){word}(?!\w)(?:\s+{class_pattern}(?!\w))?", re.IGNORECASE)
    # a function, because the class word may have backslashes
    text = subject.sub(lambda _: class_word, caption)
    if not re.search(rf"(?<!\w){class_pattern}(?!\w)", text, re.IGNORECASE):
        text = f"{class_word}, {text}" if text.strip() else class_word
    return plain(text)


def add_regularization(path: Path) -> str:
    """Return the text of a dataset file with the regularization images as a subset of each resolution.

    A file in our own layout becomes one with [[datasets.subsets]], which alone has regularization images.
    The text is that of the file if the images are in it already.

    Raises:
        DatasetError: If the file cannot be read, or has what such subsets do not have.
    """
    try:
        text = read_text(path)
        document = tomlkit.parse(text)
        tables = document["datasets"]
        if not isinstance(tables, list):
            raise ValueError("it has no [[datasets]]")
    except (OSError, KeyError, ValueError, TOMLKitError) as error:
        raise DatasetError(f"{path} cannot be read ({error}). Fix it, or run `new` again") from None
    if not any("subsets" in table for table in tables):
        tables = _convert_tables(path, document)
        document["datasets"] = tables
    general = document.get("general", {})
    is_changed = False
    for number, table in enumerate(tables, 1):
        if any(subset.get("image_dir") == FOLDER_NAME for subset in table["subsets"]):
            continue
        cache = f"cache/images/{FOLDER_NAME}"
        subset = tomlkit.table()
        subset["image_dir"] = FOLDER_NAME
        subset["cache_directory"] = cache if number == 1 else f"{cache}_{number}"
        subset["is_reg"] = True
        subset["caption_extension"] = CAPTION_SUFFIX
        # the captions are whole: what the other images get in addition is in them, or belongs to the subject
        for key in ("trigger_word", "caption_prefix", "caption_suffix"):
            if general.get(key) or table.get(key):
                subset[key] = ""
        table["subsets"].append(subset)
        is_changed = True
    return tomlkit.dumps(document) if is_changed else text


def _convert_tables(path: Path, document: tomlkit.TOMLDocument) -> Any:
    """Return the tables of a dataset file in our own layout as [[datasets]] with subsets."""
    content = document.unwrap()  # without the notation of the file, such as its comments
    general = content.get("general", {})
    _reject_unknown_keys(path, "[general]", general)
    groups: dict[str, Any] = {}  # tables with the same keys of [[datasets]] share one
    for number, entry in enumerate(content["datasets"], 1):
        keys = {_OWN_NAMES.get(name, name): value for name, value in entry.items()}
        _reject_unknown_keys(path, f"[[datasets]] {number}", keys)
        shared = {name: value for name, value in keys.items() if SUBSET_KEYS[name].level not in _OF_SUBSETS}
        if "resolution" not in general:
            shared.setdefault("resolution", _OWN_RESOLUTION)
        if str(shared) not in groups:
            groups[str(shared)] = _make_group(shared, general)
        subset = tomlkit.table()
        subset.update({name: value for name, value in keys.items() if name not in shared})
        groups[str(shared)]["subsets"].append(subset)
    tables = tomlkit.aot()
    for group in groups.values():
        tables.append(group)
    return tables


_OF_SUBSETS = {SUBSET, SUBSET_KEYS["num_repeats"].level}


def _make_group(shared: Mapping[str, Any], general: Mapping[str, Any]) -> Any:
    """Return a [[datasets]] table without subsets, whose limits of sizes allow its resolution."""
    group = tomlkit.table()
    group.update(shared)
    values = {**general, **shared}
    if values.get("enable_bucket") and not values.get("bucket_no_upscale"):
        resolution = values["resolution"]
        sides = resolution if isinstance(resolution, list) else [resolution]
        shortest, longest = min(sides), max(sides)
        if shortest >= _SIDE_STEP:
            shortest = shortest // _SIDE_STEP * _SIDE_STEP
        group["min_bucket_reso"] = min(_MIN_SIDE, shortest)
        # room for the long side of an image with an extreme aspect ratio
        group["max_bucket_reso"] = round_up(2 * longest, _SIDE_STEP)
    group["subsets"] = tomlkit.aot()
    return group


def _reject_unknown_keys(path: Path, label: str, keys: Mapping[str, Any]) -> None:
    """Raise DatasetError if a table has keys that subsets do not have."""
    unknown = [name for name in keys if name not in SUBSET_KEYS]
    if unknown:
        raise DatasetError(
            f"{path}, {label}: regularization images need [[datasets.subsets]], which have no "
            f"{', '.join(unknown)}. Remove the key, or write that layout by hand (docs/image_datasets.md)"
        )
