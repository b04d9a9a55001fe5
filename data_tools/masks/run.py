"""Make the masks that a folder lacks, after the options of tools/mask.py are read."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_tools.folders import walk_folders
from data_tools.masks.options import FOLDER_NAME, NETWORK_SMOOTH, FinderOptions, MaskOptions
from data_tools.masks.places import (
    ACCEPTED,
    MADE,
    Gray,
    MaskPlace,
    find_mask_places,
    mask_line,
    read_frames,
    write_mask,
)
from data_tools.masks.shaping import MaskShape, Values, steady
from dataset.caching.prefetch import Failure, failure_error
from modules.bars import track
from modules.console import Row, format_count, list_some, show_box
from modules.errors import DatasetError, MediaError, OptionError
from modules.media.reading import Frame, read_image, video_frames
from modules.text_files import real_path

logger = logging.getLogger(__name__)


class Finder(Protocol):
    """Finds the regions of images that a mask should cover."""

    def find(self, frame: Frame) -> Values:
        """Return how strongly each region of an image, H W 3, is to be masked: h w, 0..1."""


class _NothingFoundError(Exception):
    """Nothing to mask was found in an image, or in any frame of a clip."""


@dataclass
class MaskPlan:
    """Which masks are made, and which existing ones stay, for the media in some folders."""

    jobs: list[MaskPlace] = field(default_factory=list)
    other_method: list[MaskPlace] = field(default_factory=list)  # made before by this program, in another way
    by_hand: list[MaskPlace] = field(default_factory=list)  # drawn, changed or accepted by a person
    removed: list[MaskPlace] = field(default_factory=list)  # by a person


@dataclass
class MaskOutcome:
    """Numbers and failures of the masks made in a run."""

    written: list[MaskPlace] = field(default_factory=list)
    empty: list[MaskPlace] = field(default_factory=list)  # nothing was found
    black: list[MaskPlace] = field(default_factory=list)  # nothing would be learned
    failures: list[Failure] = field(default_factory=list)  # files that cannot be read


def make_masks(options: MaskOptions) -> None:
    """Make masks for the images and clips in a folder.

    Masks are written atomically, so the same command continues an interrupted run.

    Raises:
        UserError: If an option or the folder cannot be used.
        DatasetError: At the end, if files could not be read.
    """
    options.finder.require_one()  # called only to raise if no option says what to find
    folders = [real_path(folder) for folder in walk_folders(options.folder, options.recursive)]
    by_folder = {folder: _find_mask_folder(folder, options) for folder in folders}
    places = [place for folder, masks in by_folder.items() for place in find_mask_places(folder, masks)]
    if not places:
        hint = "" if options.recursive else ". --recursive also takes the folders below it"
        raise DatasetError(f"{options.folder} has no pictures and no clips{hint}")
    _reject_unclear(places)
    kind = _find_kind(options.finder)
    shape = _read_shape(options, kind)
    method = _describe_method(options, kind, shape)
    plan = _make_plan(places, options, method)
    _warn_of_kept(plan)
    if options.dry_run:
        names = list_some([place.medium.name for place in plan.jobs])
        text = f"{format_count(len(plan.jobs), 'mask')} would be made{': ' if names else ''}{names}"
        show_box("Masks", [("masks", f"{text}. Nothing is written"), ("by", method)])
        return
    outcome = MaskOutcome()
    if plan.jobs:
        finder = _load_finder(options.finder)
        for place in track(plan.jobs, "Masks", len(plan.jobs), unit="file"):
            frames = _draw(place, finder, shape, options)
            _make_mask(place, frames, _make_texts(place, method, options.mode), outcome)
    _show_outcome(outcome, places, num_kept=len(places) - len(plan.jobs), method=method)
    if outcome.failures:
        raise failure_error(outcome.failures, format_count(len(plan.jobs), "file"))


def _show_outcome(outcome: MaskOutcome, places: Sequence[MaskPlace], num_kept: int, method: str) -> None:
    """Log the files without a mask, then print the number of masks and the lines for dataset.toml."""
    _warn_of_files("Nothing is found in %s (without a mask a file is learned whole): %s", outcome.empty)
    _warn_of_files("Nothing would be learned of %s (no mask is written): %s", outcome.black)
    masked = [place for place in places if place.mask is not None]
    mask_folders = dict.fromkeys(place.folder for place in [*masked, *outcome.written])
    made = f"{format_count(len(outcome.written), 'mask')}, {num_kept} left as they were"
    rows: list[Row] = [("made", made), ("by", method)]
    show_box("Masks", rows, [("In dataset.toml", mask_line(folder)) for folder in mask_folders])


def _make_mask(
    place: MaskPlace, frames: Iterator[Gray], texts: Mapping[str, str], outcome: MaskOutcome
) -> None:
    """Write a mask and record the outcome. Raises OutputError if it cannot be written."""
    try:
        is_written = write_mask(place, frames, place.kind == "video", texts)
    except MediaError as error:
        outcome.failures.append(Failure(place.medium, str(error), 0, place.medium.stem))
    except _NothingFoundError:
        outcome.empty.append(place)
    else:
        (outcome.written if is_written else outcome.black).append(place)


def _find_mask_folder(folder: Path, options: MaskOptions) -> Path:
    """Return the folder of masks for a media folder. Raises OptionError if the two are the same."""
    if options.beside:
        return folder
    if options.output is None:
        return folder / FOLDER_NAME
    masks = real_path(options.output)
    if masks == folder:
        raise OptionError(f"--output {options.output}: this is the folder of the pictures. Give --beside")
    return masks


def _reject_unclear(places: Sequence[MaskPlace]) -> None:
    """Raise DatasetError if two files would share a mask, or one file has several masks."""
    by_target: dict[tuple[Path, str], MaskPlace] = {}
    for place in places:
        first = by_target.setdefault((place.folder, place.name.casefold()), place)
        if first != place:
            raise DatasetError(
                f"{first.medium} and {place.medium.name} would have the same mask. Rename one of them"
            )
        if len(place.masks) > 1:
            one, other, *_ = place.masks
            raise DatasetError(f"{one} and {other.name} are masks of {place.medium.name}. Keep one")


def _find_kind(finder: FinderOptions) -> str:
    """Return what finds the masked areas: a model type for prompts, otherwise the name of the option.

    Raises:
        CheckpointError: If the model cannot search for prompts.
    """
    if finder.prompts:
        from data_tools.masks.words import read_kind  # imports torch, which a color does not need

        return read_kind(finder.model)
    return next(name for name in ("background", "faces", "colour") if getattr(finder, name) is not None)


def _read_shape(options: MaskOptions, kind: str) -> MaskShape:
    """Return the shaping of masks; unset options take the finder's defaults."""
    shape = options.shape
    is_exact = kind in ("faces", "colour")  # these find whole areas: smoothing would only blur the border
    default_smooth = 0 if is_exact else NETWORK_SMOOTH
    default_threshold = 0.5 if kind == "sam3" else 0.3
    return MaskShape(
        threshold=default_threshold if shape.threshold is None else shape.threshold,
        smooth_pixels=default_smooth if shape.smooth_pixels is None else shape.smooth_pixels,
        expand_pixels=shape.expand_pixels,
        feather_pixels=shape.feather_pixels,
        inverts=options.inverts,
    )


def _describe_method(options: MaskOptions, kind: str, shape: MaskShape) -> str:
    """Return a text about how masks are made, which is stored in the mask files."""
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
    """Return a text about how masks are found, which is stored in each mask."""
    if finder.background is not None:
        return f"foreground by {real_path(finder.background).name}"
    if finder.faces is not None:
        return f"faces by {real_path(finder.faces).name}, score {finder.least_score:g}"
    if finder.colour is not None:
        return f"color {finder.colour.removeprefix('#').lower()}, distance {finder.colour_distance:g}"
    score = f", score {finder.least_score:g}" if kind == "sam3" else ""
    return f"{' | '.join(finder.prompts)} by {real_path(finder.model).name}{score}"


def _make_plan(places: Sequence[MaskPlace], options: MaskOptions, method: str) -> MaskPlan:
    """Decide for each image or clip whether its mask is made, and list masks that stay for a reason.

    `method` describes how this run finds masks, and is stored in each mask. Mode "fill" makes only masks that
    do not exist.
    """
    plan = MaskPlan()
    for place in places:
        texts = place.texts()
        made_by = texts.get(MADE, "")
        if place.mask is None:
            if place.is_removed and options.mode == "fill":  # a person decided against a mask
                plan.removed.append(place)
            else:
                plan.jobs.append(place)
        elif made_by.split("\n")[-1] == method:
            continue  # the last line of the text in the mask names its last method: it is this one
        elif options.mode != "fill":
            plan.jobs.append(place)
        # a person has drawn or accepted the mask
        elif not made_by or ACCEPTED in texts:
            plan.by_hand.append(place)
        elif options.overwrite:
            plan.jobs.append(place)
        else:
            plan.other_method.append(place)
    return plan


def _make_texts(place: MaskPlace, method: str, mode: str) -> dict[str, str]:
    """Return the texts of a new mask: a line for each method applied to it, and whether a person edited it.

    These lines keep a run that changes masks, and was interrupted, from changing a mask twice.
    """
    old = place.texts()
    if place.mask is None or mode in ("fill", "replace"):
        return {MADE: method}
    is_of_person = MADE not in old or ACCEPTED in old
    made = "\n".join(filter(None, [old.get(MADE, ""), method]))
    return {MADE: made, ACCEPTED: "yes"} if is_of_person else {MADE: made}


def _draw(place: MaskPlace, finder: Finder, shape: MaskShape, options: MaskOptions) -> Iterator[Gray]:
    """Yield the mask of an image, or the masks of a clip's frames, H W each.

    Raises:
        MediaError: If a file cannot be read.
        _NothingFoundError: At the end, if nothing was found in any frame.
    """
    # of the frames that are read and have no mask yet: a steady mask needs frames after its own
    sizes: deque[tuple[int, int]] = deque()
    frames = video_frames(place.medium) if place.kind == "video" else iter([read_image(place.medium)])
    values = steady(
        _find_in(frames, finder, sizes), options.shape.steady_frames if place.kind == "video" else 0
    )
    previous_masks = itertools.repeat(None) if place.mask is None else _repeat_last(read_frames(place.mask))
    has_found = False
    for value, previous_mask in zip(values, previous_masks, strict=False):
        found = shape.find(value, sizes.popleft())
        has_found = has_found or bool(found.any())
        yield shape.finish(found, previous_mask, options.mode, options.alpha)
    if not has_found:
        raise _NothingFoundError


def _find_in(frames: Iterable[Frame], finder: Finder, sizes: "deque[tuple[int, int]]") -> Iterator[Values]:
    """Yield a finder's values for each frame, and append the frame's (width, height) to `sizes`."""
    for frame in frames:
        sizes.append((frame.shape[1], frame.shape[0]))
        yield finder.find(frame)


def _repeat_last(frames: Iterable[Gray]) -> Iterator[Gray]:
    """Yield the frames, then the last one endlessly."""
    frame = None
    for frame in frames:
        yield frame
    if frame is not None:
        yield from itertools.repeat(frame)


def _load_finder(options: FinderOptions) -> Finder:
    """Load the model, or make the color rule, that finds the areas to mask, depending on the options.

    Raises CheckpointError if its file is missing or damaged.
    """
    if options.prompts:
        from data_tools.masks.words import load_word_finder  # imports torch, which a color does not need

        return load_word_finder(options.model, options.prompts, options.least_score, options.device)
    # imported late, when an image needs a mask
    from data_tools.masks import seen

    if options.background is not None:
        return seen.load_background_finder(options.background)
    if options.faces is not None:
        return seen.load_face_finder(options.faces, options.least_score, options.device)
    assert options.colour is not None  # the options have checked it
    return seen.make_color_finder(options.colour, options.colour_distance)


def _warn_of_kept(plan: MaskPlan) -> None:
    """Warn about existing masks that are not replaced, although this run would make others."""
    if plan.other_method:
        logger.warning(
            "%s kept, made with other options. --overwrite makes them again: %s",
            format_count(len(plan.other_method), "mask"),
            list_some([place.medium.name for place in plan.other_method]),
        )
    if plan.by_hand:
        logger.warning(
            "%s kept, drawn or accepted by a person. --mode replace replaces them: %s",
            format_count(len(plan.by_hand), "mask"),
            list_some([place.medium.name for place in plan.by_hand]),
        )
    if plan.removed:
        logger.warning(
            "%s removed before and not made again; --mode replace does: %s",
            format_count(len(plan.removed), "mask"),
            list_some([place.medium.name for place in plan.removed]),
        )


def _warn_of_files(text: str, places: Sequence[MaskPlace]) -> None:
    """Log a warning with the number of files and the first names; nothing without files."""
    if places:
        logger.warning(
            text, format_count(len(places), "file"), list_some([place.medium.name for place in places])
        )
