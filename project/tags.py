"""Distinguish captions that are lists of tags, as taggers write them, from sentences."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataset.sources.captions import add_trigger
from dataset.sources.wildcards import has_choice
from dataset.subset_options import KEEP_TOKENS_SEPARATOR

SHARE = 0.8  # minimum fraction of tag lists in a tagged folder
LEAST = 3  # minimum number of tags in a list
MAX_WORDS = 4  # maximum number of words in a tag
SENTENCE = re.compile(r"[.!?](\s|$)")
# matches red_hair, but not score_7 and o_o
UNDERSCORE = re.compile(r"(?<=\w)_(?=\w\w)")
EDIT = ["python", "tools/caption_dataset.py", "--dataset_config", "dataset.toml"]
WRITE_COMMAS = ["--replace_regex", r"\s+", ", "]
WRITE_BLANKS = ["--replace_regex", UNDERSCORE.pattern, " "]


@dataclass(frozen=True)
class TagLists:
    """The captions of a folder, each split into tags."""

    lists: tuple[tuple[str, ...], ...]  # in the order of the files
    separator: str  # "," or " "
    has_fixed_tag_separator: bool  # `|||` follows the tags that are not shuffled
    has_alternatives: bool  # alternatives such as {red|blue}

    @property
    def shared_tags(self) -> list[str]:
        """Return the tags that all lists contain, in the order of the first list."""
        return [tag for tag in self.lists[0] if all(tag in tags for tags in self.lists)]

    @property
    def first_with_underscore(self) -> str | None:
        """Return the first tag with an underscore between words; None if there is none."""
        return next((tag for tags in self.lists for tag in tags if UNDERSCORE.search(tag)), None)

    def make_keys(self, trigger: str | None) -> Mapping[str, Any]:
        """Return the keys of dataset.toml that shuffle the tags.

        Args:
            trigger: Trigger word, which is put in front of tag lists that lack it.
        """
        keys: dict[str, Any] = {"shuffle_caption": True}
        if self.separator != ",":
            keys["caption_separator"] = self.separator
        captions = [self.separator.join(tags) for tags in self.lists]
        adds_trigger = trigger is not None and any(add_trigger(text, trigger) != text for text in captions)
        # neither the leading tags that all captions share nor a trigger word before them are shuffled
        num_shared = 1 if len(self.lists) == 1 else len(os.path.commonprefix(self.lists))
        num_fixed_tags = num_shared + (1 if adds_trigger else 0)
        if self.has_fixed_tag_separator:
            keys["keep_tokens_separator"] = KEEP_TOKENS_SEPARATOR
        elif num_fixed_tags:
            keys["keep_tokens"] = num_fixed_tags
        if self.has_alternatives:
            keys["enable_wildcard"] = True
        return keys


def find_tags(captions: Iterable[str]) -> TagLists | None:
    """Split captions into tags; None if too few of them look like lists of tags."""
    texts = [text for text in captions if text.strip()]
    for separator in (",", " "):
        lists = [tags for text in texts if (tags := _read_list(text, separator))]
        if lists and len(lists) >= SHARE * len(texts):
            has_kept = any(KEEP_TOKENS_SEPARATOR in text for text in texts)
            return TagLists(tuple(lists), separator, has_kept, any(map(has_choice, texts)))
    return None


def make_argv_to_write_blanks(tags: TagLists) -> list[str]:
    """Return the command that rewrites the captions: spaces instead of underscores, commas between tags."""
    commas = [] if tags.separator == "," else WRITE_COMMAS
    return [*EDIT, *commas, *WRITE_BLANKS, "--edit_only"]


def as_words(tag: str) -> str:
    """Return a tag with spaces instead of underscores: `red hair`."""
    return UNDERSCORE.sub(" ", tag)


def _read_list(text: str, separator: str) -> tuple[str, ...]:
    """Split a caption into tags; () if it does not look like a list of tags."""
    tags = [
        tag.strip() for tag in text.replace(KEEP_TOKENS_SEPARATOR, separator).split(separator) if tag.strip()
    ]
    if len(tags) < LEAST or SENTENCE.search(text):
        return ()
    if separator == " " and not _have_underscores(tags):
        return ()
    if separator == "," and max(len(tag.split()) for tag in tags) > MAX_WORDS:
        return ()
    return tuple(tags)


def _have_underscores(words: Sequence[str]) -> bool:
    """Return whether space-separated words are tags (`red_hair`) rather than a sentence."""
    joined = [word for word in words if UNDERSCORE.search(word)]
    return len(joined) * 4 >= len(words) and "," not in "".join(words)
