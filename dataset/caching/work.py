"""The latents of a dataset, in parts that any process on any machine can make by itself.

Existing caches are listed before the sources, so that entries and sources that are added meanwhile never
count as stale.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from dataset.cache.files import SUFFIX, LatentName, is_latent_cache
from dataset.cache.records import LatentRecord
from dataset.cache.store import ExistingNames, LatentNames, Stores, may_be_mixed, npz_names, remove_caches
from dataset.caching import latents, prefetch
from dataset.caching.planning import Recipe, SourcePlan, plan_all
from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import IGNORE
from dataset.options import CachingOptions
from dataset.sources.clock import find_other_lengths
from dataset.sources.colours import find_colours, find_reordered
from dataset.sources.decoding import DecodedMedia, check_resolution
from dataset.sources.frames import find_far_rates, find_wrong_rates, media_table
from dataset.sources.listing import warn_captions, warn_unused
from dataset.sources.media_source import LISTED, MediaSource, list_faults
from dataset.subsets import refuse_changing
from modules.atomic_write import free_bytes
from modules.bars import Bar
from modules.console import Row, as_size, count_of, count_words, show_box
from modules.contract.data import FPS, MediaEncoders
from modules.contract.family import Caches, hears_sound, sound_of
from modules.control_codes import escape_control_codes
from modules.devices import free_memory
from modules.errors import DatasetError

if TYPE_CHECKING:  # it is loaded only for families that hear
    from dataset.caching.sound import HearingFamily, SoundWork

logger = logging.getLogger(__name__)

NUMBER_BYTES = 2  # of a latent; float32 ones take twice as much


def _check_tables(family: Caches, config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError with all faults that make tables unusable for a family."""
    problems, heard = [], sound_of(family)
    is_alone = heard is not None and heard.is_alone
    controlled = {source.table.index for source in sources if source.control}
    companions: dict[int, list[MediaSource]] = {}
    for source in sources:
        if source.references or source.control_mask is not None:
            companions.setdefault(source.table.index, []).append(source)
    for table in config.datasets:
        has_control = table.index in controlled
        try:
            if table.group is not None:
                refuse_changing(table, table.augmentation.varying_keys, "latents")
            # first: load_tensors ignores the keys that a family's own check would have changed
            if table.load_tensors:
                from dataset.caching.given import refuse_moments

                refuse_moments(family, table)
            check_resolution(table, family.latent.pixel_step)
            family.check_table(media_table(table, has_control, table.index in companions))
            if table.index in companions:
                from dataset.sources.companions import refuse_companions

                refuse_companions(table, companions[table.index])
            if is_alone and (table.kind == "image" or table.audio == IGNORE):
                why = "it has pictures" if table.kind == "image" else 'audio = "ignore" leaves none'
                raise DatasetError(f"{table.name}: this run learns sound alone, and {why}. Leave it out")
            if table.is_of_sound and not is_alone:
                raise DatasetError(
                    f"{table.name}: it has sounds, and this run learns pictures. Give the mode that learns "
                    "sound alone, audio"
                )
        except DatasetError as error:
            is_hint = has_control and table.conditioning_directory is not None
            problems.append(f"{error}{MASKS_HINT if is_hint else ''}")
    if problems:
        raise DatasetError("\n".join(problems))


class MediaWork:
    """Encode the latents of a dataset. The encoders are loaded when they are first needed and stay until
    `free`; encoders of media and of sound replace each other on the device.
    """

    def __init__(
        self,
        family: Caches,
        config: DatasetConfig,
        options: CachingOptions,
        device: torch.device,
        stores: Stores | None = None,
    ) -> None:
        """List entries and sources. stores: where entries are kept, if not where the tables say.

        Raises DatasetError if the dataset cannot be used, CheckpointError if a file of an encoder is wrong.
        """
        self.stores = stores = dataclasses.replace(
            stores or Stores(npz_names(family)), skip_existing=options.skip_existing, verify=options.verify
        )
        self._existing: ExistingNames = {
            table.index: LatentNames(self.stores.of(table), family.cache_tag, table.kind)
            for table in config.datasets
        }
        self._sound: SoundWork | None = None
        if hears_sound(family):
            from dataset.caching import sound

            hearing = cast("HearingFamily", family)
            self._sound = sound.SoundWork(hearing, config.datasets, stores, device, self.free)
        sources, self.not_listed, self.whole_tables = prefetch.list_sources(config, captions=False)
        _check_tables(family, config, sources)
        warn_captions(sources)
        if any(table.directory is None or table.references is not None for table in config.datasets):
            warn_unused(config, sources)
        family.check_given_files()
        if any(source.tensors is not None for source in sources):
            from dataset.caching.given import use_moments

            sources = use_moments(family, sources)
        self.pieces: Sequence[MediaSource] = sources
        if mixed := [one for one in config.datasets if one.index not in stores.given and may_be_mixed(one)]:
            from dataset.cache.form import require_form

            require_form(mixed, family.cache_tag)
        self._recipe = Recipe(
            family.cache_tag,
            family.media_identity,
            family.latent,
            family.defaults.fps,
            family.sections_of,
            stores,
            has_rates=family.can.rate,
            sound=sound_of(family),
        )
        self._family, self._config, self._options, self._device = family, config, options, device
        self._encoders: MediaEncoders | None = None

    def encode(self, pieces: Sequence[MediaSource], who: str | None) -> prefetch.CacheReport:
        """Encode every item of some sources that has no valid entry.

        A source that cannot be read becomes a failure of the report and does not stop the others. who: name
        of this share of the work, for progress bars; None: show none. Raises CheckpointError if an encoder
        cannot be loaded, OutputError if an entry cannot be written.
        """
        workers, shows = prefetch.workers_of(self._options), who is not None
        plans, failures = plan_all(pieces, self._existing, self._recipe, workers, shows)
        to_do = [plan for plan in plans if plan.missing is None or plan.missing]
        some = [plan.source for plan in to_do]
        # warned about, and encoded: source_fps decides, as a file's header may be wrong
        states_rates = any(table.stated_fps is not None for table in self._config.datasets)
        told = find_wrong_rates(some) if states_rates else []
        told += [] if self._recipe.has_rates else find_far_rates(some, self._recipe.fps)
        told += find_other_lengths(some, self._recipe.fps)
        told += find_reordered(some)
        if any(source.references or source.control for source in some):
            from dataset.sources.companions import find_moving_references  # few tables have any

            told += find_moving_references(some)
        told += find_colours(some, self._family.latent.masks_latents)
        if told:
            logger.warning("%s", escape_control_codes("\n".join(list_faults(told, LISTED))))
        if who is not None:
            rows: list[Row] = [
                ("data", str(self._config.path)),
                (f"latents{who}", f"{count_of(len(pieces), 'source')}, {len(to_do)} of them to encode"),
                ("disk", self._disk(to_do)),
                ("device", str(self._device)),
            ]
            show_box("Caching latents", rows)
        outdated = [plan.outdated for plan in to_do if plan.outdated is not None and plan.is_other]
        if outdated and shows:
            _warn_of_outdated(outdated)
        finished = [plan for plan in plans if plan.missing == ()]
        written: set[tuple[int, str]] = set()
        if to_do:
            items = self._items(to_do, finished, failures, workers, shows)
            with prefetch.write_behind() as write, contextlib.closing(items), torch.no_grad():
                for batch in latents.batches(items, self._options.batch_size):
                    written |= self._write(batch, write)
                    del batch  # frees its frames before waiting for the next source
        reasons = [plan.outdated for plan in finished if plan.outdated is not None]
        if len(reasons) > len(outdated):  # so that the extra work is explained
            logger.info(
                "%d sources had outdated cache files, which were made again. The first: %s",
                len(reasons),
                reasons[0],
            )
        kept = {(plan.source.table.index, name) for plan in finished for name in plan.kept}
        failed = prefetch.Failure.of
        report = prefetch.CacheReport(
            written=len(written),
            kept=sum(len(plan.kept) for plan in finished),
            foreign=sum(plan.foreign for plan in finished),
            failures=tuple(failures),
            dropped=tuple(failed(one.source, one.reason) for one in finished if one.reason is not None),
            shortened=tuple(failed(one.source, one.short) for one in finished if one.short is not None),
            resized=tuple(
                failed(one.source, "; ".join(one.size_changes)) for one in finished if one.size_changes
            ),
            share=len(pieces),
            whole=len(self.pieces),
            right=frozenset(kept | written),
        )
        if self._sound is None:
            return report
        return prefetch.join_reports([report, self._sound.encode(pieces, report.right, workers, shows)])

    def remove_stale(
        self,
        table: DatasetTable,
        right: Collection[tuple[int, str]],
        failed: Collection[str],
        keep_cache: bool,
    ) -> int:
        """Remove the entries of a table that belong to no item; return how many there were.

        right: valid files of all processes. failed: stems of sources that failed; their entries stay.
        """
        if keep_cache:
            return 0
        belongs = {name for index, name in right if index == table.index}
        store, family = self.stores.of(table), self._family
        stale = self._existing[table.index].not_in(belongs, but_of=failed)
        of_sound = 0 if self._sound is None else self._sound.remove_stale(table, belongs, failed)
        is_ours = partial(is_latent_cache, architecture=family.name)
        return of_sound + (remove_caches(store, stale, is_ours) if stale else 0)

    def free(self) -> None:
        if self._encoders is not None:
            self._encoders = None
            free_memory(self._device)
        if self._sound is not None:
            self._sound.free()

    def _items(
        self,
        plans: Sequence[SourcePlan],
        finished: list[SourcePlan],
        failures: list[prefetch.Failure],
        workers: int,
        shows: bool,
    ) -> Generator[DecodedMedia, None, None]:
        """Yield the missing items of the plans, while threads decode the next ones; add the completed plans
        to `finished`, and sources that cannot be read to `failures`.
        """
        ahead = prefetch.read_ahead(
            plans,
            lambda plan: plan.source,
            lambda plan: latents.decode(plan, self._existing[plan.source.table.index], self._recipe),
            workers,
            Bar(len(plans), "Encoding", "source", shows, at_once=True),
            decodes=True,
        )
        with contextlib.closing(ahead):
            for _, result in ahead:
                if isinstance(result, prefetch.Failure):
                    failures.append(result)
                else:
                    finished.append(result[0])
                    yield from result[1]
                del result  # frees its frames before waiting for the next source

    def _write(self, batch: Sequence[DecodedMedia], write: prefetch.Write) -> set[tuple[int, str]]:
        """Encode a batch and pass its files to `write`; then files of sections that an item no longer has are
        removed. Return table index and name of each file.
        """
        family, tag, written = self._family, self._recipe.tag, set[tuple[int, str]]()
        if self._encoders is None and not batch[0].moments:
            self.free()  # the networks of pictures and of sound take turns
            self._encoders = latents.load_encoders(family, self._device)
        names = [
            LatentName(one.source.stem, one.size)
            if one.source.table.kind == "image"
            else LatentName(one.source.stem, one.bucket, one.spans[0])
            for one in batch
        ]
        keys = [name.file_name(tag).removesuffix(SUFFIX) for name in names]
        encoded = latents.encode(batch, keys, family, self._encoders)
        for item, name, entries in zip(batch, names, encoded, strict=True):
            store = self.stores.of(item.source.table)
            sizes = {"size": item.size, "bucket": item.bucket, "span": item.spans[0]}
            options = self._recipe.options(item.source, **sizes)
            record = LatentRecord(self._recipe.encoder, options, item.files, item.clip, len(entries), {})
            facts = {"width": str(name.size[0]), "height": str(name.size[1])}
            if name.span is not None:
                facts["frame_count"] = str(name.span[1])
            if item.rate is not None:  # as text, too: what can share a batch is found by headers alone
                facts[FPS] = repr(item.rate)
            files = [dataclasses.replace(name, section=entry.section).file_name(tag) for entry in entries]
            for file, entry in zip(files, entries, strict=True):
                named = latents.name_tensors(item, entry, family.latent)
                write(partial(latents.write_entry, store, family, file, named, record, facts))
            written |= {(item.source.table.index, file) for file in files}
            there = self._existing[item.source.table.index].of(item.source.stem)
            same = [file for file, one in there.items() if (one.size, one.span) == (name.size, name.span)]
            if surplus := [file for file in same if file not in files]:
                is_ours = partial(is_latent_cache, architecture=family.name)
                write(partial(remove_caches, store, surplus, is_ours))
        return written

    def _disk(self, plans: Sequence[SourcePlan]) -> str | None:
        """Describe the estimated disk space for the latents of some sources; None if no size is known yet."""
        spec, sizes = self._family.latent, [size for plan in plans for size in plan.items]
        known = sum(plan.missing is not None for plan in plans)
        if not sizes:
            return None
        step, rows, columns = spec.stride

        def numbers(width: int, height: int, frames: int = 1) -> int:
            return spec.channels * ((frames - 1) // step + 1) * (height // rows) * (width // columns)

        needed = sum(numbers(*size) for size in sizes) * NUMBER_BYTES * len(plans) / known
        free = free_bytes(self._config.datasets[0].cache_directory)
        return f"about {as_size(needed)}, more with control or start images; {as_size(free)} free"


MASKS_HINT = (
    " If conditioning_data_dir holds masks of the loss, train with --masked_loss, or call the key "
    "mask_directory."
)


def _warn_of_outdated(reasons: Sequence[str]) -> None:
    """Warn of caches that do not fit before they are replaced: they may be meant for another model."""
    logger.warning(
        "%s, which this command replaces. If they are to stay, press Ctrl-C, and give another "
        "cache_directory or the options that made them. The first: %s",
        *(count_words(len(reasons), "sources have cache files of another kind"), reasons[0]),
    )
