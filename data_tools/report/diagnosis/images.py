"""Findings about media files: copies, crops, sharpness, buckets and the balance of concepts."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.report.diagnosis.contract import GROUND, DatasetCaption, MeasuredDataset
from data_tools.report.diagnosis.finding import Finding
from data_tools.report.findings import TableFindings
from data_tools.report.looks import COLOR_SIDE, Inspection
from dataset.sources.media_source import MediaSource
from modules.console import format_count

COPY_FRACTION = 0.2  # of a table's files that are nearly the same as another one of a group
CROPPED_PERCENT = 25.0  # of an image that cropping removes
CROPPED_FRACTION = 0.25  # of the files that are cropped so far
SOFT_FRACTION = 0.5  # of the files that are blurred
UNEVEN = 3.0  # how many times as often one concept is shown as another
MIN_GROUNDS = 8  # fewer different files say nothing about what all of them share
GROUND_FRACTION = 0.9  # of the files with the same background
# largest difference of a color value of an edge, 0..1, from the median of all files: two grounds that people
# call by different names, such as a dark brown and a dark purple, differ by 0.09
SAME_GROUND = 0.08
MIN_EDGES = 0.75  # fraction of the parts of an edge that agree; the subject may reach over the others
NAMED_GROUND = 0.5  # fraction of the captions that name the background
# words for what a crop removes first: above and below, and on the left and right
_UPRIGHT = re.compile(
    r"\b(full[- ]body|head to toe|feet|foot|shoes?|boots?|socks|legs|hats?|caps?|crown|standing|sky)\b",
    re.IGNORECASE,
)
_SIDEWAYS = re.compile(
    r"\b(left|right|beside|next to|both|two|three|group|crowd|wide|panorama|landscape)\b", re.IGNORECASE
)


def find_image_findings(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about the media files of each table, and about the balance between concepts."""
    for findings in dataset.tables:
        if findings.table.learning.validation:  # nothing is learned from it
            continue
        captions = {
            caption.path: caption for caption in dataset.captions if caption.table == findings.table.name
        }
        yield from _find_copies(findings, dataset.copies)
        yield from _find_same_background(findings, dataset.copies, list(captions.values()))
        yield from _find_crops(findings, captions)
        yield from _find_soft_files(findings)
        yield from _find_lone_items(findings)
    yield from _find_uneven_concepts(dataset)


def _find_copies(findings: TableFindings, copies: Sequence[Sequence[Path]]) -> Iterator[Finding]:
    paths = {source.path for source in findings.sources}
    groups = [[path for path in group if path in paths] for group in copies]
    largest = max(groups, key=len, default=[])
    fraction = len(largest) / len(paths) if paths else 0.0
    if len(largest) < 2 or fraction < COPY_FRACTION:
        return
    yield Finding(
        "images-copies",
        findings.table.name,
        figure=fraction,
        limit=COPY_FRACTION,
        text=f"{len(largest)} of {len(paths)} files of {findings.table.name} are nearly the same, such as "
        f"{largest[0].name} and {largest[1].name}.",
        meaning="That one view is learned by heart before the others are learned at all.",
        remedy=f"Keep {largest[0].name}, and remove the other {len(largest) - 1}, which --json lists.",
        files=[str(path) for path in largest[1:]],
    )


def _find_same_background(
    findings: TableFindings, copies: Sequence[Sequence[Path]], captions: Sequence[DatasetCaption]
) -> Iterator[Finding]:
    """Yield a finding if the edges of nearly all files look the same, and no caption says so."""
    surplus = {path for group in copies for path in group[1:]}
    edges = {
        source.path: _get_edges(inspection)
        for source, inspection in _list_measured(findings)
        if source.path not in surplus and source.mask is None
    }
    if len(edges) < MIN_GROUNDS or findings.table.learning.is_reg:
        return
    values = np.stack(list(edges.values()))
    agrees = np.abs(values - np.median(values, axis=0)).max(axis=2) <= SAME_GROUND
    is_same = agrees.mean(axis=1) >= MIN_EDGES
    num_named = sum(GROUND.search(caption.text) is not None for caption in captions)
    if is_same.mean() < GROUND_FRACTION or num_named >= NAMED_GROUND * len(captions):
        return
    yield Finding(
        "images-background",
        findings.table.name,
        figure=float(is_same.mean()),
        limit=GROUND_FRACTION,
        text=f"{is_same.sum()} of {len(edges)} files of {findings.table.name} have the same background, and "
        f"{num_named} of {format_count(len(captions), 'caption')} name one.",
        meaning="What every image has and no caption says is learned as a part of the concept.",
        remedy="Name the background in these captions, such as on a white background; or add files with "
        "others, or masks of the subject (tools/mask.py).",
        files=[str(caption.path) for caption in captions if not GROUND.search(caption.text)],
    )


def _get_edges(inspection: Inspection) -> NDArray[np.float32]:
    """Return the mean colors, 0..1, of the parts of an image or clip that touch its edges, N 3."""
    assert inspection.measures is not None
    colors = np.frombuffer(inspection.measures.colors, np.uint8).astype(np.float32) / 255
    cells = colors.reshape(-1, COLOR_SIDE, COLOR_SIDE, 3).mean(axis=0)
    is_edge = np.ones((COLOR_SIDE, COLOR_SIDE), np.bool_)
    is_edge[1:-1, 1:-1] = False
    return np.asarray(cells[is_edge], np.float32)


def _list_measured(findings: TableFindings) -> list[tuple[MediaSource, Inspection]]:
    """Return the files of a table that were measured, with their inspections."""
    # there are no inspections if files were not read
    pairs = zip(findings.sources, findings.inspections, strict=False)
    return [(source, inspection) for source, inspection in pairs if inspection.measures is not None]


def _find_crops(findings: TableFindings, captions: Mapping[Path, DatasetCaption]) -> Iterator[Finding]:
    pairs = zip(findings.sources, findings.inspections, strict=False)
    measured = [(source, inspection) for source, inspection in pairs if inspection.fit is not None]
    cropped = [pair for pair in measured if pair[1].cut_percent >= CROPPED_PERCENT]
    if not cropped or len(cropped) < CROPPED_FRACTION * len(measured):
        return
    least = min(inspection.cut_percent for _, inspection in cropped)
    lost = []
    for source, inspection in cropped:
        caption = captions.get(source.caption_path or source.path)
        assert inspection.fit is not None
        loses_sides = inspection.fit.resized[0] - inspection.fit.bucket[0] > 1
        match = None if caption is None else (_SIDEWAYS if loses_sides else _UPRIGHT).search(caption.text)
        if match is not None:
            lost.append((match[0], source.path.name))
    example = f'; the caption of {lost[0][1]} says "{lost[0][0]}"' if lost else ""
    yield Finding(
        "images-cropped",
        findings.table.name,
        figure=len(cropped) / len(measured),
        limit=CROPPED_FRACTION,
        text=f"{len(cropped)} of {len(measured)} files of {findings.table.name} lose {least:.0f} % or more "
        f"to their bucket's crop{example}.",
        meaning="What the captions say of the edges is not in the picture that is learned.",
        remedy="Set enable_bucket = true, or crop the files yourself.",
        files=[str(source.path) for source, _ in cropped],
    )


def _find_soft_files(findings: TableFindings) -> Iterator[Finding]:
    measured = _list_measured(findings)
    soft: list[Path] = []
    sharp: list[Path] = []
    for source, inspection in measured:
        assert inspection.measures is not None
        (soft if inspection.measures.is_blurred else sharp).append(source.path)
    if not soft or len(soft) < SOFT_FRACTION * len(measured):
        return
    alone = f"; only {sharp[0].name} is sharp" if len(sharp) == 1 else ""
    yield Finding(
        "images-soft",
        findings.table.name,
        figure=len(soft) / len(measured),
        limit=SOFT_FRACTION,
        text=f"{len(soft)} of {len(measured)} files of {findings.table.name} are blurred{alone}.",
        meaning="Softness is learned as a part of the concept.",
        remedy="Replace these files by sharp ones, or write in their captions that they are blurry.",
        files=[str(path) for path in soft],
    )


def _find_lone_items(findings: TableFindings) -> Iterator[Finding]:
    """Yield a finding if many buckets hold a single item, so that batches are not filled."""
    batch_size = findings.table.learning.batch_size
    rows = findings.bucket_rows()
    lone = [row for row in rows if row.items == 1]
    if batch_size == 1 or len(lone) < 2 or len(lone) * 2 < len(rows):
        return
    yield Finding(
        "buckets-single",
        findings.table.name,
        figure=len(lone) / len(rows),
        limit=0.5,
        text=f"{len(lone)} of {format_count(len(rows), 'bucket')} of {findings.table.name} hold a single "
        f"item, with batches of {batch_size}.",
        meaning="These items are learned alone, each with the weight of a whole batch.",
        remedy="Crop the files to fewer shapes, or set a larger bucket_reso_steps.",
    )


def _find_uneven_concepts(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield a finding if one trigger word is shown far more often than another: concepts then blend."""
    repeats = {findings.table.name: findings.table.learning.num_repeats for findings in dataset.tables}
    shown = Counter[str]()
    for caption in dataset.learned_captions:
        if caption.trigger_word:
            shown[caption.trigger_word] += repeats[caption.table]
    if len(shown) < 2:
        return
    (most, most_count), *_, (least, least_count) = shown.most_common()
    ratio = most_count / max(least_count, 1)
    if ratio < UNEVEN:
        return
    yield Finding(
        "concepts-uneven",
        least,
        figure=ratio,
        limit=UNEVEN,
        text=f"{most} is shown {ratio:.1f} times as often as {least} ({most_count} and {least_count} items "
        "an epoch).",
        meaning=f"{least} takes on features of {most}.",
        remedy=f"Add files of {least}, or give them a table of their own with num_repeats = "
        f"{round(ratio * repeats[next(c.table for c in dataset.captions if c.trigger_word == least)])}.",
    )
