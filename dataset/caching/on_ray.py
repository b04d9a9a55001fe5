"""Cache on a Ray cluster: `map_batches` over shards of the work, by actors that load the encoders once.

An actor runs the code of the caching loop (work.py, texts.py) for one shard after another, and writes into
the shared cache folder. Stale files are not removed: the caching command does that afterwards.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dataset.caching.prefetch import CacheReport
from dataset.caching.texts import TextWork
from dataset.caching.work import MediaWork
from dataset.config import DatasetConfig, DatasetTable
from dataset.options import CachingOptions, RayOptions
from modules.command import quote_command
from modules.console import show_box
from modules.devices import leave_cudnn_out, select_device
from modules.errors import DatasetError, InstallationError, OptionError, UserError
from modules.installation import PREFIX, ROOT
from modules.text_files import real_path
from protocols.family import Caches

logger = logging.getLogger(__name__)

# Of latents: small shards, so that actors finish at about the same time. Texts have one shard for each actor,
# because every shard loads all text encoders
SHARDS_PER_ACTOR = 8
# `main` of a caching script: reads the arguments, then calls the given function instead of caching
Main = Callable[[Sequence[str], Callable[..., None]], None]


class CachingActor:
    """Callable class for Ray's `map_batches`: caches the shards of each batch and returns their results.

    A call takes the column `shard_index`. It returns the columns `shard_index`, the counts `written`, `kept`
    and `sources`, `failures` (a JSON list of messages) and `error` ("" if the shard was completed).
    """

    def __init__(
        self,
        main: Main,
        argv: Sequence[str],
        is_latents: bool,
        num_shards: int,
        threads: int,
        folder: str | None = None,
    ) -> None:
        """Store the settings; the dataset is read with the first batch.

        Args:
            main: `main` of a caching script.
            argv: Arguments of the script.
            is_latents: Whether latents are cached, not text embeddings.
            num_shards: Number of shards of the work.
            threads: Number of threads that read ahead, unless the arguments set it.
            folder: Folder in which the command was typed; the actor's process changes to it.
        """
        # reads the arguments and the dataset, then calls `_create_work` instead of caching
        self._read_dataset = partial(main, argv, self._create_work)
        self._is_latents, self._num_shards = is_latents, num_shards
        self._threads, self._folder = threads, folder
        self._work: MediaWork | TextWork | None = None
        self._tables: Sequence[DatasetTable] = ()

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Cache the shards of a batch. A UserError becomes its shard's `error`; other errors propagate."""
        rows = [self._cache_shard(int(index)) for index in batch["shard_index"]]
        return {column: [row[column] for row in rows] for column in rows[0]}

    def _cache_shard(self, index: int) -> dict[str, Any]:
        """Cache one shard of the dataset; return its results as a row of a Ray dataset."""
        error = ""
        report = CacheReport()
        try:
            # the first call parses the arguments and reads the dataset file
            if self._work is None:
                if self._folder is not None and Path(self._folder).is_dir():
                    os.chdir(self._folder)  # relative paths refer to the folder in which they were typed
                self._read_dataset()  # calls `_create_work`
            work: Any = self._work
            report = work.encode(work.work_items[index :: self._num_shards], None)
            work.stores.close(self._tables)
        except UserError as failure:
            error = str(failure)
        counts = {"written": report.written, "kept": report.reused, "sources": report.num_assigned}
        failures = json.dumps([str(failure) for failure in report.failures])
        return {"shard_index": index, **counts, "failures": failures, "error": error}

    def _create_work(
        self, family: Caches, config: DatasetConfig, options: CachingOptions, *_: object
    ) -> None:
        """Set up this actor's caching work from the options that the caching script has parsed."""
        if options.num_workers is None:
            options = dataclasses.replace(options, num_workers=self._threads)
        if options.disable_cudnn_backend:
            leave_cudnn_out(select_device(options.device))
        work_class = MediaWork if self._is_latents else TextWork
        # the first GPU is right, because Ray shows an actor only its own GPUs
        self._work = work_class(family, config, options, select_device(options.device))
        self._tables = config.datasets


def run_on_ray(main: Main, options: RayOptions) -> None:
    """Cache all shards on a Ray cluster, and show the results.

    Raises:
        InstallationError: If Ray is missing.
        OptionError: If the command cannot be run on a cluster.
        DatasetError: If the cluster cannot be reached, a shard fails, or a media file cannot be used.
    """
    arguments = options.command[1:]
    # `main` reads the options and calls `_reject_unsuitable` instead of caching, so that wrong options are
    # reported before the cluster is contacted
    main(arguments, _reject_unsuitable)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InstallationError(
            f"Ray is not installed ({error}). Install it with: pip install 'ray[data]' (or the extra [ray])"
        ) from error
    try:
        _join_cluster(ray, options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise DatasetError(f"the Ray cluster {options.address or 'of this machine'}: {error}") from error
    try:
        # how many actors and shards the cluster has room for
        available = ray.cluster_resources()
        gpus, cpus = options.gpus_per_actor, options.cpus_per_actor
        if gpus is None:
            gpus = 1.0 if available.get("GPU", 0) >= 1 else 0.0
        default_actors = 1
        if gpus:  # as many as the cluster has GPUs for
            default_actors = max(1, int(available.get("GPU", 0) / gpus))
        num_actors = options.num_actors or default_actors
        for name, needed in (("GPU", num_actors * gpus), ("CPU", num_actors * cpus)):
            if needed > available.get(name, 0):
                raise DatasetError(
                    f"{num_actors} actors need {needed:g} {name}s, the cluster has "
                    f"{available.get(name, 0):g}. Use a smaller --num_actors or --{name.lower()}s_per_actor."
                )
        # each shard of texts loads all text encoders, so an actor gets only one
        shards_per_actor = SHARDS_PER_ACTOR if options.is_latents else 1
        num_shards = options.num_shards or num_actors * shards_per_actor
        rows = _cache_shards(
            ray,
            main,
            arguments,
            options,
            num_actors=num_actors,
            num_shards=num_shards,
            gpus_per_actor=gpus,
            cpus_per_actor=cpus,
        )
    finally:
        ray.shutdown()
    conclude_shards(sorted(rows, key=lambda row: int(row["shard_index"])), options)


def _cache_shards(
    ray: Any,
    main: Main,
    arguments: Sequence[str],
    options: RayOptions,
    *,
    num_actors: int,
    num_shards: int,
    gpus_per_actor: float,
    cpus_per_actor: int,
) -> list[Mapping[str, Any]]:
    """Let the Ray actors cache all shards; return their results, one row per shard (see `CachingActor`)."""
    logger.info("%d actors cache %d shards", num_actors, num_shards)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # one block for each shard: tasks that split blocks would wait for the cores that the actors occupy
    shards = ray.data.from_items(
        [{"shard_index": index} for index in range(num_shards)], override_num_blocks=num_shards
    )
    actor_arguments = (
        main,
        arguments,
        options.is_latents,
        num_shards,
        cpus_per_actor,
        str(Path.cwd()),
    )
    results = shards.map_batches(
        CachingActor,
        batch_size=1,
        concurrency=num_actors,
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor or None,
        fn_constructor_args=actor_arguments,
    )
    rows = []
    for row in results.iter_rows():
        rows.append(row)
        logger.info("shard %d is done: %d of %d", row["shard_index"], len(rows), num_shards)
    return rows


def conclude_shards(rows: Sequence[Mapping[str, Any]], options: RayOptions) -> None:
    """Show the results of the Ray actors, one row for each shard.

    Raises:
        DatasetError: With the failures that the actors reported, if there are any.
    """
    finished_rows = [row for row in rows if not row["error"]]
    num_written = sum(row["written"] for row in finished_rows)
    num_kept = sum(row["kept"] for row in finished_rows)
    command = quote_command(["python", f"{options.script}.py", *options.command[1:]])
    show_box(
        "Caching on Ray is finished",
        [
            ("cache files", f"{num_written} written, {num_kept} kept"),
            ("shards", f"{len(finished_rows)} of {len(rows)} are done"),
        ],
        [("Finally, check everything and remove stale files", command)],
    )
    errors = _list_shard_errors(rows)
    if errors:
        raise DatasetError("\n  ".join(errors))


def _list_shard_errors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return error lines about failed shards; if there are none, about unusable media files."""
    errors = [f"shard {row['shard_index']}: {row['error']}" for row in rows if row["error"]]
    if errors:
        return [f"{len(errors)} of {len(rows)} shards could not be done; all others are:", *errors]
    failures: list[str] = []
    for row in rows:
        failures += json.loads(row["failures"])
    if failures:
        failures.insert(0, f"{len(failures)} of the sources could not be used; all others are done:")
    return failures


def _reject_unsuitable(
    family: Caches, config: DatasetConfig, options: CachingOptions, *arguments: Any
) -> None:
    """Raise OptionError if the caching command has --check, --debug_mode or a single shard."""
    options.shard.reject_beside(quote_command(["python", "tools/cache_on_ray.py"]))
    debug = arguments[0] if arguments else None
    if options.check or getattr(debug, "debug_mode", None) is not None:
        raise OptionError("--check and --debug_mode look at the dataset: run them without cache_on_ray.py")


def _join_cluster(ray: Any, options: RayOptions) -> None:
    """Connect to the Ray cluster of --address, or start Ray on this machine with enough CPU slots."""
    settings: dict[str, Any] = {"address": options.address or "local", "runtime_env": {}}
    if not PREFIX:  # not an installed package, so actors need the path of our modules
        paths = [str(ROOT)]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        settings["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    if options.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        settings["include_dashboard"] = False
        if options.num_actors is not None:
            needed = options.num_actors * options.cpus_per_actor
            settings["num_cpus"] = max(os.cpu_count() or 1, needed)
        if options.temp_dir is not None:
            settings["_temp_dir"] = str(real_path(options.temp_dir))
    ray.init(**settings)
