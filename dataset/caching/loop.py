"""The caching loop: encode media to latents and captions to text embeddings, with a record of their sources.

Both halves do the same: compare existing files with what this run would make, encode the rest, and, when all
processes are done, remove files that no longer belong to any item. A file is complete or missing, never
partial, so the same command continues a run that was killed. The work itself is in work.py; a run that does
only one shard of it removes nothing, because it does not know what the other machines make.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dataset.cache.index import Indexes
from dataset.cache.store import Stores
from dataset.caching.existing import remove_stale_latents, remove_stale_texts
from dataset.caching.planning import Caches, SourcePlan
from dataset.caching.reports import CacheReport, join_reports
from dataset.caching.work import EntryPlaces, MediaWork, TextWork
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, ShardOptions
from modules.atomic_write import free_bytes
from modules.console import Row, as_size, count_of, show_box
from modules.devices import choose_device
from modules.errors import OptionError

T = TypeVar("T")

# torchrun and accelerate, then Intel MPI, Open MPI, MVAPICH
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
PATIENCE = datetime.timedelta(days=7)  # timeout: one share may take far longer than another


@dataclass(frozen=True)
class Share:
    """Process `rank` of `count`."""

    rank: int
    count: int
    local_rank: int  # among the processes of this machine
    group: Any = None  # of torch.distributed; None for a single process

    @property
    def is_main(self) -> bool:
        """Return whether this process does the work that only one process may do."""
        return self.rank == 0

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """Return this process's pieces, every `count`-th, of a list that all processes have."""
        return work[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, when all have called this."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def device_name(self, name: str | None) -> str | None:
        """Return the given device; if there is none and several processes run, the GPU of this process."""
        if name is None and self.count > 1 and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name


@contextlib.contextmanager
def join_processes(environment: Mapping[str, str] | None = None) -> Iterator[Share]:
    """Join the processes that a launcher (torchrun, accelerate, mpirun) started; yield this one's share.

    Processes communicate through gloo, on the CPU, whatever device they encode on.
    Raises OptionError if the launcher's variables are incomplete.
    """
    variables = os.environ if environment is None else environment
    rank, count, local_rank = (_first(variables, names) for names in (RANK, COUNT, LOCAL_RANK))
    if count is None or count <= 1:
        yield Share(0, 1, 0)
        return
    if rank is None:
        raise OptionError(
            f"WORLD_SIZE is {count}, but RANK is not set: start the processes with accelerate launch or "
            "torchrun"
        )
    started_here = not dist.is_initialized()
    if started_here:
        address = f"tcp://{variables.get('MASTER_ADDR', '127.0.0.1')}:{variables.get('MASTER_PORT', '29500')}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Share(rank, count, local_rank or 0, group)
    finally:
        if started_here:
            dist.destroy_process_group()


def _first(variables: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next((int(variables[name]) for name in names if name in variables), None)


NUMBER_BYTES = 2  # of a latent; float32 ones take twice as much


def cache_media(
    family: Caches, config: DatasetConfig, options: CachingOptions, places: EntryPlaces | None = None
) -> CacheReport:
    """Encode every item that has no valid latent cache, then remove stale files.

    places: where caches are kept, if not where the tables say.
    A source that cannot be read becomes a failure of the report and does not stop the others. The encoders
    are loaded only if there is something to encode. Raises DatasetError if the dataset cannot be used,
    CheckpointError if an encoder cannot be loaded, OutputError if a file cannot be written.
    """
    with join_processes() as share:
        device = choose_device(share.device_name(options.device))
        work = MediaWork(family, config, options, device, places)

        def announce(number: int, to_do: Sequence[SourcePlan]) -> None:
            rows: list[Row] = [
                ("data", str(config.path)),
                (_who(share, options.shard), f"{number} sources, {len(to_do)} of them to encode"),
                ("disk", _disk(config, family, to_do)),
                ("device", str(device)),
            ]
            show_box("Caching latents", rows)

        try:
            sources = share.of(options.shard.of(work.sources))
            done = work.encode(sources, share.is_main, announce if share.is_main else None)
        finally:
            work.free()
        work.stores.finish(config.datasets)
        gathered = share.gather(done)
        reports = [*(one.report for one in gathered), work.not_listed]
        failures = join_reports(reports).failures
        removed = 0
        if share.is_main and not options.keep_cache and not options.shard.is_given:
            for table in work.whole_tables:
                belongs = {name for one in gathered for index, name in one.right if index == table.index}
                failed = {one.stem for one in failures if one.table == table.index}
                existing = work.existing[table.index]
                removed += remove_stale_latents(
                    work.stores.of(table), existing, table.kind, family, belongs, failed
                )
        if share.is_main and not options.shard.is_given:
            work.stores.settle(config.datasets)
        _keep_index(share, work.index, work.stores, config)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def cache_texts(
    family: Caches, config: DatasetConfig, options: CachingOptions, places: EntryPlaces | None = None
) -> CacheReport:
    """Encode every caption without a valid text cache, one encoder after the other; then remove stale files.

    A text cache is written when all encoders are through; until then there is a `.part`, which a later run
    continues. Raises DatasetError if a caption is missing, CheckpointError if an encoder cannot be loaded,
    OutputError if a file cannot be written.
    """
    with join_processes() as share:
        device = choose_device(share.device_name(options.device))
        work = TextWork(family, config, options, device, share.is_main, places)
        if share.is_main:
            captions = count_of(len(work.files), "caption")
            show_box("Caching texts", [("data", f"{config.path}, {captions}"), ("device", str(device))])
        try:
            done = work.encode(share.of(options.shard.of(work.batches)))
        finally:
            work.free()
        work.stores.finish(config.datasets)
        reports = [*share.gather(done), work.not_listed]
        removed = 0
        if share.is_main and not options.shard.is_given:
            for table in work.whole_tables:
                stems = {one.stem for one in work.sources if one.table.index == table.index}
                names = {file.file_name for file in work.files if file.table.index == table.index}
                surplus_of = stems if options.keep_cache else None
                existing = work.existing[table.index]
                removed += remove_stale_texts(work.stores.of(table), existing, family, names, surplus_of)
            work.stores.settle(config.datasets)
        _keep_index(share, work.index, work.stores, config)
        return join_reports(reports, sum(share.gather(removed)), share.is_main)


def _keep_index(share: Share, index: Indexes[Any], stores: Stores, config: DatasetConfig) -> None:
    """Write the facts that all processes verified, so that a later run need not read the files again."""
    of_tables = [stores.of(table) for table in config.datasets]
    gathered = share.gather(index.rows(of_tables))
    if share.is_main:
        index.write(of_tables, gathered)


def _disk(config: DatasetConfig, family: Caches, plans: Sequence[SourcePlan]) -> str | None:
    """Estimate what the latents of some sources take on disk; None if no size is known yet."""
    spec, sizes = family.latent, [size for plan in plans for size in plan.items]
    known = sum(plan.missing is not None for plan in plans)
    if not sizes:
        return None
    step, rows, columns = spec.stride

    def numbers(width: int, height: int, frames: int = 1) -> int:
        return spec.channels * ((frames - 1) // step + 1) * (height // rows) * (width // columns)

    needed = sum(numbers(*size) for size in sizes) * NUMBER_BYTES * len(plans) / known
    free = free_bytes(config.datasets[0].cache_directory)
    return f"about {as_size(needed)}, more with control or start images; {as_size(free)} free"


def _who(share: Share, shard: ShardOptions) -> str:
    words = ["latents"]
    if shard.num_shards is not None and shard.shard_index is not None:
        words.append(f"--shard_index {shard.shard_index} of {shard.num_shards} shards")
    if share.count > 1:
        words.append(f"process {share.rank + 1} of {share.count}")
    return ", ".join(words)
