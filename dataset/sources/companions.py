"""Find by name and read references of clips, and masks of the part of control clips that is generated."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset.sources.clock import companion_frames, read_mask
from dataset.sources.folders import list_entries
from dataset.sources.frames import ClipCompanions
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.console import format_count
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Size, size_within
from modules.media.canvas import composite_on_white
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.pixels import pixels_to_uint8
from modules.media.reading import (
    VIDEO_SUFFIXES,
    FrameSizes,
    first_frame,
    frame_size,
    image_suffixes,
    is_single_image,
    read_image,
    resize_cover,
    resize_stretched,
)
from modules.paths import compose_name
from protocols.rules import ReferenceRules

Clip = NDArray[np.uint8]  # F H W C

logger = logging.getLogger(__name__)
REFERENCE, MASK = "reference_directory", "control_mask_directory"
LACKS_COMPANION = {
    REFERENCE: "have no reference, while others have",
    MASK: "have no control mask, while others have",
}


def add_companions(table: DatasetTable, sources: list[MediaSource], faults: list[Fault]) -> list[MediaSource]:
    """Add references and control masks, found by name in the table's folders, to its media.

    `cat.mp4`, `cat.png` or a folder `cat` belongs to `cat.mp4`; references may also be numbered `cat_0.mp4`,
    `cat_1.mp4`, ..., which determines their order. Two files with the same number, and a folder without any
    matching file, are errors. Media without a file and files without media are logged as a warning.
    """
    stems = frozenset(source.stem for source in sources)
    for key in (REFERENCE, MASK):
        folder = table.value_of(key)
        if folder is None:
            continue
        paired = pair_or_report(table, folder, key, stems, faults)
        if paired is None:
            continue
        companions, unmatched = paired
        without_companion = [source.path for source in sources if source.stem not in companions]
        warn_about_paths(table, f"of {len(sources)} {table.kind}s {LACKS_COMPANION[key]}", without_companion)
        warn_about_paths(table, f"in {key} match no {table.kind} by name and are not read", unmatched)
        sources = [_with_companion(source, key, companions.get(source.stem, ())) for source in sources]
    return sources


def _with_companion(source: MediaSource, key: str, paths: tuple[Path, ...]) -> MediaSource:
    """Return a source with its companion files, which come from the folder that the table's `key` names."""
    if key == REFERENCE:
        return replace(source, references=paths)
    return replace(source, control_mask=paths[0] if paths else None)


def pair_or_report(
    table: DatasetTable, folder: Path, key: str, stems: Collection[str], faults: list[Fault]
) -> tuple[dict[str, tuple[Path, ...]], list[Path]] | None:
    """Return the result of `pair_by_name`, which pairs files in `folder` with the media of these stems.

    Returns None, with an error added to `faults`, if it fails or if no file matches.
    """
    try:
        companions, unmatched = pair_by_name(table, folder, key, stems)
        if not companions:
            # no file belongs to an item, so the message says how to name them
            example = next(iter(sorted(stems)), "clip")
            text = (
                f"{folder} has nothing for any {table.kind}. Files and folders there are named like "
                f"their {table.kind}: {example}.mp4, {example}.png"
            )
            if key == REFERENCE:  # only references may be several
                text = f"{text} or {example}_0.mp4, {example}_1.mp4"
            raise DatasetError(text)  # caught below
    except DatasetError as error:
        faults.append(Fault(f"problems with {key} of {table.name}", f"{str(error).rstrip('.')}."))
        return None
    return companions, unmatched


def warn_about_paths(table: DatasetTable, problem: str, paths: Sequence[Path]) -> None:
    """Log how many of a table's paths have a problem, and the first few; nothing if there are none."""
    if paths:
        logger.warning("%s: %d %s, such as %s", table.name, len(paths), problem, paths[0])


def pair_by_name(
    table: DatasetTable, folder: Path, key: str, stems: Collection[str]
) -> tuple[dict[str, tuple[Path, ...]], list[Path]]:
    """Find, by their names, the files of a folder that belong to each item.

    Args:
        table: Table of the items.
        folder: Folder with the files.
        key: Key of the table that names the folder.
        stems: Stems of the items.

    Returns:
        The paths of each stem, in the order of their numbers; and the paths that belong to no stem.

    Raises:
        DatasetError: If two files have the same stem and number, or the folder cannot be listed.
    """
    suffixes = image_suffixes() | ANIMATION_SUFFIXES | VIDEO_SUFFIXES
    stem_by_name = {compose_name(stem): stem for stem in stems}
    numbered: dict[str, dict[int, Path]] = {}  # stem -> (number -> path)
    unmatched = []
    for entry in list_entries(folder, key, table.config_path):
        path = folder / entry.name
        is_folder = entry.is_dir()
        if not is_folder and path.suffix.lower() not in suffixes:
            continue
        stem_and_number = _parse_name(entry.name if is_folder else path.stem, key, stem_by_name)
        if stem_and_number is None:
            unmatched.append(path)
            continue
        stem, number = stem_and_number
        first_path = numbered.setdefault(stem, {}).setdefault(number, path)
        if first_path != path:
            raise DatasetError(
                f"{first_path} and {path.name} have the same name except for the suffix. Keep one"
            )
    companions: dict[str, tuple[Path, ...]] = {}
    for stem, by_number in numbered.items():
        companions[stem] = tuple(by_number[number] for number in sorted(by_number))
    return companions, unmatched


def _parse_name(name: str, key: str, stem_by_name: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the stem of the media file that a companion's name belongs to, and its number."""
    # The number is -1 without a suffix `_N`; only references can have one. None if the name fits no stem.
    name = compose_name(name)
    if name in stem_by_name:
        return stem_by_name[name], -1
    stem, _, number = name.rpartition("_")
    is_number = number.isdecimal() and number.isascii()
    if key != REFERENCE or stem not in stem_by_name or not is_number:  # only references may be several
        return None
    return stem_by_name[stem], int(number)


def reject_companions(table: DatasetTable, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError if a table has references or control masks that the model does not use.

    `sources` are the table's items that have references or a control mask.
    """
    rules = table.references.clip_rules  # None: the model takes no references besides control clips
    maximum = 0 if rules is None else rules.max_references
    accepts_masks = rules is not None and rules.control_masks
    for source in sources:
        if len(source.references) > maximum:
            accepted = "none besides control_path" if rules is None else f"at most {maximum}"
            raise DatasetError(f"{table.name}: {source.path} has references; this model takes {accepted}.")
        if source.control_mask is not None and not accepts_masks:
            raise DatasetError(
                f"{table.name}: {source.path} has a control mask, which this model does not take."
            )
        if source.control_mask is not None and not source.control:
            raise DatasetError(
                f"{table.name}: {source.path} has a control mask, the part of a clip to generate, but no "
                "control clip. Set control_directory, or control_path in a list."
            )


FIRST_ONLY = "files are references of several images, of which the model takes only the first"


def find_moving_references(sources: Sequence[MediaSource]) -> list[Fault]:
    """Return a warning for each clip or animation that is used as a single reference image.

    Only local files are checked. Unreadable files are reported elsewhere.
    """
    warnings: dict[Path, Fault] = {}
    for source in sources:
        if source.remote_or_packed:
            continue
        for path in _single_references(source):
            with contextlib.suppress(MediaError, OSError):
                if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES or is_animation(path):
                    warnings.setdefault(path, Fault(FIRST_ONLY, str(path), source.stem))
    return list(warnings.values())


def _single_references(source: MediaSource) -> list[Path]:
    """Return an item's references, including clips, if the model accepts only still images."""
    if source.table.kind == "image":
        return [*source.references, *source.control]
    rules = source.table.references.clip_rules
    # models that put references on a white canvas take images
    return [*source.references] if rules is not None and rules.pad_with_white else []


def companion_lines(sources: Sequence[MediaSource], faults: list[Fault]) -> Iterator[str]:
    """Yield report lines that count the references and control masks of a table's items.

    If only some items have any, a warning for each of the others is added to `faults`.
    """
    num_references = [len(source.references) for source in sources]
    num_masks = [int(source.control_mask is not None) for source in sources]
    titled_counts = {REFERENCE: ("references", num_references), MASK: ("control masks", num_masks)}
    for key, (title, counts) in titled_counts.items():
        if not any(counts):  # no item has any
            continue
        items_by_count = sorted(Counter(counts).items())
        count_texts = [
            f"{format_count(num_items, 'item')} with {count}" for count, num_items in items_by_count
        ]
        yield f"{title}: {', '.join(count_texts)}"
        for source, count in zip(sources, counts, strict=True):
            if not count:
                faults.append(Fault(LACKS_COMPANION[key], str(source.path), source.stem))


def read_companions(
    local: MediaSource,
    size: Size,
    bucket: Size,
    count: int,
    fps: float = 0.0,
    frame_times: Sequence[tuple[int, float]] = (),
) -> ClipCompanions:
    """Read an item's references, guides and control mask.

    In the result, guides (images for single frames) follow the references.

    Args:
        local: The item, with local files.
        size: Size of the image or clip.
        bucket: Size of its bucket.
        count: Number of its kept frames.
        fps: Frame rate of the kept frames.
        frame_times: Index and time of each kept frame.

    Raises:
        MediaError: If a reference or the mask cannot be read.
    """
    references, size_changes = _read_references(local, bucket, count=count, fps=fps, frame_times=frame_times)
    control_mask = None
    if local.control_mask is not None:
        control_mask = read_mask(
            local.control_mask, local, (size, bucket), count=count, fps=fps, frame_times=frame_times
        )
    guides = [resize_cover(first_frame(path), bucket)[None] for path in local.guides]
    return ClipCompanions((*references, *guides), control_mask, tuple(size_changes))


def _read_references(
    local: MediaSource, bucket: Size, *, count: int, fps: float, frame_times: Sequence[tuple[int, float]]
) -> tuple[list[Clip], list[str]]:
    """Read an item's references, at the size of its bucket divided by the family's factor."""
    # Images are cropped to this size or padded with white, and have one frame. Clips have `count` frames,
    # those at `frame_times`; if a clip ends earlier, its last frame is repeated. With `longest_side`, both
    # keep their own aspect ratio.
    rules = local.table.references.clip_rules
    reference_size = bucket
    if rules is not None and local.references:
        reference_size = _divide_bucket(local, bucket, rules)
    on_white = rules is not None and rules.pad_with_white
    references: list[Clip] = []
    size_changes: list[str] = []
    for path in local.references:
        resize: Callable[[Clip, Size], Clip] = resize_cover
        if rules is not None and rules.longest_side:
            reference_size = size_within(frame_size(path), rules.longest_side, rules.step)
            resize = resize_stretched
        if on_white:
            references.append(pixels_to_uint8(composite_on_white(first_frame(path), *reference_size)))
            continue
        if is_single_image(path) or local.table.kind == "image":
            references.append(resize(read_image(path), reference_size)[None])
            continue
        frames = companion_frames(path, local.path, table=local.table, fps=fps, frame_times=frame_times)
        # without alpha; the last frame fills gaps
        sizes = FrameSizes()
        watched = sizes.watch(frames)
        clip = [resize(np.ascontiguousarray(frame[..., :3]), reference_size) for frame in watched]
        missing = max(0, count - len(clip))
        references.append(np.stack(clip[:count] + clip[-1:] * missing))
        if sizes.change is not None:
            size_changes.append(f"{path.name}: {sizes.change}")
    return references, size_changes


def _divide_bucket(local: MediaSource, bucket: Size, rules: ReferenceRules) -> Size:
    """Return the size of an item's references: its bucket divided by the family's factor."""
    width, height = bucket
    factor = rules.size_factor
    step = rules.step * factor  # of the item, so that its references fit, too
    if width % step or height % step:
        raise MediaError(
            f"{local.path}: its bucket is {width}x{height} pixels; with references {factor} times smaller "
            f"(--reference_downscale) sides must be multiples of {step}. Choose another resolution"
        )
    return width // factor, height // factor
