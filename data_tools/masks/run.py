"""Make the masks that a folder lacks, after the options of tools/mask.py are read."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_tools.folders import walk_folders
from data_tools.masks.places import (
    ACCEPTED_TEXT,
    BACKGROUND_FILE,
    FACE_FILE,
    FOLDER_NAME,
    IS_COLOR,
    METHOD_TEXT,
    MODEL_FOLDER,
    Gray,
    MaskEntry,
    find_mask_entries,
    mask_line,
    read_frames,
    write_mask,
)
from data_tools.masks.shaping import MaskShaping, ScoreMap, median_over_time
from data_tools.masks.words import load_prompt_finder, read_kind
from dataset.caching.prefetch import Failure, failure_error
from modules.bars import track
from modules.console import Row, format_count, list_some, show_box
from modules.errors import DatasetError, MediaError, OptionError
from modules.media.reading import Frame, read_image, video_frames
from modules.options import Options, option
from modules.text_files import bad_character, real_path

WATERMARK = ("a watermark", "a logo", "text")
MAX_WORDS = 300  # maximum characters of a prompt
NETWORK_SMOOTH = 5  # default --smooth_pixels for networks, which find edges only roughly
FINDERS = ("what", "watermark", "background", "faces", "colour")

logger = logging.getLogger(__name__)


class FinderOptions(Options, title="what to find"):
    """What the masks should cover, and how it is found."""

    what: tuple[str, ...] | None = option(
        'find this, in a few words, such as "the person"; may be given several times: what fits any of them '
        "is found (the maximum of their values, before --threshold)",
        action="append",
        nargs=None,
        metavar="WORDS",
        excludes=("watermark", "background", "faces", "colour"),
        often=True,
    )
    watermark: bool = option(
        f"find {', '.join(WATERMARK)}, and learn everything else",
        excludes=("background", "faces", "colour"),
    )
    background: Path | None = option(
        "find the foreground, with a U2Net-like ONNX file; with --invert the background; "
        f"without a file {BACKGROUND_FILE.as_posix()}",
        nargs="?",
        const=BACKGROUND_FILE,
        metavar="FILE",
        excludes=("faces", "colour"),
    )
    faces: Path | None = option(
        "find faces, with a detector: YuNet, a YOLO for faces as ONNX, or RetinaFace; without a file "
        f"{FACE_FILE.as_posix()}",
        nargs="?",
        const=FACE_FILE,
        metavar="FILE",
        excludes="colour",
    )
    colour: str | None = option(
        "find a color, such as 00ff00, green: red, green and blue in two hexadecimal digits each",
        metavar="RRGGBB",
    )
    model: Path = option(
        "of --what and --watermark: folder of a CLIPSeg or SAM 3 model, as transformers saves it",
        default=MODEL_FOLDER,
    )
    least_score: float = option(
        "of --faces, and of --what with SAM 3: how sure of a thing the network has to be",
        default=0.5,
        minimum=0,
        maximum=1,
        ignored_without=("faces", "what", "watermark"),
    )
    colour_distance: float = option(
        "of --colour: how far red, green and blue, each 0 to 1, may lie from it (root of the squares' sum)",
        default=0.1,
        minimum=0,
        maximum=2,
        ignored_without="colour",
    )
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")

    def __post_init__(self) -> None:
        for words in self.what or ():
            if not words.strip():
                raise OptionError("--what is empty: describe what to find")
            character = bad_character(words)
            if character is not None:
                raise OptionError(f"--what holds {character}: set the terminal to UTF-8")
            if len(words) > MAX_WORDS or len(words.splitlines()) > 1:
                raise OptionError(f"--what: pass one line of at most {MAX_WORDS} characters")
        if self.colour is not None and not IS_COLOR.fullmatch(self.colour):
            raise OptionError(f"--colour {self.colour}: use six hexadecimal digits, such as 00ff00 for green")

    def require_one(self) -> None:
        """Raise OptionError unless some option says what the masks should cover."""
        if not any(getattr(self, name) not in (None, False) for name in FINDERS):
            raise OptionError(
                'Say what to find: --what "the person", --watermark, --background, --faces or --colour'
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts of --what or --watermark; none for other finders."""
        return WATERMARK if self.watermark else self.what or ()


class MaskShapeOptions(Options, title="the shape of the masks"):
    """Options that turn a finder's scores, 0..1, into a mask."""

    threshold: float | None = option(
        "a place is found where its value lies above; default: 0.3, with SAM 3 0.5", minimum=0, below=1
    )
    smooth_pixels: int | None = option(
        "average each value with those of so many neighbors on each side, counted on the network's own "
        f"grid, before the threshold; default: {NETWORK_SMOOTH}, of --faces and --colour 0",
        minimum=0,
        maximum=1000,
    )
    expand_pixels: int = option(
        "enlarge the found regions by so many pixels on each side",
        default=10,
        minimum=0,
        maximum=10_000,
    )
    feather_pixels: int = option(
        "then let the edge fade to black over so many pixels more", default=0, minimum=0, maximum=10_000
    )
    steady_frames: int = option(
        "of clips: the value of a place is the median over so many frames before and after it, before the "
        "threshold, so that the edge does not flicker; 0: each frame for itself",
        default=2,
        minimum=0,
        maximum=100,
    )
    invert: bool = option("train on everything except what is found")


class MaskOptions(Options, title="what to do"):
    """Which media get masks, where the masks are written, and what happens to existing ones."""

    folder: Path = option("folder of images and clips", positional=True, place="folder")
    recursive: bool = option("also make masks for the folders below, each in its own")
    output: Path | None = option(
        f"folder for the masks; default: {FOLDER_NAME}, in the folder of the images",
        place="new folder",
        excludes=("beside", "recursive"),
    )
    beside: bool = option("write NAME-masklabel.png next to the images, as OneTrainer does")
    mode: str = option(
        "fill: only where there is no mask; replace: in place of any mask, hand-drawn ones too; add: "
        "to what the mask shows; subtract: from it (without a mask: from the whole image); blend: the "
        "mean of both, in which the new one counts --alpha times. The mask as it was is kept in .before",
        default="fill",
        choices=("fill", "replace", "add", "subtract", "blend"),
        often=True,
    )
    alpha: float = option("brightness of what is found, 1 is white", default=1.0, above=0, maximum=1)
    overwrite: bool = option(
        "with --mode fill: make again masks that this program made in another way; what a person has drawn, "
        "accepted or removed stays"
    )
    dry_run: bool = option("say what would be made, and write nothing")
    finder: FinderOptions
    shape: MaskShapeOptions

    def __post_init__(self) -> None:
        if self.overwrite and self.mode != "fill":
            raise OptionError(f"--overwrite is for --mode fill; --mode {self.mode} changes every mask")

    @property
    def inverts(self) -> bool:
        """Return whether the found regions are excluded from the loss instead of selected for it."""
        return self.shape.invert != self.finder.watermark


class Finder(Protocol):
    """Finds the regions of images that a mask should cover."""

    def score(self, frame: Frame) -> ScoreMap:
        """Return how strongly each region of an image, H W 3, should be masked: h w, 0..1."""


class _NothingFoundError(Exception):
    """Raised if nothing to mask was found in an image, or in any frame of a clip."""


@dataclass
class MaskPlan:
    """Which masks a run makes and which existing ones it keeps, for the media in some folders."""

    to_make: list[MaskEntry] = field(default_factory=list)
    made_with_other_options: list[MaskEntry] = field(default_factory=list)  # made before by this program
    reviewed: list[MaskEntry] = field(default_factory=list)  # drawn, changed or accepted by a person
    removed: list[MaskEntry] = field(default_factory=list)  # by a person


@dataclass
class MaskOutcome:
    """Numbers and failures of the masks made in a run."""

    written: list[MaskEntry] = field(default_factory=list)
    nothing_found: list[MaskEntry] = field(default_factory=list)
    all_black: list[MaskEntry] = field(default_factory=list)  # nothing would be learned
    failures: list[Failure] = field(default_factory=list)  # files that cannot be read


def make_masks(options: MaskOptions) -> None:
    """Make masks for the images and clips in a folder.

    Masks are written atomically, so the same command continues an interrupted run.

    Raises:
        UserError: If an option or the folder cannot be used.
        DatasetError: At the end, if files could not be read.
    """
    options.finder.require_one()  # called only to raise if no option says what to find
    entries = _find_all_entries(options)
    _reject_ambiguous_masks(entries)
    # what finds the masked areas: the type of the model for prompts, or the name of another option
    if options.finder.prompts:
        kind = read_kind(options.finder.model)
    else:
        kind = next(
            name for name in ("background", "faces", "colour") if getattr(options.finder, name) is not None
        )
    shaping = _make_shaping(options, kind)
    method = _describe_method(options, kind, shaping)
    plan = _make_plan(entries, options, method)
    _warn_of_remaining_masks(plan)
    if options.dry_run:
        names = list_some([entry.media_path.name for entry in plan.to_make])
        text = f"{format_count(len(plan.to_make), 'mask')} would be made{': ' if names else ''}{names}"
        show_box("Masks", [("masks", f"{text}. Nothing is written"), ("by", method)])
        return
    outcome = MaskOutcome()
    if plan.to_make:
        finder = _load_finder(options.finder)
        for entry in track(plan.to_make, "Masks", len(plan.to_make), unit="file"):
            mask_frames = _generate_masks(entry, finder, shaping, options)
            png_texts = _make_texts(entry, method, options.mode)
            try:
                is_written = write_mask(entry, mask_frames, entry.kind == "video", png_texts)
            except MediaError as error:
                outcome.failures.append(
                    Failure(entry.media_path, reason=str(error), table=0, stem=entry.media_path.stem)
                )
            except _NothingFoundError:
                outcome.nothing_found.append(entry)
            else:
                (outcome.written if is_written else outcome.all_black).append(entry)
    _show_outcome(outcome, entries, num_unchanged=len(entries) - len(plan.to_make), method=method)
    if outcome.failures:
        raise failure_error(outcome.failures, format_count(len(plan.to_make), "file"))


def _find_all_entries(options: MaskOptions) -> list[MaskEntry]:
    """Return the images and clips of the folder, with --recursive also of its subfolders, with their masks.

    Raises:
        OptionError: If the masks would be written among the images.
        DatasetError: If there are no images or clips, or if a folder cannot be listed.
    """
    folders = [real_path(folder) for folder in walk_folders(options.folder, options.recursive)]
    mask_folders = {folder: _find_mask_folder(folder, options) for folder in folders}
    entries: list[MaskEntry] = []
    for folder, mask_folder in mask_folders.items():
        entries += find_mask_entries(folder, mask_folder)
    if not entries:
        hint = "" if options.recursive else ". --recursive also searches its subfolders"
        raise DatasetError(f"{options.folder} has no images and no clips{hint}")
    return entries


def _show_outcome(
    outcome: MaskOutcome, entries: Sequence[MaskEntry], num_unchanged: int, method: str
) -> None:
    """Log the files without a mask, then print the number of masks and the lines for dataset.toml."""
    _log_file_warning(
        "Nothing was found in %s (a file without a mask is used completely): %s", outcome.nothing_found
    )
    _log_file_warning("Nothing would be learned from %s (no mask is written): %s", outcome.all_black)
    masked = [entry for entry in entries if entry.mask is not None]
    mask_folders = dict.fromkeys(entry.mask_folder for entry in [*masked, *outcome.written])
    made = f"{format_count(len(outcome.written), 'mask')}, {num_unchanged} left as they were"
    rows: list[Row] = [("made", made), ("by", method)]
    show_box("Masks", rows, [("In dataset.toml", mask_line(folder)) for folder in mask_folders])


def _find_mask_folder(folder: Path, options: MaskOptions) -> Path:
    """Return the folder of masks for a media folder. Raises OptionError if the two are the same."""
    if options.beside:
        return folder
    if options.output is None:
        return folder / FOLDER_NAME
    masks = real_path(options.output)
    if masks == folder:
        raise OptionError(f"--output {options.output}: this is the folder of the images. Pass --beside")
    return masks


def _reject_ambiguous_masks(entries: Sequence[MaskEntry]) -> None:
    """Raise DatasetError if two files would share a mask, or one file has several masks."""
    by_target: dict[tuple[Path, str], MaskEntry] = {}
    for entry in entries:
        first = by_target.setdefault((entry.mask_folder, entry.mask_stem.casefold()), entry)
        if first != entry:
            raise DatasetError(
                f"{first.media_path} and {entry.media_path.name} would have the same mask. Rename one of them"
            )
        if len(entry.masks) > 1:
            one, other, *_ = entry.masks
            raise DatasetError(f"{one} and {other.name} are masks of {entry.media_path.name}. Keep one")


def _make_shaping(options: MaskOptions, kind: str) -> MaskShaping:
    """Return how scores are turned into masks; options that are not set get the finder's defaults."""
    shape = options.shape
    is_exact = kind in ("faces", "colour")  # these find whole areas: smoothing would only blur the border
    default_smooth = 0 if is_exact else NETWORK_SMOOTH
    default_threshold = 0.5 if kind == "sam3" else 0.3
    return MaskShaping(
        threshold=default_threshold if shape.threshold is None else shape.threshold,
        smooth_pixels=default_smooth if shape.smooth_pixels is None else shape.smooth_pixels,
        expand_pixels=shape.expand_pixels,
        feather_pixels=shape.feather_pixels,
        inverts=options.inverts,
    )


def _describe_method(options: MaskOptions, kind: str, shape: MaskShaping) -> str:
    """Return a description of how masks are made, which is stored in the mask files."""
    parts = [
        _describe_finder(options.finder, kind),
        f"threshold {shape.threshold:g}",
        f"smooth {shape.smooth_pixels}",
        f"expand {shape.expand_pixels}",
        f"feather {shape.feather_pixels}",
        f"steady {options.shape.steady_frames}",
        f"{options.mode} {options.alpha:g}",
    ]
    return ", ".join([*parts, "inverted"] if shape.inverts else parts)


def _describe_finder(finder: FinderOptions, kind: str) -> str:
    """Return a description of how masks are found, which is stored in each mask."""
    if finder.background is not None:
        return f"foreground by {real_path(finder.background).name}"
    if finder.faces is not None:
        return f"faces by {real_path(finder.faces).name}, score {finder.least_score:g}"
    if finder.colour is not None:
        return f"color {finder.colour.removeprefix('#').lower()}, distance {finder.colour_distance:g}"
    score = f", score {finder.least_score:g}" if kind == "sam3" else ""
    return f"{' | '.join(finder.prompts)} by {real_path(finder.model).name}{score}"


def _make_plan(entries: Sequence[MaskEntry], options: MaskOptions, method: str) -> MaskPlan:
    """Decide for each image or clip whether its mask is made, and list masks that stay for a reason."""
    # Mode "fill" makes only masks that do not exist; with --overwrite, also those that this program has made
    # with another method. `method` describes how this run finds masks, and is stored in each mask.
    plan = MaskPlan()
    for entry in entries:
        png_texts = entry.read_texts()
        previous_methods = png_texts.get(METHOD_TEXT, "").split("\n")
        is_drawn_or_accepted = previous_methods == [""] or ACCEPTED_TEXT in png_texts  # by a person
        if entry.mask is None and entry.is_removed and options.mode == "fill":
            plan.removed.append(entry)  # a person decided against a mask
        elif entry.mask is None:
            plan.to_make.append(entry)
        elif previous_methods[-1] == method:
            continue  # this run would make the same mask
        elif options.mode != "fill":
            plan.to_make.append(entry)
        elif is_drawn_or_accepted:
            plan.reviewed.append(entry)
        elif options.overwrite:
            plan.to_make.append(entry)
        else:
            plan.made_with_other_options.append(entry)
    return plan


def _make_texts(entry: MaskEntry, method: str, mode: str) -> dict[str, str]:
    """Return the text entries of a new mask: a line for each method applied, and whether a person edited it.

    These lines keep an interrupted run that changes masks from changing a mask twice.
    """
    if entry.mask is None or mode in ("fill", "replace"):
        return {METHOD_TEXT: method}
    old_texts = entry.read_texts()
    previous_methods = old_texts.get(METHOD_TEXT)
    texts = {METHOD_TEXT: f"{previous_methods}\n{method}" if previous_methods else method}
    if METHOD_TEXT not in old_texts or ACCEPTED_TEXT in old_texts:  # a person drew or accepted the mask
        texts[ACCEPTED_TEXT] = "yes"
    return texts


def _generate_masks(
    entry: MaskEntry, finder: Finder, shaping: MaskShaping, options: MaskOptions
) -> Iterator[Gray]:
    """Yield the mask of an image, or the masks of a clip's frames, H W each."""
    if entry.kind == "video":
        frames: Iterable[Frame] = video_frames(entry.media_path)
        steady_frames = options.shape.steady_frames
    else:
        frames = [read_image(entry.media_path)]
        steady_frames = 0
    # sizes of the frames that were read ahead: the median of a frame needs the frames after it
    sizes: deque[tuple[int, int]] = deque()
    score_maps = median_over_time(_score_frames(frames, finder, sizes), steady_frames)
    previous_masks = itertools.repeat(None) if entry.mask is None else _repeat_last(read_frames(entry.mask))
    has_found = False
    for score_map, previous_mask in zip(score_maps, previous_masks, strict=False):
        found_mask = shaping.shape(score_map, sizes.popleft())
        has_found = has_found or bool(found_mask.any())
        yield shaping.combine_with_previous(found_mask, previous_mask, options.mode, options.alpha)
    if not has_found:
        raise _NothingFoundError


def _score_frames(
    frames: Iterable[Frame], finder: Finder, sizes: "deque[tuple[int, int]]"
) -> Iterator[ScoreMap]:
    """Yield a finder's scores for each frame, and append the frame's (width, height) to `sizes`."""
    for frame in frames:
        sizes.append((frame.shape[1], frame.shape[0]))
        yield finder.score(frame)


def _repeat_last(frames: Iterable[Gray]) -> Iterator[Gray]:
    """Yield the frames, then the last one endlessly."""
    frame = None
    for frame in frames:
        yield frame
    if frame is not None:
        yield from itertools.repeat(frame)


def _load_finder(options: FinderOptions) -> Finder:
    """Load the model, or make the color rule, that finds the areas to mask, depending on the options."""
    if options.prompts:
        return load_prompt_finder(options.model, options.prompts, options.least_score, options.device)
    # imported late, when an image needs a mask
    from data_tools.masks import seen

    if options.background is not None:
        return seen.load_background_finder(options.background)
    if options.faces is not None:
        return seen.load_face_finder(options.faces, options.least_score, options.device)
    assert options.colour is not None  # the options have checked it
    return seen.make_color_finder(options.colour, options.colour_distance)


def _warn_of_remaining_masks(plan: MaskPlan) -> None:
    """Warn about existing masks that are not replaced, although this run would make different ones."""
    outdated = plan.made_with_other_options
    if outdated:
        logger.warning(
            "%s kept, made with other options. --overwrite makes them again: %s",
            format_count(len(outdated), "mask"),
            list_some([entry.media_path.name for entry in outdated]),
        )
    if plan.reviewed:
        logger.warning(
            "%s kept, drawn or accepted by a person. --mode replace replaces them: %s",
            format_count(len(plan.reviewed), "mask"),
            list_some([entry.media_path.name for entry in plan.reviewed]),
        )
    if plan.removed:
        logger.warning(
            "%s removed before and not made again; --mode replace does: %s",
            format_count(len(plan.removed), "mask"),
            list_some([entry.media_path.name for entry in plan.removed]),
        )


def _log_file_warning(text: str, entries: Sequence[MaskEntry]) -> None:
    """Log a warning with the number of files and the first names; log nothing if there are no files."""
    if entries:
        logger.warning(
            text, format_count(len(entries), "file"), list_some([entry.media_path.name for entry in entries])
        )
