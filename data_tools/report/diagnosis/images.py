"""Findings about media files: copies, crops, sharpness, buckets and the balance of concepts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.report.diagnosis.contract import MeasuredDataset
from data_tools.report.diagnosis.finding import Finding
from data_tools.report.findings import TableFindings
from modules.console import format_count

COPY_FRACTION = 0.2  # of a table's files that are nearly the same as another one of a group
CROPPED_PERCENT = 25.0  # of an image that cropping removes
CROPPED_FRACTION = 0.25  # of the files that are cropped so far
SOFT_FRACTION = 0.5  # of the files that are blurred
UNEVEN = 3.0  # how many times as often one concept is shown as another


def find_image_findings(dataset: MeasuredDataset) -> Iterator[Finding]:
    """Yield findings about the media files of each table, and about the balance between concepts."""
    for findings in dataset.tables:
        yield from _find_copies(findings, dataset.copies)
        yield from _find_crops(findings)
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
        remedy="Keep one or two of them.",
    )


def _find_crops(findings: TableFindings) -> Iterator[Finding]:
    measured = [inspection for inspection in findings.inspections if inspection.fit is not None]
    cut = [inspection.cut_percent for inspection in measured if inspection.cut_percent >= CROPPED_PERCENT]
    if not cut or len(cut) < CROPPED_FRACTION * len(measured):
        return
    yield Finding(
        "images-cropped",
        findings.table.name,
        figure=len(cut) / len(measured),
        limit=CROPPED_FRACTION,
        text=f"{len(cut)} of {len(measured)} files of {findings.table.name} lose {min(cut):.0f} % or more to "
        "their bucket's crop.",
        meaning="What the captions say of the edges is not in the picture that is learned.",
        remedy="Set enable_bucket = true, or crop the files yourself.",
    )


def _find_soft_files(findings: TableFindings) -> Iterator[Finding]:
    sharpness = [
        inspection.measures for inspection in findings.inspections if inspection.measures is not None
    ]
    soft = [measures for measures in sharpness if measures.is_blurred]
    if not soft or len(soft) < SOFT_FRACTION * len(sharpness):
        return
    yield Finding(
        "images-soft",
        findings.table.name,
        figure=len(soft) / len(sharpness),
        limit=SOFT_FRACTION,
        text=f"{len(soft)} of {len(sharpness)} files of {findings.table.name} are blurred.",
        meaning="Softness is learned as a part of the concept.",
        remedy="Replace these files by sharp ones, or write in their captions that they are blurry.",
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
    shown = Counter[str]()
    for findings in dataset.tables:
        word = findings.table.captions.trigger_word
        if word and not findings.table.learning.is_reg:
            shown[word] += len(findings.sources) * findings.table.learning.num_repeats
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
        remedy=f"Raise num_repeats of {least}'s table, or add files to it.",
    )
