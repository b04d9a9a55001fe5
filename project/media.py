"""List the clips, images, audio files and references of a folder, and describe skipped or odd files."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataset.sources.captions import caption_path, describe_encoding, read_caption_file
from dataset.sources.folders import ControlFolder, find_audio_beside
from dataset.sources.layers import group_layers
from dataset.sources.left_out import FOLDERS_OF_RUNS, NO_MEDIA, CaptionOwners
from dataset.subsets import FolderName, read_folder_name
from modules.command import quote_command
from modules.console import format_count
from modules.errors import DatasetError, MediaError
from modules.line_kinds import fault, warning
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.labels import MASK_FOLDERS, MASK_LABEL, MASKS_BEFORE, label_of
from modules.media.opening import AUDIO_SUFFIXES, open_image
from modules.media.reading import VIDEO_SUFFIXES, first_frame, image_size, image_suffixes
from modules.media.remedies import remedy_of
from modules.media.samples import track_info
from modules.media.streams import source_info
from modules.paths import parse_path
from modules.text_files import parse_toml, read_text, real_path
from project.control_pairs import CONTROLS, describe_control_pairs
from project.kinds.contract import RunKind
from project.listed_captions import ListedCaptions, read_lists
from project.options import WRITTEN

if TYPE_CHECKING:  # imports torch, but pages use this module too
    from project.model_choice import ModelInfo

CAPTIONS = ".txt"
OTHER_CAPTIONS = (".TXT", ".caption")  # the second is used by image trainers
CHECK_PAGE = "check.html"
FIRST_FRAMES = "first_frames"  # folder of images that `new` takes from clips
OWN_FOLDERS = {*FOLDERS_OF_RUNS, FIRST_FRAMES}
CONTROL_FOLDER = "conditioning"
DRAW_EDGES = ["python", "tools/control_pictures.py", "--canny", "--output"]
REGULARIZATION = re.compile(r"regs?|regulari[sz]ation([-_ ]?images?)?|class([-_ ]images?)?", re.IGNORECASE)
# names of folders with the sources of edited images; `control_images` and similar forms count too
REFERENCES = re.compile(
    r"(controls?|before|sources?|references?|refs?|inputs?|originals?|conditions?|conditioning)"
    r"([-_ ]?(images?|pictures?))?",
    re.IGNORECASE,
)
SHOWN = 3  # maximum number of names in a line
FEW_PIXELS = 256  # minimum shorter side: smaller images are enlarged, and the model learns their blur
FEW_MEDIA = 3  # fewer files cause a warning
LONG = 4  # ratio of sides from which an image counts as narrow
MAX_FOLDERS = 1000  # maximum number of folders searched for skipped media
MAX_REPEATS = 1000  # maximum in a folder name; larger numbers may be years
AUDIO_HELP = (
    "audio_directory in dataset.toml takes sounds of clips by their names and, for LTX-2, sounds alone"
)


@dataclass(frozen=True)
class Media:
    """A clip, image or audio file in the dataset folder, with its size, duration and caption."""

    path: Path
    kind: Literal["video", "image", "audio"]  # kind of table in dataset.toml
    size: tuple[int, int]  # width, height; 0, 0 for audio
    seconds: Fraction | None  # None: an image, or an unknown duration
    caption: str | None  # on one line; None without a caption

    @property
    def is_clip(self) -> bool:
        """Whether the file is a video."""
        return self.kind == "video"


@dataclass
class FolderContent:
    """What `new` finds in a folder; `lines` report which files are left out, and why."""

    media: list[Media] = field(default_factory=list)
    parsed_folder_names: dict[Path, FolderName] = field(
        default_factory=dict
    )  # folder names with a meaning to trainers
    listed_captions: ListedCaptions = field(default_factory=ListedCaptions)
    # files that `new` writes: captions from lists, and the first frames of clips
    new_captions: dict[Path, str] = field(default_factory=dict)
    conflicting_captions: list[Path] = field(default_factory=list)  # files whose caption file and list differ
    undecodable_captions: set[Path] = field(default_factory=set)  # files whose caption cannot be read
    unreadable_media: list[Path] = field(default_factory=list)  # clips and images
    first_frames: dict[Path, Path] = field(default_factory=dict)  # image -> clip
    repeats_by_folder: dict[Path, int] = field(
        default_factory=dict
    )  # folder -> how often its files are repeated
    regularization_folders: list[Path] = field(
        default_factory=list
    )  # folders of regularization images to train on
    mask_folders: dict[Path, Path] = field(default_factory=dict)  # folder of media -> folder of its masks
    # folder of images -> folder of their references
    reference_folders: dict[Path, Path] = field(default_factory=dict)
    control_folders: dict[Path, Path] = field(
        default_factory=dict
    )  # folder of images -> folder of its control images
    # layers of an image, from back to front
    layers_by_image: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    report_lines: list[str] = field(default_factory=list)
    caption_suffix: str = CAPTIONS  # suffix of caption files


@dataclass
class SortedFolders:
    """Subfolders of the dataset folder, grouped by use."""

    training_folders: list[Path]  # the folder itself comes first
    reference_folders: list[Path]  # folders of references, the sources of edited images
    regularization_reasons: dict[Path, str]  # folder -> why it seems to have regularization images


def collect_content(
    folder: Path,
    model_info: "ModelInfo",
    name: str,
    *,
    kind: RunKind,
    control_kind: RunKind | None,
    edits: str = "",
    hearing: str = "",
    silent: str = "",
) -> FolderContent:
    """Collect what `new` trains on: the media of a folder, with references or control images.

    Args:
        folder: The described folder.
        model_info: Properties of the model, from the record of its family.
        name: Name of the model, for messages.
        kind: Kind of run.
        control_kind: Kind of run that trains on control images; None if the model has none.
        edits: Name of a model of the family that edits images, if this one does not.
        hearing: Models that can be trained on audio alone.
        silent: Task of the family that is trained on clips without their audio.

    Raises:
        DatasetError: If the folder has no media, or lacks references, control images or audio that the
            training needs.
    """
    content = FolderContent()
    content.mask_folders = read_mask_folders(folder)
    folders_by_use = _sort_folders(folder, content)
    content.caption_suffix = _find_captions(folders_by_use.training_folders)
    for subfolder, reason in folders_by_use.regularization_reasons.items():
        content.report_lines += _describe_regularising(
            subfolder, reason, content=content, model_info=model_info, kind=kind
        )
    content.report_lines += _describe_names(folders_by_use.training_folders, content.parsed_folder_names)
    audios = _collect_media(folder, folders_by_use, content, model_info)
    if kind.uses_control_images:
        _leave_out_clips(content, kind)
    # an image model trains on the first frames of clips
    elif not model_info.trains_on_clips:
        _take_first_frames(folder, content, name)
    if model_info.max_references:
        _find_references(folder, folders_by_use, content)
    elif kind.uses_control_images:
        _find_controls(folder, folders_by_use, content, kind)
    else:
        pairs = _describe_control_pairs(
            folder, folders_by_use, media=content.media, kind=kind, control_kind=control_kind
        )
        content.report_lines += [
            *pairs.values(),
            *_describe_unused_sources(folders_by_use, name, edits, described=pairs),
        ]
    _require_media(
        folder,
        content,
        model_info,
        name=name,
        alone=f" {hearing} learns sounds alone." if audios and hearing else "",
        instead=f", or take --task {silent}, which learns pictures and movement alone" if silent else "",
        has_audios=bool(audios),
        kind=kind,
    )
    if model_info.max_references:
        content.report_lines += _describe_numbered(content.media)
    content.report_lines += _describe_unsuitable_media(content, model_info)
    return content


def _collect_media(
    folder: Path, folders_by_use: SortedFolders, content: FolderContent, model_info: "ModelInfo"
) -> list[Path]:
    """Add the captioned media of the training folders to `content`; return the audio files.

    Lines about files that are not used are added, too, after those about lists of captions.
    """
    suffixes = _media_suffixes() | AUDIO_SUFFIXES
    files = {
        training_folder: _files_in(training_folder, suffixes)
        for training_folder in folders_by_use.training_folders
    }
    # before the media, whose captions may stand in these lists
    content.listed_captions = read_lists(files, {*WRITTEN, CHECK_PAGE})
    start = len(content.report_lines)
    audios: list[Path] = []
    for training_folder in folders_by_use.training_folders:
        audios += _list_media(folder, training_folder, content, model_info)
        if training_folder != folder:
            content.report_lines += _describe_too_deep_media(
                _list_unsorted_folders(training_folder, folders_by_use)
            )
    _add_audios(content, audios, model_info)
    # only now is it known which captions were used; inserted before the lines about files
    content.report_lines[start:start] = _describe_lists(content)
    return audios


def _list_unsorted_folders(place: Path, folders_by_use: SortedFolders) -> list[Path]:
    """Return subfolders that are not used for training, regularization or references."""
    sorted_folders = {*folders_by_use.training_folders, *folders_by_use.regularization_reasons}
    inner_folders = [inner for inner in _folders(place) if inner not in sorted_folders]
    return [inner for inner in inner_folders if not REFERENCES.fullmatch(inner.name)]


def _describe_control_pairs(
    folder: Path,
    folders_by_use: SortedFolders,
    media: Sequence[Media],
    kind: RunKind,
    control_kind: RunKind | None,
) -> dict[Path, str]:
    """Return a line for each folder of control images that belongs to the media folder.

    Folders of control images are inside the media folder, inside a training folder, or next to the media
    folder.

    Args:
        folder: The media folder.
        folders_by_use: Its subfolders by their meaning.
        media: Its media.
        kind: The kind of this run.
        control_kind: The kind of run that trains on control images; None if the model has none. Then no line
            is returned.
    """
    if control_kind is None:
        return {}
    images = [item.path for item in media if item.kind == "image"]
    absolute = folder.absolute()
    neighbors = [source for source in _sources_in(absolute.parent) if source != absolute]
    # folder of control images -> images of this folder that it may belong to
    images_of_source = dict.fromkeys([*folders_by_use.reference_folders, *neighbors], images)
    for training_folder in folders_by_use.training_folders[1:]:  # without the media folder itself
        inner_images = [path for path in images if path.parent == training_folder]
        images_of_source |= dict.fromkeys(_sources_in(training_folder), inner_images)
    lines: dict[Path, str] = {}
    for source, source_images in images_of_source.items():
        line = describe_control_pairs(source, source_images, kind, control_kind)
        if line is not None:
            lines[source] = line
    return lines


def _describe_unused_sources(
    folders_by_use: SortedFolders, name: str, edits: str, described: Collection[Path]
) -> list[str]:
    """Return lines about folders of reference images, which a model that does not edit cannot use.

    `name` is the model's name, and `edits` continues the sentence with a model of the family that does.
    Folders in `described` already have a line.
    """
    inner_sources = [
        # [1:]: without the media folder itself, whose folders are in `sources`
        source
        for subfolder in folders_by_use.training_folders[1:]
        for source in _sources_in(subfolder)
    ]
    return [
        warning(
            f"{subfolder}: left out. A folder of this name holds what pictures are made from, and {name} "
            f"does not edit{edits}. If it is to be learned, rename it"
        )
        for subfolder in (*folders_by_use.reference_folders, *inner_sources)
        if subfolder not in described and _media_in(subfolder)
    ]


def _describe_numbered(media: Sequence[Media]) -> list[str]:
    """Return a line about images named like references of other images; [] if there are none."""
    numbered = _find_numbered(media)
    if not numbered:
        return []
    text = "learned as results. If they are what others are made from, move them into a folder control"
    return [f"{name_some(numbered)}: {text}"]


def _sort_folders(folder: Path, content: FolderContent) -> SortedFolders:
    """Sort the subfolders by their use: for training, as references, or for regularization.

    The names of the folders that are used, and lines about those that are left out, are added to `content`.
    """
    candidates = [folder]
    folders_by_use = SortedFolders(training_folders=[], reference_folders=[], regularization_reasons={})
    for subfolder in _folders(folder):
        # a link to a parent folder would be searched without end
        if subfolder.is_symlink() and _leads_back(subfolder, folder):
            continue
        kind = subfolder.name.lower()
        if REFERENCES.fullmatch(kind):
            folders_by_use.reference_folders.append(subfolder)
        elif kind in MASK_FOLDERS and real_path(subfolder) in content.mask_folders.values():
            content.report_lines.append(f"{subfolder}: learned by its masks")
        elif kind in MASK_FOLDERS:
            content.report_lines.append(warning(f"{subfolder}: {_explain_masks(folder, subfolder)}"))
        elif kind not in OWN_FOLDERS:
            candidates.append(subfolder)
            # sd-scripts' layout: folders such as img/10_cat class
            candidates += [inner for inner in _folders(subfolder) if _name_of(inner) is not None]
        # a folder named like one that runs write; `new` itself fills FIRST_FRAMES
        elif kind != FIRST_FRAMES and _has_captioned_media(subfolder):
            text = f"{subfolder}: left out. Runs write into a folder of this name: rename it"
            content.report_lines.append(warning(text))
    for subfolder in candidates:
        name = _name_of(subfolder)
        if name is not None:
            content.parsed_folder_names[subfolder] = name
    for subfolder in candidates:
        reason = _why_regularization(subfolder, folder, content.parsed_folder_names)
        if reason is None:
            folders_by_use.training_folders.append(subfolder)
        else:
            folders_by_use.regularization_reasons[subfolder] = reason
    folders_by_use.regularization_reasons |= _find_outer_regularising(folder, content)
    return folders_by_use


def _find_outer_regularising(folder: Path, content: FolderContent) -> dict[Path, str]:
    """Return folders of regularization images next to `folder`, if its subfolders follow kohya's naming."""
    # only kohya's layout has such a neighbor: img/10_cat next to reg/1_cat
    if not content.parsed_folder_names or _name_of(folder) is not None:
        return {}
    outer: dict[Path, str] = {}
    real_folder = real_path(folder)
    for neighbor in _folders(real_folder.parent):
        if neighbor == real_folder or not REGULARIZATION.fullmatch(neighbor.name):
            continue
        reason = f"{neighbor.name} is the name of a folder of regularization pictures"
        for inner in _folders(neighbor):
            name = _name_of(inner)
            if name is not None:
                content.parsed_folder_names[inner] = name  # its class, such as cat of 1_cat
                outer[inner] = reason
    return outer


def _describe_regularising(
    subfolder: Path, reason: str, content: FolderContent, model_info: "ModelInfo", kind: RunKind
) -> list[str]:
    """Return a line about a folder of regularization images, and record the folder if it is used.

    Folders are left out if the run, the model or missing captions allow no regularization. `reason` explains
    why its images are for regularization. `kind` is the kind of run.
    """
    images = _files_in(subfolder, image_suffixes())
    if not images:
        return []
    rename = "If they are to be learned as others, rename the folder"
    if kind.uses_control_images or kind.trains_embedding:
        text = f"{subfolder}: left out, as {reason}, and {kind.title} learns nothing from such. {rename}"
        return [warning(text)]
    if not model_info.supports_regularization:
        text = (
            f"{subfolder}: left out, as {reason}. A dataset file with [[datasets.subsets]] and is_reg = true "
            f"takes them (docs/image_datasets.md). {rename}"
        )
        return [warning(text)]
    class_name = content.parsed_folder_names.get(subfolder)
    uncaptioned = [path for path in images if not caption_path(path, content.caption_suffix).exists()]
    if uncaptioned and class_name is None:
        text = (
            f"{subfolder}: left out: {name_some(uncaptioned)}: regularization pictures without a caption, in "
            "a folder whose name has no class. Call it 1_man, with the word for the class, or give captions"
        )
        return [warning(text)]
    content.regularization_folders.append(subfolder)
    # the line that says how the folder is used
    count = format_count(len(images), "regularization picture")
    caption = ""
    if uncaptioned and class_name is not None:
        caption = f", `{class_name.words}` for those without a caption"
    return [f"{subfolder}: {count} (is_reg){caption}, as {reason}. {rename}"]


def _leads_back(link: Path, folder: Path) -> bool:
    """Return whether a link points to the folder that contains it, or to a parent of that folder."""
    real_folder = real_path(folder)
    return real_path(link) in (real_folder, *real_folder.parents)


def _has_captioned_media(folder: Path) -> bool:
    return any(caption_path(path, CAPTIONS).exists() for path in _media_in(folder))


def _name_of(folder: Path) -> FolderName | None:
    """Parse a folder name such as `10_ohwx man` into repeats and words; None for other names."""
    name = read_folder_name(real_path(folder).name)
    return name if name is not None and name.repeats < MAX_REPEATS and name.words.strip() else None


def _why_regularization(subfolder: Path, folder: Path, names: Mapping[Path, FolderName]) -> str | None:
    """Return why a folder's images count as regularization images; None if they do not.

    `names` are the class or subject words in the names of folders, such as `ohwx man` of 10_ohwx man.
    """
    if subfolder == folder:
        return None
    for path in (subfolder, subfolder.parent):
        if path != folder and REGULARIZATION.fullmatch(path.name):
            return f"{path.name} is the name of a folder of regularization pictures"
    name = names.get(subfolder)
    if name is None:
        return None
    class_words = name.words.strip().lower()
    for subject in names.values():
        # this folder shows a class if another one shows a subject of it: `man` is the class of `ohwx man`
        if subject.words.strip().lower().endswith(f" {class_words}"):
            return (
                f"`{name.words}` is the class of `{subject.words}`: its pictures seem to be for "
                "regularization"
            )
    return None


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    return []


def _sources_in(folder: Path) -> list[Path]:
    return [inner for inner in _folders(folder) if REFERENCES.fullmatch(inner.name)]


def _media_suffixes() -> frozenset[str]:
    return VIDEO_SUFFIXES | image_suffixes() | ANIMATION_SUFFIXES


def _media_in(folder: Path) -> list[Path]:
    return _files_in(folder, _media_suffixes())


def _files_in(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    with contextlib.suppress(OSError):
        paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
        return [path for path in paths if label_of(path.stem) is None]
    return []


def _find_captions(folders_by_use: Sequence[Path]) -> str:
    """Return the most frequent suffix of caption files in the folders."""
    suffixes = (CAPTIONS, *OTHER_CAPTIONS)
    counts = Counter[str]()
    for folder in folders_by_use:
        with contextlib.suppress(OSError):
            names = {path.name for path in folder.iterdir()}
            for path in _media_in(folder):
                counts.update(suffix for suffix in suffixes if path.stem + suffix in names)
    return max(suffixes, key=counts.__getitem__)  # the first suffix among equal counts


def _describe_names(folders_by_use: Sequence[Path], names: Mapping[Path, FolderName]) -> list[str]:
    """Return lines about folders whose names image trainers read as repeats and a class."""
    lines = []
    for folder in folders_by_use:
        if folder in names:
            name = names[folder]
            times = "once" if name.repeats == 1 else f"{name.repeats} times"
            lines.append(
                f"{folder}: by its name, each file is trained {times} an epoch (num_repeats), and "
                f"`{name.words}` is the caption of files without one (class_tokens)"
            )
    return lines


def _describe_lists(content: FolderContent) -> list[str]:
    """Return lines that say which lists provide captions, and for how many files.

    Call this after captions have been assigned to the media.
    """
    lines = []
    single_files = []  # JSON files about one file each share a line
    for path, count in content.listed_captions.lists.items():
        if path.suffix.lower() == ".json" and count == 1:
            single_files.append(path)
        else:
            lines.append(f"{path.name}: captions of {format_count(count, 'file')}")
    if single_files:
        article = "the" if len(single_files) > 1 else "a"
        lines.append(f"{name_some(single_files)}: captions of {article} file of that name")
    # captions from lists are copied into caption files
    if lines and content.new_captions:
        count = len(content.new_captions)
        lines[-1] += f". {count} are written into {content.caption_suffix} files, which count from now on"
    if content.conflicting_captions:
        names = name_some(content.conflicting_captions)
        text = f"{names}: the {content.caption_suffix} file says something else than the list, and counts"
        lines.append(warning(text))
    return [*lines, *content.listed_captions.lines]


def _describe_too_deep_media(folders: Sequence[Path]) -> list[str]:
    """Warn about media in subfolders of subfolders, which `new` does not search."""
    lines = []
    waiting = list(folders)
    visited = 0
    # breadth first, with a limit on the number of folders
    while waiting and visited < MAX_FOLDERS:
        folder = waiting.pop(0)
        visited += 1
        if folder.is_symlink() or folder.name.lower() in OWN_FOLDERS | MASK_FOLDERS:
            continue
        if _media_in(folder):
            text = (
                f"{folder}: left out because it is too deep. Move its files up, or give this folder to `new`"
            )
            lines.append(warning(text))
        waiting += _folders(folder)
    return lines


def _list_media(folder: Path, subfolder: Path, content: FolderContent, model_info: "ModelInfo") -> list[Path]:
    """Add the clips and images of a folder to `content`, with lines about other files; return audio files."""
    try:
        paths = sorted(subfolder.iterdir())
    except OSError as error:
        content.report_lines.append(warning(f"{subfolder}: left out, it cannot be listed ({error.strerror})"))
        return []
    suffixes = _media_suffixes()
    media: list[Path] = []
    labels: list[Path] = []
    other_files: dict[str, list[Path]] = {}  # by suffix
    for path in paths:
        if not _is_material(path):
            continue
        suffix = path.suffix.lower()
        if suffix in suffixes and label_of(path.stem) is not None:
            labels.append(path)
        elif suffix in suffixes:
            media.append(path)
        else:
            other_files.setdefault(suffix, []).append(path)
    if model_info.trains_on_layers:
        media = _take_layers(media, content)
    _add_media(media, content, model_info)
    content.report_lines += _describe_labels(folder, subfolder, labels, content)
    audios = [path for suffix in AUDIO_SUFFIXES for path in other_files.get(suffix, [])]
    # also folders and hidden files with a media suffix, so that their captions are not reported as unused
    with_captions = [path for path in paths if path.suffix.lower() in suffixes]
    content.report_lines += _describe_other_files(other_files, [*with_captions, *audios], content)
    return sorted(audios)


def read_mask_folders(folder: Path) -> dict[Path, Path]:
    """Map each media folder that has masks to its folder of masks.

    A dataset.toml names the folders of masks. Without it, they are the folders in which this program has
    created masks.
    """
    if not (folder / WRITTEN[0]).exists():
        media_folders = [folder, *_folders(folder)]
        candidates = [media_folder / name for media_folder in media_folders for name in MASK_FOLDERS]
        return {real_path(path.parent): real_path(path) for path in candidates if _has_made_masks(path)}
    try:
        tables: list[Mapping[str, Any]] = []
        for table in parse_toml(read_text(folder / WRITTEN[0]))["datasets"]:
            tables += [table, *table.get("subsets", ())]
        mask_folders: dict[Path, Path] = {}
        for table in tables:
            masks = folder / table.get("mask_directory", "")
            if "mask_directory" not in table or not masks.is_dir():
                continue
            # keys of tables and subsets that name the folder of media
            for key in ("image_directory", "video_directory", "image_dir"):
                if table.get(key):
                    mask_folders[real_path(folder / table[key])] = real_path(masks)
        return mask_folders
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # the user may have edited it
        return {}


def _has_made_masks(folder: Path) -> bool:
    """Return whether a folder holds masks made by this program, by a run or in the browser."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return MASKS_BEFORE in names and any(not name.startswith(".") for name in names)


def _explain_masks(folder: Path, place: Path) -> str:
    """Return the line for dataset.toml that makes a training use the masks in a folder.

    `folder` contains dataset.toml.
    """
    inside = Path(parse_path(real_path(folder), real_path(place))).as_posix()
    return f'masks are left out. mask_directory = "{inside}" in dataset.toml, with their pictures, takes them'


def _describe_labels(folder: Path, place: Path, paths: Sequence[Path], content: FolderContent) -> list[str]:
    """Return lines about masks and conditioning images that OneTrainer stores next to images."""
    lines = []
    masks = [path for path in paths if label_of(path.stem) == MASK_LABEL]
    if masks and content.mask_folders.get(real_path(place)) != real_path(place):
        lines.append(warning(f"{name_some(masks)}: {_explain_masks(folder, place)}"))
    conditions = [path for path in paths if path not in masks]
    if conditions:
        text = "left out, conditioning images of OneTrainer. Move them into a folder control"
        lines.append(warning(f"{name_some(conditions)}: {text}"))
    return lines


def _is_material(path: Path) -> bool:
    """Return whether a path is a file of the user: not hidden, and not written by Reelsmith or the system."""
    is_written = path.name in (*WRITTEN, CHECK_PAGE)
    is_of_system = path.name.lower() in NO_MEDIA or path.name[0] == "."
    return not is_written and not is_of_system and not path.is_dir()


def _add_media(paths: Sequence[Path], content: FolderContent, model_info: "ModelInfo") -> None:
    """Add clips and images to `content`, and lines about unreadable files and captions that are not UTF-8."""
    encodings: list[str] = []
    for path in paths:
        try:
            content.media.append(_measure(path, content, model_info, encodings))
        except MediaError as error:
            _leave_out(path, error, content)
    _warn_of_encodings(encodings, content)


def _warn_of_encodings(encodings: Sequence[str], content: FolderContent) -> None:
    """Add a line about caption files that are not UTF-8, if there are any."""
    if encodings:
        more = f" and {len(encodings) - 1} more" if len(encodings) > 1 else ""
        content.report_lines.append(warning(f"captions that are not UTF-8: {encodings[0]}{more}"))


def _take_layers(paths: Sequence[Path], content: FolderContent) -> list[Path]:
    """Return the images that have layers; add a line about images without layers."""
    layers = group_layers(paths, content.caption_suffix)
    alone = [path for path, of_path in layers.items() if not of_path]
    if alone:
        example = f"{alone[0].stem}_1.png"
        content.report_lines.append(
            warning(f"{name_some(alone)}: left out, without layers, such as {example}")
        )
    of_images = {path: of_path for path, of_path in layers.items() if of_path}
    content.layers_by_image |= of_images
    return list(of_images)


def _leave_out(path: Path, error: MediaError, content: FolderContent) -> None:
    """Record a media file that cannot be read."""
    content.report_lines.append(fault(f"left out: {error}"))
    if path.is_file():  # runs ignore broken links
        content.unreadable_media.append(path)


def _describe_other_files(
    other_files: Mapping[str, Sequence[Path]], media: Sequence[Path], content: FolderContent
) -> list[str]:
    """Return lines about caption files without media, and about files of other kinds that are not used.

    `other_files` holds all files except media, by suffix. `media` are the files that captions may belong to.
    """
    owned_captions = {caption_path(path, content.caption_suffix) for path in media}
    stems = {path.stem for path in media}
    used_files = {*content.listed_captions.paths, *media}  # lists of captions are read, too
    lines = []
    for suffix, paths in other_files.items():
        if suffix == content.caption_suffix.lower():
            ownerless = [path for path in paths if path not in owned_captions]
            if ownerless:
                owners = CaptionOwners(path.name for path in media)
                lines.append(warning(_describe_ownerless(ownerless, content.caption_suffix, owners)))
            continue
        unread = [path for path in paths if path not in used_files]
        if unread:
            reason = _why_left_out(unread, stems, content.caption_suffix)
            lines.append(warning(f"{name_some(unread)}: left out, {reason}"))
    return lines


def _describe_ownerless(paths: Sequence[Path], suffix: str, owners: CaptionOwners) -> str:
    """Return a line about caption files without a media file."""
    for path in paths:
        owner = owners.find(path.stem)
        if owner is not None:
            right = caption_path(Path(owner), suffix)
            hint = f"{path.name} seems to be that of {owner}: call it {right}"
            return f"{name_some(paths)}: captions of no file. {hint}"
    example = f"cat{suffix} for cat.png"
    return f"{name_some(paths)}: captions of no file. A caption has the name of its file, such as {example}"


def _why_left_out(paths: Sequence[Path], stems: set[str], captions: str) -> str:
    """Return why files with one suffix, which is not a media suffix, are not used."""
    if paths[0].suffix in (CAPTIONS, *OTHER_CAPTIONS) and stems & {path.stem for path in paths}:
        return (
            f"captions are read from {captions} files. Rename them, or in a folder of their own "
            f'give its table in dataset.toml caption_extension = "{paths[0].suffix}"'
        )
    remedy = remedy_of(paths[0].suffix.lower())
    return "neither media nor captions" if remedy is None else f"this kind is not read; {remedy}"


def _add_audios(content: FolderContent, audios: Sequence[Path], model_info: "ModelInfo") -> None:
    """Use audio files as media if there are no others and the model allows it; else report them."""
    if model_info.reads_separate_audio:  # such an audio file is used with its clip
        audios = [path for path in audios if not any(_is_named_like(path, clip) for clip in content.media)]
    if not audios:
        return
    if content.media or not model_info.trains_on_audio_alone:
        text = f"{name_some(audios)}: left out, this kind is not read; {AUDIO_HELP}"
        content.report_lines.append(warning(text))
        return
    encodings: list[str] = []
    for path in audios:
        try:
            if track_info(path) is None:
                raise MediaError(f"{path} has no sound")
            caption = _find_caption(path, content, encodings)
            content.media.append(Media(path, "audio", (0, 0), seconds=None, caption=caption))
        except MediaError as error:
            _leave_out(path, error, content)
    _warn_of_encodings(encodings, content)


def _measure(path: Path, content: FolderContent, model_info: "ModelInfo", encodings: list[str]) -> Media:
    """Return the size, duration and caption of a clip or an image.

    Raises:
        MediaError: If the file cannot be read.
    """
    caption = _find_caption(path, content, encodings)
    is_moving = path.suffix.lower() in VIDEO_SUFFIXES or (model_info.trains_on_clips and is_animation(path))
    if not is_moving:
        return Media(path, "image", image_size(path), seconds=None, caption=caption)
    info = source_info(path)
    seconds = None if info.frames is None else info.frames / info.rate
    return Media(path, "video", (info.width, info.height), seconds=seconds, caption=caption)


def _find_caption(path: Path, content: FolderContent, encodings: list[str]) -> str | None:
    """Return a file's caption in one line, from its caption file or from a list; None without a caption.

    If the caption file is not UTF-8, a line about it is appended to `encodings`.
    """
    caption_file = caption_path(path, content.caption_suffix)
    try:
        file = read_caption_file(caption_file)
    except DatasetError:  # not a text; the check of the written files reports it
        content.undecodable_captions.add(path)
        return None
    listed_text = content.listed_captions.by_path.get(path)
    if file is None:
        if listed_text is None:
            return None
        # `new` will write the caption of the list into a file
        content.new_captions[caption_file] = listed_text
        return " ".join(listed_text.split())
    if file.encoding is not None:
        encodings.append(describe_encoding(caption_file, file.text, file.encoding))
    if listed_text is not None and listed_text != file.text:
        # the caption file has precedence over the list
        content.conflicting_captions.append(path)
    return " ".join(file.text.split())


def _take_first_frames(folder: Path, content: FolderContent, name: str) -> None:
    """Replace each clip by its first frame, which `new` writes as an image.

    `name` is the name of the model.
    """
    images: list[Media] = []
    for clip in content.media:
        if clip.is_clip:
            image = _take_first_frame(folder, content, clip)
            if image is not None:
                images.append(image)
    content.media = [item for item in content.media if not item.is_clip] + images
    if images:
        names = name_some(list(content.first_frames.values()))
        content.report_lines.append(
            f"{names}: {name} learns pictures alone. The first frame of each clip is written as a picture "
            f"with its caption into {folder / FIRST_FRAMES}"
        )


def _take_first_frame(folder: Path, content: FolderContent, clip: Media) -> Media | None:
    """Add a clip's first frame to the images that `new` writes; return None if the clip is left out."""
    try:
        height, width, _ = first_frame(clip.path).shape
    except MediaError as error:
        content.report_lines.append(fault(f"left out: {error}"))
        return None
    if clip.path in content.undecodable_captions:
        text = f"left out: {clip.path}: its caption cannot be read. Save it as UTF-8"
        content.report_lines.append(fault(text))
        return None
    target = _first_frame_path(folder, content, clip.path)
    content.first_frames[target] = clip.path
    if clip.caption is not None:
        _move_caption(content, clip.path, target, clip.caption)
    if clip.path.parent in content.parsed_folder_names:
        content.parsed_folder_names[target.parent] = content.parsed_folder_names[clip.path.parent]
    return Media(target, "image", (width, height), seconds=None, caption=clip.caption)


def _first_frame_path(folder: Path, content: FolderContent, clip: Path) -> Path:
    """Return a path for a clip's first frame that no other clip uses."""
    inside = clip.parent.relative_to(folder)
    path = folder / FIRST_FRAMES / inside / f"{clip.stem}.png"
    while path in content.first_frames:
        path = path.with_stem(f"{path.stem}_{clip.suffix[1:]}")
    return path


def _move_caption(content: FolderContent, clip: Path, picture: Path, caption: str) -> None:
    """Assign a clip's caption to its first frame, which replaces the clip."""
    content.new_captions.pop(caption_path(clip, content.caption_suffix), None)
    content.new_captions[caption_path(picture, content.caption_suffix)] = caption


def _find_references(folder: Path, folders_by_use: SortedFolders, content: FolderContent) -> None:
    """Find the folder of references for each training folder: inside it, or next to it."""
    for training_folder in folders_by_use.training_folders:
        _find_references_of(training_folder, _list_sources(training_folder, folder, folders_by_use), content)
    for source in folders_by_use.reference_folders:
        if source not in content.reference_folders.values() and _media_in(source):
            text = f"{source}: left out. No file there has the name of a picture next to it"
            content.report_lines.append(warning(text))


def _list_sources(place: Path, folder: Path, folders_by_use: SortedFolders) -> list[Path]:
    """Return folders that may hold a training folder's references: inside it, next to it or its parent."""
    absolute = folder.absolute()
    outer_sources = []
    if not folders_by_use.reference_folders:
        outer_sources = [source for source in _sources_in(absolute.parent) if source != absolute]
    inner_sources = [] if place == folder else _sources_in(place)
    return [*inner_sources, *folders_by_use.reference_folders, *outer_sources]


def has_control_pairs(folder: Path, has_word: bool = False) -> bool:
    """Return whether the images in a folder have control images, in a folder that is named so.

    The control folder is usually inside the folder. A control folder next to it may belong to another folder:
    it counts only if it has a control image for each image, if there are no other media next to it, and if no
    trigger word is given.
    """
    folders_by_use = _sort_folders(folder, FolderContent())
    parent = folder.absolute().parent
    for training_folder in folders_by_use.training_folders:
        images = [path.stem for path in _files_in(training_folder, image_suffixes())]
        for source in _list_sources(training_folder, folder, folders_by_use):
            if not CONTROLS.fullmatch(source.name):
                continue
            missing = _without_reference(source, images)
            is_outside = training_folder == folder and source.parent == parent
            if is_outside and (missing or has_word or _list_other_media(folder, source)):
                continue  # it may belong to another folder
            if len(missing) < len(images):
                return True
    return False


def _list_other_media(folder: Path, source: Path) -> list[Path]:
    """Return other media next to a folder, to which a control folder there may belong."""
    parent = source.parent
    others = [
        neighbor
        for neighbor in _folders(parent)
        if neighbor not in (folder.absolute(), source)
        and neighbor.name.lower() not in {*MASK_FOLDERS, *OWN_FOLDERS}
        and not REFERENCES.fullmatch(neighbor.name)
    ]
    return [path for neighbor in (parent, *others) for path in _media_in(neighbor)]


def _find_controls(
    folder: Path, folders_by_use: SortedFolders, content: FolderContent, kind: RunKind
) -> None:
    """For each image folder, use the first control folder that contains any of its control images.

    For kinds of runs whose images are their own control images, the image folder itself is used.
    """
    for training_folder in folders_by_use.training_folders:
        if kind.inpaints_images:
            content.control_folders[training_folder] = training_folder
            continue
        images = [item.path.stem for item in content.media if item.path.parent == training_folder]
        for source in _list_sources(training_folder, folder, folders_by_use):
            if len(_without_reference(source, images)) < len(images):
                content.control_folders[training_folder] = source
                break
    for source in folders_by_use.reference_folders:
        if source not in content.control_folders.values() and _media_in(source):
            why = "No file there has the name of a picture next to it"
            if kind.inpaints_images:
                why = f"{kind.title} learns from the pictures themselves"
            content.report_lines.append(warning(f"{source}: left out. {why}"))


def _leave_out_clips(content: FolderContent, kind: RunKind) -> None:
    """Remove clips, which cannot have control images, and report them.

    `kind` is the kind of run.
    """
    clips = [item.path for item in content.media if item.is_clip]
    if clips:
        text = f"{name_some(clips)}: left out, as {kind.title} learns pictures alone"
        content.report_lines.append(warning(text))
    content.media = [item for item in content.media if not item.is_clip]


def _find_references_of(image_folder: Path, sources: Sequence[Path], content: FolderContent) -> None:
    """Use the first folder that has references for any image in a folder; report missing references."""
    media = [item for item in content.media if item.path.parent == image_folder]
    images = [item.path.stem for item in media if item.kind == "image"]
    if not images:
        return
    # references have the file names of their images
    for source in sources:
        without = _without_reference(source, images)
        if len(without) == len(images):
            continue
        content.reference_folders[image_folder] = source
        content.report_lines += _describe_unused(image_folder, source, content.media)
        if without:
            text = f"{len(without)} of {len(images)} pictures have no reference in {source}"
            content.report_lines.append(f"{image_folder}: {text}, such as {without[0]}: learned without one")
        return


def _without_reference(source: Path, stems: Sequence[str]) -> list[str]:
    """Return the stems of images that have no reference in a folder."""
    with_reference = set[str]()
    with contextlib.suppress(DatasetError):  # the folder cannot be listed
        folder = ControlFolder(source, {*stems})
        for stem in stems:
            with contextlib.suppress(DatasetError):
                if folder.for_image(stem, None):
                    with_reference.add(stem)
    return [stem for stem in stems if stem not in with_reference]


def find_equal(media: Iterable[Media]) -> list[list[Path]]:
    """Return groups of media files with identical content; files that cannot be read are ignored."""
    by_size: dict[int, list[Path]] = {}
    for item in media:
        with contextlib.suppress(OSError):
            by_size.setdefault(item.path.stat().st_size, []).append(item.path)
    by_digest: dict[str, list[Path]] = {}
    for paths in by_size.values():
        # only files of equal size are hashed
        if len(paths) == 1:
            continue
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                by_digest.setdefault(digest, []).append(path)
    return [paths for paths in by_digest.values() if len(paths) > 1]


def reference_of(media: Media, source: Path) -> tuple[Path, ...]:
    """Return the reference images of a file in a folder; () if none has a fitting name."""
    try:
        return ControlFolder(source, {media.path.stem}).for_image(media.path.stem, None)
    except DatasetError:
        return ()


def why_unused(path: Path) -> str:
    """Return why a reference image cannot be used; "" if it can."""
    try:
        image_size(path)
    except MediaError as error:
        return str(error)
    return ""


def _describe_unused(place: Path, source: Path, media: Sequence[Media]) -> list[str]:
    """Return lines about unreadable reference images in folder `source`, for images in folder `place`."""
    lines = []
    for item in media:
        if item.path.parent != place or item.kind != "image":
            continue
        for reference in reference_of(item, source):
            reason = why_unused(reference)
            if reason:
                lines.append(f"{item.path.name}: not trained on, its reference cannot be read: {reason}")
    return lines


def _find_numbered(media: Sequence[Media]) -> list[Path]:
    """Return uncaptioned images that are named like references of another image: cat_0, cat_input."""
    stems = {item.path.stem for item in media if item.kind == "image"}
    numbered = []
    for item in media:
        owner, _, ending = item.path.stem.rpartition("_")
        if item.caption is None and owner in stems and (ending.isdecimal() or REFERENCES.fullmatch(ending)):
            numbered.append(item.path)
    return numbered


def _layout(folder: Path, name: str, media: Sequence[Media]) -> str:
    """Return a message that shows where images and their references should be stored."""
    numbered = _find_numbered(media)
    advice = ""
    if numbered:
        advice = f" {name_some(numbered)} seem to be such pictures: move them into {folder / 'control'}."
    return (
        f"{folder}: {name} learns edits, and there is no picture to edit from.{advice} Make this of it:\n"
        f"  {folder / 'cat.jpg'}          a result\n"
        f"  {folder / 'cat.txt'}          the edit as a text, such as: the cat wears a hat\n"
        f"  {folder / 'control' / 'cat.jpg'}  what it is made from; of several cat_0.jpg, cat_1.jpg\n"
        "Other names for control: before, source, reference. It may also be next to the folder of results."
    )


def _describe_unsuitable_media(content: FolderContent, model_info: "ModelInfo") -> list[str]:
    """Return lines about used media that may be unsuitable: few, small, transparent or silent."""
    minimum = model_info.min_seconds
    long_enough = [item for item in content.media if item.seconds is None or item.seconds >= minimum]
    visible = [item for item in long_enough if item.kind != "audio"]
    lines = _describe_sizes(visible)
    if len(content.media) < FEW_MEDIA:
        files = format_count(len(content.media), "file")
        lines.append(f"{files} to learn from: few. Most is learned by heart; 10 to 30 are usual")
    images = [item.path for item in visible if item.kind == "image"]
    # first frames of clips are not written yet, and have no alpha
    originals = [path for path in images if path not in content.first_frames]
    transparent = [path for path in originals if _is_transparent(path)]
    if transparent:
        training_folders = "which is learned" if model_info.trains_on_alpha else "which is learned as white"
        lines.append(
            f"{name_some(transparent)}: transparent in part, {training_folders}; alpha_mask = true in "
            "dataset.toml leaves it out"
        )
    if model_info.trains_on_audio:
        silent = [item.path for item in visible if item.is_clip and _is_silent(item.path)]
        if model_info.reads_separate_audio:
            silent = [path for path in silent if find_audio_beside(path) is None]
        if silent:
            lines.append(f"{name_some(silent)}: without sound: only the pictures are learned")
    return lines + _describe_equal(content.media)


def is_narrow(item: Media) -> bool:
    """Return whether an image has an extreme aspect ratio."""
    return max(item.size) > LONG * min(item.size)


def _describe_sizes(media: Sequence[Media]) -> list[str]:
    """Return lines about clips and images that are too small or too narrow for training."""
    tiny = [item.path for item in media if min(item.size) < FEW_PIXELS]
    narrow = [item.path for item in media if is_narrow(item)]
    lines = []
    if tiny:
        text = f"{name_some(tiny)}: tiny, below {FEW_PIXELS} pixels: their blur is learned"
        lines.append(warning(text))
    if narrow:
        text = f"more than {LONG} times as long as wide, as few models know pictures: crop them"
        lines.append(warning(f"{name_some(narrow)}: {text}"))
    return lines


def _describe_equal(media: Sequence[Media]) -> list[str]:
    """Return lines about the first groups of identical files, and the number of further groups."""
    groups = find_equal(media)
    lines = []
    for paths in groups[:SHOWN]:
        names = " = ".join(_name_among(paths))
        lines.append(
            f"{names}: equal copies, learned more often than others. Delete all but one of {len(paths)}"
        )
    if len(groups) > SHOWN:
        lines.append(f"... and {len(groups) - SHOWN} more groups of equal copies")
    return lines


def _name_among(paths: Sequence[Path]) -> list[str]:
    """Return file names, with their folders unless all files share one folder."""
    if len({path.parent for path in paths}) == 1:
        return [path.name for path in paths[:SHOWN]]
    return [f"{path.parent.name}/{path.name}" for path in paths[:SHOWN]]


def _is_transparent(path: Path) -> bool:
    with contextlib.suppress(MediaError), open_image(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A").getextrema()
            return isinstance(alpha[0], (int, float)) and alpha[0] < 255
    return False


def _require_media(
    folder: Path,
    content: FolderContent,
    model_info: "ModelInfo",
    *,
    name: str,
    alone: str,
    instead: str,
    has_audios: bool,
    kind: RunKind,
) -> None:
    """Raise DatasetError if a folder lacks the media that a training run needs.

    `name` is the name of the model, and `kind` the kind of run. `alone` and `instead` suggest other ways to
    use the folder. With `has_audios`, audio files lie next to the clips; `audio_directory` in
    dataset.toml adds them to the clips.
    """
    remarks = "".join(f"\n  {line}" for line in content.report_lines)
    if not content.media:
        raise DatasetError(
            f"{folder} has no clip and no picture that can be read. Give one that has.{alone}{remarks}"
        )
    if model_info.needs_reference and not content.reference_folders:
        raise DatasetError(_layout(folder, name, content.media) + remarks)
    if kind.uses_control_images and not content.control_folders:
        raise DatasetError(
            f"{folder}: {kind.title} learns from pairs of a picture and its control picture, and no picture "
            f"has one. Put them into {folder / CONTROL_FOLDER}, under the names of the pictures. This draws "
            f"their edges: {quote_command([*DRAW_EDGES, str(folder / CONTROL_FOLDER), str(folder)])}{remarks}"
        )
    needs_audio = model_info.trains_on_audio and not model_info.reads_separate_audio
    if needs_audio and not has_audios and not any(map(_has_audio, content.media)):
        raise DatasetError(
            f"{folder} has no sound, and {name} learns sound. Give clips that have some{instead}.{remarks}"
        )


def _is_named_like(audio: Path, medium: Media) -> bool:
    return medium.is_clip and audio.with_suffix("") == medium.path.with_suffix("")


def _has_audio(medium: Media) -> bool:
    return medium.kind == "audio" or (medium.is_clip and not _is_silent(medium.path))


def _is_silent(path: Path) -> bool:
    try:
        return is_animation(path) or track_info(path) is None
    except MediaError:
        return True


def name_some(paths: Sequence[Path]) -> str:
    """Return the first few file names, and how many more there are."""
    names = [path.name for path in paths]
    further = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + further
