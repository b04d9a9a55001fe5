"""`--check`: report totals and all faults of a configuration, before a long run."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from dataset.batches.finding import NO_COMMANDS, CachingCommands, FoundItems, find_items
from dataset.batches.items import Items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch, stores_for
from dataset.batches.same_encoders import SameEncoders, describe_identity
from dataset.cache.files import EMPTY
from dataset.cache.forms import other_form
from dataset.cache.store import CacheStore, Stores
from dataset.caching.existing import LatentNames, names_of
from dataset.caching.given_tensors import use_moments
from dataset.caching.planning import (
    Caches,
    Recipe,
    SourcePlan,
    complete,
    media_table,
    plan_all,
)
from dataset.caching.prefetch import decode_ahead
from dataset.caching.reports import Failure
from dataset.caching.text_plans import TextRecipe, list_caption_files
from dataset.caching.work import npz_names
from dataset.checking.captions import Counters, check_captions, load_counters
from dataset.checking.findings import CheckResult, TableFindings, balance, count_batches, indent
from dataset.checking.folders import check_unused
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.decoding import check_resolution, decode_source
from dataset.sources.faults import Fault
from dataset.sources.folders import folder_id
from dataset.sources.listing import find_sources, unsearched_folders
from dataset.sources.media_source import MediaSource
from dataset.sources.rates import find_wrong_rates
from modules.bars import Bar
from modules.contract.data import LatentSpec, MediaTable
from modules.errors import CacheError, DatasetError, OptionError
from modules.paths import is_address

NO_COUNTERS = Counters(())
OTHER_FORM = "cache folders are in the other form"
UNUSABLE = "tables cannot be used"
NO_ITEM = "tables have no item to train on"


def check_media(
    family: Caches,
    config: DatasetConfig,
    workers: int,
    skip_existing: bool,
    encodes_media: bool = True,
    verify: bool = False,
) -> CheckResult:
    """Report the plan of latent caching. verify: read all cache files again.

    Sources whose records are missing or outdated are decoded; nothing is encoded or written. encodes_media:
    False if the family was made for another script, without the options of latent caching.
    """
    encoder: dict[str, str] = {}
    files: list[str] = []
    if encodes_media:
        try:
            encoder = dict(family.media_identity)
            files = describe_identity(encoder)
        except OptionError as error:
            files = [f"caches are not compared: {error}"]

    def sections(table: MediaTable, frames: int) -> int | None:
        # whether images are taken alone is an option of latent caching
        is_whole = table.kind == "image" and not encodes_media
        return None if is_whole else family.sections_of(table, frames)

    latent, fps, stores = family.latent, family.defaults.fps, Stores(npz_names(family))
    recipe = Recipe(family.cache_tag, encoder, latent, fps, skip_existing, sections, stores, verify)
    head, tables = ("Files recognised:", *indent(files)), []
    for table in config.datasets:
        found = find_table(config, table)
        if encodes_media:
            found.faults += [Fault(OTHER_FORM, line) for line in other_form(table, family.cache_tag)]
        if found.sources:
            if _is_usable(family, found, encodes_media):
                _check_sources(found, recipe, workers)
            found.faults += find_wrong_rates(found.sources)
            check_captions(found, NO_COUNTERS)
        found.title = f"{table.name}: {len(found.sources)} {table.kind}s, {found.num_items} items"
        tables.append(found)
    balance(tables)
    batches = count_batches(tables)
    tail = f"Training on all of it: {batches} batches an epoch, as many steps without accumulation"
    return CheckResult(head, tuple(tables), (tail,))


def check_texts(
    family: Caches, config: DatasetConfig, skip_existing: bool, verify: bool = False
) -> CheckResult:
    """Report the plan of text caching, and captions longer than an encoder reads.

    No encoder is loaded. Without the encoders' files only the captions are checked. verify: read all cache
    files again.
    """
    counters = load_counters(family.text_encoders)
    try:
        encoders = [(encoder, dict(encoder.identity)) for encoder in family.text_encoders()]
    except OptionError:  # an encoder was not given: `counters` says which
        encoders = []
    files = [line for _, identity in encoders for line in describe_identity(identity)]
    head, tables = ("Files recognised:", *indent([*files, *counters.missing])), []
    recipe = TextRecipe(encoders, skip_existing, Stores(npz_names(family)), verify)
    for table in config.datasets:
        found = find_table(config, table)
        found.faults += [Fault(OTHER_FORM, line) for line in other_form(table, family.cache_tag)]
        texts = list_caption_files(found.sources, family.cache_tag)
        plans = [plan for plan in map(recipe.plan, texts) if plan is not None]
        missing = Counter(name for plan in plans for name in plan.missing)
        for encoder, _ in encoders:
            to_do = missing[encoder.name]
            kept = len(texts) - to_do
            found.caches.append(f"caches of {encoder.name}: {kept} are valid, {to_do} captions need encoding")
        found.remarks += _store_remarks(recipe.stores.of(table))
        check_captions(found, counters)
        found.title = f"{table.name}: {len(found.sources)} {table.kind}s"
        tables.append(found)
    return CheckResult(head, tuple(tables))


def check_training(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    commands: CachingCommands = NO_COMMANDS,
    accumulation: int = 1,
    processes: int = 1,
    files: Iterable[str] = (),
    text_keys: frozenset[str] = frozenset(),
    counters: Counters = NO_COUNTERS,
) -> CheckResult:
    """Report the caches that a training run would see; every cache file is read and verified.

    accumulation, processes: their product is the number of batches per optimizer step. files: lines about the
    checkpoints that the caller recognised. text_keys: keys of a complete text cache.
    """
    cached = find_items(config, cache_tag, latent, text_keys)
    encoders = SameEncoders(commands)
    head, tables = ("Files recognised:", *indent([*files, *counters.missing])), []
    for table in config.datasets:
        found = TableFindings(table)
        items = cached.items.where([facts.table.index == table.index for facts in cached.items.facts])
        found.buckets.update({group[1:]: len(places) for group, places in items.groups().items()})
        _check_caches(found, items, cached, latent, encoders)
        _compare_sources(config, found, items, counters)
        is_held_back = ", for validation" if table.validation else ""
        found.title = f"{table.name}: {len(items)} cached items{is_held_back}"
        tables.append(found)
    trained = cached.items.where([not facts.table.validation for facts in cached.items.facts])
    order = BatchOrder(trained, seed=0)
    steps = -(-order.num_batches // (accumulation * processes))
    tail = [
        f"An epoch: {order.num_items} items with repeats, {order.num_batches} batches, {steps} steps"
        + (f" of {accumulation * processes} batches" if accumulation * processes > 1 else "")
    ]
    if any(found.faults for found in tables):
        tail += ["Caches are made by:", *indent([commands.latents, commands.text])]
    return CheckResult(head, tuple(tables), tuple(tail))


def find_table(config: DatasetConfig, table: DatasetTable) -> TableFindings:
    """List the sources of a table with all faults of the listing, and the files beside them."""
    found = TableFindings(table)
    try:
        found.sources = find_sources(table, faults=found.faults)
    except DatasetError as error:
        found.faults.append(Fault(UNUSABLE, str(error)))
        return found
    others = {folder_id(one.directory) for one in config.datasets if one.directory and one is not table}
    check_unused(found, others)
    if table is config.datasets[0]:
        found.remarks += [Fault("folders are not searched", line) for line in unsearched_folders(config)]
    return found


def _store_remarks(store: CacheStore) -> list[Fault]:
    """Return remarks on the faults of a store as a whole, which caching mends."""
    return [Fault("shards or folders are not whole; caching mends them", line) for line in store.faults()]


def _is_usable(family: Caches, found: TableFindings, encodes_media: bool) -> bool:
    """Return whether the table can be cached; if not, add why."""
    try:
        check_resolution(found.table, family.latent.pixel_step)
        if encodes_media:
            family.check_table(media_table(found.table, any(source.control for source in found.sources)))
            found.sources = use_moments(family, found.sources)
    except DatasetError as error:
        found.faults.append(Fault(UNUSABLE, str(error)))
        return False
    return True


def _check_sources(found: TableFindings, recipe: Recipe, workers: int) -> None:
    """Compare the sources with their caches; decode those with too few known facts."""
    table = found.table
    try:
        plans, unreadable = _look_at(table, found.sources, recipe, workers)
    except DatasetError as error:
        found.faults.append(Fault(UNUSABLE, str(error)))
        return
    found.buckets = Counter(item for plan in plans for item in plan.items)
    found.faults += [Fault("cannot be read", str(one), one.stem) for one in unreadable]
    for kind, lines in (
        ("give no item", [(plan, plan.reason) for plan in plans if plan.reason is not None]),
        ("give no item of some lengths", [(plan, plan.short) for plan in plans if plan.short is not None]),
    ):
        found.remarks += [
            Fault(kind, f"{plan.source.path}: {line}", plan.source.stem) for plan, line in lines
        ]
    if plans and not found.buckets:
        text = f"{table.name}: not one of its {len(plans)} {table.kind}s gives an item"
        found.faults.append(Fault(NO_ITEM, text))
    masked = sum(source.mask is not None for source in found.sources)
    if masked:
        found.caches.append(f"{masked} of {len(found.sources)} have a mask; the others are learned whole")
    if recipe.encoder:
        kept = sum(len(plan.kept) for plan in plans)
        to_encode = sum(len(plan.missing or ()) for plan in plans)
        found.caches.append(f"caches: {kept} files are valid, {to_encode} items need encoding")
        found.remarks += _store_remarks(recipe.stores.of(table))


def _look_at(
    table: DatasetTable, sources: Sequence[MediaSource], recipe: Recipe, workers: int
) -> tuple[list[SourcePlan], list[Failure]]:
    existing = {table.index: LatentNames(recipe.stores.of(table), recipe.tag, table.kind)}
    plans, unreadable = plan_all(sources, existing, recipe, workers)

    def decoded(plan: SourcePlan) -> SourcePlan:
        media = decode_source(plan.source, recipe.fps, recipe.latent.pixel_step, recipe.latent.frame_step)
        return complete(plan, media, names_of(existing, plan.source), recipe)

    known = [plan for plan in plans if plan.missing is not None]
    unknown = [plan for plan in plans if plan.missing is None]
    for _, result in decode_ahead(
        unknown, lambda plan: plan.source, decoded, workers, Bar(len(unknown), "Decoding", "source")
    ):
        if isinstance(result, Failure):
            unreadable.append(result)
        else:
            known.append(result)
    return known, unreadable


def _check_caches(
    found: TableFindings,
    items: Items,
    cached: FoundItems,
    latent: LatentSpec,
    encoders: SameEncoders,
) -> None:
    """Read every item of a table; add why some cannot be trained on."""
    folder = found.table.cache_directory
    for kind, paths in (
        ("text caches are missing", (*cached.missing_text, *cached.missing_empty)),
        ("text caches are unfinished", cached.unfinished_text),
    ):
        found.faults += [Fault(kind, str(path)) for path in paths if path.parent == folder]
    found.faults += [
        Fault("caches may be incomplete", line) for table, line in cached.unsound if table is found.table
    ]
    if not items:
        found.faults.append(Fault(NO_ITEM, f"{found.table.name}: look in {folder}"))
    remarks, stores = [], None if not items else stores_for(items[0], latent)
    drops = [EMPTY] if items and items[0].table.drops_captions else []
    # each caption, and the empty prompt once
    pairs = ((item, number) for item in items for number in range(item.captions))
    for item, number in itertools.chain(pairs, ((item, number) for item in items[:1] for number in drops)):
        try:
            batch = read_batch([item], latent, encoders.commands, captions=[number], stores=stores)
            said = encoders.difference(batch.made_by)
        except CacheError as error:
            found.faults.append(Fault("cannot be used", str(error).splitlines()[0], item.source_stem))
        else:
            remarks += [] if said is None else said.splitlines()
    found.caches += remarks


def _compare_sources(config: DatasetConfig, found: TableFindings, items: Items, counters: Counters) -> None:
    """Add remarks about sources without a cache or a caption, if the sources exist: they are not needed."""
    if any(map(is_address, found.table.tars or ())):  # listing them would download them
        found.caches.append("its sources are not checked: they are in tars at addresses")
        return
    sources = find_table(config, found.table)
    if not sources.sources:
        found.caches += [f"its sources are not checked: {fault.text}" for fault in sources.faults[:1]]
        return
    found.sources = sources.sources
    check_captions(sources, counters)
    found.remarks += [*sources.faults, *sources.remarks]
    stems = set(items.stems)
    found.remarks += [
        Fault("have no cache: too short, unreadable, or not cached yet", str(one.path), one.stem)
        for one in found.sources
        if one.stem not in stems
    ]
