"""The caching loop: encode media to latents and captions to text embeddings, with a record of their sources.

Both halves do the same: compare existing files with what this run would make, encode the rest, and, when all
processes are done, remove files that no longer belong to any item. A file is complete or missing, never
partial, so the same command continues a run that was killed. The work itself is in work.py and texts.py; a
run that does only one shard of it removes nothing, because it does not know what the other machines make.
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
from dataset.cache.index import is_indexed, mark_table
from dataset.cache.store import Stores
from dataset.caching.indexing import write_index
from dataset.caching.prefetch import CacheReport, conclude, join_reports, workers_of
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, DebugOptions
from modules.command import COUNT, LOCAL_RANK, RANK, as_typed
from modules.console import Row, in_words
from modules.devices import freeze_libraries, leave_cudnn_out, peak_in_words, select_device
from modules.errors import OptionError
from modules.installation import import_own
from modules.option_values import missing_words
from protocols.family import Caches, audio_of

T = TypeVar("T")

# the work of each half, of which a run loads one
LATENTS, TEXTS = "dataset.caching.work:MediaWork", "dataset.caching.texts:TextWork"
STAYS = "What is cached so far stays; the same command continues from there."
PATIENCE = datetime.timedelta(days=7)  # timeout: one share may take far longer than another


@dataclass(frozen=True)
class NextCommand:
    """The command that follows a caching command, and the values that it needs."""

    words: Sequence[str]
    remember: Callable[[], None]  # keeps the options of this command, once all is cached


@dataclass(frozen=True)
class Share:
    """This process's rank among `count` processes, and its device."""

    rank: int
    count: int
    device: torch.device  # as asked for; else, if several processes run, the GPU of this one
    group: Any = None  # of torch.distributed; None for a single process

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. All processes must call it."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextlib.contextmanager
def join_processes(device: str | None) -> Iterator[Share]:
    """Connect the processes that a launcher (torchrun, accelerate, mpirun) started; yield this one's share.

    Args:
        device: The device option, if given. Processes communicate through gloo, on the CPU, whatever device
            they encode on.

    Raises:
        OptionError: If the launcher's variables are incomplete.
    """
    rank, count, local_rank = (  # each from the first of its variables that is set
        next((int(os.environ[name]) for name in names if name in os.environ), None)
        for names in (RANK, COUNT, LOCAL_RANK)
    )
    if count is None or count <= 1:
        yield Share(0, 1, select_device(device))
        return
    if rank is None:
        raise OptionError(
            f"WORLD_SIZE is {count}, but RANK is not set: start the processes with accelerate launch or "
            "torchrun"
        )
    started_here = not dist.is_initialized()  # the caller may have done so, and then ends it
    if started_here:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = os.environ.get("MASTER_PORT", "29500")
        where = f"tcp://{host}:{port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        if device is None and torch.cuda.is_available():
            device = f"cuda:{(local_rank or 0) % torch.cuda.device_count()}"
        yield Share(rank, count, select_device(device), group)
    finally:
        if started_here:
            dist.destroy_process_group()


def cache(
    kind: str, family: Caches, config: DatasetConfig, options: CachingOptions, stores: Stores | None = None
) -> CacheReport:
    """Encode all sources without a valid cache, in all processes of a launcher; then remove stale files.

    `kind` is LATENTS or TEXTS. `stores` replaces the caches that the tables name. A source that cannot be
    read becomes a failure in the report and does not stop the run. Encoders are loaded only if there is
    something to encode. A text cache is complete when all of its encoders have run; until then there is a
    `.part` file, which a later run continues.

    Raises:
        DatasetError: If the dataset cannot be used or a caption is missing.
        CheckpointError: If an encoder cannot be loaded.
        OutputError: If a file cannot be written.
    """
    freeze_libraries()
    shard = options.shard
    module_name, class_name = kind.split(":")  # only the module of this kind of work is imported
    with join_processes(options.device) as share:
        make_work = getattr(import_own(module_name), class_name)
        work = make_work(family, config, options, device=share.device, stores=stores)
        is_main = share.rank == 0
        pieces = work.pieces
        who = ""  # which share of the work, shown after the progress
        if shard.num_shards is not None:
            pieces = pieces[shard.shard_index :: shard.num_shards]
            who = f", --shard_index {shard.shard_index} of {shard.num_shards} shards"
        if share.count > 1:
            who += f", process {share.rank + 1} of {share.count}"
        try:
            part = work.encode(pieces[share.rank :: share.count], who if is_main else None)
        finally:
            work.free()
        work.stores.close(config.datasets)
        report = join_reports([*share.gather(part), work.not_listed])
        removed = 0
        if is_main and shard.num_shards is None:  # one shard does not know the valid files of the others
            for table in work.full_tables:
                failed = {failure.stem for failure in report.failures if failure.table == table.index}
                removed += work.remove_stale(table, report.right, failed, options.keep_cache)
            work.stores.close(config.datasets, is_last=True)
        return replace(report, removed=sum(share.gather(removed)), is_main=is_main)


cache_media, cache_texts = partial(cache, LATENTS), partial(cache, TEXTS)


def _write_indexes(
    kind: str,
    family: Caches,
    config: DatasetConfig,
    report: CacheReport,
    marks: Mapping[int, str | None],
) -> None:
    """Write the results of a run into the index of each table.

    `marks` are the fingerprints of the tables, by table index.
    """
    for table in config.datasets:
        if not is_indexed(table, audio_of(family)):
            continue
        left_out = {}
        for failure in (*report.failures, *report.dropped):
            if failure.table == table.index and failure.path != table.source:  # of no file that can be read
                left_out[failure.stem] = str(failure.path)
        write_index(
            table,
            part=index.TEXTS if kind == TEXTS else index.LATENTS,
            tag=family.cache_tag,
            latent=family.latent,
            mark=marks[table.index],
            right={name for number, name in report.right if number == table.index},
            left_out=left_out,
        )


def run_caching(
    kind: str,
    family: Caches,
    config: DatasetConfig,
    options: CachingOptions,
    debug: DebugOptions | None,
    following: NextCommand,
) -> None:
    """Run --debug_mode, --check, or the caching of one half, LATENTS or TEXTS.

    `following` is what comes next, if no shard is missing.

    Raises:
        UserError: If caching fails, and SystemExit with the result of a check.
    """
    if debug is not None and debug.debug_mode is not None:
        from data_tools.report.views import show_datasets  # only with --debug_mode

        conclude(show_datasets(family, config, debug, workers_of(options)))
        return
    what, then = "sources", "cache the captions"
    if kind == TEXTS:
        what, then = "captions", "check all before training"
    if options.check:
        from data_tools.report.check import check_script  # only with --check

        raise SystemExit(check_script(family, config, options, kind == TEXTS))
    if options.disable_cudnn_backend:
        leave_cudnn_out(select_device(options.device))
    started = time.monotonic()
    # taken before sources are listed: if files are added in the meantime, the index does not count as valid
    marks = {table.index: mark_table(table) for table in config.datasets}
    try:
        report = cache(kind, family, config, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(STAYS) from None
    if report.is_main:
        following.remember()
        if options.shard.num_shards is None:
            _write_indexes(kind, family, config=config, report=report, marks=marks)
    memory = peak_in_words(select_device(options.device))
    costs: list[Row] = [("time", in_words(time.monotonic() - started)), ("peak memory", memory)]
    if options.shard.num_shards is None:
        heading = f"Next, {then}"
        missing = missing_words(following.words)
        if missing:
            paths = "that path" if len(missing) == 1 else "those paths"
            heading += f" (fill in {' and '.join(missing)}: this command does not know {paths})"
        conclude(report, costs, [(heading, as_typed(following.words))])
        return
    rows: list[Row] = [
        ("this shard", f"{report.share} of {report.whole} {what}"),
        (
            "when all are done",
            "run this command once without --num_shards and --shard_index: it checks everything, makes what "
            "is missing and removes what is stale",
        ),
    ]
    conclude(report, [*rows, *costs])
