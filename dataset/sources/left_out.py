"""Find files and folders inside the folders of tables that nothing reads, with what to do."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.folders import folder_id, is_file, list_entries, media_suffixes, split_name
from dataset.sources.media_source import OF_SHARDS
from modules.errors import MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.opening import SOUND_SUFFIXES

LOOKED_INTO = 1000  # names of a folder inside a folder
# what lies beside media without being read: files of runs and caches, captions of other programs
NO_MEDIA = {"prompts.txt", "check.html", "thumbs.db", "desktop.ini"}
_USUAL = frozenset({".json", ".jsonl", ".toml", ".bak", ".npz", ".safetensors", ".ini", ".db", ".txt"})
_USUAL |= {".caption", ".csv", ".tsv", ".parquet", ".md"}
FOLDERS_OF_RUNS = {"cache", "output"}
_KINDS = ("image", "video")
# what to do with files of other kinds
REMEDIES = {
    (".heic", ".heif"): "convert them to PNG, or `pip install pillow-heif`",
    (".psd", ".svg", ".jp2", ".j2k", ".jpx", ".jfif", ".exr", ".hdr", ".tga", ".ppm", ".ico"): (
        "convert them to PNG"
    ),
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"): "develop them to PNG",
    (".avif", ".jxl"): "convert them to PNG, or install a plugin of Pillow that reads them",
    (".zip", ".rar", ".7z", ".tar", ".gz"): "unpack them",
    (".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".rm", ".rmvb", ".asf", ".divx"): (
        "convert them to .mp4"
    ),
    (".apng", ".y4m", ".f4v", ".hevc", ".h264", ".264", ".265", ".ivf"): "convert them to .mp4",
}


def remedy_of(suffix: str) -> str | None:
    """Return advice for files with a suffix that is not read; None if it is no kind of media."""
    return next((text for ends, text in REMEDIES.items() if suffix in ends), None)


def left_out_files(config: DatasetConfig, table: DatasetTable) -> str | None:
    """Return a line that counts the files of a table's folder that nothing reads by their suffixes; None if
    there are none, or if an earlier table has the same folder. What usually lies beside media is not counted.

    Raises DatasetError if the folder cannot be listed.
    """
    if table.directory is None:
        return None
    place = folder_id(table.directory)
    sharing = [one for one in config.datasets if one.directory and folder_id(one.directory) == place]
    if sharing[0].index != table.index:
        return None
    kinds = {str(one.holds) for one in sharing}
    captions = {one.caption_extension for one in sharing if one.caption_extension}
    caption_ends = {one.lower() for one in captions}
    read = frozenset().union(*itertools.chain(*map(media_suffixes, kinds)))
    if place in _other_folders(config):
        read |= SOUND_SUFFIXES.union(*itertools.chain(*map(media_suffixes, _KINDS)))
    # without a Path for each: there may be a million
    there = [(entry, *split_name(entry.name)) for entry in list_entries(table.directory, table.name)]
    stems = {stem for _, stem, suffix in there if suffix.lower() in read}
    counts: dict[str, Counter[str]] = {}  # by what to do
    for entry, stem, suffix in there:
        end = suffix.lower()
        is_caption = end in caption_ends
        if (suffix in captions and stem in stems) or entry.name.lower() in NO_MEDIA:
            continue
        if not is_caption and end in _USUAL:
            continue
        may_be_still = kinds == {"video"} and end in ANIMATION_SUFFIXES
        if end in read and not (may_be_still and _is_still(table.directory / entry.name)):
            continue
        if is_file(entry) and not OF_SHARDS.fullmatch(entry.name):
            why = f"captions of no {table.holds}" if is_caption else _explain(end, kinds)
            shown = suffix if is_caption else end
            counts.setdefault(why, Counter())[shown or "no suffix"] += 1
    if not counts:
        return None
    number = sum(count.total() for count in counts.values())
    parts = [
        ", ".join(f"{end} ({count})" for end, count in sorted(found.items())) + (f": {why}" if why else "")
        for why, found in sorted(counts.items(), key=lambda pair: -pair[1].total())
    ]
    verb = "file is" if number == 1 else "files are"
    return f"{table.directory}: {number} {verb} not read: {'; '.join(parts)}"


def _other_folders(config: DatasetConfig) -> set[str]:
    """Return the folders that belong to the media of all tables: controls, masks, sound, caches."""
    keys = [f"{kind}_directory" for kind in ("cache", "control", "mask", "audio", "download")]
    keys += ["reference_directory", "control_mask_directory"]
    return {folder_id(path) for table in config.datasets for key in keys if (path := getattr(table, key))}


def _is_still(path: Path) -> bool:
    """Return whether a file with the suffix of an animation is a still picture."""
    try:
        return not is_animation(path)
    except MediaError:  # which decoding reports
        return False


def _explain(end: str, kinds: set[str]) -> str:
    for other in _KINDS:
        if other not in kinds and any(end in ends for ends in media_suffixes(other)):
            return f"{other}s, for which a table with {other}_directory is needed"
    return remedy_of(end) or ""


def describe_entries(table: DatasetTable) -> str:
    """Describe the content of a folder without usable files."""
    assert table.directory is not None
    suffixes = [path.suffix.lower() for path in table.directory.iterdir() if path.is_file()]
    kind = table.holds
    other = "image" if kind == "video" else "video"
    there = sum(suffix in media_suffixes(other)[0] for suffix in suffixes)
    if there:
        return f"has no {kind}s but {there} {other}s, for which the key is {other}_directory"
    folders = [path.name for path in table.directory.iterdir() if path.is_dir()]
    found = ", ".join(
        f"{count} {suffix or 'without suffix'}" for suffix, count in Counter(suffixes).most_common(3)
    )
    what = f"it has {found}" if found else f"only folders, such as {folders[0]}" if folders else "it is empty"
    kinds = ", ".join(sorted(frozenset().union(*media_suffixes(kind))))
    return f"has no {kind}s ({what}; folders inside it are not searched; the suffixes are {kinds})"


def left_out_folders(config: DatasetConfig) -> Iterator[str]:
    """Yield a line for each folder inside a table's folder that holds its kind of media and is not read."""
    others = _other_folders(config)
    others |= {folder_id(table.directory) for table in config.datasets if table.directory}
    for table in config.datasets:
        if table.directory is None or not table.directory.is_dir():
            continue
        with os.scandir(table.directory) as entries:
            folders = sorted(entry.path for entry in entries if entry.name[0] != "." and not is_file(entry))
        for folder in folders:
            if Path(folder).name in FOLDERS_OF_RUNS and (table.directory / "run.toml").exists():
                continue
            kind, suffixes = table.holds, frozenset[str]().union(*media_suffixes(table.holds))
            if folder_id(folder) not in others and _holds(folder, suffixes, others):
                unused = f"its {kind}s are not used: folders inside a folder are not searched"
                yield f"{folder}: {unused}. Give it a table"


def _holds(folder: str, suffixes: frozenset[str], others: set[str]) -> bool:
    """Return whether a folder, or one inside it, holds files with these suffixes."""
    looked = 0
    for place, folders, names in os.walk(folder):
        names = list(itertools.islice(names, LOOKED_INTO))
        if any(Path(name).suffix.lower() in suffixes for name in names):
            return True
        looked += len(names) + len(folders)
        folders[:] = [one for one in folders if one[0] != "." and folder_id(Path(place, one)) not in others]
        if looked > LOOKED_INTO:
            break
    return False
