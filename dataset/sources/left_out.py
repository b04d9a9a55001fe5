"""Find files and subfolders in the folders of tables that are not read, with hints for each."""

import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.sources.folders import is_file, list_entries, media_suffixes, split_name
from dataset.sources.media_source import SHARD_FILE_NAME
from dataset.table import DatasetConfig, DatasetTable, folder_id
from modules.errors import MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.labels import MASK_FOLDERS, MASK_LABEL, find_stem_label
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.remedies import find_remedy
from modules.paths import compose_name

MAX_SEARCHED_NAMES = 1000  # maximum number of names of a subfolder that are searched
# files that are often next to media and are not reported: files of runs and caches, captions of other
# programs
NO_MEDIA = {"prompts.txt", "check.html", "thumbs.db", "desktop.ini"}
_EXPECTED = frozenset({".json", ".jsonl", ".toml", ".bak", ".npz", ".safetensors", ".ini", ".db", ".txt"})
_EXPECTED |= {".caption", ".csv", ".tsv", ".parquet", ".md"}
# common suffixes of captions, in lower case
CAPTION_ENDINGS = frozenset({".txt", ".caption", ".cap", ".tags", ".tag", ".text"})
RUN_SUBFOLDERS = {"cache", "output"}  # subfolders of a folder with run.toml, which are not reported
_KINDS = ("image", "video")
_SplitEntry = tuple["os.DirEntry[str]", str, str]  # entry of a folder, and its stem and suffix


class TableFolders:
    """The folders of a dataset file's tables, with each real path resolved only once."""

    def __init__(self, config: DatasetConfig) -> None:
        """Find which tables share a folder, and which other folders tables read or write."""
        self._folder_ids: dict[int, str] = {}  # `folder_id` by index of the table
        self._tables_by_folder: dict[str, list[DatasetTable]] = {}  # tables by `folder_id`
        for table in config.datasets:
            if table.source.directory is not None:
                identity = folder_id(table.source.directory)
                self._folder_ids[table.index] = identity
                self._tables_by_folder.setdefault(identity, []).append(table)
        # other folders that tables read or write
        keys = [f"{kind}_directory" for kind in ("cache", "control", "mask", "audio", "download")]
        keys += ["reference_directory", "reference_audio_directory", "control_mask_directory"]
        keys += ["worse_directory"]
        folders = [table.value_of(key) for table in config.datasets for key in keys]
        folders += [
            guide.directory
            for table in config.datasets
            if table.references.has_guides
            for guide in table.references.guides
        ]
        self._other_folders = {folder_id(folder) for folder in folders if folder}

    def left_out_files(self, table: DatasetTable) -> str | None:
        """Return a warning with the number of unread files in a table's folder, by suffix.

        Returns None if all files are read, or if an earlier table has the same folder.

        Raises:
            DatasetError: If the folder cannot be listed.
        """
        folder_key = self._folder_ids.get(table.index)
        if folder_key is None or table.source.directory is None:
            return None
        tables = self._tables_by_folder[folder_key]
        if tables[0].index != table.index:  # the first table with this folder reports for all of them
            return None
        rules = self._make_rules(folder_key)
        # plain strings, because making a million Path objects is slow
        entries = [
            (entry, *split_name(entry.name)) for entry in list_entries(table.source.directory, table.name)
        ]
        if rules.has_only_captioned_media(entries):
            return None
        counts = _count_unused(table, table.source.directory, rules, entries)
        return f"{table.source.directory}: {_describe_counts(counts)}" if counts else None

    def _make_rules(self, folder_key: str) -> "_FolderRules":
        """Collect which media, captions and masks of a folder are read by the tables that have it."""
        tables = self._tables_by_folder[folder_key]
        kinds = {str(table.media_kind) for table in tables}
        suffixes_read = _all_suffixes(kinds)
        if folder_key in self._other_folders:  # the folder also has masks, control media or audio
            suffixes_read |= AUDIO_SUFFIXES | _all_suffixes(_KINDS)
        caption_suffixes = {
            table.captions.caption_extension for table in tables if table.captions.caption_extension
        }
        mask_folders = [
            table.source.mask_directory for table in tables if table.source.mask_directory is not None
        ]
        has_masks = folder_key in map(folder_id, mask_folders)
        return _FolderRules(
            kinds,
            suffixes_read,
            caption_suffixes=caption_suffixes,
            lower_caption_suffixes={suffix.lower() for suffix in caption_suffixes},
            labels_read=frozenset({MASK_LABEL} if has_masks else ()),
        )

    def left_out_folders(self, tables: Iterable[DatasetTable]) -> Iterator[str]:
        """Yield a line for each unread subfolder of a table's folder with media of the table's kind."""
        used_folders = self._other_folders | {*self._tables_by_folder}
        for table in tables:
            if table.source.directory is None or not table.source.directory.is_dir():
                continue
            with os.scandir(table.source.directory) as entries:
                folders = sorted(
                    entry.path for entry in entries if entry.name[0] != "." and not is_file(entry)
                )
            suffixes = _all_suffixes([table.media_kind])
            for folder in folders:
                is_run_folder = (
                    Path(folder).name in RUN_SUBFOLDERS and (table.source.directory / "run.toml").exists()
                )
                if is_run_folder or folder_id(folder) in used_folders:
                    continue
                if _contains_media(folder, suffixes, used_folders):
                    yield f"{folder}: {_explain_folder(Path(folder), table)}"


def _describe_counts(counts: Mapping[str, Counter[str]]) -> str:
    """Return counts of unused files as text, largest first."""
    num_files = sum(by_suffix.total() for by_suffix in counts.values())
    verb = "file is" if num_files == 1 else "files are"
    parts = []
    for hint, by_suffix in sorted(counts.items(), key=lambda pair: -pair[1].total()):
        files = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(by_suffix.items()))
        parts.append(f"{files}: {hint}" if hint else files)
    return f"{num_files} {verb} not read: {'; '.join(parts)}"


def _explain_folder(folder: Path, table: DatasetTable) -> str:
    """Return why media in a subfolder of a table's folder are not read, and how to have them read."""
    if folder.name.lower() in MASK_FOLDERS:
        key = f'mask_directory = "{folder.name}"'
        return f"its masks are not used. {key} in the table of {table.source.directory} uses them"
    return f"its {table.media_kind}s are not used: folders inside a folder are not searched. Give it a table"


def _count_unused(
    table: DatasetTable, folder: Path, rules: "_FolderRules", entries: Sequence[_SplitEntry]
) -> dict[str, Counter[str]]:
    """Count the unread files of a folder, by hint (why they are not read) and suffix."""
    # 1. Count captions that are probably unread by mistake.
    # 2. Count images with a label in their names, such as masks, that no table reads.
    # 3. Count other files, except those that are expected next to media.
    media_stems = {
        compose_name(stem) for _, stem, suffix in entries if suffix.lower() in rules.media_suffixes
    }
    unread_captions = _find_unread_captions(table, entries, rules)
    caption_names = {name for names in unread_captions.values() for name in names}
    counts: dict[str, Counter[str]] = {}  # hint -> number of files by suffix
    for hint, names in unread_captions.items():
        counts[hint] = Counter(split_name(name)[1] for name in names)
    for split_entry in entries:
        entry, stem, _ = split_entry
        if entry.name in caption_names:
            continue
        unused = _explain_unused(
            split_entry, table, folder, rules, has_media=compose_name(stem) in media_stems
        )
        if unused is not None:
            hint, displayed = unused
            counts.setdefault(hint, Counter())[displayed] += 1
    return counts


def _explain_unused(
    split_entry: _SplitEntry, table: DatasetTable, folder: Path, rules: "_FolderRules", has_media: bool
) -> tuple[str, str] | None:
    """Return the hint for a file that no table reads, and the suffix under which it is counted."""
    # Returns None if the path is read, is a folder, or is expected next to media. `has_media` says whether
    # the folder has a media file with the same stem.
    entry, stem, suffix = split_entry
    ending = suffix.lower()
    label = find_stem_label(stem)  # such as that of cat-mask.png
    if label is not None and label not in rules.labels_read and ending in _all_suffixes(["image"]):
        hint = "conditioning images of OneTrainer; models with control read them from a folder of their own"
        if label == MASK_LABEL:
            hint = f'masks of OneTrainer, which mask_directory = "{folder.as_posix()}" uses'
        return hint, f"{label}{suffix}"
    if rules.is_expected(entry.name, suffix, has_media) or _is_read_or_folder(entry, ending, folder, rules):
        return None
    if ending in rules.lower_caption_suffixes:
        return f"captions of no {table.media_kind}", suffix or "no suffix"
    return _explain_suffix(ending, rules.kinds), ending or "no suffix"


def _is_read_or_folder(entry: "os.DirEntry[str]", ending: str, folder: Path, rules: "_FolderRules") -> bool:
    """Return whether a path need not be reported as unread: media in use, folders, cache shard files."""
    if ending in rules.media_suffixes:  # only a GIF or WebP may be unread: a still image in a folder of clips
        may_be_still = rules.kinds == {"video"} and ending in ANIMATION_SUFFIXES
        if not (may_be_still and _is_still(folder / entry.name)):
            return True
    return not is_file(entry) or SHARD_FILE_NAME.fullmatch(entry.name) is not None


class CaptionOwners:
    """Index of a folder's media files that finds the file to which a misnamed caption belongs."""

    def __init__(self, names: Iterable[str]) -> None:
        """Index these names of media files, which include suffixes."""
        self._by_name: dict[str, str] = {}
        self._by_stem: dict[str, str] = {}
        for name in names:
            self._by_name[_normalize(name)] = name
            self._by_stem[_normalize(Path(name).stem)] = name

    def find(self, stem: str) -> str | None:
        """Return the name of the media file that a caption probably belongs to; None if there is none.

        Names may differ in case or Unicode normalization, and the name of the caption may include the suffix
        of the media file (`cat.png.txt`). `stem` is the name of the caption without its suffix.
        """
        key = _normalize(stem)
        return self._by_name.get(key) or self._by_stem.get(key)


def _normalize(name: str) -> str:
    """Return a name's normal form, which ignores case and Unicode normalization."""
    # normalized again, because `casefold` may decompose characters
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _find_unread_captions(
    table: DatasetTable, entries: Sequence[_SplitEntry], rules: "_FolderRules"
) -> dict[str, list[str]]:
    """Find caption files that are probably unread by mistake; return their names by the hint to show."""
    # These are files that seem to belong to an image or clip without a caption, but have another suffix than
    # the table's caption_extension (cat.caption), or a slightly different name (Cat.txt for cat.png).
    if not rules.caption_suffixes:
        return {}
    uncaptioned_media = CaptionOwners(_list_uncaptioned(entries, rules))
    by_suffix: dict[str, list[str]] = {}  # caption files with the right name but a different suffix
    misnamed: list[tuple[str, str]] = []  # (caption file, its media file)
    for entry, stem, suffix in entries:
        is_caption = suffix.lower() in rules.lower_caption_suffixes | CAPTION_ENDINGS
        if not is_caption or entry.name.lower() in NO_MEDIA:
            continue
        media_name = uncaptioned_media.find(stem)
        if media_name is None or not is_file(entry):
            continue
        media_stem, _ = split_name(media_name)
        if compose_name(media_stem) != compose_name(stem):
            misnamed.append((entry.name, media_name))
        elif suffix not in rules.caption_suffixes:
            by_suffix.setdefault(suffix, []).append(entry.name)
    return _describe_captions(table, by_suffix, misnamed, wanted_suffix=min(rules.caption_suffixes))


def _list_uncaptioned(entries: Sequence[_SplitEntry], rules: "_FolderRules") -> Iterator[str]:
    """Yield the names of a folder's media files without a caption, except masks and conditioning images."""
    names = {compose_name(entry.name) for entry, _, _ in entries}
    for entry, stem, suffix in entries:
        if suffix.lower() in rules.media_suffixes and find_stem_label(stem) is None:
            caption_names = {
                compose_name(f"{stem}{caption_suffix}") for caption_suffix in rules.caption_suffixes
            }
            if names.isdisjoint(caption_names):
                yield entry.name


def _describe_captions(
    table: DatasetTable,
    by_suffix: Mapping[str, list[str]],
    misnamed: Sequence[tuple[str, str]],
    wanted_suffix: str,
) -> dict[str, list[str]]:
    """Return the names of unread caption files, by a hint that explains how to have them read."""
    by_hint: dict[str, list[str]] = {}
    for suffix, captions in by_suffix.items():
        setting = f'caption_extension = "{suffix}"'
        if table.config_path.is_dir():  # the dataset is given as a folder
            setting = f"--caption_extension {suffix}"
        by_hint[f"captions of {table.media_kind}s without another one, which {setting} reads"] = captions
    if misnamed:
        caption, owner = misnamed[0]
        wanted_name = f"{split_name(owner)[0]}{wanted_suffix}"
        example = f"{caption} of {owner}, which reads {wanted_name}"
        hint = f"captions under a different name than their {table.media_kind}: {example}; rename them"
        by_hint[hint] = [name for name, _ in misnamed]
    return by_hint


@dataclass(frozen=True)
class _FolderRules:
    """Rules about which files of a folder a table reads, or expects next to its media files."""

    kinds: set[str]  # kinds of media of the tables with this folder
    media_suffixes: frozenset[str]  # suffixes of media that are read, in lower case
    caption_suffixes: set[str]  # as written in the tables
    lower_caption_suffixes: set[str]  # the same in lower case
    labels_read: frozenset[str]  # labels in file names, such as that of masks, that are read

    def has_only_captioned_media(self, entries: Sequence[_SplitEntry]) -> bool:
        """Return whether each image or clip has a caption and there is nothing else: a quick check."""
        media_stems = {stem for _, stem, suffix in entries if suffix.lower() in self.media_suffixes}
        caption_stems = {stem for _, stem, suffix in entries if suffix in self.caption_suffixes}
        if media_stems != caption_stems or len(entries) != 2 * len(media_stems):
            return False
        # an animation may be a still image, and a label marks a mask or a conditioning image
        return not any(
            suffix.lower() in ANIMATION_SUFFIXES or find_stem_label(stem) for _, stem, suffix in entries
        )

    def is_expected(self, name: str, suffix: str, has_media: bool) -> bool:
        """Return whether a file, such as a caption, is expected next to media and need not be reported.

        `has_media` says whether the folder has a media file with the same stem.
        """
        if (suffix in self.caption_suffixes and has_media) or name.lower() in NO_MEDIA:
            return True
        ending = suffix.lower()
        return ending not in self.lower_caption_suffixes and ending in _EXPECTED


def _all_suffixes(kinds: Iterable[str]) -> frozenset[str]:
    """Return all file suffixes of these kinds of media ("image", "video", "audio")."""
    suffixes: frozenset[str] = frozenset()
    for kind in kinds:
        suffixes = suffixes.union(*media_suffixes(kind))
    return suffixes


def _is_still(path: Path) -> bool:
    """Return whether a file with an animation's suffix (such as .gif) is a still image."""
    try:
        return not is_animation(path)
    except MediaError:  # decoding reports the error
        return False


def _explain_suffix(ending: str, kinds: set[str]) -> str:
    """Return a hint why files with this suffix are not read; "" if there is none."""
    # `kinds` are the kinds ("image", "video") of the tables that read the folder.
    for kind in _KINDS:
        if kind not in kinds and any(ending in suffixes for suffixes in media_suffixes(kind)):
            return f"{kind}s, for which a table with {kind}_directory is needed"
    return find_remedy(ending) or ""


def describe_entries(table: DatasetTable) -> str:
    """Return what a table's folder contains instead of usable files, for an error message."""
    assert table.source.directory is not None
    suffixes = [path.suffix.lower() for path in table.source.directory.iterdir() if path.is_file()]
    kind = table.media_kind
    other_kind = "image" if kind == "video" else "video"
    other_suffixes, _ = media_suffixes(other_kind)
    num_others = sum(suffix in other_suffixes for suffix in suffixes)
    if num_others:
        return f"has no {kind}s but {num_others} {other_kind}s, for which the key is {other_kind}_directory"
    read = ", ".join(sorted(_all_suffixes([kind])))
    contents = _describe_contents(table.source.directory, suffixes)
    return f"has no {kind}s ({contents}; folders inside it are not searched; the suffixes are {read})"


def _describe_contents(folder: Path, suffixes: Sequence[str]) -> str:
    """Return the contents of a folder as text; `suffixes` contains the suffix of each file."""
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    if suffixes:
        most_common = Counter(suffixes).most_common(3)
        files = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in most_common)
        return f"it has {files}"
    return f"only folders, such as {folders[0]}" if folders else "it is empty"


def _contains_media(folder: str, suffixes: frozenset[str], used: set[str]) -> bool:
    """Return whether a folder or its subfolders contain files with these suffixes."""
    # Subfolders in `used`, the ids of other tables' folders, do not count. The search ends after
    # `MAX_SEARCHED_NAMES` names.
    num_names = 0
    for path, folders, all_names in os.walk(folder):
        names = list(itertools.islice(all_names, MAX_SEARCHED_NAMES))
        if any(Path(name).suffix.lower() in suffixes for name in names):
            return True
        num_names += len(names) + len(folders)
        # os.walk descends only into the remaining folders
        folders[:] = [name for name in folders if name[0] != "." and folder_id(Path(path, name)) not in used]
        if num_names > MAX_SEARCHED_NAMES:
            break
    return False
