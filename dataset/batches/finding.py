"""Find training items by the names of cache files, and report missing caches."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from dataset import cache_files
from dataset.batches.items import (
    NO_COMMANDS,
    CachingCommands,
    OnTheFlyTables,
    TableCacheInfo,
    TrainingItem,
    list_tables,
)
from dataset.cache.form import list_format_errors, list_shard_errors
from dataset.cache.index import has_audio_caches, is_indexed, read_index
from dataset.cache.latent_files import (
    LatentFile,
    list_latent_files,
    reference_sizes,
)
from dataset.cache.store import Stores, may_have_both_formats, open_store
from dataset.cache_files import CacheStore, NpzNames
from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import REQUIRED
from dataset.forms.composing import SHARED_CACHES, get_source_format
from dataset.sources.media_source import pause_garbage_collection
from dataset.sources.missing import explain_lookup
from modules.console import format_count, pluralize
from modules.errors import CacheError, DatasetError
from protocols.data import FPS, REFERENCE_AUDIO, AudioSpec, LatentSpec

logger = logging.getLogger(__name__)

SAMPLED = 1000  # items whose headers are read to find out whether any item has a reference
_LATENT_CACHE_NAME = re.compile(
    r"_[0-9]+x[0-9]+_[a-z0-9]+\.safetensors$"
)  # names of latent caches of any model
_TEXT_CACHE_NAME = re.compile(r"_[a-z0-9]+_te\.safetensors$")


@dataclass
class FoundItems:
    """Training items found in the cache folders, and what is missing; paths are in the order of discovery."""

    items: list[TrainingItem] = field(default_factory=list)  # sorted by table and file name
    # missing text caches; their items are skipped
    missing_text: dict[Path, None] = field(default_factory=dict)
    empty_tables: list[DatasetTable] = field(default_factory=list)  # tables without any latent cache
    # text caches that some of the text encoders have not written yet
    unfinished_text: dict[Path, None] = field(default_factory=dict)
    # missing caches of the empty prompt, for tables that need it
    missing_empty_prompts: list[Path] = field(default_factory=list)
    # tables whose caches cannot be trusted to be complete, each with the reason
    incomplete_tables: list[tuple[DatasetTable, str]] = field(default_factory=list)
    missing_audio: list[Path] = field(default_factory=list)  # missing audio caches, if audio is required
    why_audio_is_needed: str = 'audio = "required"'  # why missing audio is an error
    trained_but_absent_audio: AudioSpec | None = None  # set if the run trains audio, but no item has any
    # folder without text caches for this model -> name of a text cache of another model in that folder
    foreign_texts: dict[Path, str] = field(default_factory=dict)
    # stems of current sources, by folder because several tables may share one
    current_stems: dict[Path, set[str]] = field(default_factory=dict)
    # (folder, stem) of caches whose table does not list the source
    unlisted_caches: dict[tuple[Path, str], None] = field(default_factory=dict)
    # index of a table -> sources without latents; only if the items were taken from the index of its caches
    left_out: dict[int, list[str]] = field(default_factory=dict)


def find_items(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    text_keys: frozenset[str] = frozenset(),
    stores: Stores | None = None,
    on_the_fly_tables: OnTheFlyTables | None = None,
    audio: AudioSpec | None = None,
    trusts_index: bool = False,
) -> FoundItems:
    """Find all training items by the names of their cache files, without reading any tensors.

    Headers of cache files are read only for sizes that their names do not contain, such as those of
    references.

    Args:
        config: The dataset file.
        cache_tag: Suffix of the family's cache file names.
        latent: The family's latent space.
        text_keys: Names of the tensors that a complete text cache has.
        stores: Stores of the run; None for the cache folders of the tables.
        on_the_fly_tables: For tables with a part that is encoded during training: facts about their items.
        audio: Audio spec of the family; None if no audio is trained.
        trusts_index: Whether to take the items of a table from the index of its caches if that is up to
            date.
    """
    stores = stores or Stores(NpzNames(cache_tag, latent, text_keys))
    found = FoundItems()
    default_info = TableCacheInfo(cache_tag)
    for table in config.datasets:
        cache_info = on_the_fly_tables.get(table.index, default_info) if on_the_fly_tables else default_info
        _add_table(
            found,
            table=table,
            cache_info=replace(cache_info, text_keys=text_keys),
            latent=latent,
            stores=stores,
            audio=audio,
            trusts_index=trusts_index,
        )
    if audio is not None:
        # why audio is needed, and whether no item at all has cached audio
        if audio.audio_only:
            found.why_audio_is_needed = "only audio is learned"
        # the audio of tables that are encoded during training is not known yet
        expects_audio_caches = not audio.is_in_latent_cache and not on_the_fly_tables
        if expects_audio_caches and found.items and not any(item.has_cached_audio for item in found.items):
            if audio.silent_option:
                found.trained_but_absent_audio = audio
            else:
                logger.info("No clip of the dataset has cached audio: only the video is trained")
    return found


def _add_table(
    found: FoundItems,
    table: DatasetTable,
    cache_info: TableCacheInfo,
    latent: LatentSpec,
    stores: Stores,
    audio: AudioSpec | None,
    trusts_index: bool,
) -> None:
    """Add a table's items to `found`: from the index of its caches, or else by listing its caches."""
    # If the caches are listed, missing and unfinished ones are added to `found`, too.
    names = stores.latent_store(table).names()
    in_own_folder = table.index not in stores.custom_stores
    encodes_while_training = bool(cache_info.on_the_fly_sources) or not cache_info.has_cached_texts
    may_use_index = trusts_index and in_own_folder and not encodes_while_training
    if may_use_index and is_indexed(table, audio) and not latent.has_layers:
        index = read_index(table, names, tag=cache_info.tag, latent=latent)
        if index is not None:  # up to date
            cache_info = replace(cache_info, indexed_checksums=index.compared)
            found.items += [_item(table, cache_info, file, captions) for file, captions in index.items]
            found.left_out[table.index] = index.left_out
            return
    if in_own_folder and may_have_both_formats(table, names):
        # caches that are not in the table's cache_format, and broken shards; imported here, because few
        # folders have caches in two formats

        for line in (*list_format_errors(table, cache_info.tag), *list_shard_errors(table)):
            found.incomplete_tables.append((table, line))
    caches = _list_caches(found, table, cache_info=cache_info, names=names, stores=stores, audio=audio)
    del names  # frees memory: there may be a million names, which are no longer needed
    has_latents = _add_items(found, table, cache_info=cache_info, caches=caches, latent=latent)
    if not has_latents:
        found.empty_tables.append(table)


class _TableCaches(NamedTuple):
    """The cache files of a table by what they contain."""

    store: CacheStore  # of the latents
    latent_files: list[str]  # sorted names, without those of media that the table no longer has
    texts: "_TextCaches | None"  # None if captions are encoded during training
    audio: "_AudioCaches | None"  # None if audio has no files of its own


def _list_caches(
    found: FoundItems,
    table: DatasetTable,
    cache_info: TableCacheInfo,
    names: Collection[str],
    stores: Stores,
    audio: AudioSpec | None,
) -> _TableCaches:
    """Sort a table's cache files, whose latents and audio are in `names`, by what they contain."""
    # Caches without a media file, and unfinished text caches, are added to `found`.
    store = stores.latent_store(table)
    # if latents are encoded on the fly, these are the names that their caches would have
    ending = f"_{cache_info.tag}{cache_files.SUFFIX}"
    candidates = names if cache_info.on_the_fly_buckets is None else cache_info.latent_names()
    latent_files = sorted([name for name in candidates if name.endswith(ending)])
    # a shared folder may also have caches of other tables
    if cache_info.on_the_fly_sources or store.is_shared:
        latent_files = _leave_out_unlisted(found, table, cache_info, latent_files)
    texts_store = stores.text_store(table)
    text_names = names if texts_store is store else texts_store.names()
    text_caches = None
    if cache_info.has_cached_texts:
        text_caches = _TextCaches(table, text_names, cache_info.tag, found)
    audio_caches = None
    if audio is not None and has_audio_caches(table, audio):
        audio_caches = _AudioCaches(table, names=names, tag=cache_info.tag, spec=audio, found=found)
    return _TableCaches(store, latent_files, text_caches, audio_caches)


def _add_items(
    found: FoundItems,
    table: DatasetTable,
    cache_info: TableCacheInfo,
    caches: _TableCaches,
    latent: LatentSpec,
) -> bool:
    """Add an item to `found` for each latent cache with a caption; return whether any latents exist."""
    files = list_latent_files(
        table,
        caches.latent_files,
        tag=cache_info.tag,
        latent=latent,
        store=caches.store if cache_info.on_the_fly_buckets is None else None,
    )
    has_latents = False
    with pause_garbage_collection():
        for file in files:
            has_latents = True
            if caches.texts is None:
                num_captions = 1 + len(cache_info.on_the_fly_sources[file.stem].more_captions)
            else:
                num_captions = caches.texts.count_or_report(file.stem)
            if not num_captions:
                continue
            if latent.has_layers:  # only items with the same number of layers can share a batch
                num_images = _count_images(cache_info, caches.store, file)
                file = file._replace(bucket=(*file.bucket, num_images))
            item = _item(table, cache_info, file, num_captions)
            if caches.audio is not None:
                item = caches.audio.add_audio(item, caches.store)
            found.items.append(item)
    return has_latents


def _item(
    table: DatasetTable, cache_info: TableCacheInfo, file: LatentFile, num_captions: int
) -> TrainingItem:
    """Return the training item of a latent cache file."""
    return TrainingItem(
        file_name=file.file,
        stem_length=len(file.stem),
        table=table,
        bucket=file.bucket,
        cache_info=cache_info,
        num_latent_files=file.num_parts,
        num_captions=num_captions,
        reference_latent_sizes=file.references,
    )


def _count_images(cache_info: TableCacheInfo, store: CacheStore, file: LatentFile) -> int:
    """Return the number of images in a layered cache; 1 if it is damaged, which is reported later."""
    if cache_info.on_the_fly_buckets is not None:
        return cache_info.on_the_fly_sources[file.stem].num_images
    with contextlib.suppress(CacheError):
        for tensor, shape in store.read(file.file, is_full=False).shapes.items():
            if cache_files.tensor_key(tensor) == "latents":
                return shape[-3]
    return 1


def _leave_out_unlisted(
    found: FoundItems, table: DatasetTable, cache_info: TableCacheInfo, latent_files: list[str]
) -> list[str]:
    """Return the latent caches whose media file is still in the table; add others to `found`."""
    # Returns all caches if the table's items depend only on its caches.
    stems = _find_listed_stems(table, cache_info, latent_files)
    if stems is None:
        return latent_files
    found.current_stems.setdefault(table.source.base_folder, set()).update(stems)
    selected = []
    for name, stem, _ in cache_files.latent_names(latent_files, cache_info.tag, table.kind):
        if stem in stems:
            selected.append(name)
        else:
            found.unlisted_caches[table.source.base_folder, stem] = None
    return selected


class _AudioCaches:
    """Names of a table's audio cache files, to be added to the table's training items."""

    def __init__(
        self, table: DatasetTable, names: Collection[str], tag: str, spec: AudioSpec, found: FoundItems
    ) -> None:
        """Find the audio caches among `names`; `add_audio` adds missing ones to `found`."""
        self.spec = spec
        self._tag, self._folder, self._found = tag, table.cache_directory, found
        self._is_needed = table.source.audio == REQUIRED or spec.audio_only
        ending = f"_{cache_files.audio_tag(tag)}{cache_files.SUFFIX}"
        self._names = {name for name in names if name.endswith(ending)}
        # each shape as its own key: items share one tuple, which saves memory
        self._shared_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def add_audio(self, item: TrainingItem, store: CacheStore) -> TrainingItem:
        """Return the item with its audio fields set, and report its audio cache if it is needed but missing.

        The lengths of the audio and its reference are read only for batches of several items, which must
        have equal lengths. Otherwise they stay () and 0.
        """
        name = cache_files.audio_file_name(item.file_name, self._tag)
        is_cached = name in self._names
        if self._is_needed and not is_cached:
            self._found.missing_audio.append(self._folder / name)
        shape: tuple[int, ...] = ()
        reference_length = 0
        if item.table.learning.batch_size > 1:
            num_frames = item.bucket[2]
            # C T M; () if the cached latents do not record their frame rate, which is reported when a batch
            # is read
            rate: float | None = None
            with contextlib.suppress(CacheError, KeyError, ValueError):
                rate = float(store.read(item.file_name, is_full=False).metadata[FPS])
            shape = () if rate is None else self.spec.shape(num_frames, rate)
            shape = self._shared_shapes.setdefault(shape, shape)
            if shape and is_cached and item.table.references.reference_audio_directory is not None:
                reference_length = _reference_length(store, name)
        return replace(
            item,
            audio_latent_shape=shape,
            has_cached_audio=is_cached,
            audio_reference_length=reference_length,
        )


def _reference_length(store: CacheStore, name: str) -> int:
    """Return the length of the reference in an audio cache; 0 if there is none or the file is damaged."""
    with contextlib.suppress(CacheError):
        for tensor, shape in store.read(name, is_full=False).shapes.items():
            if cache_files.tensor_key(tensor) == REFERENCE_AUDIO:
                return shape[1]
    return 0


def with_reference_sizes(items: Iterable[TrainingItem], stores: Stores) -> list[TrainingItem]:
    """Return the items with the sizes of their reference images, read from cache file headers.

    `find_items` reads these sizes only if batches depend on them.
    """
    sized = []
    for item in items:
        is_unread = not item.reference_latent_sizes and item.cache_info.on_the_fly_buckets is None
        if is_unread and _may_have_references(item.table):
            sizes = reference_sizes(stores.latent_store(item.table), item.file_name)
            item = replace(item, reference_latent_sizes=sizes)
        sized.append(item)
    return sized


def _may_have_references(table: DatasetTable) -> bool:
    """Return whether items of a table could have references; only then must their records be read."""
    if table.references.rules or table.references.fp_1f_clean_indices:
        return True
    has_source = (
        table.references.reference_directory
        or table.references.control_directory
        or table.source.directory is None
    )
    return bool(table.references.clip_rules and has_source)


def lack_edit_references(items: Sequence[TrainingItem], stores: Stores) -> bool:
    """Return whether items that are trained for editing have no references; up to SAMPLED are examined."""
    edited = [item for item in items if _is_edited(item.table)]
    stride = len(edited) // SAMPLED + 1
    for item in edited[::stride]:
        if item.cache_info.on_the_fly_buckets is not None:  # encoded during training
            source = item.cache_info.on_the_fly_sources[item.source_stem]
            references: Sequence[object] = source.control or source.references
        else:
            references = item.reference_latent_sizes or reference_sizes(
                stores.latent_store(item.table), item.file_name
            )
        if references:
            return False
    return bool(edited)


def _is_edited(table: DatasetTable) -> bool:
    """Return whether the model is trained to edit the table's reference images or clips."""
    if table.learns_edits:
        return True
    return table.references.clip_rules is not None and table.references.clip_rules.edits_images


class _TextCaches:
    """Names of a table's text cache files, to find out how many captions of each item are cached."""

    def __init__(self, table: DatasetTable, names: Collection[str], tag: str, found: FoundItems) -> None:
        """Find the text caches among `names`; unfinished ones are added to `found`."""
        self._table, self._tag, self._found = table, tag, found
        self._ending = cache_files.text_file_name("", tag)
        # caches of first captions, whose names have only the stem of the source before the ending; the names
        # of other captions and of empty prompts have one part more
        self._first_captions = {name for name in names if name.endswith(self._ending)}
        if not self._first_captions:
            # an example of the text caches of another model, if there are any
            foreign_name = next((name for name in sorted(names) if _TEXT_CACHE_NAME.search(name)), None)
            if foreign_name is not None:
                self._found.foreign_texts[self._table.cache_directory] = foreign_name
        unfinished = [name for name in names if name.endswith(cache_files.PART)]
        unfinished_ending = self._ending + cache_files.PART
        # added to `found` by `count_or_report` if their source has latents
        self._unfinished_first_captions = {name for name in unfinished if name.endswith(unfinished_ending)}
        for name in unfinished:
            if self._is_used(name.removesuffix(cache_files.PART)):
                self._found.unfinished_text[self._table.cache_directory / name] = None
        # number of captions by stem, for stems with several
        self._num_captions = _count_captions(names, tag) if table.captions.multi_caption else {}
        # names of caches of empty prompts; None: not needed, or a missing one has already been reported
        self._empty_prompts: set[str] | None = None
        if table.captions.caches_empty_prompt:
            self._empty_prompts = {name for name in names if cache_files.is_empty_text_name(name, tag)}

    def _is_used(self, name: str) -> bool:
        """Return whether the table uses this text cache of a further caption or of the empty prompt."""
        if (
            self._table.captions.multi_caption
            and cache_files.parse_more_text_name(name, self._tag) is not None
        ):
            return True
        return self._table.captions.caches_empty_prompt and cache_files.is_empty_text_name(name, self._tag)

    def count_or_report(self, stem: str) -> int:
        """Return how many captions of a media file are cached; 0 if the first one is not.

        Missing and unfinished caches, also of the empty prompt, are added to `found`.
        """
        name = stem + self._ending
        unfinished_name = name + cache_files.PART
        folder = self._table.cache_directory
        if unfinished_name in self._unfinished_first_captions:
            self._found.unfinished_text[folder / unfinished_name] = None
        elif name not in self._first_captions:
            self._found.missing_text[folder / name] = None
        if name not in self._first_captions:
            return 0
        if self._empty_prompts is not None:
            empty_name = cache_files.empty_text_name(self._tag)
            if self._table.references.are_seen_by_texts:  # then each source has an empty prompt of its own
                empty_name = cache_files.text_file_name(stem, self._tag, cache_files.EMPTY)
            if empty_name not in self._empty_prompts:
                self._found.missing_empty_prompts.append(folder / empty_name)
                self._empty_prompts = None  # no further check: one is reported for each table
        return self._num_captions.get(stem, 1)


def _count_captions(names: Iterable[str], tag: str) -> dict[str, int]:
    """Return, for each stem with numbered captions, how many there are up to the first missing number."""
    # Numbers begin at 1 with the second caption; the first caption has none.
    further_numbers: dict[str, set[int]] = {}  # by stem
    for name in names:
        if ".caption" not in name:  # faster than parsing a million names
            continue
        parsed = cache_files.parse_more_text_name(name, tag)
        if parsed is not None:
            stem, number = parsed
            further_numbers.setdefault(stem, set()).add(number)
    counts = {}
    for stem, numbers in further_numbers.items():
        counts[stem] = 1  # the first caption
        while counts[stem] in numbers:
            counts[stem] += 1
    return counts


def _find_listed_stems(
    table: DatasetTable, cache_info: TableCacheInfo, latents: Sequence[str]
) -> Collection[str] | None:
    """Return the stems of a table's current media files; None if its items depend only on the caches."""
    # Normally they do: when a media file is gone, the caching script removes its caches. But it never removes
    # caches that other trainers share, so for these the media files are listed. Files that are read during
    # training have been listed already.
    if cache_info.on_the_fly_sources:
        return cache_info.on_the_fly_sources.keys()
    if not get_source_format(table).shares_caches_with_other_programs or not latents:
        return None
    from dataset.listing import find_sources  # only for shared caches

    try:
        return {source.stem for source in find_sources(table, captions=False, faults=[])}
    except DatasetError:  # no sources: the caches were copied without the images
        return None


_EMPTY_IS_FOR = "caption_dropout_rate, --guided_target and --blank_prior_weight need it"


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> Sequence[TrainingItem]:
    """Return the items to train on. Items without a text cache are skipped with a warning.

    Raises:
        CacheError: If a table has no usable cache, or text caching has not finished. The message lists
            the caching commands.
    """
    if found.incomplete_tables:
        lines = [line for _, line in found.incomplete_tables]
        if any("convert_cache" not in line for line in lines):
            lines += ["Shards are made whole by:", commands.latents, commands.text]
        raise CacheError("\n  ".join(lines))
    if found.unfinished_text:
        count = pluralize(len(found.unfinished_text), "text caches are unfinished")
        first = next(iter(found.unfinished_text))
        raise CacheError(
            f"{count}, such as {first}: text caching was stopped before all text encoders had written.\n"
            f"  Finish it with: {commands.text}"
        )
    errors = _explain_missing_caches(found)
    if errors:
        needed_commands = []
        lacks_all_audio = found.trained_but_absent_audio is not None
        if found.empty_tables or lacks_all_audio or found.missing_audio:
            needed_commands.append(commands.latents)
        text_command = commands.text
        if found.missing_empty_prompts:
            text_command += " --empty_prompt"
        if found.empty_tables or found.missing_text or found.missing_empty_prompts:
            needed_commands.append(text_command)
        raise CacheError("\n  ".join([*errors, "Make the caches first:", *needed_commands]))
    if found.missing_text or found.unlisted_caches:
        _warn_left_out(found, commands)
    num_items = format_count(len(found.items), "item")
    num_tables = format_count(len(list_tables(found.items)), "data set")
    logger.info("In the caches: %s of %s", num_items, num_tables)
    return found.items


def _explain_missing_caches(found: FoundItems) -> list[str]:
    """Return all reasons why training cannot start without more caches; [] if it can."""
    errors = [_explain_empty(table) for table in found.empty_tables]
    if found.missing_audio:
        errors += _audio_errors(found)
    if found.empty_tables or not found.items:  # perhaps the folder has caches of another model
        errors += [
            f"no text cache in {folder} for this model: {name} contains what the text encoder of another "
            "model made of the caption, which this model cannot read"
            for folder, name in found.foreign_texts.items()
        ]
    if not errors and not found.items:
        folders = {path.parent for path in found.missing_text}
        errors = [f"no text cache in {folder}" for folder in sorted(folders)]
    if found.trained_but_absent_audio is not None:
        advice = found.trained_but_absent_audio.silent_option
        errors.append(f"no clip of the dataset has cached audio. Add clips with audio, or {advice}")
    for path in found.missing_empty_prompts:
        errors.append(f"the cache of the empty prompt is missing, {path}: {_EMPTY_IS_FOR}")
    return errors


def _explain_empty(table: DatasetTable) -> str:
    """Return an explanation why a table may have no latent cache."""
    error = f"{table.name}: no latent cache in {table.cache_directory}"
    folder = table.source.directory
    if folder is not None and not folder.exists() and not table.cache_directory.exists():
        error = f"{table.name}: {folder}: no such folder{explain_lookup(folder, table.config_path)}"
    if table.cache_format in SHARED_CACHES:  # npz files, whose names the pattern below does not match
        return error
    store = open_store(table)
    foreign_cache = next(filter(_LATENT_CACHE_NAME.search, sorted(store.names())), None)
    if foreign_cache is not None:
        maker = ""
        with contextlib.suppress(CacheError):  # a damaged file names no model
            maker = store.read(foreign_cache, is_full=False).metadata.get("architecture", "")
        model = maker or "another model or kind of data"
        error += f" of {table.kind}s for this model: {foreign_cache} is for {model}"
    return error


def _audio_errors(found: FoundItems) -> list[str]:
    """Return an error line for each folder with clips without audio, if the model needs audio."""
    errors = []
    counts = Counter(path.parent for path in found.missing_audio)
    for folder, count in counts.items():
        example = next(path.name for path in found.missing_audio if path.parent == folder)
        lacking = pluralize(count, "clips have no sound")
        errors.append(
            f"{found.why_audio_is_needed}, but {lacking} in {folder}, such as {example}. Take silent ones out"
        )
    return errors


def _warn_left_out(found: FoundItems, commands: CachingCommands) -> None:
    """Log which media files and caches are not trained on."""
    if found.missing_text:
        logger.warning(
            "%d of the sources have latents but no text cache (the first: %s); they are left out. Run: %s",
            len(found.missing_text),
            next(iter(found.missing_text)),
            commands.text,
        )
    # a cache that one table does not list may belong to a source that another table of the folder lists
    vanished_sources = [
        folder / stem for folder, stem in found.unlisted_caches if stem not in found.current_stems[folder]
    ]
    if vanished_sources:
        logger.warning(
            "%d sources have caches but no longer exist, or are in no list (the first: %s): left out.",
            len(vanished_sources),
            vanished_sources[0],
        )
