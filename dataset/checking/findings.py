"""The result of a check: totals of each table, its faults, and files left out."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dataset.config import DatasetTable
from dataset.sources.faults import Fault, list_faults
from dataset.sources.media_source import MediaSource

LISTED = 50  # at most so many lines of one kind

Buckets = Mapping[tuple[int, ...], int]  # items by (width, height[, frames])


@dataclass
class TableFindings:
    """Findings of a check in one table; filled as it goes on."""

    table: DatasetTable
    title: str = ""  # "data.toml, [[datasets]] 1 (clips): 3 videos, 6 items"
    sources: Sequence[MediaSource] = ()
    buckets: Counter[tuple[int, ...]] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)  # must be mended
    remarks: list[Fault] = field(default_factory=list)  # left out, or cut off: good to know
    caches: list[str] = field(default_factory=list)  # lines about its cache files
    times: float = 1.0  # how often its repeats come: regularisation images are as many as the others

    @property
    def num_items(self) -> int:
        return self.buckets.total()

    @property
    def items_per_epoch(self) -> int:
        """Return how often an epoch shows an item of it."""
        return round(self.num_items * self.table.num_repeats * self.times)

    @property
    def num_batches(self) -> int:
        """Return the batches of an epoch, if the table shares none."""
        return sum(batches for _, _, batches, _ in self.bucket_rows())

    def bucket_rows(self) -> list[tuple[tuple[int, ...], int, int, int]]:
        """Return (bucket, items, batches in an epoch, items in the last batch) of each bucket, ascending."""
        size = self.table.batch_size
        rows = []
        for bucket, count in sorted(self.buckets.items()):
            shown = round(count * self.table.num_repeats * self.times)
            batches = -(-shown // size)
            rows.append((bucket, count, batches, shown - (batches - 1) * size if shown else size))
        return rows

    def bucket_lines(self) -> list[str]:
        """Return the rows of the buckets as text."""
        size, repeats = self.table.batch_size, self.table.num_repeats * self.times
        lines = []
        for bucket, count, batches, last in self.bucket_rows():
            frames = "" if len(bucket) == 2 else f", {bucket[2]} frames"
            remainder = f" (the last has {last})" if last < size else ""
            lines.append(
                f"{bucket[0]}x{bucket[1]}{frames}: {count} items x {_in_words(repeats)}, "
                f"{batches} batches of {size}{remainder}"
            )
        return lines

    def lines(self) -> list[str]:
        """Return all of it as lines to print."""
        found = list_faults([*self.faults, *self.remarks], LISTED)
        return [self.title, *indent([*self.bucket_lines(), *self.caches, *found])]


@dataclass(frozen=True)
class CheckResult:
    """Findings in each table, with lines to print before and after."""

    head: tuple[str, ...]
    tables: tuple[TableFindings, ...] = ()
    tail: tuple[str, ...] = ()

    @property
    def num_faults(self) -> int:
        return sum(len(found.faults) for found in self.tables)

    @property
    def num_remarks(self) -> int:
        return sum(len(found.remarks) for found in self.tables)

    @property
    def ok(self) -> bool:
        return self.num_faults == 0

    @property
    def num_batches(self) -> int:
        return count_batches(self.tables)

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    @property
    def lines(self) -> list[str]:
        """Return all lines to print; the last one is the verdict."""
        remarks = f" Remarks above: {self.num_remarks}." if self.num_remarks else ""
        verdict = (
            "Nothing is wrong." if self.ok else f"Something is wrong: see above. Faults: {self.num_faults}."
        )
        tables = [line for found in self.tables for line in found.lines()]
        return [*self.head, *tables, *self.tail, verdict + remarks]


def balance(tables: Sequence[TableFindings]) -> None:
    """Set how often the regularisation images of each dataset come. tables: all of a configuration."""
    learned, raw = Counter[int](), Counter[int]()
    for found in tables:
        counts = raw if found.table.is_reg else learned
        counts[found.table.batch_group] += found.num_items * found.table.num_repeats
    for found in tables:
        group = found.table.batch_group
        if found.table.is_reg and raw[group]:
            found.times = learned[group] / raw[group]


def count_batches(tables: Iterable[TableFindings]) -> int:
    """Return the batches of an epoch. Subsets of a dataset share them.

    With regularisation images it may differ by a few, as these are taken to be spread over their sizes.
    """
    counts: dict[tuple[int, ...], float] = {}
    sizes: dict[tuple[int, ...], int] = {}
    for found in tables:
        table = found.table
        for bucket, count in found.buckets.items():
            key = (table.batch_group, *bucket)
            counts[key] = counts.get(key, 0) + count * table.num_repeats * found.times
            sizes[key] = table.batch_size
    return sum(math.ceil(round(count, 6) / sizes[key]) for key, count in counts.items())


def indent(lines: Iterable[str]) -> list[str]:
    """Return the lines, each two characters further right."""
    return [f"  {line}" for line in lines]


def join_findings(first: CheckResult, second: CheckResult) -> CheckResult:
    """Return the findings of two checks of one configuration, each fault once."""
    tables = []
    for one, other in zip(first.tables, second.tables, strict=True):
        tables.append(
            TableFindings(
                one.table,
                one.title,
                one.sources or other.sources,
                one.buckets or other.buckets,
                list(dict.fromkeys([*one.faults, *other.faults])),
                list(dict.fromkeys([*one.remarks, *other.remarks])),
                [*one.caches, *other.caches],
                one.times,
            )
        )
    head = (*first.head, *(line for line in second.head if line not in first.head))
    return CheckResult(head, tuple(tables), (*first.tail, *second.tail))


def _in_words(repeats: float) -> str:
    return str(int(repeats)) if repeats == int(repeats) else f"{repeats:.1f}"
