"""The work of caching a dataset, in parts that any process on any machine can do by itself: the latents, and
what the texts (texts.py) need too.

Names of existing caches are listed before the sources are: an entry that was there belongs to a source that
was there, so additions meanwhile never count as stale.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from dataset.cache.converting import require_form
from dataset.cache.files import FLIPPED, SUFFIX, grid_in_name, is_latent_cache, tensor_name
from dataset.cache.store import Stores, npz_names
from dataset.caching.existing import (
    ExistingNames,
    LatentNames,
    media_table,
    names_of,
    refuse_changing,
    refuse_moments,
    remove_caches,
    use_moments,
)
from dataset.caching.latents import (
    PARTIAL_BYTES,
    EncodersOnDemand,
    Pending,
    add_mirrored,
    batch_media,
    decode,
    write_entry,
)
from dataset.caching.planning import Recipe, SourcePlan, plan_all
from dataset.caching.prefetch import CacheReport, Failure, WriteBehind, join_reports, read_ahead
from dataset.caching.sound import HearingFamily, SoundWork
from dataset.config import DatasetConfig, DatasetTable
from dataset.options import CachingOptions
from dataset.sources.clock import find_other_lengths
from dataset.sources.colours import find_colours
from dataset.sources.decoding import check_resolution
from dataset.sources.frames import find_wrong_rates, shrink_mask
from dataset.sources.listing import find_all_sources, warn_captions, warn_unused
from dataset.sources.media_source import LISTED, Fault, MediaSource, list_faults
from modules.atomic_write import free_bytes
from modules.bars import Bar
from modules.console import Row, as_size, count_of, show_box
from modules.contract.data import FPS, LOSS_MASK, CacheEntry, MomentsBatch
from modules.contract.family import Caches, has_frame_rates, hears_sound
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

NUMBER_BYTES = 2  # of a latent; float32 ones take twice as much


@dataclass(frozen=True)
class EncodedPart:
    """Results for a part of the sources."""

    report: CacheReport
    right: frozenset[tuple[int, str]]  # table index and name of each valid entry


class MediaWork:
    """The latents of a dataset. The encoders are loaded when they are first needed and stay until `free`."""

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
        self.stores = stores = stores or Stores(npz_names(family))
        self._existing: ExistingNames = {
            table.index: LatentNames(self.stores.of(table), family.cache_tag, table.kind)
            for table in config.datasets
        }
        self._sound: SoundWork | None = None
        if hears_sound(family):
            how = options.skip_existing, options.verify, device
            self._sound = SoundWork(cast(HearingFamily, family), config.datasets, self.stores, *how)
        sources, self.not_listed, self.whole_tables = list_sources(config, captions=False)
        problems = []
        controlled = {source.table.index for source in sources if source.control}
        for table in config.datasets:
            has_control = table.index in controlled
            try:
                refuse_changing(table, table.augmentation.varying_keys, "latents")
                # first: load_tensors ignores the keys that a family's own check would have changed
                refuse_moments(family, table)
                check_resolution(table, family.latent.pixel_step)
                family.check_table(media_table(table, has_control))
            except DatasetError as error:
                is_hint = has_control and table.conditioning_directory is not None
                problems.append(f"{error}{MASKS_HINT if is_hint else ''}")
        if problems:
            raise DatasetError("\n".join(problems))
        warn_captions(sources)
        warn_unused(config, sources)
        family.check_given_files()
        self.pieces: Sequence[MediaSource] = use_moments(family, sources)
        require_form(config, family.cache_tag, stores.given)
        self._recipe = Recipe(
            family.cache_tag,
            family.media_identity,
            family.latent,
            family.defaults.fps,
            options.skip_existing,
            family.sections_of,
            self.stores,
            options.verify,
            has_rates=has_frame_rates(family),
        )
        self._family, self._config, self._options, self._device = family, config, options, device
        self._encoders = EncodersOnDemand(family, device)
        # items that wait, by what those of a batch must have in common
        self._pending: dict[tuple[object, ...], list[Pending]] = {}
        self._written: set[tuple[int, str]] = set()  # table index and name of each file of this `encode`

    def encode(self, pieces: Sequence[MediaSource], who: str | None) -> EncodedPart:
        """Encode every item of some sources that has no valid entry.

        A source that cannot be read becomes a failure of the report and does not stop the others. who: which
        share of the work this is, to show it; None shows nothing. Raises CheckpointError if an encoder cannot
        be loaded, OutputError if an entry cannot be written.
        """
        workers, shows = workers_of(self._options), who is not None
        plans, failures = plan_all(pieces, self._existing, self._recipe, workers, shows)
        to_do = [plan for plan in plans if plan.missing is None or plan.missing]
        some = [plan.source for plan in to_do]
        # told and done: of rates the option decides, as a file's header may be wrong
        told = [*find_wrong_rates(some), *find_other_lengths(some, self._recipe.fps)]
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
        finished = [plan for plan in plans if plan.missing == ()]
        self._pending.clear()
        self._written.clear()
        if to_do:
            more, unreadable = self._encode_all(to_do, workers, shows)
            finished, failures = finished + more, failures + unreadable
        reasons = [plan.outdated for plan in finished if plan.outdated is not None]
        if reasons:  # so that the extra work is explained
            logger.info(
                "%d sources had outdated cache files, which were made again. The first: %s",
                len(reasons),
                reasons[0],
            )
        report = CacheReport(
            written=len(self._written),
            kept=sum(len(plan.kept) for plan in finished),
            foreign=sum(plan.foreign for plan in finished),
            failures=tuple(failures),
            dropped=tuple(Failure.of(one.source, one.reason) for one in finished if one.reason is not None),
            shortened=tuple(Failure.of(one.source, one.short) for one in finished if one.short is not None),
            share=len(pieces),
            whole=len(self.pieces),
        )
        kept = {(plan.source.table.index, name) for plan in finished for name in plan.kept}
        right = frozenset(kept | self._written)
        if self._sound is not None:
            self._encoders.free()  # the VAE of pictures is not needed beside that of sound
            sound, right_too = self._sound.encode(pieces, right, workers, shows)
            report, right = join_reports([report, sound]), right | right_too
        return EncodedPart(report, right)

    def remove_stale(
        self, table: DatasetTable, done: Sequence[EncodedPart], failed: Collection[str], keep_cache: bool
    ) -> int:
        """Remove the entries of a table that belong to no item; return how many there were.

        done: of all processes. failed: stems of sources that failed: theirs stay.
        """
        if keep_cache:
            return 0
        belongs = {name for one in done for index, name in one.right if index == table.index}
        store, family = self.stores.of(table), self._family
        stale = self._existing[table.index].not_in(belongs, but_of=failed)
        of_sound = 0 if self._sound is None else self._sound.remove_stale(table, belongs, failed)
        return of_sound + remove_caches(store, stale, partial(is_latent_cache, architecture=family.name))

    def free(self) -> None:
        """Free the encoders."""
        self._encoders.free()
        if self._sound is not None:
            self._sound.free()

    def _encode_all(
        self, plans: Sequence[SourcePlan], workers: int, shows: bool
    ) -> tuple[list[SourcePlan], list[Failure]]:
        """Decode and encode the missing entries of the plans; return the finished ones.

        Threads decode ahead, batches hold items of one size, and files are written while later batches are
        encoded. Sources that cannot be read become failures.
        """
        finished: list[SourcePlan] = []
        failures: list[Failure] = []
        ahead = read_ahead(
            plans,
            lambda plan: plan.source,
            lambda plan: decode(plan, names_of(self._existing, plan.source), self._recipe),
            workers,
            Bar(len(plans), "Encoding", "source", shows, at_once=True),
            decodes=True,
        )
        with WriteBehind() as writer, contextlib.closing(ahead), torch.no_grad():
            for _, result in ahead:
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    finished.append(result[0])
                    self._add(result[1], writer)
                del result  # frees its frames before waiting for the next source
            for group in list(self._pending):
                self._encode(group, writer)
        return finished, failures

    def _add(self, items: Iterable[Pending], writer: WriteBehind) -> None:
        """Put the missing items of a source into their batches; encode full batches."""
        for item in items:
            group = (item.table.index, *(tensor.shape for tensor in item.crop.tensors))
            self._pending.setdefault(group, []).append(item)
            if len(self._pending[group]) >= (self._options.batch_size or item.table.batch_size):
                self._encode(group, writer)
        sizes = {group: sum(item.size_bytes for item in some) for group, some in self._pending.items()}
        if sum(sizes.values()) > PARTIAL_BYTES:
            self._encode(max(sizes, key=sizes.__getitem__), writer)

    def _encode(self, group: tuple[object, ...], writer: WriteBehind) -> None:
        items = self._pending.pop(group)
        table, crops = items[0].table, [item.crop for item in items]
        # the names of the files, but for the sections that the family may make
        keys = [item.name.file_name(self._recipe.tag).removesuffix(SUFFIX) for item in items]
        encoded: Sequence[Sequence[CacheEntry]]
        if crops[0].moments:
            moments = [torch.stack(found) for found in zip(*(crop.moments for crop in crops), strict=True)]
            given = MomentsBatch(moments[0], tuple(keys), *moments[1:])
            encoded = [[entry] for entry in self._family.latents_from_moments(given)]
        else:
            encoders = self._encoders.get()
            media = batch_media(crops, keys, [item.span for item in items], table)
            encoded = self._family.encode_media(encoders, media)
            if table.augmentation.flip:
                flipped = dataclasses.replace(
                    media,
                    frames=media.frames.flip(3),
                    keys=tuple(f"{key}{FLIPPED}" for key in media.keys),
                    control=tuple(control.flip(3) for control in media.control),
                    alpha=None if media.alpha is None else media.alpha.flip(2),
                )
                mirrored = self._family.encode_media(encoders, flipped)
                del flipped  # its frames are not held while the writer is waited for
                encoded = [
                    [add_mirrored(one, other) for one, other in zip(*sides, strict=True)]
                    for sides in zip(encoded, mirrored, strict=True)
                ]
        for item, entries in zip(items, encoded, strict=True):
            self._submit(item, entries, writer)

    def _submit(self, item: Pending, entries: Sequence[CacheEntry], writer: WriteBehind) -> None:
        """Have an item's files written, and then its other files removed: sections that it no longer has."""
        names, crop, spec = set(), item.crop, self._family.latent
        store = self._recipe.stores.of(item.table)
        mask = None if crop.mask is None else shrink_mask(crop.mask, spec.stride)
        record = dataclasses.replace(item.record, parts=len(entries))
        facts = {"width": str(item.name.size[0]), "height": str(item.name.size[1])}
        if item.name.span is not None:
            facts["frame_count"] = str(item.name.span[1])
        if item.rate is not None:  # as text, too: what can share a batch is found by headers alone
            facts[FPS] = repr(item.rate)
        for entry in entries:
            tensors = {key: tensor.detach().cpu() for key, tensor in entry.tensors.items()}
            if mask is not None:
                tensors[LOSS_MASK] = mask[entry.start : entry.start + tensors["latents"].shape[1]].clone()
            if item.rate is not None:
                tensors[FPS] = torch.tensor(item.rate)
            named = {
                tensor_name(key, tensor, grid=entry.grid, has_frames=spec.names_frames): tensor
                for key, tensor in tensors.items()
            }
            if spec.flat_in_caches:
                named = {
                    name: tensor if grid_in_name(name) is None else tensor.squeeze(1)
                    for name, tensor in named.items()
                }
            file = dataclasses.replace(item.name, section=entry.section).file_name(self._recipe.tag)
            writer.submit(partial(write_entry, store, self._family, file, named, record, facts))
            names.add(file)
        self._written |= {(item.table.index, name) for name in names}
        surplus = [name for name in item.there if name not in names]
        if surplus:
            is_ours = partial(is_latent_cache, architecture=self._family.name)
            writer.submit(partial(remove_caches, store, surplus, is_ours))

    def _disk(self, plans: Sequence[SourcePlan]) -> str | None:
        """Estimate what the latents of some sources take on disk; None if no size is known yet."""
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


def list_sources(
    config: DatasetConfig, captions: bool
) -> tuple[list[MediaSource], CacheReport, list[DatasetTable]]:
    """Return all sources, a report of unreadable ones, such as the end of a tar, and the completely listed
    tables: only their entries can be stale.
    """
    skipped: list[tuple[DatasetTable, Fault]] = []
    sources = find_all_sources(config, captions, skipped=skipped)
    failures = [Failure(table.source, fault.text, table.index, fault.stem or "") for table, fault in skipped]
    broken = {table.index for table, _ in skipped}
    whole = [table for table in config.datasets if table.index not in broken]
    return sources, CacheReport(failures=tuple(failures)), whole


MASKS_HINT = (
    " If conditioning_data_dir holds masks of the loss, train with --masked_loss, or call the key "
    "mask_directory."
)


def workers_of(options: CachingOptions) -> int:
    """Return how many threads read ahead."""
    return options.num_workers or max(1, (os.cpu_count() or 2) - 1)
