"""The result of a check: what each table amounts to, what is wrong with it, and what is left out."""

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
    """What a check finds in one table; filled as it goes on."""

    table: DatasetTable
    title: str = ""  # "data.toml, [[datasets]] 1 (clips): 3 videos, 6 items"
    sources: Sequence[MediaSource] = ()
    buckets: Counter[tuple[int, ...]] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)  # must be mended
    remarks: list[Fault] = field(default_factory=list)  # left out, or cut off: good to know
    caches: list[str] = field(default_factory=list)  # lines about its cache files

    @property
    def num_items(self) -> int:
        return self.buckets.total()

    @property
    def num_batches(self) -> int:
        return sum(batches for _, _, batches, _ in self.bucket_rows())

    def bucket_rows(self) -> list[tuple[tuple[int, ...], int, int, int]]:
        """Return (bucket, items, batches in an epoch, items in the last batch) of each bucket, ascending."""
        size, repeats = self.table.batch_size, self.table.num_repeats
        rows = []
        for bucket, count in sorted(self.buckets.items()):
            batches = -(-count * repeats // size)
            rows.append((bucket, count, batches, count * repeats - (batches - 1) * size))
        return rows

    def bucket_lines(self) -> list[str]:
        """Return the rows of the buckets as text."""
        size, repeats = self.table.batch_size, self.table.num_repeats
        lines = []
        for bucket, count, batches, last in self.bucket_rows():
            frames = "" if len(bucket) == 2 else f", {bucket[2]} frames"
            remainder = f" (the last has {last})" if last < size else ""
            lines.append(
                f"{bucket[0]}x{bucket[1]}{frames}: {count} items x {repeats}, {batches} batches of {size}"
                f"{remainder}"
            )
        return lines

    def lines(self) -> list[str]:
        """Return all of it as lines to print."""
        found = list_faults([*self.faults, *self.remarks], LISTED)
        return [self.title, *indent([*self.bucket_lines(), *self.caches, *found])]


@dataclass(frozen=True)
class CheckResult:
    """What was found in each table, with lines to print before and after."""

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


def indent(lines: Iterable[str]) -> list[str]:
    """Return the lines, each two characters further right."""
    return [f"  {line}" for line in lines]


def join_findings(first: CheckResult, second: CheckResult) -> CheckResult:
    """Return what two checks of one configuration found, each fault once."""
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
            )
        )
    head = (*first.head, *(line for line in second.head if line not in first.head))
    return CheckResult(head, tuple(tables), (*first.tail, *second.tail))
