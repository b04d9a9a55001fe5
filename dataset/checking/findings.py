"""The result of a check: what each table amounts to, what is wrong with it, and what is left out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dataset.config import DatasetTable
from dataset.sources.faults import Fault, list_faults
from dataset.sources.listing import MediaSource

LISTED = 50  # at most so many lines of one kind

Buckets = Mapping[tuple[int, ...], int]  # items by (width, height[, frames])


@dataclass
class TableFindings:
    """What a check finds in one table; filled as it goes on."""

    table: DatasetTable
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

    def fault_lines(self) -> list[str]:
        return list_faults([*self.faults, *self.remarks], LISTED)


@dataclass(frozen=True)
class CheckResult:
    """Lines to print, and what was found in each table, for the page."""

    lines: tuple[str, ...]
    tables: tuple[TableFindings, ...] = ()

    @property
    def num_faults(self) -> int:
        return sum(len(found.faults) for found in self.tables)

    @property
    def ok(self) -> bool:
        return self.num_faults == 0

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    @property
    def verdict(self) -> str:
        faults, remarks = self.num_faults, sum(len(found.remarks) for found in self.tables)
        said = f" {remarks} remarks are above." if remarks else ""
        return f"Something is wrong: {faults} faults, see above." if faults else f"Nothing is wrong.{said}"


def indent(lines: Iterable[str]) -> list[str]:
    """Return the lines, each two characters further right."""
    return [f"  {line}" for line in lines]


def join_findings(first: CheckResult, second: CheckResult) -> CheckResult:
    """Return the first result with what only the second one found; both are of one configuration."""
    tables = []
    for one, other in zip(first.tables, second.tables, strict=True):
        tables.append(
            TableFindings(
                one.table,
                one.sources or other.sources,
                one.buckets or other.buckets,
                list(dict.fromkeys([*one.faults, *other.faults])),
                list(dict.fromkeys([*one.remarks, *other.remarks])),
                [*one.caches, *other.caches],
            )
        )
    return CheckResult(first.lines, tuple(tables))
