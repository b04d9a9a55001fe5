"""Count the tags in the captions of a folder; rename or remove a tag in all of them, and undo that."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from browser.folders.captions import CaptionEdit, CaptionFiles
from browser.folders.folder_files import find_caption_file, list_names
from browser.folders.offered_folders import list_dataset_media_folders
from browser.runs.runs import Runs
from dataset.subset_options import KEEP_TOKENS_SEPARATOR
from modules.errors import OptionError
from modules.pages.language import join, refusal, say_count
from modules.text_files import bad_character, read_if_object, real_path

SEPARATOR = ","
MAX_CHARACTERS = 200  # maximum number of characters in a tag


@dataclass(frozen=True)
class TagChange:
    """A renamed tag, and the caption files that contained it, each with its checksum after the change."""

    old: str
    new: str  # "": it was removed
    checksums: dict[Path, str] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """Message that names the change and the number of changed captions."""
        if self.new:
            return say_count(
                len(self.checksums),
                "%(old)s became %(new)s in %(n)s caption.",
                "%(old)s became %(new)s in %(n)s captions.",
                old=self.old,
                new=self.new,
            )
        return say_count(
            len(self.checksums),
            "%(old)s was removed from %(n)s caption.",
            "%(old)s was removed from %(n)s captions.",
            old=self.old,
        )


def split_line(line: str) -> list[str]:
    """Return the tags in a line of a caption without surrounding spaces, from all sections of the line."""
    return [tag for section in line.split(KEEP_TOKENS_SEPARATOR) for tag in split_section(section)]


def split_section(section: str) -> list[str]:
    """Return the tags in a section, the part of a caption line between two KEEP_TOKENS_SEPARATOR signs."""
    return [tag for part in section.split(SEPARATOR) if (tag := part.strip())]


def rename_tag(text: str, old: str, new: str) -> str:
    """Replace the tag `old` in a caption with `new`, and remove duplicates of `new`; "" removes the tag.

    Lines without the tag are unchanged.
    """
    lines = text.split("\n")
    return "\n".join(_rename_in_line(line, old, new) if old in split_line(line) else line for line in lines)


def _rename_in_line(line: str, old: str, new: str) -> str:
    """Replace the tag `old` in a caption line with `new`, and drop tags that an earlier section contains."""
    used_tags = {""}  # "" stands for the removed tag
    sections = []
    for section in line.split(KEEP_TOKENS_SEPARATOR):  # tags before this sign are not shuffled
        renamed = [new if tag == old else tag for tag in split_section(section)]
        distinct = list(dict.fromkeys(renamed))  # in the original order
        sections.append(f"{SEPARATOR} ".join(tag for tag in distinct if tag not in used_tags))
        used_tags.update(distinct)
    return f" {KEEP_TOKENS_SEPARATOR} ".join(sections).strip()


@dataclass
class TagEditor:
    """Reads and changes tags in the captions of folders. Changes can be undone until the server ends."""

    runs: Runs
    captions: CaptionFiles = field(default_factory=CaptionFiles)
    _changes: dict[Path, list[TagChange]] = field(default_factory=dict)  # keyed by folder
    _lock: threading.Lock = field(default_factory=threading.Lock)  # two pages may undo at the same time

    def count(self, folder: Path) -> "Counter[str]":
        """Count, by tag, the captions that contain it. Raises OSError if the folder cannot be read."""
        counts: Counter[str] = Counter()
        for caption in self._read_captions(folder):
            counts.update({tag for line in caption.text.split("\n") for tag in split_line(line)})
        return counts

    def rename(self, folder: Path, old: str, new: str) -> str:
        """Replace a tag in all captions in a folder, and return a message about the changed captions.

        The old captions are kept as .bak. A caption that would become empty is not changed.

        Args:
            new: The new tag; "" removes the old one.

        Raises:
            OptionError: If the new tag is not valid, or if no caption contains the old tag.
            OutputError: If a caption cannot be written.
            OSError: If a caption cannot be read.
        """
        old, new = old.strip(), " ".join(new.split())
        _check_new_tag(new)
        edits = []
        num_emptied = 0
        for caption in list(self._read_captions(folder)):
            renamed_text = rename_tag(caption.text, old, new)
            if renamed_text == caption.text:
                continue
            if any(map(split_line, renamed_text.split("\n"))):
                edits.append(CaptionEdit(caption.path, renamed_text, caption.checksum))
            else:
                num_emptied += 1
        change = TagChange(old, new)
        try:
            self.captions.save_all(edits, on_saved=change.checksums.__setitem__)
        except ValueError as error:
            raise OptionError(str(error)) from None
        finally:  # a full disk may stop it between two captions
            if change.checksums:
                self._changes.setdefault(folder, []).append(change)
        num_conflicts = len(edits) - len(change.checksums)  # skipped because another program changed them
        if not edits and not num_emptied:
            raise refusal("no caption has the tag %(tag)s", tag=old)
        return join(" ", [change.about, *_explain_unchanged(num_emptied, num_conflicts)])

    def last_change(self, folder: Path) -> TagChange | None:
        """Return the last tag change in a folder's captions; None if there is none to undo."""
        changes = self._changes.get(folder)
        return changes[-1] if changes else None

    def undo(self, folder: Path) -> str:
        """Undo the last tag change in a folder, and return a message about the restored captions.

        A caption that has changed since is not restored. Raises OptionError if there is no change to undo,
        OutputError or OSError if a caption cannot be restored.
        """
        with self._lock:
            changes = self._changes.get(folder)
            if not changes:
                raise refusal("There is nothing to undo.")
            change = changes[-1]
            num_conflicts = self.captions.undo_all(change.checksums)
            changes.remove(change)  # only now: after an error, it can be undone again
        num_undone = len(change.checksums) - num_conflicts
        about = say_count(num_undone, "%(n)s caption was restored.", "%(n)s captions were restored.")
        return join(" ", [about, *_explain_unchanged(num_emptied=0, num_conflicts=num_conflicts)])

    def _read_captions(self, folder: Path) -> Iterator[CaptionEdit]:
        """Yield each caption file of a folder that is below the roots, with its text and checksum."""
        # Skips files that are not UTF-8 or cannot be read, which the page reports one by one, and captions
        # that are JSON objects, which have no tags.
        for media_folder in list_dataset_media_folders(self.runs, folder):
            paths = dict.fromkeys(find_caption_file(media_folder, name) for name in list_names(media_folder))
            for path in paths:
                if not self.runs.is_inside(path):
                    continue
                path = real_path(path)
                try:
                    caption, checksum, _ = self.captions.read(path)
                    if read_if_object(caption.text) is None:
                        yield CaptionEdit(path, caption.text, checksum)
                except (OSError, ValueError):
                    continue


def _check_new_tag(tag: str) -> None:
    """Raise OptionError if a tag contains a comma or `keep_tokens_separator`, or is too long."""
    if bad_character(tag) or SEPARATOR in tag or len(tag) > MAX_CHARACTERS:
        raise refusal(
            "a tag is at most %(most_letters)s letters without a comma: rename to one tag at a time",
            most_letters=MAX_CHARACTERS,
        )
    if KEEP_TOKENS_SEPARATOR in tag:
        raise refusal(
            "a tag cannot contain %(sign)s, after which tags are shuffled", sign=KEEP_TOKENS_SEPARATOR
        )


def _explain_unchanged(num_emptied: int, num_conflicts: int) -> list[str]:
    """Return sentences on how many captions a tag change has left unchanged, and why."""
    lines: list[str] = []
    if num_emptied:
        lines.append(
            say_count(
                num_emptied,
                "%(n)s has no other tag and stays unchanged.",
                "%(n)s have no other tag and stay unchanged.",
            )
        )
    if num_conflicts:
        lines.append(
            say_count(
                num_conflicts,
                "%(n)s was changed by another program in the meantime and stays.",
                "%(n)s were changed by another program in the meantime and stay.",
            )
        )
    return lines
