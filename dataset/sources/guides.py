"""Find by name the images that guide clips (`DatasetTable.guides`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dataset.sources.companions import pair_or_report, warn_about_paths
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable

KEYFRAMES, LATENT_GUIDES = "keyframe_guide_directory", "latent_idx_guide_directory"
LACKING = "clips without a guide, while their table has guides. Add these images, or use another table"


def add_guides(table: DatasetTable, sources: list[MediaSource], faults: list[Fault]) -> list[MediaSource]:
    """Add a table's guides (images that condition single frames of a clip), found by name, to its clips.

    `door.png` belongs to `door.mp4`, and to all items that are cut from it. If a guide is a clip, its first
    frame is used. A clip without one of its guides, two files with the same stem, and a folder without
    any matching file are errors, which are added to `faults`.
    """
    stems = frozenset(source.stem for source in sources)
    guide_files: list[Mapping[str, tuple[Path, ...]]] = []  # files by stem of the clip
    for guide in table.references.guides:
        key = KEYFRAMES if guide.is_keyframe else LATENT_GUIDES
        paired = pair_or_report(table, guide.directory, key, stems, faults)
        if paired is None:
            return sources
        files_by_stem, unmatched = paired
        warn_about_paths(table, f"in {key} match no {table.kind} by name and are not read", unmatched)
        without_guide = [source for source in sources if source.stem not in files_by_stem]
        faults += [
            Fault(LACKING, f"{source.path} in {guide.directory}", source.stem) for source in without_guide
        ]
        if without_guide:
            return sources
        guide_files.append(files_by_stem)
    completed = []
    for source in sources:
        guides = tuple(files_by_stem[source.stem][0] for files_by_stem in guide_files)
        completed.append(replace(source, guides=guides))
    return completed
