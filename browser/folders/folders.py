"""List the folders below the roots that contain clips, images or audio, and add files to new folders."""

import contextlib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from browser.core.bin_folder import FOLDER as BIN
from browser.folders.described_folder import is_described
from browser.runs.runs import Runs
from modules.media.labels import MASK_FOLDERS, find_stem_label
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.output_files import fold_name
from modules.pages.language import join, say, say_count
from modules.paths import expand_path
from modules.run_limits import QUEUE_FOLDER
from modules.text_files import bad_character, real_path
from training.reports.sections import SAMPLES

DEEPEST = 6  # maximum depth below a root
MAX_FOLDERS = 500
MAX_ENTRIES = 20_000  # maximum number of entries that are read in a folder
CHECK_PAGE = "check.html"  # written by `run --check` into the folder of run.toml
# folder names of image trainers, with the number of repeats and the caption: 10_ohwx man
TRAINER_FOLDER_NAME = re.compile(r"[1-9]\d{0,2}_.*\S.*")
IMG_FOLDER = "img"  # subfolder of a project that contains such folders
# names of subfolders that belong to a project
PROJECT_SUBFOLDER_NAME = re.compile(rf"{IMG_FOLDER}|regs?|regulari[sz]ation([-_ ]?images?)?", re.IGNORECASE)
# names of folders that our programs write, normalized by `fold_name`
NOT_MEDIA = re.compile(
    rf"\..*|{SAMPLES}|output|cache|generated|compare|{QUEUE_FOLDER}|{BIN}|.*-state", re.DOTALL
)


@dataclass(frozen=True)
class MediaFolder:
    """Row of the list of folders: counts of a folder's files, without its subfolders."""

    path: Path
    num_images: int
    num_clips: int
    num_audios: int
    num_uncaptioned: int  # files whose caption is missing or empty
    shown_file: Path | None  # first image or clip, shown as the thumbnail of the folder
    is_described: bool
    num_subfolders: int = 0  # subfolders with media, if the folder itself has none
    num_unreadable: int = 0  # unreadable files among those whose headers were read

    @property
    def problem(self) -> str:
        """Reason why no page can name the folder; "" if a page can."""
        reason = bad_character(str(self.path))
        return (
            "" if reason is None else say("Its name or the name of a parent folder is not UTF-8: rename it.")
        )

    @property
    def summary(self) -> str:
        """The counts as text, such as `12 clips, 3 without caption`."""
        phrases = []
        if self.num_images:
            phrases.append(say_count(self.num_images, "%(n)s image", "%(n)s images"))
        if self.num_clips:
            phrases.append(say_count(self.num_clips, "%(n)s clip", "%(n)s clips"))
        if self.num_audios:
            phrases.append(say_count(self.num_audios, "%(n)s sound", "%(n)s sounds"))
        if self.num_subfolders:  # then all counted files are in the subfolders
            phrases[-1] = say_count(
                self.num_subfolders,
                "%(files)s in %(n)s folder",
                "%(files)s in %(n)s folders",
                files=phrases[-1],
            )
        if self.num_uncaptioned:
            phrases.append(say("%(uncaptioned)s without caption", uncaptioned=self.num_uncaptioned))
        if self.num_unreadable:
            phrases.append(say_count(self.num_unreadable, "%(n)s cannot be read", "%(n)s cannot be read"))
        return join(", ", phrases)


def list_media_folders(runs: Runs) -> list[MediaFolder]:
    """Return the folders below the roots that contain media, at most MAX_FOLDERS."""
    folders = []
    for top in dict.fromkeys(runs.root_folders):
        for folder in _walk(top, DEEPEST):
            media_folder = read_media_folder(folder) or read_outer_folder(folder)
            if media_folder is not None:
                folders.append(media_folder)
            if len(folders) >= MAX_FOLDERS:
                return folders
    return folders


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Yield a folder and its subfolders, sorted by name, without folders of masks and without links."""
    yield folder
    if not depth:
        return
    with contextlib.suppress(OSError):
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        for name in inner:
            if not is_written(name) and name.lower() not in MASK_FOLDERS:
                yield from _walk(folder / name, depth - 1)


def read_media_folder(folder: Path) -> MediaFolder | None:
    """Count a folder's images, clips, audio files and missing captions; return None if it has no media."""
    try:
        with os.scandir(folder) as scanned:
            entries = [*itertools.islice(scanned, MAX_ENTRIES)]
    except OSError:
        return None
    # without hidden files, and without files that belong to a clip, such as clip_mask.png
    entries = [
        entry for entry in entries if entry.name[0] != "." and find_stem_label(Path(entry.name).stem) is None
    ]
    images = _list_names(entries, IMAGE_SUFFIXES)
    clips = _list_names(entries, VIDEO_SUFFIXES)
    audios = _list_names(entries, AUDIO_SUFFIXES)
    media = [*images, *clips, *audios]
    if not media:
        return None
    captioned_stems = _find_captioned_stems(entries)
    first_name = min([*images, *clips], default=None)
    return MediaFolder(
        path=folder,
        num_images=len(images),
        num_clips=len(clips),
        num_audios=len(audios),
        num_uncaptioned=sum(Path(name).stem not in captioned_stems for name in media),
        shown_file=None if first_name is None else folder / first_name,
        is_described=is_described(folder),
    )


def _list_names(entries: Sequence["os.DirEntry[str]"], suffixes: Collection[str]) -> list[str]:
    """Return the names of the files with one of these suffixes, in any case."""
    return [entry.name for entry in entries if Path(entry.name).suffix.lower() in suffixes]


def _find_captioned_stems(entries: Sequence["os.DirEntry[str]"]) -> set[str]:
    """Return the stems of caption files that are not empty; a .txt takes precedence over a .caption."""
    has_text: dict[str, bool] = {}
    for entry in entries:
        path = Path(entry.name)
        suffix = path.suffix.lower()
        if suffix == ".txt" or (suffix == ".caption" and path.stem not in has_text):
            has_text[path.stem] = _has_text(entry)
    return {stem for stem, is_filled in has_text.items() if is_filled}


def _has_text(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.stat().st_size > 0
    except OSError:  # a link to nothing
        return False


def read_outer_folder(folder: Path) -> MediaFolder | None:
    """Count the media in the subfolders of a folder that `new` treats as one dataset.

    Returns None unless the folder has a run.toml, or subfolders with names as image trainers use (`10_name`),
    directly or in a subfolder `img`.
    """
    direct = _read_subfolders(folder)
    in_img = _read_subfolders(folder / IMG_FOLDER)
    subfolders = [*direct, *in_img]
    # the direct subfolders of a folder such as `img` belong to the folder above, which is the dataset
    is_img_folder = PROJECT_SUBFOLDER_NAME.fullmatch(folder.name) is not None
    named_subfolders = in_img if is_img_folder else subfolders
    has_trainer_names = any(TRAINER_FOLDER_NAME.fullmatch(named.path.name) for named in named_subfolders)
    if not subfolders or not (has_trainer_names or is_described(folder)):
        return None
    shown_files = [subfolder.shown_file for subfolder in subfolders if subfolder.shown_file is not None]
    return MediaFolder(
        path=folder,
        num_images=sum(subfolder.num_images for subfolder in subfolders),
        num_clips=sum(subfolder.num_clips for subfolder in subfolders),
        num_audios=sum(subfolder.num_audios for subfolder in subfolders),
        num_uncaptioned=sum(subfolder.num_uncaptioned for subfolder in subfolders),
        shown_file=shown_files[0] if shown_files else None,
        is_described=is_described(folder),
        num_subfolders=len(subfolders),
    )


def _read_subfolders(folder: Path) -> list[MediaFolder]:
    """Return the direct subfolders of a folder that contain media, with their counts."""
    return [
        media_folder
        for path in itertools.islice(_walk(folder, 1), 1, None)
        if (media_folder := read_media_folder(path)) is not None
    ]


def find_folder(runs: Runs, text: str) -> Path | None:
    """Return the real path of an existing folder below the roots; None for any other text.

    `text` is an absolute path, or a path relative to the first root.
    """
    try:
        path = find_typed(runs, text)
        if path is None or not runs.is_below(path):
            return None
    except (OSError, ValueError):
        return None
    return real_path(path)


def find_file(runs: Runs, text: str) -> Path | None:
    """Return the path of an existing file below the roots; None for any other text."""
    try:
        path = expand_path(text.strip(), runs.root_folders[0])
        return path if runs.is_below(path) and path.is_file() else None
    except (OSError, ValueError):
        return None


def find_typed(runs: Runs, text: str) -> Path | None:
    """Return the path of an existing folder, also outside the roots; None for any other text.

    A relative `text` refers to the first root folder.

    Raises:
        ValueError: If no folder can have this name, with the reason.
        OSError: If the path cannot be resolved.
    """
    if not text.strip():
        return None
    path = expand_path(text.strip(), runs.root_folders[0])
    # opening a network share would send the user's login to that machine
    is_on_known_drive = path.anchor in {top.anchor for top in runs.root_folders}
    return path if is_on_known_drive and path.is_dir() else None


def is_closed(runs: Runs, folder: Path) -> bool:
    """Return whether programs of this project write a folder, or a folder around it below the roots."""
    parts = folder.relative_to(real_path(runs.find_top(folder))).parts
    return any(is_written(part) for part in parts)


def is_written(name: str) -> bool:
    """Return whether a folder name, in any case, is one that programs of this project create."""
    return NOT_MEDIA.fullmatch(fold_name(name)) is not None
