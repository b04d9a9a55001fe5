"""The caching loop: encode media to latents and captions to text embeddings, with a record of their sources.

Both halves do the same: compare existing files with those that this run would make, encode the rest, and,
when all processes have finished, remove files that no longer belong to any item. A file is complete or
missing, never partial, so the same command continues a run that was killed. The encoding itself is in work.py
and texts.py. A run that caches a single shard removes nothing, because it does not know the files of other
shards.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dataset.cache import index
from dataset.cache.index import fingerprint_table, is_indexed, write_index
from dataset.cache.store import Stores
from dataset.caching.prefetch import CacheReport, conclude, count_workers, join_reports
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, DebugOptions
from modules.command import COUNT, LOCAL_RANK, RANK, quote_command
from modules.console import Row, format_duration
from modules.devices import format_peak_memory, freeze_libraries, leave_cudnn_out, select_device
from modules.errors import OptionError
from modules.installation import import_own
from modules.option_values import missing_words
from protocols.family import Caches, get_audio_spec

T = TypeVar("T")

# module and class of each half; a run imports one of them
LATENTS, TEXTS = "dataset.caching.work:MediaWork", "dataset.caching.texts:TextWork"
INTERRUPTED_NOTE = "What is cached so far stays; the same command continues from there."
TIMEOUT = datetime.timedelta(days=7)  # one process may take far longer than another


@dataclass(frozen=True)
class NextCommand:
    """The command to run after a caching command, and a function that stores this command's options."""

    argv: Sequence[str]  # the command line
    remember: Callable[[], None]  # writes the options of this command into the cache folders


@dataclass(frozen=True)
class Share:
    """This process's share of the work: its rank among `num_processes`, and its device."""

    rank: int
    num_processes: int
    device: torch.device
    group: Any = None  # process group of torch.distributed; None for a single process

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. All processes must call this."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.num_processes
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextlib.contextmanager
def join_processes(device: str | None) -> Iterator[Share]:
    """Connect the processes that torchrun, accelerate or mpirun started; yield this process's share.

    Processes communicate through gloo, on the CPU, no matter on which device they encode.

    Args:
        device: Value of the device option; None to choose the GPU of each process.

    Raises:
        OptionError: If the launcher's environment variables are incomplete.
    """
    rank = _read_first(RANK)
    count = _read_first(COUNT)
    local_rank = _read_first(LOCAL_RANK)
    if count is None or count <= 1:
        yield Share(0, 1, select_device(device))
        return
    if rank is None:
        raise OptionError(
            f"WORLD_SIZE is {count}, but RANK is not set: start the processes with accelerate launch or "
            "torchrun"
        )
    is_started_here = not dist.is_initialized()  # a caller that has started it also ends it
    if is_started_here:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = os.environ.get("MASTER_PORT", "29500")
        address = f"tcp://{host}:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=TIMEOUT)
    try:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        if device is None and torch.cuda.is_available():
            device = f"cuda:{(local_rank or 0) % torch.cuda.device_count()}"
        yield Share(rank, count, select_device(device), group)
    finally:
        if is_started_here:
            dist.destroy_process_group()


def _read_first(names: Sequence[str]) -> int | None:
    """Return the integer in the first of these environment variables that is set; None if none is."""
    for name in names:
        if name in os.environ:
            return int(os.environ[name])
    return None


def cache(
    kind: str, family: Caches, config: DatasetConfig, options: CachingOptions, stores: Stores | None = None
) -> CacheReport:
    """Encode all media without a valid cache, in all processes of a launcher; then remove stale files.

    A media file that cannot be read becomes a failure in the report and does not stop the run. Encoders are
    loaded only if there is something to encode. A text cache is complete when all of its encoders have run;
    until then there is a `.part` file, which a later run continues.

    Args:
        kind: LATENTS or TEXTS.
        family: Family that encodes.
        config: The dataset file.
        options: Options of the run.
        stores: Stores of the caches; None for those that the tables name.

    Raises:
        DatasetError: If the dataset cannot be used or a caption is missing.
        CheckpointError: If an encoder cannot be loaded.
        OutputError: If a file cannot be written.
    """
    freeze_libraries()
    shard = options.shard
    # LATENTS and TEXTS are "module:class", so that only the module of this kind of work is imported
    module_name, class_name = kind.split(":")
    with join_processes(options.device) as share:
        make_work = getattr(import_own(module_name), class_name)
        work = make_work(family, config, options, device=share.device, stores=stores)
        work_items = work.work_items
        if shard.num_shards is not None:
            work_items = work_items[shard.shard_index :: shard.num_shards]
        own_items = work_items[share.rank :: share.num_processes]
        is_main = share.rank == 0
        label = ""  # this process's part of the work: the number of its shard, of the process, or both
        if shard.num_shards is not None:
            label = f", --shard_index {shard.shard_index} of {shard.num_shards} shards"
        if share.num_processes > 1:
            label += f", process {share.rank + 1} of {share.num_processes}"
        try:
            # only the main process shows progress
            own_report = work.encode(own_items, label if is_main else None)
        finally:
            work.free()
        work.stores.close(config.datasets)
        report = join_reports([*share.gather(own_report), work.listing_report])
        removed = 0
        if is_main and shard.num_shards is None:  # one shard does not know the valid files of the others
            for table in work.complete_tables:
                failed = {failure.stem for failure in report.failures if failure.table == table.index}
                removed += work.remove_stale(table, report.valid, failed, options.keep_cache)
            work.stores.close(config.datasets, is_last=True)
        return replace(report, removed=sum(share.gather(removed)), is_main=is_main)


cache_media, cache_texts = partial(cache, LATENTS), partial(cache, TEXTS)


def _write_indexes(
    kind: str,
    family: Caches,
    config: DatasetConfig,
    report: CacheReport,
    fingerprints: Mapping[int, str | None],
) -> None:
    """Write the results of a caching run to each table's index file, which training reads."""
    # `fingerprints` are the hashes of the tables, by table index.
    for table in config.datasets:
        if not is_indexed(table, get_audio_spec(family)):
            continue
        left_out = {}
        for failure in (*report.failures, *report.dropped):
            # if the whole list failed, the failure has the path of the table, not of a media file
            if failure.table == table.index and failure.path != table.source.path:
                left_out[failure.stem] = str(failure.path)
        write_index(
            table,
            part=index.TEXTS if kind == TEXTS else index.LATENTS,
            tag=family.cache_tag,
            latent=family.latent,
            table_fingerprint=fingerprints[table.index],
            valid={name for table_index, name in report.valid if table_index == table.index},
            left_out=left_out,
        )


def run_caching(
    kind: str,
    family: Caches,
    config: DatasetConfig,
    options: CachingOptions,
    debug: DebugOptions | None,
    next_command: NextCommand,
) -> None:
    """Cache the latents or text embeddings of a dataset, or do what --debug_mode or --check requests instead.

    Args:
        kind: LATENTS or TEXTS.
        family: Family that encodes.
        config: The dataset file.
        options: Options of the run.
        debug: Options of --debug_mode; None if the command has none.
        next_command: The command to run next, shown unless only a shard was cached.

    Raises:
        UserError: If caching fails.
        SystemExit: With the result of a check.
    """
    if debug is not None and debug.debug_mode is not None:
        from data_tools.report.views import show_datasets  # only with --debug_mode

        conclude(show_datasets(family, config, debug, count_workers(options)))
        return
    if options.check:
        from data_tools.report.check import check_script  # only with --check

        raise SystemExit(check_script(family, config, options, kind == TEXTS))
    if options.disable_cudnn_backend:
        leave_cudnn_out(select_device(options.device))
    started = time.monotonic()
    # taken before sources are listed, so that an index does not count as valid if files are added meanwhile
    fingerprints = {table.index: fingerprint_table(table) for table in config.datasets}
    try:
        report = cache(kind, family, config, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(INTERRUPTED_NOTE) from None
    is_shard = options.shard.num_shards is not None
    if report.is_main:  # one process writes for all of them
        next_command.remember()  # stores this command's options for training
        if not is_shard:
            _write_indexes(kind, family, config=config, report=report, fingerprints=fingerprints)
    peak_memory = format_peak_memory(select_device(options.device))
    costs: list[Row] = [("time", format_duration(time.monotonic() - started)), ("peak memory", peak_memory)]
    if is_shard:
        _conclude_shard(kind, report, costs)
    else:
        heading = "Next, check all before training" if kind == TEXTS else "Next, cache the captions"
        unknown_paths = missing_words(next_command.argv)
        if unknown_paths:
            pronoun = "that path" if len(unknown_paths) == 1 else "those paths"
            heading += f" (fill in {' and '.join(unknown_paths)}: this command does not know {pronoun})"
        conclude(report, costs, [(heading, quote_command(next_command.argv))])


def _conclude_shard(kind: str, report: CacheReport, costs: Sequence[Row]) -> None:
    """Show the report of one shard (--num_shards), and the command to run when all shards are done."""
    noun = "captions" if kind == TEXTS else "sources"
    shard_rows: list[Row] = [
        ("this shard", f"{report.num_assigned} of {report.num_total} {noun}"),
        (
            "when all are done",
            "run this command once without --num_shards and --shard_index: it checks everything, caches what "
            "is missing and removes stale files",
        ),
    ]
    conclude(report, [*shard_rows, *costs])
