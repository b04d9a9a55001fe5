"""List a table's folder: images or clips, captions and control media; report files that are not used."""

import contextlib
import itertools
import logging
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from dataset.config_keys import IGNORE
from dataset.sources.captions import captions_in, explain_captions, read_caption_file, split_first_caption
from dataset.sources.layers import group_layers
from dataset.sources.mask_files import files_by_stem, masks_by_stem
from dataset.sources.media_source import Fault, MediaSource
from dataset.sources.missing import explain_lookup
from dataset.table import DatasetTable, folder_id
from modules.console import format_count
from modules.errors import DatasetError, MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.labels import MASK_LABEL, find_stem_label
from modules.media.opening import AUDIO_SUFFIXES, open_image
from modules.media.reading import TIFF_SUFFIXES, TOOL_TAG, VIDEO_SUFFIXES, image_suffixes, read_tags
from modules.paths import compose_name, find_spelling
from modules.text_files import bad_character, require_regular_file

logger = logging.getLogger(__name__)


class _FolderCompanions(NamedTuple):
    """Files in other folders of a table that belong to its images or clips, by path of the image or clip."""

    controls: Mapping[Path, tuple[Path, ...]] = MappingProxyType({})
    masks: Mapping[Path, Path] = MappingProxyType({})
    audios: Mapping[Path, Path] = MappingProxyType({})


def list_table_folder(table: DatasetTable, captions: bool, faults: list[Fault]) -> list[MediaSource]:
    """Return the media files of a table's folder; add a fault for each one that cannot be used.

    1. List the media, and separate layers from their images.
    2. Find the control media, masks and audio in other folders.
    3. Read the captions, and make a source of each media file.

    Caption files are read only if `captions` is true.

    Raises:
        DatasetError: If the folder cannot be listed.
    """
    layers = _list_with_layers(table, faults)
    paths = list(layers)
    companions = _FolderCompanions()
    if any((table.references.control_directory, table.source.mask_directory, table.source.audio_directory)):
        companions = _find_folder_companions(table, paths, faults)
    caption_errors: dict[Path, str] = {}  # by caption file
    sources = []
    for path in paths:
        caption = _find_captions(table, path.stem, reads_file=captions)
        if caption.path is not None and caption.error:
            caption_errors[caption.path] = caption.error
        audio = None
        if companions.audios or table.source.finds_audio_by_name:
            audio = _find_audio(table, path, companions.audios, faults)
        source = MediaSource(
            path=path,
            stem=path.stem,
            caption=caption.first,
            caption_path=caption.path,
            control=companions.controls.get(path, ()),
            table=table,
            more_captions=caption.further,
            mask=companions.masks.get(path),
            audio=audio,
            caption_encoding=caption.encoding,
            layers=layers[path],
        )
        sources.append(source)
    if caption_errors:
        faults += _make_caption_faults(table, caption_errors)
    return sources


def _list_with_layers(table: DatasetTable, faults: list[Fault]) -> Mapping[Path, tuple[Path, ...]]:
    """Return the images or clips of a table's folder, sorted, each with its layers."""
    # () if the table has none.
    # Outputs of tools, and names that are not UTF-8, are left out.
    paths = _list_media(table, faults)
    if any("_" in path.stem for path in paths):  # a tool names its output after its input: cat_SWINIR.png
        paths = _leave_out_tool_outputs(table, paths)
    if not all(path.name.isascii() for path in paths):
        paths = _leave_out_bad_names(table, paths, faults)
    if not table.source.multiple_target:
        return dict.fromkeys(paths, ())

    return group_layers(paths, table.captions.caption_extension)


def _find_folder_companions(
    table: DatasetTable, paths: Sequence[Path], faults: list[Fault]
) -> _FolderCompanions:
    """Find the control media, masks and audio files that belong to these images or clips by name."""
    controls: Mapping[Path, tuple[Path, ...]] = {}
    if table.references.control_directory is not None:
        folder = ControlFolder(
            table.references.control_directory, {path.stem for path in paths}, table.config_path
        )
        controls = dict(zip(paths, _find_folder_controls(table, folder, paths, faults), strict=True))
    masks: Mapping[Path, Path] = {}
    if table.source.mask_directory is not None:
        masks = _find_companions(table, "mask", table.source.mask_directory, media=paths, faults=faults)
    audios: Mapping[Path, Path] = {}
    if table.source.audio_directory is not None and table.source.audio != IGNORE:
        audios = _find_companions(table, "sound", table.source.audio_directory, media=paths, faults=faults)
    return _FolderCompanions(controls, masks, audios)


def _make_caption_faults(table: DatasetTable, errors: Mapping[Path, str]) -> list[Fault]:
    """Return a fault for each caption file that cannot be used; `errors` has the reason by file."""
    extension = table.captions.caption_extension or ""
    messages = explain_captions(list(errors), list(errors.values()))
    faults = []
    for path, message in zip(errors, messages, strict=True):
        faults.append(Fault("have a caption that cannot be used", message, path.name.removesuffix(extension)))
    return faults


def _find_audio(
    table: DatasetTable, clip: Path, audios: Mapping[Path, Path], faults: list[Fault]
) -> tuple[Path, None] | None:
    """Return the separate audio file of a clip, with None as its origin; None if there is no file."""
    # `audios` contains the files of audio_directory by clip. If several files match, an error is added to
    # `faults`.
    if clip in audios:
        return audios[clip], None
    # a file next to the clip is used only if no audio_directory is set
    if (
        not table.source.finds_audio_by_name
        or table.source.audio_directory is not None
        or table.source.audio == IGNORE
    ):
        return None
    try:
        return find_audio_beside(clip)
    except DatasetError as error:
        faults.append(Fault(f"problems with the sound of {table.name}", str(error)))
        return None


def find_audio_beside(clip: Path) -> tuple[Path, None] | None:
    """Return the audio file next to a clip that has the same stem; None if there is none.

    Raises:
        DatasetError: If there are several such files.
    """
    paths = [find_spelling(clip.with_suffix(suffix)) for suffix in sorted(AUDIO_SUFFIXES)]
    files = [path for path in paths if path.exists()]
    if len(files) > 1:
        names = " and ".join(path.name for path in files)
        raise DatasetError(f"{clip}: several files contain its audio: {names}. Remove all but one.")
    return (files[0], None) if files else None


def _leave_out_bad_names(table: DatasetTable, paths: list[Path], faults: list[Fault]) -> list[Path]:
    """Return the paths whose names are valid UTF-8; add a fault for each of the others."""
    bad_names = {path for path in paths if not path.name.isascii() and bad_character(path.name)}
    if not bad_names:
        return paths
    kind = f"names of {table.name} are not UTF-8, so that no cache can name them; rename the files"
    faults += [Fault(kind, ascii(str(path))) for path in paths if path in bad_names]
    return [path for path in paths if path not in bad_names]


class _Captions(NamedTuple):
    """The captions of one image or clip, or why its caption file cannot be used."""

    path: Path | None = None  # the caption file, which need not exist; None: the table has no caption files
    first: str | None = None  # None: there is no caption
    further: tuple[str, ...] = ()
    encoding: str | None = None  # encoding of the caption file; None: UTF-8
    error: str = ""  # why the file cannot be used


def _find_captions(table: DatasetTable, stem: str, reads_file: bool) -> _Captions:
    """Return the captions in the file next to an image or clip."""
    # If there is none, the table's class_tokens.
    # Without `reads_file`, the result has only the path of the file.
    if not table.captions.caption_extension:
        return _Captions()
    assert table.source.directory is not None
    path = find_spelling(table.source.directory / (stem + table.captions.caption_extension))
    if not reads_file:
        return _Captions(path)
    encoding = None
    try:
        file = read_caption_file(path)
        text = table.captions.class_tokens
        if file is not None:
            text, encoding = file.text, file.encoding
        captions = None if text is None else captions_in(text, table)
        first, further = split_first_caption(captions, path)
    except DatasetError as error:
        return _Captions(path, encoding=encoding, error=str(error))
    return _Captions(path, first, further, encoding)


def _find_companions(
    table: DatasetTable, what: str, folder: Path, media: Sequence[Path], faults: list[Fault]
) -> dict[Path, Path]:
    """Return the mask or audio file of each image or clip: the file with the same stem in `folder`."""
    # `what` is "mask" or "sound". A fault is added if two files have the same stem, or if no file matches.
    try:
        by_stem = _companions_by_stem(table, what, folder)
        stems = {path: compose_name(path.stem) for path in media}
        files_by_medium = {path: by_stem[stem] for path, stem in stems.items() if stem in by_stem}
        for files in files_by_medium.values():
            if len(files) > 1:
                kinds = f"masks of the same {table.kind}" if what == "mask" else "sound of the same clip"
                raise DatasetError(f"{table.name}: {files[0]} and {files[1].name} are {kinds}. Keep one.")
        if not files_by_medium:
            example = "cat.png for cat.jpg"
            if table.kind != "image":
                example = "cat.png or cat.mp4 for cat.mp4" if what == "mask" else "cat.wav for cat.mp4"
            raise DatasetError(
                f"{table.name}: {folder} has no {what} for any {table.kind}. Give each file the name of its "
                f"{table.kind}, except for the suffix: {example}."
            )
    except DatasetError as error:
        faults.append(Fault(f"problems with the {what} of {table.name}", str(error)))
        return {}
    return {path: files[0] for path, files in files_by_medium.items()}


def _companions_by_stem(table: DatasetTable, what: str, folder: Path) -> dict[str, list[Path]]:
    """Return the masks or audio files in a folder by the stem of the image or clip they belong to."""
    if what == "mask":
        entries = list_entries(folder, "mask_directory", table.config_path)
        in_media_folder = table.source.directory is not None and folder_id(folder) == folder_id(
            table.source.directory
        )
        return masks_by_stem(map(Path, entries), table.kind, in_media_folder)
    entries = list_entries(folder, "audio_directory", table.config_path)
    suffixes = AUDIO_SUFFIXES | VIDEO_SUFFIXES
    if folder == table.source.directory:  # the clips themselves are in this folder
        suffixes = AUDIO_SUFFIXES
    return files_by_stem(map(Path, entries), suffixes, False)


def _list_media(table: DatasetTable, faults: list[Fault]) -> list[Path]:
    """Return the images or clips in a table's folder, sorted."""
    # Add a fault for each that is no regular file.
    # 1. Separate the entries by suffix, without opening them.
    # 2. If there are GIF, WebP or TIFF files, find which of them the table uses.
    # Files with a spare suffix (GIF, WebP, TIFF) are used only if no other file has their stem. Video tables
    # use only animations among them.
    assert table.source.directory is not None
    suffixes, spare_suffixes = media_suffixes(table.media_kind)
    key = table.source_key if table.group is None else "image_dir"
    entries = list_entries(table.source.directory, f"{table.name}: {key}", table.config_path)
    found_suffixes: set[str] = set()
    media: list[Path] = []
    spare_files: list[Path] = []
    for entry in entries:
        stem, suffix = split_name(entry.name)
        suffix = suffix.lower()
        found_suffixes.add(suffix)
        is_medium = suffix in suffixes or suffix in spare_suffixes
        if (
            not is_medium or find_stem_label(stem) is not None
        ):  # a label is of a mask or condition of OneTrainer
            continue
        path = table.source.directory / entry.name
        if suffix in spare_suffixes:
            spare_files.append(path)
        elif is_file(entry):
            media.append(path)
        else:
            kind = f"{table.media_kind}s of {table.name} cannot be opened"
            faults.append(Fault(kind, f"{path}: {_explain(path)}", path.stem, is_fatal=False))
    # usually there are no such files, and none has to be opened
    if (ANIMATION_SUFFIXES | spare_suffixes).isdisjoint(found_suffixes):
        return media
    if table.source.excludes_animations:  # a video table with the same folder uses them
        animations = {path for path in [*media, *spare_files] if _is_animated(path)}
        if animations:
            logger.info(
                "%s: %d files, such as %s, are animated: the video table with the same folder uses them",
                table.name,
                len(animations),
                min(animations),
            )
        media = [path for path in media if path not in animations]
        spare_files = [path for path in spare_files if path not in animations]
    return sorted([*media, *_select_spare(table, spare_files, media)], key=str)


def _is_animated(path: Path) -> bool:
    """Return whether a file is an animated image."""
    # Damaged files count as animated, so that decoding them as clips reports the error.
    try:
        return is_animation(path)
    except MediaError:
        return True


def is_file(entry: "os.DirEntry[str]") -> bool:
    """Return whether a directory entry is a file; False for a broken link."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _find_folder_controls(
    table: DatasetTable, folder: "ControlFolder", paths: Sequence[Path], faults: list[Fault]
) -> list[tuple[Path, ...]]:
    """Return the control media of each path; log control media that are not used."""
    # A fault is added for each path without the required control media.
    controls: list[tuple[Path, ...]] = []
    kind = f"problems with the control media of {table.name}"
    for path in paths:
        try:
            if table.kind == "image":
                controls.append(folder.for_image(path.stem, table.references.control_count))
            else:
                controls.append((folder.for_video(path),))
        except DatasetError as error:
            controls.append(())
            faults.append(Fault(kind, str(error), path.stem))
    if table.references.rules is not None and paths and not any(controls):
        control_directory = table.references.control_directory
        text = f"{control_directory} has no reference image for any image, such as {paths[0].stem}.png"
        faults.append(Fault(kind, text))
    if table.kind == "image" and table.references.control_count is not None and all(controls):
        # control images after the first control_count
        unused: list[Path] = []
        for path in paths:
            unused += folder.list_surplus(path.stem, table.references.control_count)
        if unused:
            logger.warning(
                "%s: %d control images are ignored, such as %s, because each image uses %d. For FramePack, "
                "fp_1f_clean_indices lists the index of each control image that is used.",
                table.name,
                len(unused),
                unused[0],
                table.references.control_count,
            )
    return controls


def log_lone_controls(sources: Sequence[MediaSource]) -> None:
    """Log the control images that belong to no image of any table, for each folder.

    `sources` are the media files of all tables, because tables may share a folder.
    """
    image_stems: dict[Path, set[str]] = {}  # by control folder
    table_names: dict[Path, str] = {}  # name of the first table with the folder
    for source in sources:
        folder = source.table.references.control_directory
        if source.table.kind == "image" and folder is not None:
            image_stems.setdefault(folder, set()).add(source.stem)
            table_names.setdefault(folder, source.table.name)
    for folder, stems in image_stems.items():
        with contextlib.suppress(DatasetError):  # already reported when the folder was listed
            unmatched = ControlFolder(folder, stems).unmatched
            if unmatched:
                count = format_count(len(unmatched), "control image")
                text = "%s: %s without an image of that name, such as %s: not read"
                logger.info(text, table_names[folder], count, unmatched[0])


class ControlFolder:
    """The files in a `control_directory` by stem; the folder is listed only once."""

    def __init__(self, folder: Path, stems: Iterable[str], config_path: Path | None = None) -> None:
        """List the folder, and index its images by the stem of the image to which they belong.

        Args:
            folder: Folder of the control media.
            stems: Stems of all images or clips of the table.
            config_path: The dataset file, for an error message.

        Raises:
            DatasetError: If the folder cannot be listed.
        """
        self._folder = folder
        self._stems = frozenset(map(compose_name, stems))
        entries = [folder / entry.name for entry in list_entries(folder, "control_directory", config_path)]
        self._by_name = {compose_name(path.name): path for path in entries}
        # reversed, so that the first of the clips with the same stem stays
        self._clips: dict[str, Path] = {}
        for suffixes in (ANIMATION_SUFFIXES, VIDEO_SUFFIXES):  # videos take precedence
            clips = [path for path in reversed(entries) if _ends_in(path, suffixes)]
            self._clips |= {compose_name(path.stem): path for path in clips}
        self._images: dict[str, list[Path]] = {}  # control images by the stem of their image
        for path in entries:
            if _ends_in(path, image_suffixes()) and find_stem_label(path.stem) != MASK_LABEL:
                for image_stem in self._find_image_stems(compose_name(path.stem)):
                    self._images.setdefault(image_stem, []).append(path)
        self.unmatched = self._images.get("", [])  # control images that belong to no image

    def _find_image_stems(self, name: str) -> set[str]:
        """Return the stems of the images that a control image may belong to, including "" for none."""
        # It belongs to the longest stem that `name`, the stem of the control image, begins with: `pic_10_0`
        # belongs to `pic_10`, not to `pic`. If `name` ends in an underscore and a number, it also belongs to
        # the text before them: `pic_1` belongs to `pic_1` and to `pic`.
        longest = ""
        for length in range(len(name), 0, -1):
            if name[:length] in self._stems:
                longest = name[:length]
                break
        before_number, _, number = name.rpartition("_")
        is_numbered = bool(before_number) and number.isdecimal()
        return {longest, before_number} if is_numbered else {longest}

    def for_image(self, stem: str, count: int | None) -> tuple[Path, ...]:
        """Return the first `count` control images of an image, or all if `count` is None.

        `<stem>.*` comes first, then `<stem>_<number>.*` by number. If `count` is None, files that have the
        stem of another image are omitted.

        Raises:
            DatasetError: If there are fewer than `count`, or if a name that begins with `stem` has no number.
        """
        images = self._list_numbered_images(stem)
        if count is None:
            own = compose_name(stem)
            return tuple(path for path in images if compose_name(path.stem) not in self._stems - {own})
        if len(images) < count:
            needed = f"{stem}.png" if count == 1 else f"{count} images {stem}_0.png, {stem}_1.png, ..."
            raise DatasetError(
                f"{self._folder} has {len(images)} control images for {stem}; needed: {needed} (or another "
                "image type)"
            )
        return tuple(images[:count])

    def list_surplus(self, stem: str, count: int) -> list[Path]:
        """Return an image's control images after the first `count`, except those named like another image."""
        surplus = self._list_numbered_images(stem)[count:]
        return [path for path in surplus if compose_name(path.stem) not in self._stems]

    def _list_numbered_images(self, stem: str) -> list[Path]:
        """Return an item's control images in order: NAME.png, then NAME_0.png, NAME_1.png, ..."""
        ranked = []
        for path in self._images.get(compose_name(stem), ()):
            is_unnumbered = compose_name(path.stem) == compose_name(stem)
            number = path.stem.rsplit("_", 1)[-1]
            if not is_unnumbered and not number.isdecimal():
                raise DatasetError(
                    f"{path}: a control image of {stem} must be named {stem}{path.suffix} or "
                    f"{stem}_<number>{path.suffix}"
                )
            rank = -1 if is_unnumbered else int(number)
            ranked.append((rank, path))
        return [path for _, path in sorted(ranked)]

    def for_video(self, video: Path) -> Path:
        """Return the control clip of a video.

        Tries, in this order: the same file name, a folder `<stem>` of images, and `<stem>` with another video
        suffix.

        Raises:
            DatasetError: If the video has no control clip.
        """
        name, stem = compose_name(video.name), compose_name(video.stem)
        if name in self._by_name:
            return self._by_name[name]
        folder = self._by_name.get(stem)
        if folder is not None and folder.is_dir():
            return folder
        if stem in self._clips:
            return self._clips[stem]
        raise DatasetError(
            f"{self._folder} has no control clip for {video.name}: neither {video.name} nor a folder "
            f"{video.stem}"
        )


def _ends_in(path: Path, suffixes: Container[str]) -> bool:
    """Return whether a file has one of these suffixes."""
    return path.suffix.lower() in suffixes


def list_entries(folder: Path, key: str, config_path: Path | None = None) -> Sequence["os.DirEntry[str]"]:
    """Return a folder's directory entries, sorted by name, without those that begin with a dot.

    Entries are not converted to Path, because there may be a million.

    Args:
        folder: The folder.
        key: Key of the table that names the folder, for an error message.
        config_path: The dataset file, for an error message.

    Raises:
        DatasetError: If the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if entry.name[0] != "."]
        return sorted(visible, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(
            f"{key} = {folder}: {error.strerror}{explain_lookup(folder, config_path)}"
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """Split a file name into stem and suffix as `pathlib.Path` does, but faster."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return (name, "") if suffix == "." else (stem, suffix)  # a name that ends in a dot has no suffix


# --- files by suffix: images, clips, audio
# ------------------------------------------------------------------------------------------------------------


def media_suffixes(kind: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return two sets of suffixes for images, clips or audio: normal ones, and ones of lower precedence.

    Files with a suffix of the second set may be previews or originals: they are left out if a file with a
    suffix of the first set has the same stem.
    """
    if kind == "sound":
        return AUDIO_SUFFIXES, frozenset()
    if kind == "video":
        return VIDEO_SUFFIXES, ANIMATION_SUFFIXES
    spare = ANIMATION_SUFFIXES - {".webp"} | TIFF_SUFFIXES
    return image_suffixes() - spare, spare


def _select_spare(table: DatasetTable, spare_files: Sequence[Path], media: Sequence[Path]) -> list[Path]:
    """Return which of the GIF, WebP and TIFF files (`spare_files`) the table uses besides `media`."""
    # A clip table uses only animations; an image table uses the first image of each GIF and TIFF. A file with
    # the same stem as a file of `media` is left out with a warning, because both would share a cache.
    files = [path for path in spare_files if path.is_file()]
    if table.kind == "image":
        # of animations and multi-page TIFFs, an image table uses only the first image
        paths = [*media, *files]
        with_several = [path for path in paths if _has_several_images(path, table)]
        animations = [path for path in with_several if path.suffix.lower() not in TIFF_SUFFIXES]
        _log_file_warning(
            table,
            animations,
            "animated: only the first frame of each is used. video_directory takes clips",
        )
        with_pages = [path for path in with_several if path not in animations]
        _log_file_warning(table, with_pages, "of several pages: only the first of each is used")
    else:
        files = [path for path in files if _has_several_images(path, table)]
    media_names = {os.path.normcase(path.stem) for path in media}
    same_named = [path for path in files if os.path.normcase(path.stem) in media_names]
    _log_file_warning(
        table,
        same_named,
        "ignored, because another file of the folder has the same name except for its suffix",
    )
    return [path for path in files if path not in same_named]


def _has_several_images(path: Path, table: DatasetTable) -> bool:
    """Return whether a file is an animation or a multi-page TIFF."""
    try:
        return _has_pages(path) if path.suffix.lower() in TIFF_SUFFIXES else is_animation(path)
    except MediaError:  # damaged: it stays in the table, and decoding reports the error
        return table.kind == "video"


def _log_file_warning(table: DatasetTable, paths: Sequence[Path], problem: str) -> None:
    """Log how many files have a problem, and the first few; nothing if there are none."""
    if paths:
        logger.warning("%s: %d files, such as %s, are %s.", table.name, len(paths), paths[0], problem)


def _has_pages(path: Path) -> bool:
    """Return whether an image file contains several images (animation frames or TIFF pages)."""
    with open_image(path) as image:
        return int(getattr(image, "n_frames", 1)) > 1


def _explain(path: Path) -> str:
    """Explain why a path that has the name of an image or clip is not a regular file."""
    try:
        require_regular_file(path)
    except FileNotFoundError:
        return f"the link leads to {path.readlink() if path.is_symlink() else path}, which is not there"
    except OSError as error:
        return "it is a folder" if path.is_dir() else str(error.strerror or error)
    return "it can be read now"


def _leave_out_tool_outputs(table: DatasetTable, paths: Sequence[Path]) -> list[Path]:
    """Return the paths without outputs of this program's tools: clip_SWINIR.mkv next to clip.mp4."""
    # An output has the tool's metadata (TOOL_TAG), and a name that begins with the stem of another file; only
    # files with such names are opened. A warning says how many are left out.
    stems = {path.stem for path in paths}
    tool_outputs = set()
    for path in paths:
        stem_parts = path.stem.split("_")[:-1]
        shorter_stems = itertools.accumulate(stem_parts, "{}_{}".format)  # of a_b_c: a, a_b
        if stems.isdisjoint(shorter_stems):
            continue
        with contextlib.suppress(MediaError, OSError):  # decoding reports errors
            if any(TOOL_TAG.fullmatch(metadata_key) for metadata_key in read_tags(path)):
                tool_outputs.add(path)
    if tool_outputs:
        logger.warning(
            "%s: %d files, such as %s, are left out: a tool made them of other files of this folder. Move "
            "the ones to train on into a folder of their own.",
            table.name,
            len(tool_outputs),
            min(tool_outputs),
        )
    return [path for path in paths if path not in tool_outputs]
