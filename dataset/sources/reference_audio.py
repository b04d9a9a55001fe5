"""Find by name the audio files that serve as references for the audio of clips."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dataset.sources.companions import warn_about_paths
from dataset.sources.folders import list_entries
from dataset.sources.mask_files import files_by_stem
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES
from modules.paths import compose_name

KEY = "reference_audio_directory"


def add_reference_audio(
    table: DatasetTable, sources: list[MediaSource], faults: list[Fault]
) -> list[MediaSource]:
    """Add the reference audio in reference_audio_directory to the clips of the same name.

    `cat.wav`, or the audio of `cat.mp4`, belongs to `cat.mp4` and to all items that are cut from it. Two
    files with the same name, and a folder without any matching file, are errors. A warning counts clips
    without a reference, and files without a clip.
    """
    folder = table.references.reference_audio_directory
    assert folder is not None  # the caller checks it
    entries = map(Path, list_entries(folder, KEY, table.config_path))
    by_stem = files_by_stem(entries, AUDIO_SUFFIXES | VIDEO_SUFFIXES, with_folders=False)
    stems = {compose_name(source.stem) for source in sources}
    kind = f"problems with {KEY} of {table.name}"
    if not by_stem.keys() & stems:
        example = min(stems, default="clip")
        text = f"{folder} has no audio for any clip. Name each file after its clip: {example}.wav."
        faults.append(Fault(kind, text))
        return sources
    for stem in sorted(by_stem.keys() & stems):
        first_path, *other_paths = by_stem[stem]
        if other_paths:
            text = f"{first_path} and {other_paths[0].name} are references of the same clip. Keep one."
            faults.append(Fault(kind, text, stem))
    _warn_of_unmatched_audio(table, sources, by_stem)
    completed = []
    for source in sources:
        paths = by_stem.get(compose_name(source.stem))
        completed.append(source if paths is None else replace(source, reference_audio=paths[0]))
    return completed


def _warn_of_unmatched_audio(
    table: DatasetTable, sources: Sequence[MediaSource], by_stem: Mapping[str, list[Path]]
) -> None:
    """Log how many clips have no reference audio, and how many of the files belong to no clip."""
    without_reference = [source.path for source in sources if compose_name(source.stem) not in by_stem]
    warn_about_paths(table, f"of {len(sources)} clips have no reference in {KEY}", without_reference)
    stems = {compose_name(source.stem) for source in sources}
    unmatched = [paths[0] for stem, paths in by_stem.items() if stem not in stems]
    warn_about_paths(table, f"files in {KEY} match no clip by name and are not read", unmatched)
