"""Measure the masks of the loss: how many latents of each are learned, and which masks match no file."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.report.findings import TableFindings
from dataset.caching.planning import SourcePlan
from dataset.caching.prefetch import map_ahead
from dataset.sources.folders import list_entries
from dataset.sources.frames import MAX_CHECKED_FILES, read_mask_clip, read_mask_image, shrink_mask
from dataset.sources.mask_files import masks_by_stem
from dataset.sources.media_source import Fault
from dataset.table import DatasetTable, folder_id
from modules.bars import Bar
from modules.console import format_count
from modules.errors import DatasetError, MediaError
from modules.integers import ceil_div
from modules.media import reading
from modules.paths import compose_name
from protocols.data import LatentSpec

LEARNED = 0.5  # a latent whose mask lies above counts as learned
SHOWN_FRAMES = 8  # maximum number of frames read from a clip's mask, evenly spaced
BLACK = "masks are all black: nothing in their images is trained on"
THIN = (
    f"masks are so thin that none of their latents lies above {LEARNED:g}: --expand_pixels of tools/mask.py"
)
LONE = "masks belong to nothing by their names, and are not read"


@dataclass(frozen=True)
class MeasuredMask:
    """A mask, and which fraction of an image or clip it includes in the loss."""

    path: Path
    stem: str  # of the image or clip
    learned_fraction: float  # latent positions whose weight is above LEARNED
    is_black: bool


def check_masks(
    findings: TableFindings, plans: Sequence[SourcePlan], latent: LatentSpec, workers: int
) -> None:
    """Report which share of the latents the masks of a table include in the loss; warn about empty masks."""
    sampled_plans = _sample_masks(plans)
    measure = functools.partial(_measure, latent=latent)
    bar = Bar(len(sampled_plans), "Reading masks", "mask", shown=False)
    measured = [mask for mask in map_ahead(sampled_plans, measure, workers, bar) if mask is not None]
    if not measured:
        return
    mean = sum(mask.learned_fraction for mask in measured) / len(measured)
    lowest = min(measured, key=lambda mask: mask.learned_fraction)
    findings.info_lines.append(
        f"{format_count(len(measured), 'mask')} measured: on average {mean:.0%} of the latents are learned "
        f"(weight above {LEARNED:g}), the fewest with {lowest.path.name}: {lowest.learned_fraction:.1%}"
    )
    for mask in measured:
        if mask.learned_fraction == 0:
            kind = BLACK if mask.is_black else THIN
            findings.warnings.append(Fault(kind, str(mask.path), mask.stem, is_fatal=False))


def _sample_masks(plans: Sequence[SourcePlan]) -> Sequence[SourcePlan]:
    """Return up to MAX_CHECKED_FILES plans of sources with masks, evenly spaced among the local files."""
    masked_plans = [plan for plan in plans if plan.source.mask is not None and plan.item_sizes]
    local_plans = [plan for plan in masked_plans if not plan.source.remote_or_packed]
    step = math.ceil(len(local_plans) / MAX_CHECKED_FILES) or 1  # a step of 0 is an error, also without files
    return local_plans[::step]


def _measure(plan: SourcePlan, latent: LatentSpec) -> MeasuredMask | None:
    """Measure which fraction of the latent positions a mask includes; None if the mask cannot be read."""
    source = plan.source
    assert source.mask is not None
    width, height, *_ = plan.item_sizes[0]  # the bucket of the source's first item
    resize = functools.partial(reading.resize_cover, bucket=(width, height))
    try:
        size = reading.frame_size(source.path)
        if reading.is_single_image(source.mask):
            mask = read_mask_image(source.mask, resize, size, num_frames=1)
        else:
            num_frames = reading.count_frames(source.mask)
            step = ceil_div(num_frames, SHOWN_FRAMES)  # every step-th frame is read
            frames = itertools.islice(reading.video_frames(source.mask, alpha=True), 0, None, step)
            num_read = ceil_div(num_frames, step)
            mask = read_mask_clip(source.mask, frames, fit_image=resize, size=size, num_frames=num_read)
    except (MediaError, OSError):
        return None
    # the mask is reduced to the size of the latents, as for training
    _, height_stride, width_stride = latent.stride
    # 1: each frame that was read counts by itself
    weights = shrink_mask(torch.from_numpy(mask.copy()), (1, height_stride, width_stride)).float()
    learned_fraction = float((weights > LEARNED).float().mean())
    return MeasuredMask(source.mask, source.stem, learned_fraction, is_black=not mask.any())


def find_lone_masks(tables: Sequence[TableFindings]) -> None:
    """Warn about each mask file that belongs to no image or clip.

    If a folder has no matching mask at all, its table already has an error.
    """
    media_stems: dict[str, set[str]] = {}  # by folder of masks: stems of all images and clips of its tables
    first_tables: dict[str, TableFindings] = {}  # the first table of each folder of masks
    for findings in tables:
        folder = findings.table.source.mask_directory
        if folder is not None:
            key = folder_id(folder)
            media_stems.setdefault(key, set()).update(
                compose_name(source.stem) for source in findings.sources
            )
            first_tables.setdefault(key, findings)
    for key, findings in first_tables.items():
        findings.warnings += _find_lone_masks(findings.table, media_stems[key])


def _find_lone_masks(table: DatasetTable, media_stems: set[str]) -> list[Fault]:
    """Return a warning for each mask in a table's folder whose stem is not among `media_stems`."""
    assert table.source.mask_directory is not None
    masks = _list_masks(table.source.mask_directory, table.source.directory)
    if media_stems.isdisjoint(masks):  # the table already has an error
        return []
    warnings = []
    for stem, paths in sorted(masks.items()):
        if stem not in media_stems:
            warnings += [Fault(LONE, str(path), is_fatal=False) for path in paths]
    return warnings


def _list_masks(folder: Path, media: Path | None) -> dict[str, list[Path]]:
    """Return the mask files in a folder, grouped by the stem of the masked file."""
    # `media` is the folder of the masked files.
    is_beside = media is not None and folder_id(folder) == folder_id(media)
    try:
        entries = list_entries(folder, "mask_directory")
    except DatasetError:  # the listing has reported it
        return {}
    return masks_by_stem([folder / entry.name for entry in entries], "video", is_beside)
