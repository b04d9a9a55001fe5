"""Find by name, read and cut references of clips, and masks that say which part of a control clip is new."""

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset.config import DatasetTable
from dataset.sources.clock import frames_beside, read_mask
from dataset.sources.folders import list_entries
from dataset.sources.frames import is_still
from dataset.sources.media_source import Fault, MediaSource
from modules.console import count_of
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Size
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.pixels import pixels_to_uint8
from modules.media.reading import (
    VIDEO_SUFFIXES,
    FrameSizes,
    first_frame,
    image_suffixes,
    read_image,
    resize_cover,
)

Clip = NDArray[np.uint8]  # F H W C

logger = logging.getLogger(__name__)
REFERENCE, MASK = "reference_directory", "control_mask_directory"
NONE = {REFERENCE: "have no reference, while others have", MASK: "have no control mask, while others have"}


def add_companions(table: DatasetTable, sources: list[MediaSource], faults: list[Fault]) -> list[MediaSource]:
    """Add to a folder's sources the files of the same name in the table's folders of references and control
    masks.

    `cat.mp4`, `cat.png` or a folder `cat` belongs to `cat.mp4`; of references also `cat_0.mp4`, `cat_1.mp4`,
    ..., in this order. Two files with one number, and a folder in which nothing fits, are faults; a warning
    counts sources and files without a partner.
    """
    stems = frozenset(source.stem for source in sources)
    for key in (REFERENCE, MASK):
        folder = getattr(table, key)
        if folder is None:
            continue
        try:
            paired, alone = _pair(folder, key, stems)
            if not paired:
                example = next(iter(sorted(stems)), "clip")
                raise DatasetError(
                    f"{folder} has nothing for any {table.kind}. Files and folders there are named like "
                    f"their {table.kind}: {example}.mp4, {example}.png"
                    + (f" or {example}_0.mp4, {example}_1.mp4" if key == REFERENCE else "")
                )
        except DatasetError as error:
            faults.append(Fault(f"problems with {key} of {table.name}", f"{str(error).rstrip('.')}."))
            continue
        lacking = [source for source in sources if source.stem not in paired]
        for what, paths in (
            (f"of {len(sources)} {table.kind}s {NONE[key]}", [source.path for source in lacking]),
            (f"in {key} belong to no {table.kind} by their name, and are not read", alone),
        ):
            if paths:
                logger.warning("%s: %d %s, such as %s", table.name, len(paths), what, paths[0])
        found = []
        for one in sources:
            there = paired.get(one.stem, ())
            changes = {"references": there} if key == REFERENCE else {"control_mask": next(iter(there), None)}
            found.append(replace(one, **changes))
        sources = found
    return sources


def _pair(folder: Path, key: str, stems: Collection[str]) -> tuple[dict[str, tuple[Path, ...]], list[Path]]:
    """Return the paths for each stem, in order, and the paths without a stem. Raises DatasetError."""
    suffixes = image_suffixes() | ANIMATION_SUFFIXES | VIDEO_SUFFIXES
    numbered: dict[str, dict[int, Path]] = {}
    alone = []
    for entry in list_entries(folder, key):
        path = folder / entry.name
        name = entry.name if entry.is_dir() else path.stem
        if not entry.is_dir() and path.suffix.lower() not in suffixes:
            continue
        first, _, number = name.rpartition("_")
        if name in stems:
            first, number = name, "-1"
        elif key == MASK or first not in stems or not (number.isdecimal() and number.isascii()):
            alone.append(path)
            continue
        other = numbered.setdefault(first, {}).setdefault(int(number), path)
        if other != path:
            raise DatasetError(f"{other} and {path.name} have the same name but for the suffix. Keep one")
    return {stem: tuple(path for _, path in sorted(of.items())) for stem, of in numbered.items()}, alone


def refuse_companions(table: DatasetTable, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError for references, and masks of controls, that the model does not take.

    sources: those of the table that have some.
    """
    rules = table.clip_references
    for source in sources:
        if len(source.references) > (0 if rules is None else rules.most):
            takes = "none beside control_path" if rules is None else f"{rules.most} at most"
            raise DatasetError(f"{table.name}: {source.path} has references; this model takes {takes}.")
        if source.control_mask is not None and not (rules is not None and rules.control_masks):
            raise DatasetError(
                f"{table.name}: {source.path} has a control mask, which this model does not take."
            )
        if source.control_mask is not None and not source.control:
            raise DatasetError(
                f"{table.name}: {source.path} has a control mask, which says what of a control clip is made "
                "new, and no such clip. Give control_directory, or control_path in a list."
            )


FIRST_ONLY = "files are references of several pictures, of which the model takes the first alone"


def find_moving_references(sources: Sequence[MediaSource]) -> list[Fault]:
    """Return a remark for each clip or animation that is read as a single reference picture.

    Only files that are here are looked at. Unreadable files are reported elsewhere.
    """
    found: dict[Path, Fault] = {}
    for source in sources:
        rules, is_image = source.table.clip_references, source.table.kind == "image"
        takes_first = is_image or (rules is not None and rules.on_white)
        paths = [*(source.references if takes_first else ()), *(source.control if is_image else ())]
        for path in paths if not source.origins else ():
            with contextlib.suppress(MediaError, OSError):
                if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES or is_animation(path):
                    found.setdefault(path, Fault(FIRST_ONLY, str(path), source.stem))
    return list(found.values())


def companion_lines(sources: Sequence[MediaSource], faults: list[Fault]) -> Iterator[str]:
    """Yield lines about the pairs of a table for its report; add a remark for each item without partner."""
    for key, counts in (
        (REFERENCE, [len(one.references) for one in sources]),
        (MASK, [int(one.control_mask is not None) for one in sources]),
    ):
        if any(counts):
            words = (f"{count_of(n, 'item')} with {number}" for number, n in sorted(Counter(counts).items()))
            yield f"{'references' if key == REFERENCE else 'control masks'}: {', '.join(words)}"
            pairs = zip(sources, counts, strict=True)
            faults += [Fault(NONE[key], str(one.path), one.stem) for one, count in pairs if not count]


def read_companions(
    here: MediaSource,
    size: Size,
    bucket: Size,
    count: int,
    fps: float = 0.0,
    clock: Sequence[tuple[int, float]] = (),
) -> dict[str, Any]:
    """Read references and the control mask of a fetched source, as fields of `DecodedMedia`, and with
    `size_changes` a text for each reference whose frames change their size.

    References are cropped to the bucket divided by the family's factor, or padded with white. A clip gives
    `count` frames, those shown at the times of `clock`, its last one repeated; a picture gives one. Raises
    MediaError.
    """
    found: dict[str, Any] = {}
    rules = here.table.clip_references
    factor, step = (1, 1) if rules is None else (rules.size_factor, rules.step * rules.size_factor)
    if bucket[0] % step or bucket[1] % step:
        raise MediaError(
            f"{here.path}: it has {bucket[0]}x{bucket[1]} pixels; with references {factor} times smaller "
            f"sides are multiples of {step}. Choose another resolution"
        )
    small = bucket[0] // factor, bucket[1] // factor
    changes: list[str] = []

    def read(path: Path) -> Clip:
        if here.table.clip_references is not None and here.table.clip_references.on_white:
            from modules.media.canvas import on_white  # few models have their references so

            return pixels_to_uint8(on_white(first_frame(path), *small))
        if is_still(path) or here.table.kind == "image":
            return resize_cover(read_image(path), small)[None]
        sizes = FrameSizes()
        frames = sizes.watch(frames_beside(path, here.path, table=here.table, fps=fps, clock=clock))
        clip = [resize_cover(np.ascontiguousarray(frame[..., :3]), small) for frame in frames][:count]
        if sizes.change is not None:
            changes.append(f"{path.name}: {sizes.change}")
        return np.stack(clip + clip[-1:] * (count - len(clip)))

    found["references"] = tuple(map(read, here.references))
    found["size_changes"] = changes
    if here.control_mask is not None:
        found["control_mask"] = read_mask(here.control_mask, here, (size, bucket), count, fps, clock)
    return found
