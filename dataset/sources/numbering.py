"""Find numbers that are missing among the numbered files of an image: its layers, controls and references."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dataset.sources.media_source import Fault, MediaSource

GAPS = "have numbered files of which one is missing: the others are used in their order without it"


def find_gap(numbers: Collection[int]) -> int | None:
    """Return the lowest number that is missing below the largest one; None if there is no gap.

    Counting starts at 0 if 0 is among `numbers`, otherwise at 1.
    """
    first = 0 if 0 in numbers else 1
    expected = range(first, max(numbers, default=0) + 1)
    return next((number for number in expected if number not in numbers), None)


def find_number_gaps(sources: Iterable[MediaSource]) -> list[Fault]:
    """Return a warning for each image whose numbered companion files skip a number."""
    warnings = []
    for source in sources:
        if source.table.source.directory is None:  # files that a list names need not be numbered
            continue
        for files in (source.layers, source.control, source.references):
            numbers = _read_numbers(source.stem, files)
            gap = find_gap(numbers)
            if gap is not None:
                text = f"{source.path}: there is no {source.stem}_{gap}, but {source.stem}_{max(numbers)}"
                warnings.append(Fault(GAPS, text, source.stem))
    return warnings


def _read_numbers(stem: str, files: Sequence[Path]) -> set[int]:
    """Return the numbers that follow the stem in file names; other file names are ignored."""
    numbers = set()
    for file in files:
        start, _, number = file.stem.rpartition("_")
        if start == stem and number.isdecimal():
            numbers.add(int(number))
    return numbers
