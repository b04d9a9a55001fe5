"""Clean tags and captions of drawings in a metadata file, following the rules of clean_captions_and_tags.py.

Underscores, ratings, and tags that repeat a more precise one are removed. If the image shows several people,
tags that describe them differently are removed too, because it is unclear whom they describe. In captions,
words that call the image a drawing are removed, and all people become girls, as in tags.
Source of the rules: github.com/kohya-ss/sd-scripts, finetune/clean_captions_and_tags.py.
"""

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.metadata import CAPTION, TAGS, check_name, read_metadata, write_metadata
from data_tools.tags.words import remove_underscores, split_tags
from modules.console import format_count
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError
from modules.options import Options, option

logger = logging.getLogger(__name__)

_RATING = "rating:"  # beginning of DeepDanbooru's rating tags
_SEVERAL_PEOPLE = re.compile("girls|boys")
_LENGTHS = "long|short|medium"
# kinds of tags: one person has at most one of each
_PERSON_TAG_KINDS = (
    re.compile(rf"({_LENGTHS}) hair"),
    re.compile(rf"(?!({_LENGTHS}) )[\w-]+ hair"),
    re.compile("(bob|hime) cut"),
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(
        r"ponytail|twintails|two tails|two side up|ahoge|sidelocks|([\w-]+ )?braid"
        r"|[\w-]+ bun|single (hair|side) bun"
    ),
)
_GENERAL = re.compile(r"[\w-]+|hair ornament")  # tags that are removed if a longer tag ends with them

_DRAWN = "(anime |cartoon )"
# pairs of a pattern and its replacement, applied in this order, ignoring case
_CAPTION_RULES = (
    (re.compile(r"\byoung ", re.I), ""),
    (re.compile(rf"\b{_DRAWN}+(characters|girls)\b", re.I), "girls"),
    (re.compile(rf"\b{_DRAWN}*(females|ladies|women|people|persons)\b", re.I), "girls"),
    (re.compile(rf"\b{_DRAWN}+(character|girl)\b", re.I), "girl"),
    (re.compile(rf"\b{_DRAWN}*(female|lady|woman|person)\b", re.I), "girl"),
    (re.compile(r"\b(anime )?cartoon (anime )?(figure|image|picture|drawing)\b", re.I), r"\3"),
    (re.compile(r"\b(girl|anime)( \1)+\b", re.I), r"\1"),
    (re.compile(r"\b(a)n (?=girl\b|figure\b|picture\b|drawing\b)", re.I), r"\1 "),
    (re.compile(r"\b(a) (?=image\b)", re.I), r"\1n "),
)


class CleaningOptions(Options, title="what to do"):
    """Options for cleaning captions and tags in a metadata file."""

    in_json: Path = option("metadata file with captions and tags", positional=True, place="file")
    out_json: Path = option("file to write; it may be the same one", positional=True)
    debug: bool = option("print each text that changes, and what it becomes")

    def __post_init__(self) -> None:
        check_name(self.out_json)


def clean_metadata(options: CleaningOptions) -> None:
    """Clean captions and tags of all images in a metadata file, and write the file.

    Raises:
        DatasetError: If the file cannot be read, or if a caption or its tags are not text.
    """
    entries = read_metadata(options.in_json)
    num_changed = 0
    cleaned: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        cleaned[key] = dict(entry)
        for name, clean in _CLEAN.items():  # the keys of tags and caption, and their functions
            text = entry.get(name)
            if text is None:
                continue
            if not isinstance(text, str):
                raise DatasetError(f"{options.in_json}: {key[:200]!r}: {name} is not text. Fix it")
            cleaned[key][name] = clean(text)
            if cleaned[key][name] != text:
                num_changed += 1
                if options.debug:
                    line = f"{key}: {name}: {text} -> {cleaned[key][name]}"
                    sys.stdout.write(escape_control_codes(line) + "\n")
    write_metadata(options.out_json, cleaned)
    logger.info("wrote %s: %s changed", options.out_json, format_count(num_changed, "text"))


def clean_tags(text: str) -> str:
    """Return cleaned tags: `1girl, shirt, white_shirt, rating:safe` becomes `1girl, white shirt`.

    Args:
        text: Tags with commas between them.
    """
    tags = [remove_underscores(tag) for tag in split_tags(text, ",")]
    tags = [tag for tag in tags if not tag.startswith(_RATING)]
    if any(_SEVERAL_PEOPLE.search(tag) for tag in tags):
        for kind in _PERSON_TAG_KINDS:
            exclusive_tags = {tag for tag in tags if kind.fullmatch(tag)}
            if len(exclusive_tags) > 1:  # such as two hair colors: unclear whose they are
                tags = [tag for tag in tags if tag not in exclusive_tags]
    return ", ".join(tag for tag in tags if not _is_superfluous(tag, tags))


def _is_superfluous(tag: str, tags: list[str]) -> bool:
    """Return whether a more specific tag exists: `white shirt` makes `shirt` superfluous."""
    if not _GENERAL.fullmatch(tag):
        return False
    return any(other.endswith(f" {tag}") for other in tags)


def clean_caption(text: str) -> str:
    """Return a cleaned caption: `an anime woman in a cartoon image` becomes `a girl in an image`."""
    for pattern, replacement in _CAPTION_RULES:
        text = pattern.sub(replacement, text)
    return text


_CLEAN: dict[str, Callable[[str], str]] = {TAGS: clean_tags, CAPTION: clean_caption}
