"""Caches made inside the training command, by the caching loop, and texts that are encoded while training.

Options say where latents and texts of a table are kept: in npz files next to the images, or in host memory.
Without these options, caches of the caching scripts are used; if there are none, latents are encoded once
into memory (like encoding at each step, but with fixed posterior noise) and texts at each step. Images
that augmentation changes each time are encoded at each step too: the training process reads, changes and
encodes them once for each of their micro-batches. Their randomness is a function of the run's seed and the
micro-batch's number, as that of noise and timesteps.
"""

import logging
import os
import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import cast

import torch
from torch import Tensor

from dataset.batches.checks import SameEncoders
from dataset.batches.items import NO_COMMANDS, CachingCommands, OnTheFlyTables, TableCacheInfo, TrainingItem
from dataset.cache.store import MemoryStore, StorePair, Stores, npz_names, open_shared, open_store
from dataset.cache_files import CacheStore, NpzNames, parse_latent_name, text_file_name
from dataset.caching.latents import batch_media, load_encoders
from dataset.caching.prefetch import conclude
from dataset.listing import find_all_sources, require_captions, warn_unused
from dataset.options import CachingInRunOptions, CachingOptions
from dataset.sources.decoding import DecodedMedia, decode_source
from dataset.sources.fetching import fetch
from dataset.sources.frames import shrink_mask
from dataset.sources.left_out import TableFolders
from dataset.sources.media_source import LISTED, MediaSource
from dataset.sources.remarks import (
    NAMED,
    find_caption_warnings,
    find_media_warnings,
    log_warnings,
    unvaried_captions,
    warn_cut_captions,
)
from dataset.table import NO_AUGMENTATION, DatasetConfig, DatasetTable
from modules.console import format_size, quiet
from modules.errors import DatasetError, OptionError
from modules.integers import ceil_div
from modules.media.buckets import Size
from modules.media.reading import image_size
from modules.seeds import derive_seed
from networks.builtin_modules import OWN_MODULES
from networks.kinds.composing import list_kinds
from protocols.data import LOSS_MASK
from protocols.family import Caches, Family, LearningEncoder, TextEncoder, can_learn
from protocols.full_model import trains_checkpoint
from training.data.feed import BatchSources
from training.data.live import LiveTextEncoders, WithNetwork
from training.features.contract import EMPTY_PROMPT, LIVE_MEDIA, LIVE_TEXTS, NO_DATASET
from training.features.hooks import OnMedia
from training.options import TrainingOptions

logger = logging.getLogger(__name__)

# cache entries per exchange between processes: a copy of all would double the memory
ENTRIES_PER_MESSAGE = 64


class TensorLocation(Enum):
    """Where a dataset table's latents, or its text encoder outputs, come from."""

    CACHE = "in the caches that the table names"
    NPZ = "in npz files next to the images"
    MEMORY = "in host memory"
    LIVE = "encoded at each step"

    @property
    def is_made(self) -> bool:
        """Whether the training command itself makes these tensors: as npz files or in memory."""
        return self in {TensorLocation.NPZ, TensorLocation.MEMORY}


@dataclass(frozen=True)
class TablePlan:
    """How the latents and text encoder outputs of a dataset table are obtained: from caches or encoders."""

    table: DatasetTable
    latents: TensorLocation
    texts: TensorLocation

    @property
    def reads_cache_files(self) -> bool:
        """Whether latents and text encoder outputs come from ordinary cache files, which need no store."""
        return self.latents is self.texts is TensorLocation.CACHE

    @property
    def can_be_planned(self) -> bool:
        """Whether all tensors are in files, as --plan needs: none is encoded live or cached in memory."""
        return (
            self.latents in {TensorLocation.CACHE, TensorLocation.NPZ}
            and self.texts is not TensorLocation.MEMORY
        )


def prepare_sources(
    family: Caches,
    config: DatasetConfig,
    options: CachingInRunOptions | None,
    device: torch.device,
    live_encoders: LiveTextEncoders | None = None,
    commands: CachingCommands = NO_COMMANDS,
    needs: Collection[str] = (),
    on_media: Sequence[OnMedia] = (),
) -> BatchSources:
    """Make the caches that the options ask for, and return the sources of batches.

    1. Decide for each dataset table where its tensors come from, and encode what is to be cached.
    2. Send caches in memory to all processes.
    3. List the sources of images and captions that are encoded at each step, and warn about them.

    All processes of a run call this and share the work.

    Args:
        family: The model family.
        config: The dataset, as read from its file.
        options: Options of caching; None for a script that trains only from caches.
        device: Device for encoding.
        live_encoders: Encoders that run during training; their outputs are not cached.
        commands: Commands to show if a cache cannot be used.
        needs: What the active features need in batches, as names such as NO_DATASET.
        on_media: Functions that change the tensors of images that are encoded at each step.

    Raises:
        UserError: If items cannot be cached in this way, or a file cannot be used.
    """
    plans = plan_tables(
        family, config, options, () if live_encoders is None else live_encoders.keys, needs=needs
    )
    stores = open_stores(family, plans)
    if options is not None:
        with quiet() if NO_DATASET in needs else nullcontext():  # such a dataset is a placeholder
            _encode_planned_tables(family, config, plans, options=options, device=device, stores=stores)
    caches_in_memory = _exchange_memory_caches(stores)
    tables = list_on_the_fly_tables(family.cache_tag, plans, needs_captions=live_encoders is not None)
    if os.environ.get("RANK", "0") == "0":  # all processes have the same tables
        _warn_of_live_sources(
            family, config, tables, encoders=() if live_encoders is None else live_encoders.encoders
        )
    media_encoder = None
    if any(table.on_the_fly_buckets is not None for table in tables.values()):
        logger.info("Images that change are encoded at each step: the VAE stays on the device.")
        media_encoder = LiveMedia(family, device, on_media)
    return BatchSources(
        family.latent,
        SameEncoders(commands),
        stores=stores,
        tables=tables,
        image_encoder=media_encoder,
        # the encoder and caches in memory are in this process, so no worker process can read batches
        must_stay_in_process=media_encoder is not None or caches_in_memory,
    )


def _exchange_memory_caches(stores: Stores) -> bool:
    """Share the in-memory caches that each process encoded a part of; return whether any are filled."""
    memory_stores: list[MemoryStore] = []
    for store_pair in stores.custom_stores.values():
        memory_stores += [store for store in store_pair if isinstance(store, MemoryStore)]
    if memory_stores:
        _share_entries(memory_stores)
    has_entries = any(store.entries for store in memory_stores)
    if has_entries:
        size_bytes = sum(store.size_bytes for store in memory_stores)
        logger.info(
            "Caches in host memory: %s. Batches are read by no other process.", format_size(size_bytes)
        )
    return has_entries


def _encode_planned_tables(
    family: Caches,
    config: DatasetConfig,
    plans: Sequence[TablePlan],
    options: CachingInRunOptions,
    device: torch.device,
    stores: Stores,
) -> None:
    """Encode the latents and captions that the table plans ask for, into npz files or into memory."""
    from dataset.caching import loop  # only if something is cached

    stores = replace(stores, trusts_shared_caches=options.skip_cache_check)
    caching_options = partial(
        CachingOptions.from_defaults, dataset_config=config.path, device=str(device), keep_cache=True
    )
    media_tables = tuple(plan.table for plan in plans if plan.latents.is_made)
    if media_tables:
        caching = caching_options(batch_size=options.vae_batch_size)
        report = loop.cache_media(family, DatasetConfig(config.path, media_tables), caching, stores)
        # no warning: files of other programs are expected here
        conclude(replace(report, num_without_record=0))
    elif options.vae_batch_size > 1:
        logger.warning(
            "--vae_batch_size %d has no effect: this run caches no images, because they are "
            "cached already, or because they change each time",
            options.vae_batch_size,
        )
    text_tables = tuple(plan.table for plan in plans if plan.texts.is_made)
    if text_tables:
        caching = caching_options(batch_size=options.text_encoder_batch_size)
        report = loop.cache_texts(family, DatasetConfig(config.path, text_tables), caching, stores)
        conclude(replace(report, num_without_record=0))


def plan_tables(
    family: Caches,
    config: DatasetConfig,
    options: CachingInRunOptions | None,
    live_keys: Collection[str] = (),
    needs: Collection[str] = (),
) -> list[TablePlan]:
    """Decide where the latents and text encoder outputs of each table come from; encode nothing.

    Args:
        family: The model family.
        config: The dataset, as read from its file.
        options: Options of the run.
        live_keys: Names of text tensors that are encoded at each step; the others come from caches.
        needs: What the active features need in batches, as names such as NO_DATASET.

    Raises:
        DatasetError: If images that augmentation changes each time are to be cached.
        OptionError: If npz files are requested but the family has none.
    """
    if NO_DATASET in needs:  # the table is a placeholder that is not trained on
        return [TablePlan(table, TensorLocation.MEMORY, TensorLocation.MEMORY) for table in config.datasets]
    if options is not None and family.latent.npz is None:
        # Raise OptionError if the options ask for caches in npz files, for a model that has none
        to_disk_by_name = {
            "latents": options.cache_latents_to_disk,
            "text_encoder_outputs": options.cache_text_encoder_outputs_to_disk,
        }
        for name, to_disk in to_disk_by_name.items():
            if to_disk:
                raise OptionError(f"--cache_{name}_to_disk: this model has no npz files; omit _to_disk")
    texts = _locate_texts(family, options, live_keys)
    if LIVE_MEDIA in needs:  # the feature that needs it has already rejected --cache_latents
        return [TablePlan(table, TensorLocation.LIVE, texts) for table in config.datasets]
    return [TablePlan(table, _locate_latents(family, table, options), texts) for table in config.datasets]


def _locate_texts(
    family: Caches, options: CachingInRunOptions | None, live_keys: Collection[str]
) -> TensorLocation:
    """Return the source of the text encoder outputs; tensors in `live_keys` are encoded at each step."""
    # only if all outputs are live: otherwise the rest is read from caches
    if live_keys and family.text_keys.issubset(live_keys):
        return TensorLocation.LIVE
    if options is None or not options.caches_texts:
        return TensorLocation.CACHE
    return TensorLocation.NPZ if options.cache_text_encoder_outputs_to_disk else TensorLocation.MEMORY


def _locate_latents(
    family: Caches, table: DatasetTable, options: CachingInRunOptions | None
) -> TensorLocation:
    """Return where the latents of a table come from: encoded at each step, in memory, or from files."""
    if table.buckets.augmentation.varying_keys:
        if options is not None and options.caches_latents:
            raise DatasetError(
                f"{table.name}: color_aug, random_crop and face_crop_aug_range change images each time, so "
                "their latents cannot be cached: omit these keys, or --cache_latents"
            )
        return TensorLocation.LIVE
    if options is None:
        return TensorLocation.CACHE
    if options.caches_latents:
        return TensorLocation.NPZ if options.cache_latents_to_disk else TensorLocation.MEMORY
    # without any option, existing caches are used; if there are none, latents are encoded into memory
    names = open_store(table, npz_names(family)).names()
    # caches of this program, and not only npz files of others
    has_own = any(parse_latent_name(name, family.cache_tag, table.kind) is not None for name in names)
    return TensorLocation.CACHE if has_own else TensorLocation.MEMORY


def open_stores(family: Caches, plans: Sequence[TablePlan]) -> Stores:
    """Open the cache stores of the dataset tables; tables with ordinary cache files need no store."""
    names = npz_names(family)
    return Stores(
        names,
        {plan.table.index: stores_for_plan(plan, names) for plan in plans if not plan.reads_cache_files},
    )


def stores_for_plan(plan: TablePlan, names: NpzNames) -> StorePair:
    """Return the stores for the latents and for the text encoder outputs of a table."""
    return StorePair(
        latents=_open_store_at(plan.latents, plan.table, names),
        texts=_open_store_at(plan.texts, plan.table, names),
    )


def _open_store_at(location: TensorLocation, table: DatasetTable, names: NpzNames) -> CacheStore:
    if location is TensorLocation.CACHE:
        return open_store(table, names)
    if location is TensorLocation.NPZ:
        return open_shared(table, names, "npz", table.source.base_folder)
    return MemoryStore(table.cache_directory)  # with `TensorLocation.LIVE` it stays empty


def list_on_the_fly_tables(tag: str, plans: Sequence[TablePlan], needs_captions: bool) -> OnTheFlyTables:
    """Return the tables whose images or captions are read from their sources during training, by index.

    Args:
        tag: Name of the model family in the names of cache files.
        plans: Where the latents and text encoder outputs of each table come from.
        needs_captions: Whether to list all tables, with captions.

    Raises:
        DatasetError: If captions are missing, or if they are read together with reference images.
        MediaError: If the header of an image cannot be read.
    """
    dataset = DatasetConfig(plans[0].table.config_path, tuple(plan.table for plan in plans))
    folders = TableFolders(dataset)
    return {
        plan.table.index: _read_on_the_fly_table(tag, plan, needs_captions, folders)
        for plan in plans
        if needs_captions or plan.latents is TensorLocation.LIVE
    }


def _read_on_the_fly_table(
    tag: str, plan: TablePlan, needs_captions: bool, folders: TableFolders
) -> TableCacheInfo:
    """Return the sources of one table, with the sizes of its images if they are encoded during training."""
    # The arguments are those of `list_on_the_fly_tables`; `folders` has the folders of all its tables.
    config = DatasetConfig(plan.table.config_path, (plan.table,))
    # the listing was logged already if this run has cached the table
    with quiet() if plan.latents.is_made else nullcontext():
        sources = find_all_sources(config, captions=needs_captions, folders=folders)
    if needs_captions:
        require_captions(sources)
        _check_references(plan.table, sources)
    sources_by_stem = {source.stem: source for source in sources}
    sizes: dict[str, Size] | None = None
    if plan.latents is TensorLocation.LIVE:
        sizes = {stem: _read_size(source) for stem, source in sources_by_stem.items()}
    return TableCacheInfo(
        tag,
        frozenset(),
        has_cached_texts=plan.texts is not TensorLocation.LIVE,
        on_the_fly_buckets=sizes,
        on_the_fly_sources=sources_by_stem,
    )


def _check_references(table: DatasetTable, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError if text encoders need reference images, which are not read during training."""
    if table.references.are_seen_by_texts and any(source.control for source in sources):
        raise DatasetError(
            f"{table.name}: the text encoder reads captions together with their reference images, and this "
            "training encodes captions at each step, without them. Omit what changes captions or learns "
            "a word, and cache texts; or omit the reference images"
        )


def _warn_of_live_sources(
    family: Caches, config: DatasetConfig, tables: OnTheFlyTables, encoders: Sequence[TextEncoder]
) -> None:
    """Log the same warnings about images and captions encoded during training that caching logs."""
    images: list[MediaSource] = []
    listed_tables: list[DatasetTable] = []  # whose items come from a list instead of a folder
    for table in config.datasets:
        live_table = tables.get(table.index)
        # tables with buckets are those whose images are encoded during training
        if live_table is not None and live_table.on_the_fly_buckets is not None:
            images += live_table.on_the_fly_sources.values()
            if table.source.directory is None:
                listed_tables.append(table)
    if listed_tables:
        warn_unused(DatasetConfig(config.path, tuple(listed_tables)), images)
    latent, fps = family.latent, family.defaults.fps
    log_warnings(find_media_warnings(images, latent, fps, family.abilities.takes_fps), LISTED)
    if encoders:
        # Log warnings about captions that are encoded during training, such as captions that are too long
        sources = [source for table in tables.values() for source in table.on_the_fly_sources.values()]
        log_warnings(find_caption_warnings(sources), NAMED)
        captions = [
            (source.caption_path or source.path, text)
            for source in sources
            for text in unvaried_captions(source)
        ]
        for text_encoder in encoders:
            warn_cut_captions(text_encoder, captions)


def _read_size(source: MediaSource) -> Size:
    with fetch(source) as here:
        return image_size(here.path)


def _share_entries(stores: Sequence[MemoryStore]) -> None:
    """Send the cache entries of each process to all other processes, a few at a time."""
    from dataset.caching.loop import join_processes  # only with caches in memory

    with join_processes("cpu") as share:
        if share.num_processes <= 1:
            return
        for store in stores:
            local_entries = list(store.entries.items())
            num_messages = ceil_div(len(local_entries), ENTRIES_PER_MESSAGE)
            for index in range(max(share.gather(num_messages))):  # all processes send equally many messages
                start = index * ENTRIES_PER_MESSAGE
                message = dict(local_entries[start : start + ENTRIES_PER_MESSAGE])
                for received in share.gather(message):
                    new_entries = {
                        name: entry for name, entry in received.items() if name not in store.entries
                    }
                    store.entries.update(new_entries)


UNET_ONLY = "--network_train_unet_only"


def find_live_encoders(
    family: Family, options: TrainingOptions, config: DatasetConfig
) -> LiveTextEncoders | None:
    """Return the text encoders that run during training; None if all text outputs are cached.

    Raises:
        OptionError: If caching is requested for captions that change between epochs, or if a required
            encoder is missing.
    """
    needs_none = NO_DATASET in options.features.needs
    live_encoders = None if needs_none else _select_live_encoders(family, options, config)
    if live_encoders is None:
        return None
    return replace(live_encoders, adds_empty_prompt=EMPTY_PROMPT in options.features.needs)


def _select_live_encoders(
    family: Family, options: TrainingOptions, config: DatasetConfig
) -> LiveTextEncoders | None:
    """Return the text encoders that run during training; None if all their outputs come from caches."""
    # They run in the first of these cases that applies:
    # 1. Whole text encoders are trained along with the whole transformer.
    # 2. They learn a new word.
    # 3. Captions vary, or text encoders get a LoRA.
    # 4. An image trainer finds no caches of their outputs.
    caches_texts = options.caching is not None and options.caching.caches_texts
    varying = next((table for table in config.datasets if table.captions.changes.varying_keys), None)
    if varying is not None and caches_texts:
        raise OptionError(
            f"--cache_text_encoder_outputs: captions of {varying.name} vary (shuffle_caption, wildcards, tag "
            "dropout or token warm-up), so that they cannot be cached. Omit one of the two"
        )
    if options.full_dit is not None:
        fully_trained = _select_fully_trained_encoders(family, caches_texts)
        if fully_trained is not None:
            return fully_trained
    if LIVE_TEXTS in options.features.needs:
        # All text encoders for a run that trains the embedding of a new word in them
        encoders = _require_text_encoders(family, "they learn a new word")
        trainable_encoders = [encoder for encoder in encoders if can_learn(encoder)]
        trained = _select_trained_encoders(family, options, trainable_encoders)
        word_encoders = [
            cast(WithNetwork, encoder) for encoder in encoders if encoder.abilities.accepts_new_words
        ]
        return LiveTextEncoders(
            encoders,
            trained,
            [encoder.lora_prefix for encoder in trainable_encoders],
            word_encoders=word_encoders,
        )
    if varying is not None or _trains_text_loras(options):
        live_encoders = _select_for_varying_captions_or_loras(family, options, varies=varying is not None)
        if live_encoders is not None:
            return live_encoders
    if caches_texts or not options.is_for_images or _has_text_caches(family, config):
        return None
    return LiveTextEncoders(_require_text_encoders(family, "there are no text caches"))


def _has_text_caches(family: Family, config: DatasetConfig) -> bool:
    """Return whether a table has caches of text encoder outputs."""
    stores = Stores(npz_names(family))
    cache_ending = text_file_name("", family.cache_tag)
    for table in config.datasets:
        if any(name.endswith(cache_ending) for name in stores.latent_store(table).names()):
            return True
    return False


def _select_for_varying_captions_or_loras(
    family: Family, options: TrainingOptions, varies: bool
) -> LiveTextEncoders | None:
    """Return the text encoders that run during training if captions vary or they get a LoRA."""
    # None for none.
    # 1. If captions vary, or encoders are trained and no text caches are requested, all encoders run.
    # 2. If only some are trained, only these run; the outputs of the frozen ones come from caches.
    # 3. If all are trained although text caches are requested, `_overrides_text_cache` decides.
    caches_texts = options.caching is not None and options.caching.caches_texts
    reason = "captions vary" if varies else f"they are trained without {UNET_ONLY}"
    encoders = _require_text_encoders(family, reason)
    trainable_encoders = [encoder for encoder in encoders if can_learn(encoder)]
    prefixes = [encoder.lora_prefix for encoder in trainable_encoders]
    trained_encoders = _select_trained_encoders(family, options, trainable_encoders)
    if varies or (trained_encoders and not caches_texts):
        return LiveTextEncoders(encoders, trained_encoders, prefixes)
    if 0 < len(trained_encoders) < len(encoders):  # the frozen encoders' outputs come from caches
        return LiveTextEncoders(trained_encoders, trained_encoders, prefixes)
    if trained_encoders and _overrides_text_cache(family, options, trained_encoders):
        return LiveTextEncoders(encoders, trained_encoders, prefixes)
    return None


def _select_fully_trained_encoders(family: Family, caches_texts: bool) -> LiveTextEncoders | None:
    """Return the text encoders if some of them are fully fine-tuned; otherwise None."""
    if not trains_checkpoint(family):
        return None
    parts = family.learning_parts
    encoders = family.text_encoders() if parts.text_encoder_rates else []
    trained = [encoder for encoder in encoders if can_learn(encoder) and parts.learns(encoder.name)]
    if not trained:
        return None
    if caches_texts:
        raise OptionError(
            f"--cache_text_encoder_outputs: outputs of {' and '.join(encoder.name for encoder in trained)} "
            "change, as they are trained. Omit the caches, or train the U-Net alone"
        )
    return LiveTextEncoders(encoders, trained)


def _overrides_text_cache(
    family: Family, options: TrainingOptions, trained: Sequence[LearningEncoder]
) -> bool:
    """Return whether to train the text encoders and ignore --cache_text_encoder_outputs."""
    # Log what is ignored.
    names = " and ".join(encoder.name for encoder in trained)
    switches = _encoder_switches(family, options)  # choices for encoders that are off by default
    if any(switches.get(encoder.lora_prefix) for encoder in trained):
        logger.warning(
            "--cache_text_encoder_outputs is ignored because it would keep the outputs of %s, which "
            "are trained: captions are encoded at each step.",
            names,
        )
        return True
    # common guides cache all captions and do not ask to train text encoders, so these are left out
    if options.lora_parts is None or not options.lora_parts.trains_dit:
        raise OptionError(
            f"--cache_text_encoder_outputs: outputs of {names} change, as they are trained. Omit it"
        )
    # a given --text_encoder_lr loses its effect, which deserves a warning
    log = logger.info if options.lora_parts.text_encoder_lr is None else logger.warning
    log(
        "Text encoders are not trained (%s), because --cache_text_encoder_outputs keeps their outputs: only "
        "the transformer is trained, as with %s. To train both, omit the caches.",
        names,
        UNET_ONLY,
    )
    return False


def _trains_text_loras(options: TrainingOptions) -> bool:
    """Return whether the options train LoRAs of text encoders, if the family has trainable ones."""
    trains_lora = options.network is not None and options.features.lora_replacement is None
    return options.lora_parts is not None and options.lora_parts.trains_text_encoders and trains_lora


def _require_text_encoders(family: Family, why: str) -> Sequence[TextEncoder]:
    """Return the text encoders; if one is missing, raise OptionError with the reason `why` it is needed."""
    try:
        return family.text_encoders()
    except OptionError as error:
        raise OptionError(f"{error}\n  Text encoders are needed because {why}.") from None


def _select_trained_encoders(
    family: Family, options: TrainingOptions, trainable_encoders: Sequence[LearningEncoder]
) -> list[LearningEncoder]:
    """Return which of the trainable text encoders get a trained network, such as a LoRA."""
    if not _trains_text_loras(options) or options.network is None or options.lora_parts is None:
        return []
    # raises if there are too many rates
    options.lora_parts.text_rates(len(trainable_encoders), options.optimizer.learning_rate)
    name = options.network.network_module or family.lora_module
    known_module = OWN_MODULES.get(name)
    if trainable_encoders and known_module is not None and known_module.kind.rotates:
        raise OptionError(
            f"--network_module {name} has no part for text encoders: add {UNET_ONLY}, or use a "
            f"{list_kinds(lambda kind: kind.network_module and not kind.rotates)}"
        )
    switches = _encoder_switches(family, options)
    trained_encoders = [encoder for encoder in trainable_encoders if switches.get(encoder.lora_prefix, True)]
    if not trained_encoders and not options.lora_parts.trains_dit:
        raise OptionError(
            "--network_train_text_encoder_only: this model has no text encoder that can be trained. Omit it"
        )
    return trained_encoders


def _encoder_switches(family: Family, options: TrainingOptions) -> Mapping[str, bool]:
    """Map the LoRA prefix of each off-by-default text encoder to whether --network_args enables it."""
    network = options.network
    known_module = None if network is None else OWN_MODULES.get(network.network_module or family.lora_module)
    if network is None or known_module is None or known_module.rules is None:
        return {}
    arguments = network.arguments()
    return {
        prefix: arguments.get(name, "").lower() == "true"
        for name, prefix in known_module.rules.encoder_switches.items()
    }


class LiveMedia:
    """The media encoders of a family, which stay loaded during training to encode images."""

    def __init__(self, family: Caches, device: torch.device, on_media: Sequence[OnMedia] = ()) -> None:
        """Load the encoders. Raises CheckpointError if that fails."""
        self._family = family
        self._on_media = on_media
        self._media_encoders = load_encoders(family, device)

    def encode(self, items: Sequence[TrainingItem], *seed_parts: int | str) -> dict[int, dict[str, Tensor]]:
        """Encode the uncached items of a batch.

        Args:
            items: Items of the batch in order; items with cached latents are skipped.
            seed_parts: Parts of the seed for random crops, flips and the posterior sample.

        Returns:
            Tensors of each encoded item on the CPU, without a batch dimension, by position in the batch.

        Raises:
            MediaError: If an image cannot be read.
            DatasetError: If the size of an image has changed since the items were listed.
        """
        # images of equal shapes are encoded together: group -> position in the batch -> image
        groups: dict[tuple[object, ...], dict[int, DecodedMedia]] = {}
        for position, item in enumerate(items):
            if item.cache_info.on_the_fly_buckets is not None:
                media = self._read(item, random.Random(derive_seed(*seed_parts, "picture", position)))
                groups.setdefault(media.group, {})[position] = media
        tensors_by_position: dict[int, dict[str, Tensor]] = {}
        for images in groups.values():
            # keys seed the posterior sample, which must be different each time
            keys = ["-".join(map(str, (items[position].key, *seed_parts, position))) for position in images]
            tensors_by_position |= self._encode([*images.keys()], [*images.values()], keys)
        return tensors_by_position

    def _read(self, item: TrainingItem, generator: random.Random) -> DecodedMedia:
        """Read and augment the image of an item; `generator` draws the augmentation."""
        source = item.cache_info.on_the_fly_sources[item.source_stem]
        # the table of a validation item is a copy without augmentation
        source = replace(source, table=item.table)
        spec, fps = self._family.latent, self._family.defaults.fps
        augmentation_generator = None if item.table.buckets.augmentation == NO_AUGMENTATION else generator
        media = decode_source(
            source,
            fps,
            spec.pixel_step,
            lengths=spec.lengths,
            rng=augmentation_generator,
            keeps_alpha=spec.keeps_alpha,
            has_alpha=spec.has_alpha,
        )
        if media.bucket != item.bucket[:2]:
            sides = "x".join(map(str, media.size))
            raise DatasetError(f"{source.path} has {sides} pixels now, a different size than at the start")
        return media.cut(media.spans[0])

    def _encode(
        self, positions: Sequence[int], images: Sequence[DecodedMedia], keys: Sequence[str]
    ) -> dict[int, dict[str, Tensor]]:
        """Encode images of equal shapes; return the tensors of each by its position in the batch."""
        media = batch_media(images, keys)
        with torch.no_grad():
            encoded_media = self._family.encode_media(self._media_encoders, media)
        by_position = {}
        for position, item, key, (entry,) in zip(positions, images, keys, encoded_media, strict=True):
            tensors = {name: tensor.detach().cpu() for name, tensor in entry.tensors.items()}
            if item.mask is not None:
                tensors[LOSS_MASK] = shrink_mask(torch.from_numpy(item.mask), self._family.latent.stride)
            for change in self._on_media:
                tensors = change(self._family, self._media_encoders, item, key, tensors)
            by_position[position] = tensors
        return by_position
