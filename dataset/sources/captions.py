"""Caption files: a text file next to an image or a clip, and a table's additions to their text."""

import codecs
import errno
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.sources.wildcards import fill_wildcards
from dataset.table import CaptionChanges, DatasetTable
from modules.errors import DatasetError
from modules.limits import MAX_CAPTION_BYTES, MAX_CAPTIONS
from modules.paths import find_spelling
from modules.text_encodings import EncodingGuess, guess_encoding, guess_encodings
from modules.text_files import bad_character, read_content, read_if_object, read_text
from protocols.families import caption_formats
from protocols.rules import TokenCount


def caption_path(media: Path, extension: str) -> Path:
    """Return the path of the caption next to an image or a clip."""
    return find_spelling(media.with_name(media.stem + extension))


SHOWN = 60  # characters of a caption in a message
# encodings of Windows Notepad: "ANSI" in Western Europe and America, in Central Europe, and "Unicode"
ANSI = "cp1252"
ANSI_CENTRAL_EUROPE = "cp1250"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_UTF8 = "have a caption that is not UTF-8"


@dataclass(frozen=True)
class CaptionContent:
    """The text of a caption file, stripped of white space, and its encoding if that is not UTF-8."""

    text: str
    encoding: str | None = None  # common name: "Windows-1252 (Western European)"


def read_caption(path: Path) -> str | None:
    """Return a caption file's text, stripped of white space; None if the file does not exist.

    Raises:
        DatasetError: If the file cannot be read.
    """
    file = read_caption_file(path)
    return None if file is None else file.text


def read_caption_file(path: Path) -> CaptionContent | None:
    """Return the text and encoding of a caption file; None if the file does not exist.

    A file that is not UTF-8 is read if it is Windows-1252, or UTF-16 with a byte order mark, as saved by
    Windows Notepad.

    Raises:
        DatasetError: If the file is in another encoding, too large, not a regular file, or unreadable.
    """
    encoding = None
    try:
        caption = read_text(path, MAX_CAPTION_BYTES).strip()
    except UnicodeDecodeError as error:
        guess = guess_windows_encoding(error.object)
        if guess is None:
            raise DatasetError(
                f"{path}: this caption is not UTF-8 text (byte {error.start}). Save it as UTF-8."
            ) from None
        text = guess.text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()
        caption, encoding = text, guess.name
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DatasetError(
                f"{path}: a file name cannot be that long, so its caption cannot exist. Shorten the name "
                "that both share."
            ) from None
        raise DatasetError(
            f"{path}: this caption cannot be read: {error.strerror}. Put a text file there."
        ) from error
    bad = bad_character(caption)
    if bad is not None:
        raise DatasetError(f"{path}: this caption contains {bad}. Save it as UTF-8.")
    return CaptionContent(caption, encoding)


def guess_windows_encoding(content: bytes) -> EncodingGuess | None:
    """Guess the encoding of a file that Windows Notepad may have saved, and decode it; None for others."""
    guess = guess_encoding(content)
    if guess is None or guess.encoding == ANSI or content.startswith(UTF_16):
        return guess
    if guess.encoding == ANSI_CENTRAL_EUROPE:  # many letters are the same in both encodings
        western = content.decode(ANSI, "replace")
        is_valid = "\ufffd" not in western  # U+FFFD stands for bytes that ANSI does not have
        if guess.text == western or (is_valid and not guess.is_sure):
            return EncodingGuess(ANSI, western, is_sure=False)
    return None


def describe_encoding(path: Path, text: str, encoding: str) -> str:
    """Return a message with a file's encoding: `cat.txt: read as Windows-1252 (...): 'ein Mädchen'`."""
    one_line = " ".join(text.split())
    shown = one_line if len(one_line) <= SHOWN else f"{one_line[:SHOWN]}..."
    return f"{path}: read as {encoding}: {shown!r}"


@dataclass(frozen=True)
class Caption:
    """One caption of an item. In a JSON object, nothing is drawn, shuffled, dropped or joined."""

    text: str
    is_object: bool

    @classmethod
    def of(cls, text: str) -> "Caption":
        """Return the caption of a text, which may be a JSON object."""
        return cls(text, is_object=read_if_object(text) is not None)


def captions_in(text: str, table: DatasetTable) -> tuple[str, ...]:
    """Return the captions in the text of a caption file, ready to be encoded; at least one.

    If captions vary, this is the full text, which `dataset.batches.order` changes in each step.
    """
    if table.captions.changes.varies_per_step:
        return (text,)
    captions = complete_captions([caption.text for caption in split_captions(text, table)], table)
    return tuple(join_parts(Caption.of(caption), table.captions.changes) for caption in captions)


def split_captions(text: str, table: DatasetTable) -> list[Caption]:
    """Return the captions in the text of a caption file as it is, before words are added; at least one.

    A JSON object is one caption, also if it has several lines. Other texts: with multi_caption, each
    non-empty line is a caption. Tables in the layout of sd-scripts have a single caption, the first line,
    or with enable_wildcard one of the lines.
    """
    whole = Caption.of(text)
    is_in_subset = table.group is not None
    if whole.is_object or not (is_in_subset or table.captions.multi_caption):
        return [whole]
    captions = [Caption.of(line) for line in split_lines(text) or [""]]
    return captions[:1] if is_in_subset and not table.captions.changes.wildcards else captions


def draw_caption(caption: Caption, table: DatasetTable, generator: random.Random) -> Caption:
    """Draw one alternative of each {a|b} if the table has wildcards; add trigger word, prefix and suffix."""
    text = caption.text
    prefix, suffix = table.captions.caption_prefix, table.captions.caption_suffix
    if table.captions.changes.wildcards:
        prefix = fill_wildcards(prefix, generator).text
        text = text if caption.is_object else fill_wildcards(text, generator).text
        suffix = fill_wildcards(suffix, generator).text
    text = complete_caption(text, table.captions.trigger_word, prefix, suffix)
    return Caption(text, caption.is_object)


def split_first_caption(
    captions: tuple[str, ...] | None, position: Path | str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Return the first caption and the remaining ones.

    Raises:
        DatasetError: If there are more than MAX_CAPTIONS.
    """
    if captions and len(captions) > MAX_CAPTIONS:
        raise DatasetError(
            f"{position}: {len(captions)} captions, at most {MAX_CAPTIONS} are used. With multi_caption = "
            "true each line is one; omit it if the lines are one text."
        )
    return (captions[0], captions[1:]) if captions else (None, ())


def complete_captions(captions: Iterable[str], table: DatasetTable) -> tuple[str, ...]:
    """Add a table's trigger word, prefix and suffix to captions; return them without duplicates."""
    prefix, suffix = table.captions.caption_prefix, table.captions.caption_suffix
    if not (table.captions.trigger_word or prefix or suffix):
        return tuple(dict.fromkeys(captions))
    completed = [
        complete_caption(caption, table.captions.trigger_word, prefix, suffix) for caption in captions
    ]
    return tuple(dict.fromkeys(completed))


def complete_caption(caption: str, trigger: str, prefix: str, suffix: str) -> str:
    """Return "prefix trigger, caption suffix"; the trigger is left out if the caption contains it.

    In a model's JSON caption format, these are put around its main text.
    """
    if trigger or prefix or suffix:
        full = _complete_object(caption, trigger, prefix, suffix)
        if full is not None:
            return full
    if trigger:
        caption = add_trigger(caption, trigger)
    if not (prefix or suffix):
        return caption
    return " ".join(part for part in (prefix, caption, suffix) if part)


def _complete_object(caption: str, trigger: str, prefix: str, suffix: str) -> str | None:
    """Return a JSON caption with the main text completed; None if the caption is not in a known format."""
    content = read_if_object(caption)
    if content is None:
        return None
    import json  # only for captions that are objects

    key = _find_key(content, _list_text_keys())
    if key is None:
        return None
    has_trigger = add_trigger(caption, trigger) == caption  # anywhere in the object
    content[key] = complete_caption(content[key], "" if has_trigger else trigger, prefix, suffix)
    return json.dumps(content, ensure_ascii=False)


def find_text(caption: str) -> str:
    """Return the text of a caption; for a JSON caption, its instruction, or else its main text.

    Returns "" for a JSON object that has neither.
    """
    content = read_if_object(caption)
    if content is None:
        return caption
    key = _find_key(content, reversed(_list_text_keys()))
    return content[key] if key else ""


def _list_text_keys() -> list[str]:
    """Return the main key of each JSON caption format, followed by the key of its instruction."""
    return [key for format in caption_formats().values() for key in (format.main, format.instruction)]


def _find_key(content: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Return the first of these keys whose value is a string; None if there is none."""
    return next((key for key in keys if isinstance(content.get(key), str)), None)


def split_lines(text: str) -> list[str]:
    """Return the non-blank lines of a text, stripped of white space."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def join_parts(caption: Caption, changes: CaptionChanges) -> str:
    """Replace the secondary separator, which keeps tags together during shuffling, with the separator."""
    secondary = changes.secondary_separator
    if not secondary or caption.is_object:
        return caption.text
    return caption.text.replace(secondary, changes.separator)


def add_trigger(caption: str, trigger: str) -> str:
    """Put the trigger word in front of a caption that does not contain it as a word."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def guess_captions(paths: Sequence[Path]) -> list[EncodingGuess | None]:
    """Guess the encoding of caption files that are not UTF-8, from all of their bytes together.

    The guess is None for a file that is unreadable or probably not text.
    """
    contents = []
    for path in paths:
        try:
            contents.append(read_content(path, MAX_CAPTION_BYTES))
        except OSError:
            contents.append(b"")  # its guess is None
    return guess_encodings(contents)


def not_utf8(path: Path, number: int) -> DatasetError:
    """Return the error for a list that is not UTF-8 after line `number`, with a guess at its encoding."""
    guess = guess_captions([path])[0]
    seems = "" if guess is None else f"; it looks like {guess.name}"
    return DatasetError(f"{path} is not UTF-8 text (after line {number}{seems}). Save it as UTF-8.")


def explain_captions(paths: Sequence[Path], errors: Sequence[str]) -> list[str]:
    """Return the errors of `read_caption` with each file's probable encoding and first words added."""
    explained = []
    for error, guess in zip(errors, guess_captions(paths), strict=True):
        if guess is not None and "UTF-8" in error:
            start = " ".join(guess.text.split())[:SHOWN]
            error = f"{error} It looks like {guess.name}: {start!r}; --check --repair_captions converts it."
        explained.append(error)
    return explained


def describe_cut(position: Path | str, encoder: str, count: TokenCount) -> str:
    """Return the message about a caption that is too long for a text encoder, with the text that is lost.

    `position` is the caption file, or the name of the media file.
    """
    cut_text = " ".join(count.cut_text.split())
    lost = cut_text if len(cut_text) <= SHOWN else f"{cut_text[:SHOWN]}... ({len(cut_text)} characters)"
    return f"{position}: {count.tokens} tokens, {encoder} reads {count.limit}; lost: {lost}"
