"""List the clips, images, audio files and references of a folder, and describe skipped or odd files."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dataset.sources.captions import caption_path, describe_encoding, read_caption_file
from dataset.sources.folders import ControlFolder, find_audio_beside
from dataset.sources.layers import group_layers
from dataset.sources.left_out import NO_MEDIA, RUN_SUBFOLDERS, CaptionOwners
from dataset.subsets import FolderName, read_folder_name
from downloads.catalogue import ModelSet
from modules.command import quote_command
from modules.console import format_count
from modules.errors import DatasetError, MediaError
from modules.line_kinds import fault, warning
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.labels import MASK_FOLDERS, MASK_LABEL, MASKS_BEFORE, find_stem_label
from modules.media.opening import AUDIO_SUFFIXES, open_image
from modules.media.reading import VIDEO_SUFFIXES, first_frame, image_size, image_suffixes
from modules.media.remedies import find_remedy
from modules.media.samples import track_info
from modules.media.streams import source_info
from modules.paths import parse_path
from modules.text_files import parse_toml, read_text, real_path
from project.control_pairs import CONTROLS, describe_control_pairs
from project.kinds.composing import LORA, find_control_kind
from project.kinds.contract import RunKind
from project.listed_captions import ListedCaptions, read_lists
from project.options import DATASET_FILE, WRITTEN

if TYPE_CHECKING:  # imports torch, but pages use this module too
    from project.model_choice import ModelInfo

CAPTIONS = ".txt"
OTHER_CAPTIONS = (".TXT", ".caption")  # the second is used by image trainers
CHECK_PAGE = "check.html"
FIRST_FRAMES = "first_frames"  # folder of images that `new` takes from clips
RUN_FOLDERS = {*RUN_SUBFOLDERS, FIRST_FRAMES}
CONTROL_FOLDER = "conditioning"
DRAW_EDGES = ["python", "tools/control_pictures.py", "--canny", "--output"]
REGULARIZATION = re.compile(r"regs?|regulari[sz]ation([-_ ]?images?)?|class([-_ ]images?)?", re.IGNORECASE)
# names of folders with the sources of edited images; `control_images` and similar forms count too
REFERENCES = re.compile(
    r"(controls?|before|sources?|references?|refs?|inputs?|originals?|conditions?|conditioning)"
    r"([-_ ]?(images?|pictures?))?",
    re.IGNORECASE,
)
MAX_LISTED = 3  # maximum number of names in a line
FEW_PIXELS = 256  # minimum shorter side: smaller images are enlarged, and the model learns their blur
FEW_MEDIA = 3  # fewer files cause a warning
MAX_ASPECT_RATIO = 4  # an image with at least this ratio of sides is narrow
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
    """What `new` finds in a folder; `report_lines` say which files are left out, and why."""

    media: list[Media] = field(default_factory=list)
    # folder names with a meaning to trainers
    parsed_folder_names: dict[Path, FolderName] = field(default_factory=dict)
    listed_captions: ListedCaptions = field(default_factory=ListedCaptions)
    # files that `new` writes: captions from lists, and the first frames of clips
    new_captions: dict[Path, str] = field(default_factory=dict)
    conflicting_captions: list[Path] = field(default_factory=list)  # files whose caption file and list differ
    undecodable_captions: set[Path] = field(default_factory=set)  # files whose caption cannot be read
    unreadable_media: list[Path] = field(default_factory=list)  # clips and images
    first_frames: dict[Path, Path] = field(default_factory=dict)  # image -> clip
    # folder -> how often its files are repeated
    repeats_by_folder: dict[Path, int] = field(default_factory=dict)
    # folders of regularization images to train on
    regularization_folders: list[Path] = field(default_factory=list)
    mask_folders: dict[Path, Path] = field(default_factory=dict)  # folder of media -> folder of its masks
    # folder of images -> folder of their references
    reference_folders: dict[Path, Path] = field(default_factory=dict)
    # folder of images -> folder of its control images
    control_folders: dict[Path, Path] = field(default_factory=dict)
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


class SuggestedModels(NamedTuple):
    """Models to suggest for a folder that the chosen model cannot use; "" for none."""

    editing_task: str = ""  # of the same family, for reference images
    audio_options: str = ""  # options that select a model for audio without clips
    silent_task: str = ""  # of the same family, for clips without audio


class PlannedTraining(NamedTuple):
    """The model and kind of run for which `new` collects the media of a folder."""

    model_info: "ModelInfo"
    model_name: str  # for messages
    kind: RunKind
    control_kind: RunKind | None  # kind of run that trains on control images; None if the model has none
    suggested_models: SuggestedModels  # for messages about media that this model cannot use


def collect_content(folder: Path, training: PlannedTraining) -> FolderContent:
    """Collect what `new` trains on: the media of a folder, with references or control images.

    1. Sort the subfolders by their use, and collect the media of the training folders.
    2. Select references or control images for them, or report those that this run does not use.
    3. Raise an error if the training run needs something that is missing.

    Raises:
        DatasetError: If the folder has no media, or lacks references, control images or audio that the
            training run needs.
    """
    model_info = training.model_info
    content = FolderContent()
    content.mask_folders = read_mask_folders(folder)
    folders_by_use = _sort_folders(folder, content)
    content.caption_suffix = _find_caption_suffix(folders_by_use.training_folders)
    for subfolder, reason in folders_by_use.regularization_reasons.items():
        _add_regularization(subfolder, reason, content=content, model_info=model_info, kind=training.kind)
    content.report_lines += _describe_names(folders_by_use.training_folders, content.parsed_folder_names)
    audio_files = _collect_media(folder, folders_by_use, content, model_info)
    if training.kind.uses_control_images:
        # runs of this kind use only images
        clips = [item.path for item in content.media if item.is_clip]
        if clips:
            text = f"{name_some(clips)}: left out, as {training.kind.title} uses only images"
            content.report_lines.append(warning(text))
        content.media = [item for item in content.media if not item.is_clip]
    elif not model_info.trains_on_clips:
        _replace_clips_by_first_frames(folder, content, training.model_name)
    _select_source_images(folder, folders_by_use, content, training)
    _require_media(folder, content, training.suggested_models, has_audio_files=bool(audio_files))
    _require_source_images(folder, content, training)
    _require_audio(folder, content, training, has_audio_files=bool(audio_files))
    if model_info.max_references:
        content.report_lines += _describe_images_named_as_references(content.media)
    content.report_lines += _describe_unsuitable_media(content, model_info)
    return content


def _select_source_images(
    folder: Path, folders_by_use: SortedFolders, content: FolderContent, training: PlannedTraining
) -> None:
    """Select the references or control images of the media, or report folders that this run cannot use."""
    if training.model_info.max_references:
        # a folder of references is inside its training folder, or next to it
        for training_folder in folders_by_use.training_folders:
            _select_folder_references(
                training_folder, _list_reference_candidates(training_folder, folder, folders_by_use), content
            )
        for reference_folder in folders_by_use.reference_folders:
            is_used = reference_folder in content.reference_folders.values()
            if not is_used and _list_media_files(reference_folder):
                text = f"{reference_folder}: left out. No file there has the name of an image next to it"
                content.report_lines.append(warning(text))
    elif training.kind.uses_control_images:
        _select_control_folders(folder, folders_by_use, content, training.kind)
    else:
        line_by_folder = _describe_control_pairs(
            folder,
            folders_by_use,
            media=content.media,
            kind=training.kind,
            control_kind=training.control_kind,
        )
        content.report_lines += line_by_folder.values()
        content.report_lines += _describe_unused_reference_folders(
            folders_by_use, training.model_name, training.suggested_models, described=line_by_folder
        )


def _require_source_images(folder: Path, content: FolderContent, training: PlannedTraining) -> None:
    """Raise DatasetError if the training run needs references or control images, and there are none."""
    if training.model_info.needs_reference and not content.reference_folders:
        layout = _describe_reference_layout(folder, training.model_name, content.media)
        raise DatasetError(layout + _indent_lines(content.report_lines))
    if training.kind.uses_control_images and not content.control_folders:
        control_folder = folder / CONTROL_FOLDER
        raise DatasetError(
            f"{folder}: {training.kind.title} learns from pairs of an image and its control image, and no "
            f"image has one. Put them into {control_folder}, under the names of the images. This draws "
            f"their edges: {quote_command([*DRAW_EDGES, str(control_folder), str(folder)])}"
            f"{_indent_lines(content.report_lines)}"
        )


def _require_audio(
    folder: Path, content: FolderContent, training: PlannedTraining, has_audio_files: bool
) -> None:
    """Raise DatasetError if the model learns the audio of clips, and the folder has none."""
    info = training.model_info
    if not info.trains_on_audio or info.reads_separate_audio or info.takes_silent_clips:
        return
    # audio files next to the clips can be added to them by `audio_directory` in dataset.toml
    if not has_audio_files and not any(map(_has_audio, content.media)):
        raise _make_audio_error(folder, content, training.model_name, training.suggested_models)


def _require_media(
    folder: Path,
    content: FolderContent,
    suggested_models: SuggestedModels,
    has_audio_files: bool,
) -> None:
    """Raise DatasetError if a folder has no readable clip or image, and no audio to train on alone."""
    if content.media:
        return
    remedy = ""
    if has_audio_files and suggested_models.audio_options:
        remedy = f" {suggested_models.audio_options} learns sounds alone."
    raise DatasetError(
        f"{folder} has no clip and no image that can be read. Pass a folder that has one.{remedy}"
        f"{_indent_lines(content.report_lines)}"
    )


def _make_audio_error(
    folder: Path, content: FolderContent, model_name: str, suggested_models: SuggestedModels
) -> DatasetError:
    """Return the error for clips without audio, if the model trains on both."""
    remedy = ""
    if suggested_models.silent_task:
        remedy = (
            f", or take --task {suggested_models.silent_task}, which is trained on pictures and movement only"
        )
    return DatasetError(
        f"{folder} has no sound, and {model_name} learns sound. Use clips that have some{remedy}."
        f"{_indent_lines(content.report_lines)}"
    )


def _indent_lines(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _collect_media(
    folder: Path, folders_by_use: SortedFolders, content: FolderContent, model_info: "ModelInfo"
) -> list[Path]:
    """Add the captioned media of the training folders to `content`; return the audio files."""
    # The report gets lines about lists of captions, and then lines about files that are not used.
    suffixes = _media_suffixes() | AUDIO_SUFFIXES
    training_folders = folders_by_use.training_folders
    files_by_folder = {subfolder: _list_files(subfolder, suffixes) for subfolder in training_folders}
    # before the media, whose captions may be in these lists
    content.listed_captions = read_lists(files_by_folder, {*WRITTEN, CHECK_PAGE})
    num_earlier_lines = len(content.report_lines)
    audio_files: list[Path] = []
    for subfolder in training_folders:
        audio_files += _add_folder_media(folder, subfolder, content, model_info)
        if subfolder != folder:
            # folders of no use, neither for training or regularization nor as references
            sorted_folders = {*folders_by_use.training_folders, *folders_by_use.regularization_reasons}
            inner_folders = [inner for inner in _list_subfolders(subfolder) if inner not in sorted_folders]
            unsorted_folders = [inner for inner in inner_folders if not REFERENCES.fullmatch(inner.name)]
            content.report_lines += _describe_too_deep_media(unsorted_folders)
    _add_audio_files(content, audio_files, model_info)
    # these lines come first, although the lists in use are known only now
    content.report_lines[num_earlier_lines:num_earlier_lines] = _describe_lists(content)
    return audio_files


def _describe_control_pairs(
    folder: Path,
    folders_by_use: SortedFolders,
    media: Sequence[Media],
    kind: RunKind,
    control_kind: RunKind | None,
) -> dict[Path, str]:
    """Return a line for each folder of control images that belongs to the media folder."""
    # Folders of control images are inside the media folder, inside a training folder, or next to the media
    # folder.
    if control_kind is None:
        return {}
    images = [item.path for item in media if item.kind == "image"]
    # folder that may have control images -> images that they may belong to
    images_by_control_folder = dict.fromkeys(
        [*folders_by_use.reference_folders, *_list_neighboring_reference_folders(folder)], images
    )
    for training_folder in folders_by_use.training_folders[1:]:  # without the media folder itself
        images_in_folder = [path for path in images if path.parent == training_folder]
        inner_folders = _list_reference_folders(training_folder)
        images_by_control_folder |= dict.fromkeys(inner_folders, images_in_folder)
    line_by_folder: dict[Path, str] = {}
    for control_folder, images_in_folder in images_by_control_folder.items():
        line = describe_control_pairs(control_folder, images_in_folder, kind, control_kind)
        if line is not None:
            line_by_folder[control_folder] = line
    return line_by_folder


def _describe_unused_reference_folders(
    folders_by_use: SortedFolders,
    model_name: str,
    suggested_models: SuggestedModels,
    described: Collection[Path],
) -> list[str]:
    """Return lines about folders of reference images that the model cannot use, as it does not edit images.

    Folders in `described` already have a line.
    """
    remedy = f", --task {suggested_models.editing_task} does" if suggested_models.editing_task else ""
    reference_folders = [*folders_by_use.reference_folders]
    for subfolder in folders_by_use.training_folders[1:]:  # without the media folder itself
        reference_folders += _list_reference_folders(subfolder)
    lines = []
    for reference_folder in reference_folders:
        if reference_folder in described or not _list_media_files(reference_folder):
            continue
        text = (
            f"{reference_folder}: left out. A folder of this name contains source images of edits, and "
            f"{model_name} does not edit{remedy}. To train on it, rename it"
        )
        lines.append(warning(text))
    return lines


def _describe_images_named_as_references(media: Sequence[Media]) -> list[str]:
    """Return a line about images that are named like references of other images; [] if there are none."""
    numbered = _find_images_named_as_references(media)
    if not numbered:
        return []
    text = "learned as results. If others are made from them, move them into a folder named control"
    return [f"{name_some(numbered)}: {text}"]


def _sort_folders(folder: Path, content: FolderContent) -> SortedFolders:
    """Sort the subfolders by their use: for training, as references, or for regularization."""
    # The names of the folders in use, and lines about those that are left out, are added to `content`.
    candidates = [folder]  # for training or regularization
    folders_by_use = SortedFolders(training_folders=[], reference_folders=[], regularization_reasons={})
    for subfolder in _list_subfolders(folder):
        # a link to a parent folder would be searched without end
        if subfolder.is_symlink() and _leads_back(subfolder, folder):
            continue
        name = subfolder.name.lower()
        if REFERENCES.fullmatch(name):
            folders_by_use.reference_folders.append(subfolder)
        elif name in MASK_FOLDERS | RUN_FOLDERS:
            content.report_lines += _describe_mask_or_run_folder(folder, subfolder, content)
        else:
            candidates.append(subfolder)
            # sd-scripts' layout: folders such as img/10_cat class
            candidates += [
                inner for inner in _list_subfolders(subfolder) if _parse_folder_name(inner) is not None
            ]
    _split_candidates(folder, candidates, folders_by_use, content)
    folders_by_use.regularization_reasons |= _find_neighboring_regularization(folder, content)
    return folders_by_use


def _describe_mask_or_run_folder(folder: Path, subfolder: Path, content: FolderContent) -> list[str]:
    """Return a line about a folder with the name of a mask folder or of a run's output folder."""
    if subfolder.name.lower() in MASK_FOLDERS:
        if real_path(subfolder) in content.mask_folders.values():
            return [f"{subfolder}: learned by its masks"]
        return [warning(f"{subfolder}: {_explain_masks(folder, subfolder)}")]
    if subfolder.name.lower() == FIRST_FRAMES:  # `new` itself writes into it
        return []
    if any(caption_path(path, CAPTIONS).exists() for path in _list_media_files(subfolder)):
        return [warning(f"{subfolder}: left out. Runs write into a folder of this name: rename it")]
    return []


def _split_candidates(
    folder: Path, candidates: Sequence[Path], folders_by_use: SortedFolders, content: FolderContent
) -> None:
    """Sort media folders into training and regularization folders, judged by all of their names."""
    for subfolder in candidates:
        name = _parse_folder_name(subfolder)
        if name is not None:
            content.parsed_folder_names[subfolder] = name
    for subfolder in candidates:
        reason = _find_regularization_reason(subfolder, folder, content.parsed_folder_names)
        if reason is None:
            folders_by_use.training_folders.append(subfolder)
        else:
            folders_by_use.regularization_reasons[subfolder] = reason


def _find_neighboring_regularization(folder: Path, content: FolderContent) -> dict[Path, str]:
    """Return the regularization folders next to `folder`, if its subfolders follow kohya's naming."""
    # only kohya's layout has such a neighbor: img/10_cat next to reg/1_cat
    if not content.parsed_folder_names or _parse_folder_name(folder) is not None:
        return {}
    outer: dict[Path, str] = {}
    real_folder = real_path(folder)
    for neighbor in _list_subfolders(real_folder.parent):
        if neighbor == real_folder or not REGULARIZATION.fullmatch(neighbor.name):
            continue
        reason = f"{neighbor.name} is the name of a folder of regularization images"
        for inner in _list_subfolders(neighbor):
            name = _parse_folder_name(inner)
            if name is not None:
                content.parsed_folder_names[inner] = name  # its class, such as cat of 1_cat
                outer[inner] = reason
    return outer


def _add_regularization(
    subfolder: Path, reason: str, content: FolderContent, model_info: "ModelInfo", kind: RunKind
) -> None:
    """Add a folder of regularization images to `content`, or report why it cannot be used."""
    # `reason` is why its images seem to be for regularization. `kind` is the kind of run.
    images = _list_files(subfolder, image_suffixes())
    if not images:
        return
    remedy = "To train on them like on other images, rename the folder"
    uncaptioned = [path for path in images if not caption_path(path, content.caption_suffix).exists()]
    folder_name = content.parsed_folder_names.get(subfolder)
    error = ""
    if kind.uses_control_images or kind.trains_embedding:
        error = f"left out, as {reason}, and {kind.title} does not use such images. {remedy}"
    elif not model_info.supports_regularization:
        error = (
            f"left out, as {reason}. A dataset file with [[datasets.subsets]] and is_reg = true "
            f"supports them (docs/image_datasets.md). {remedy}"
        )
    elif uncaptioned and folder_name is None:
        error = (
            f"left out: {name_some(uncaptioned)}: regularization images without a caption, in "
            "a folder whose name has no class. Call it 1_man, with the word for the class, or add captions"
        )
    if error:
        content.report_lines.append(warning(f"{subfolder}: {error}"))
        return
    content.regularization_folders.append(subfolder)
    usage = "(is_reg)"
    if uncaptioned and folder_name is not None:
        usage += f", `{folder_name.class_tokens}` for those without a caption"
    count = format_count(len(images), "regularization image")
    content.report_lines.append(f"{subfolder}: {count} {usage}, as {reason}. {remedy}")


def _leads_back(link: Path, folder: Path) -> bool:
    """Return whether a link points to the folder that contains it, or to a parent of that folder."""
    real_folder = real_path(folder)
    return real_path(link) in (real_folder, *real_folder.parents)


def _parse_folder_name(folder: Path) -> FolderName | None:
    """Parse a folder name such as `10_ohwx man` into repeats and class words; None for other names."""
    name = read_folder_name(real_path(folder).name)
    return name if name is not None and name.repeats < MAX_REPEATS and name.class_tokens.strip() else None


def _find_regularization_reason(
    subfolder: Path, folder: Path, names: Mapping[Path, FolderName]
) -> str | None:
    """Return why a folder's images count as regularization images; None if they do not."""
    # `names` are the class or subject words in the names of folders, such as `ohwx man` of 10_ohwx man.
    if subfolder == folder:
        return None
    for path in (subfolder, subfolder.parent):
        if path != folder and REGULARIZATION.fullmatch(path.name):
            return f"{path.name} is the name of a folder of regularization images"
    name = names.get(subfolder)
    if name is None:
        return None
    # a folder shows a class if another one shows a subject of it: `man` is the class of `ohwx man`
    class_ending = f" {name.class_tokens.strip().lower()}"
    for subject in names.values():
        if subject.class_tokens.strip().lower().endswith(class_ending):
            return (
                f"`{name.class_tokens}` is the class of `{subject.class_tokens}`: "
                "its images seem to be for regularization"
            )
    return None


def _list_subfolders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    return []


def _list_reference_folders(folder: Path) -> list[Path]:
    return [inner for inner in _list_subfolders(folder) if REFERENCES.fullmatch(inner.name)]


def _list_neighboring_reference_folders(folder: Path) -> list[Path]:
    """Return the folders next to `folder` that have names of reference or control image folders."""
    absolute = folder.absolute()
    return [neighbor for neighbor in _list_reference_folders(absolute.parent) if neighbor != absolute]


def _media_suffixes() -> frozenset[str]:
    return VIDEO_SUFFIXES | image_suffixes() | ANIMATION_SUFFIXES


def _list_media_files(folder: Path) -> list[Path]:
    return _list_files(folder, _media_suffixes())


def _list_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    with contextlib.suppress(OSError):
        paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
        return [path for path in paths if find_stem_label(path.stem) is None]
    return []


def _find_caption_suffix(folders_by_use: Sequence[Path]) -> str:
    """Return the most frequent caption file suffix in these folders."""
    suffixes = (CAPTIONS, *OTHER_CAPTIONS)
    counts = Counter[str]()
    for folder in folders_by_use:
        with contextlib.suppress(OSError):
            names = {path.name for path in folder.iterdir()}
            for path in _list_media_files(folder):
                counts.update(suffix for suffix in suffixes if path.stem + suffix in names)
    return max(suffixes, key=counts.__getitem__)  # the first suffix among equal counts


def _describe_names(folders_by_use: Sequence[Path], names: Mapping[Path, FolderName]) -> list[str]:
    """Return a line for each folder whose name sets repeats and a class, as in sd-scripts (`10_ohwx man`)."""
    lines = []
    for folder in folders_by_use:
        if folder in names:
            name = names[folder]
            times = "once" if name.repeats == 1 else f"{name.repeats} times"
            lines.append(
                f"{folder}: by its name, each file is trained {times} an epoch (num_repeats), and "
                f"`{name.class_tokens}` is the caption of files without one (class_tokens)"
            )
    return lines


def _describe_lists(content: FolderContent) -> list[str]:
    """Return lines that say which lists provide captions, and for how many files."""
    # Call this after captions have been assigned to the media.
    lines = []
    single_files = []  # JSON files about one file each share a line
    for path, count in content.listed_captions.num_captions_by_list.items():
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
        lines[-1] += f". {count} are written into {content.caption_suffix} files, which are used from now on"
    if content.conflicting_captions:
        names = name_some(content.conflicting_captions)
        text = f"{names}: the {content.caption_suffix} file differs from the list, and is used"
        lines.append(warning(text))
    return [*lines, *content.listed_captions.report_lines]


def _describe_too_deep_media(folders: Sequence[Path]) -> list[str]:
    """Return warnings about media in subfolders of subfolders, which `new` does not search."""
    lines = []
    folders_to_search = list(folders)
    visited = 0
    # breadth first, with a limit on the number of folders
    while folders_to_search and visited < MAX_FOLDERS:
        folder = folders_to_search.pop(0)
        visited += 1
        if folder.is_symlink() or folder.name.lower() in RUN_FOLDERS | MASK_FOLDERS:
            continue
        if _list_media_files(folder):
            text = (
                f"{folder}: left out because it is too deep. Move its files up, or pass this folder to `new`"
            )
            lines.append(warning(text))
        folders_to_search += _list_subfolders(folder)
    return lines


def _add_folder_media(
    folder: Path, subfolder: Path, content: FolderContent, model_info: "ModelInfo"
) -> list[Path]:
    """Add the clips and images of a subfolder to `content`, with messages about other files."""
    # 1. Separate media, media with a label (such as masks), and other files.
    # 2. Add the media; if the model learns layers, only images with their layers.
    # 3. Report labeled files, captions without media, and files that are not used.
    # `folder` is the dataset folder. Returns the audio files of the subfolder.
    try:
        paths = sorted(subfolder.iterdir())
    except OSError as error:
        content.report_lines.append(warning(f"{subfolder}: left out, it cannot be listed ({error.strerror})"))
        return []
    files = _sort_files(paths)
    media = _select_layered_images(files.media, content) if model_info.trains_on_layers else files.media
    encodings: list[str] = []
    for file in media:
        try:
            content.media.append(_read_media(file, content, model_info, encodings))
        except MediaError as failure:
            _record_unreadable(file, failure, content)
    _report_non_utf8_files(encodings, content)
    content.report_lines += _describe_labels(folder, subfolder, files.labeled_media, content)
    audio_files = [path for suffix in AUDIO_SUFFIXES for path in files.others_by_suffix.get(suffix, [])]
    # also folders and hidden files with a media suffix, so that their captions are not reported as unused
    possible_caption_owners = [path for path in paths if path.suffix.lower() in _media_suffixes()]
    content.report_lines += _describe_other_files(
        files.others_by_suffix, [*possible_caption_owners, *audio_files], content
    )
    return sorted(audio_files)


class SortedFiles(NamedTuple):
    """Files of a folder, grouped by use."""

    media: list[Path]  # clips and images to train on
    labeled_media: list[Path]  # clips and images with a label in their names, such as masks
    others_by_suffix: dict[str, list[Path]]


def _sort_files(paths: Sequence[Path]) -> SortedFiles:
    """Sort the visible files of a folder by their use; other paths are omitted."""
    suffixes = _media_suffixes()
    files = SortedFiles(media=[], labeled_media=[], others_by_suffix={})
    for path in filter(_is_user_file, paths):
        suffix = path.suffix.lower()
        if suffix not in suffixes:
            files.others_by_suffix.setdefault(suffix, []).append(path)
        elif find_stem_label(path.stem) is not None:
            files.labeled_media.append(path)
        else:
            files.media.append(path)
    return files


def read_mask_folders(folder: Path) -> dict[Path, Path]:
    """Return the mask folder of each media folder that has one.

    It is named in dataset.toml. Without that file, it is a folder in which this program has created masks.
    """
    if (folder / DATASET_FILE).exists():
        try:
            return _read_table_mask_folders(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # the user may have edited it
            return {}
    mask_folders: dict[Path, Path] = {}
    for media_folder in (folder, *_list_subfolders(folder)):
        for name in MASK_FOLDERS:
            if _has_made_masks(media_folder / name):
                mask_folders[real_path(media_folder)] = real_path(media_folder / name)
    return mask_folders


def _read_table_mask_folders(folder: Path) -> dict[Path, Path]:
    """Return the mask folder of each media folder, from the tables and subsets of dataset.toml."""
    tables: list[Mapping[str, Any]] = []
    for table in parse_toml(read_text(folder / DATASET_FILE))["datasets"]:
        tables += [table, *table.get("subsets", ())]
    mask_folders: dict[Path, Path] = {}
    for table in tables:
        masks = folder / table.get("mask_directory", "")
        if "mask_directory" not in table or not masks.is_dir():
            continue
        for media_key in ("image_directory", "video_directory", "image_dir"):
            if table.get(media_key):
                mask_folders[real_path(folder / table[media_key])] = real_path(masks)
    return mask_folders


def _has_made_masks(folder: Path) -> bool:
    """Return whether a folder contains masks that this program made, in a run or in the browser."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return MASKS_BEFORE in names and any(not name.startswith(".") for name in names)


def _explain_masks(folder: Path, subfolder: Path) -> str:
    """Return the line for dataset.toml that makes training use the masks in a folder."""
    # `folder` contains dataset.toml.
    inside = Path(parse_path(real_path(folder), real_path(subfolder))).as_posix()
    return f'masks are left out. mask_directory = "{inside}" in dataset.toml, with their images, takes them'


def _describe_labels(
    folder: Path, subfolder: Path, paths: Sequence[Path], content: FolderContent
) -> list[str]:
    """Return lines about masks and conditioning images next to images, as OneTrainer stores them."""
    lines = []
    masks = [path for path in paths if find_stem_label(path.stem) == MASK_LABEL]
    if masks and content.mask_folders.get(real_path(subfolder)) != real_path(subfolder):
        lines.append(warning(f"{name_some(masks)}: {_explain_masks(folder, subfolder)}"))
    conditions = [path for path in paths if path not in masks]
    if conditions:
        text = "left out, conditioning images of OneTrainer. Move them into a folder control"
        lines.append(warning(f"{name_some(conditions)}: {text}"))
    return lines


def _is_user_file(path: Path) -> bool:
    """Return whether a file belongs to the user: not hidden, not written by this program or the system."""
    is_written = path.name in (*WRITTEN, CHECK_PAGE)
    is_system_file = path.name.lower() in NO_MEDIA or path.name[0] == "."
    return not is_written and not is_system_file and not path.is_dir()


def _report_non_utf8_files(encodings: Sequence[str], content: FolderContent) -> None:
    """Add a message about caption files that are not UTF-8, if there are any."""
    if encodings:
        more = f" and {len(encodings) - 1} more" if len(encodings) > 1 else ""
        content.report_lines.append(warning(f"captions that are not UTF-8: {encodings[0]}{more}"))


def _select_layered_images(paths: Sequence[Path], content: FolderContent) -> list[Path]:
    """Return the images that have layers; report images without layers."""
    layers = group_layers(paths, content.caption_suffix)
    alone = [path for path, of_path in layers.items() if not of_path]
    if alone:
        example = f"{alone[0].stem}_1.png"
        content.report_lines.append(
            warning(f"{name_some(alone)}: left out, because they have no layers, such as {example}")
        )
    layered_images = {path: of_path for path, of_path in layers.items() if of_path}
    content.layers_by_image |= layered_images
    return list(layered_images)


def _record_unreadable(path: Path, error: MediaError, content: FolderContent) -> None:
    """Record an unreadable media file and the reason."""
    content.report_lines.append(fault(f"left out: {error}"))
    if path.is_file():  # runs ignore broken links
        content.unreadable_media.append(path)


def _describe_other_files(
    other_files: Mapping[str, Sequence[Path]], media: Sequence[Path], content: FolderContent
) -> list[str]:
    """Return lines about caption files without media, and about files of other kinds that are not used."""
    # `other_files` are all files except media, by suffix. `media` are the files that captions may belong to.
    media_caption_paths = {caption_path(path, content.caption_suffix) for path in media}
    stems = {path.stem for path in media}
    used_files = {*content.listed_captions.list_paths, *media}  # lists of captions are read, too
    lines = []
    for suffix, paths in other_files.items():
        are_captions = suffix == content.caption_suffix.lower()
        unused = [path for path in paths if path not in (media_caption_paths if are_captions else used_files)]
        if unused and are_captions:
            owners = CaptionOwners(path.name for path in media)
            text = _describe_captions_without_media(unused, content.caption_suffix, owners)
            lines.append(warning(text))
        elif unused:
            if unused[0].suffix in (CAPTIONS, *OTHER_CAPTIONS) and stems & {path.stem for path in unused}:
                reason = (
                    f"captions are read from {content.caption_suffix} files. Rename them, or in a folder of "
                    f'their own give its table in dataset.toml caption_extension = "{unused[0].suffix}"'
                )
            else:
                remedy = find_remedy(unused[0].suffix.lower())
                reason = (
                    "neither media nor captions" if remedy is None else f"this kind is not read; {remedy}"
                )
            lines.append(warning(f"{name_some(unused)}: left out, {reason}"))
    return lines


def _describe_captions_without_media(paths: Sequence[Path], suffix: str, owners: CaptionOwners) -> str:
    """Return a line about caption files without a media file of the same name."""
    for path in paths:
        owner = owners.find(path.stem)
        if owner is not None:
            right = caption_path(Path(owner), suffix)
            hint = f"{path.name} seems to be that of {owner}: call it {right}"
            return f"{name_some(paths)}: captions without a file. {hint}"
    example = f"cat{suffix} for cat.png"
    return (
        f"{name_some(paths)}: captions without a file. A caption has the name of its file, such as {example}"
    )


def _add_audio_files(content: FolderContent, audio_files: Sequence[Path], model_info: "ModelInfo") -> None:
    """Add audio files as media if there are no clips and images, and the model allows it."""
    # Else report them.
    # Audio files named like a clip are used with the clip, if the model reads such files.
    remaining = list(audio_files)
    if model_info.reads_separate_audio:
        clip_names = {item.path.with_suffix("") for item in content.media if item.is_clip}
        remaining = [path for path in audio_files if path.with_suffix("") not in clip_names]
    if not remaining:
        return
    if content.media or not model_info.trains_on_audio_alone:
        text = f"{name_some(remaining)}: left out, this kind is not read; {AUDIO_HELP}"
        content.report_lines.append(warning(text))
        return
    encodings: list[str] = []
    for path in remaining:
        try:
            # audio has no width and height
            if track_info(path) is None:
                raise MediaError(f"{path} has no sound")
            audio_item = Media(
                path, "audio", (0, 0), seconds=None, caption=_find_caption(path, content, encodings)
            )
            content.media.append(audio_item)
        except MediaError as error:
            _record_unreadable(path, error, content)
    _report_non_utf8_files(encodings, content)


def _read_media(path: Path, content: FolderContent, model_info: "ModelInfo", encodings: list[str]) -> Media:
    """Return the size, duration and caption of a clip or an image."""
    caption = _find_caption(path, content, encodings)
    is_moving = path.suffix.lower() in VIDEO_SUFFIXES or (model_info.trains_on_clips and is_animation(path))
    if not is_moving:
        return Media(path, "image", image_size(path), seconds=None, caption=caption)
    info = source_info(path)
    seconds = None if info.frames is None else info.frames / info.rate
    return Media(path, "video", (info.width, info.height), seconds=seconds, caption=caption)


def _find_caption(path: Path, content: FolderContent, encodings: list[str]) -> str | None:
    """Return a file's caption on one line; None if it has none."""
    # The caption file has precedence over a list of captions. `content` records which captions `new` has to
    # copy from a list into a caption file, and which files have two different captions. If the caption file
    # is not UTF-8, a line about it is appended to `encodings`.
    caption_file = caption_path(path, content.caption_suffix)
    try:
        caption = read_caption_file(caption_file)
    except DatasetError:  # it cannot be decoded; the check of the written files reports it
        content.undecodable_captions.add(path)
        return None
    listed_caption = content.listed_captions.by_path.get(path)
    if caption is not None:
        if caption.encoding is not None:
            encodings.append(describe_encoding(caption_file, caption.text, caption.encoding))
        if listed_caption is not None and listed_caption != caption.text:
            content.conflicting_captions.append(path)
        return " ".join(caption.text.split())
    if listed_caption is None:
        return None
    content.new_captions[caption_file] = listed_caption
    return " ".join(listed_caption.split())


def _replace_clips_by_first_frames(folder: Path, content: FolderContent, model_name: str) -> None:
    """Replace each clip by its first frame, which `new` writes as an image, for an image model."""
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
            f"{names}: {model_name} is trained only on images. The first frame of each clip is written as "
            f"an image with its caption into {folder / FIRST_FRAMES}"
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
    # In the folder of first frames, below the folder that the clip is in. Clips of one stem in several
    # formats get different names.
    inside = clip.path.parent.relative_to(folder)
    target = folder / FIRST_FRAMES / inside / f"{clip.path.stem}.png"
    while target in content.first_frames:
        target = target.with_stem(f"{target.stem}_{clip.path.suffix[1:]}")
    content.first_frames[target] = clip.path
    if clip.caption is not None:
        # the image of the first frame replaces the clip, and takes its caption
        content.new_captions.pop(caption_path(clip.path, content.caption_suffix), None)
        content.new_captions[caption_path(target, content.caption_suffix)] = clip.caption
    if clip.path.parent in content.parsed_folder_names:
        content.parsed_folder_names[target.parent] = content.parsed_folder_names[clip.path.parent]
    return Media(target, "image", (width, height), seconds=None, caption=clip.caption)


def _list_reference_candidates(subfolder: Path, folder: Path, folders_by_use: SortedFolders) -> list[Path]:
    """Return folders that may hold a training folder's references: in it, or in or next to `folder`."""
    neighbors = [] if folders_by_use.reference_folders else _list_neighboring_reference_folders(folder)
    inner_folders = [] if subfolder == folder else _list_reference_folders(subfolder)
    return [*inner_folders, *folders_by_use.reference_folders, *neighbors]


def find_folder_kind(folder: Path, model: ModelSet, has_word: bool) -> RunKind:
    """Return the model's control network if the folder has control images for it, otherwise a LoRA."""
    control_kind = find_control_kind(model)
    if control_kind is not None and has_control_pairs(folder, has_word):
        return control_kind
    return LORA


def has_control_pairs(folder: Path, has_trigger_word: bool = False) -> bool:
    """Return whether any image in a folder has a control image, in a folder named `conditioning` or similar.

    The control folder is usually inside the folder. A control folder next to it may belong to another folder:
    it counts only if it has a control image for each image, if there are no other media next to it, and if no
    trigger word is given.
    """
    folders_by_use = _sort_folders(folder, FolderContent())
    parent = folder.absolute().parent
    for training_folder in folders_by_use.training_folders:
        image_stems = [path.stem for path in _list_files(training_folder, image_suffixes())]
        for control_folder in _list_reference_candidates(training_folder, folder, folders_by_use):
            if not CONTROLS.fullmatch(control_folder.name):
                continue
            without_control = _find_stems_without_reference(control_folder, image_stems)
            if len(without_control) == len(image_stems):  # no image has a control image
                continue
            is_neighbor = training_folder == folder and control_folder.parent == parent
            if not is_neighbor:
                return True
            if not without_control and not has_trigger_word and not _list_other_media(folder, control_folder):
                return True
    return False


def _list_other_media(folder: Path, reference_folder: Path) -> list[Path]:
    """Return media outside `folder` to which a control folder next to it may belong."""
    parent = reference_folder.parent
    others = [
        neighbor
        for neighbor in _list_subfolders(parent)
        if neighbor not in (folder.absolute(), reference_folder)
        and neighbor.name.lower() not in {*MASK_FOLDERS, *RUN_FOLDERS}
        and not REFERENCES.fullmatch(neighbor.name)
    ]
    return [path for neighbor in (parent, *others) for path in _list_media_files(neighbor)]


def _select_control_folders(
    folder: Path, folders_by_use: SortedFolders, content: FolderContent, kind: RunKind
) -> None:
    """Select each training folder's control image folder: the first that has any for its images."""
    # Inpainting uses the images themselves as control images. Unused folders are reported.
    unused_reason = "No file there has the name of an image next to it"
    if kind.inpaints_images:
        unused_reason = f"{kind.title} learns from the images themselves"
    for training_folder in folders_by_use.training_folders:
        if kind.inpaints_images:
            content.control_folders[training_folder] = training_folder
            continue
        image_stems = [item.path.stem for item in content.media if item.path.parent == training_folder]
        for candidate in _list_reference_candidates(training_folder, folder, folders_by_use):
            if len(_find_stems_without_reference(candidate, image_stems)) < len(image_stems):
                content.control_folders[training_folder] = candidate
                break
    for unused in folders_by_use.reference_folders:
        if unused not in content.control_folders.values() and _list_media_files(unused):
            content.report_lines.append(warning(f"{unused}: left out. {unused_reason}"))


def _select_folder_references(image_folder: Path, candidates: Sequence[Path], content: FolderContent) -> None:
    """Select the first candidate folder with references for any image in `image_folder`."""
    # References have the file names of their images. Missing ones are reported.
    media = [item for item in content.media if item.path.parent == image_folder]
    image_stems = [item.path.stem for item in media if item.kind == "image"]
    if not image_stems:
        return
    for candidate in candidates:
        missing = _find_stems_without_reference(candidate, image_stems)
        if len(missing) == len(image_stems):
            continue
        content.reference_folders[image_folder] = candidate
        for item in content.media:
            if item.path.parent != image_folder or item.kind != "image":
                continue
            for reference in find_references(item, candidate):
                reason = why_unused(reference)
                if reason:
                    text = f"{item.path.name}: not trained on, its reference cannot be read: {reason}"
                    content.report_lines.append(text)
        if missing:
            text = f"{len(missing)} of {len(image_stems)} images have no reference in {candidate}"
            content.report_lines.append(f"{image_folder}: {text}, such as {missing[0]}: trained without one")
        return


def _find_stems_without_reference(reference_folder: Path, stems: Sequence[str]) -> list[str]:
    """Return the stems of images for which `reference_folder` has no reference image."""
    with_reference = set[str]()
    with contextlib.suppress(DatasetError):  # the folder cannot be listed
        folder = ControlFolder(reference_folder, {*stems})
        for stem in stems:
            with contextlib.suppress(DatasetError):
                if folder.for_image(stem, None):
                    with_reference.add(stem)
    return [stem for stem in stems if stem not in with_reference]


def group_identical_files(media: Iterable[Media]) -> list[list[Path]]:
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


def find_references(media: Media, reference_folder: Path) -> tuple[Path, ...]:
    """Return the images in `reference_folder` that belong to a media file; () if no name matches."""
    try:
        return ControlFolder(reference_folder, {media.path.stem}).for_image(media.path.stem, None)
    except DatasetError:
        return ()


def why_unused(path: Path) -> str:
    """Return why a reference image cannot be used; "" if it is usable."""
    try:
        image_size(path)
    except MediaError as error:
        return str(error)
    return ""


def _find_images_named_as_references(media: Sequence[Media]) -> list[Path]:
    """Return uncaptioned images whose names mark them as references of another: cat_0, cat_input."""
    stems = {item.path.stem for item in media if item.kind == "image"}
    numbered = []
    for item in media:
        owner, _, ending = item.path.stem.rpartition("_")
        if item.caption is None and owner in stems and (ending.isdecimal() or REFERENCES.fullmatch(ending)):
            numbered.append(item.path)
    return numbered


def _describe_reference_layout(folder: Path, name: str, media: Sequence[Media]) -> str:
    """Return a message that shows in which folders images and their references belong."""
    numbered = _find_images_named_as_references(media)
    advice = ""
    if numbered:
        advice = f" {name_some(numbered)} seem to be such images: move them into {folder / 'control'}."
    return (
        f"{folder}: {name} learns edits, and there is no image to edit from.{advice} "
        "Make a folder like this:\n"
        f"  {folder / 'cat.jpg'}          a result\n"
        f"  {folder / 'cat.txt'}          the edit as a text, such as: the cat wears a hat\n"
        f"  {folder / 'control' / 'cat.jpg'}  what it is made from; of several cat_0.jpg, cat_1.jpg\n"
        "Other names for control: before, source, reference. It may also be next to the folder of results."
    )


def _describe_unsuitable_media(content: FolderContent, model_info: "ModelInfo") -> list[str]:
    """Return lines about media that may not suit training: few, small, transparent, silent or identical."""
    minimum = model_info.min_seconds
    long_enough = [item for item in content.media if item.seconds is None or item.seconds >= minimum]
    visible = [item for item in long_enough if item.kind != "audio"]
    lines = _describe_sizes(visible)
    if len(content.media) < FEW_MEDIA:
        files = format_count(len(content.media), "file")
        lines.append(f"{files} to learn from: few. They would mostly be memorized; 10 to 30 are usual")
    images = [item.path for item in visible if item.kind == "image"]
    # first frames of clips are not written yet, and have no alpha
    existing_images = [path for path in images if path not in content.first_frames]
    lines += _describe_transparent_images(existing_images, model_info)
    clips = [item.path for item in visible if item.is_clip]
    lines += _describe_silent_clips(clips, model_info)
    return lines + _describe_identical_files(content.media)


def _describe_transparent_images(images: Iterable[Path], model_info: "ModelInfo") -> list[str]:
    transparent = [path for path in images if _is_transparent(path)]
    if not transparent:
        return []
    effect = "which is learned" if model_info.trains_on_alpha else "which is learned as white"
    return [
        f"{name_some(transparent)}: transparent in part, {effect}; alpha_mask = true in "
        "dataset.toml leaves it out"
    ]


def _describe_silent_clips(clips: Iterable[Path], model_info: "ModelInfo") -> list[str]:
    """Return a line about clips without audio if the model is trained on audio, else []."""
    if not model_info.trains_on_audio:
        return []
    silent = [path for path in clips if _is_silent(path)]
    if model_info.reads_separate_audio:
        silent = [path for path in silent if find_audio_beside(path) is None]
    return [f"{name_some(silent)}: without sound: only their pictures are used"] if silent else []


def is_narrow(item: Media) -> bool:
    """Return whether an image has an extreme aspect ratio."""
    return max(item.size) > MAX_ASPECT_RATIO * min(item.size)


def _describe_sizes(media: Sequence[Media]) -> list[str]:
    """Return lines about clips and images that are too small or too narrow to train on."""
    tiny = [item.path for item in media if min(item.size) < FEW_PIXELS]
    narrow = [item.path for item in media if is_narrow(item)]
    lines = []
    if tiny:
        text = f"{name_some(tiny)}: tiny, below {FEW_PIXELS} pixels: the model would learn their blur"
        lines.append(warning(text))
    if narrow:
        text = (
            f"more than {MAX_ASPECT_RATIO} times as long as wide, a shape that few models were trained on: "
            "crop them"
        )
        lines.append(warning(f"{name_some(narrow)}: {text}"))
    return lines


def _describe_identical_files(media: Sequence[Media]) -> list[str]:
    """Return lines about the first groups of identical files, and how many more groups there are."""
    groups = group_identical_files(media)
    lines = []
    for paths in groups[:MAX_LISTED]:
        # with their folders, unless all files share one
        if len({path.parent for path in paths}) == 1:
            labels = [path.name for path in paths[:MAX_LISTED]]
        else:
            labels = [f"{path.parent.name}/{path.name}" for path in paths[:MAX_LISTED]]
        names = " = ".join(labels)
        lines.append(
            f"{names}: equal copies, which are trained more often than others. Delete all but one of "
            f"{len(paths)}"
        )
    if len(groups) > MAX_LISTED:
        lines.append(f"... and {len(groups) - MAX_LISTED} more groups of equal copies")
    return lines


def _is_transparent(path: Path) -> bool:
    with contextlib.suppress(MediaError), open_image(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A").getextrema()
            return isinstance(alpha[0], (int, float)) and alpha[0] < 255
    return False


def _has_audio(item: Media) -> bool:
    return item.kind == "audio" or (item.is_clip and not _is_silent(item.path))


def _is_silent(path: Path) -> bool:
    try:
        return is_animation(path) or track_info(path) is None
    except MediaError:
        return True


def name_some(paths: Sequence[Path]) -> str:
    """Return the first few file names, and how many more there are."""
    names = [path.name for path in paths]
    further = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + further
