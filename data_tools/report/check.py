"""`--check`: report totals and all faults of a configuration, before a long run."""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from data_tools.report import findings
from data_tools.report.page import write_check_page
from data_tools.report.sound import check_sound, is_heard
from dataset.batches.checks import SameEncoders, describe_identity
from dataset.batches.finding import FoundItems, find_items, learn_no_references
from dataset.batches.items import NO_COMMANDS, CachingCommands, TrainingItem, group_items
from dataset.batches.order import BatchOrder, split_validation
from dataset.batches.reading import read_batch, stores_for
from dataset.cache.files import EMPTY
from dataset.cache.form import list_shard_faults, other_form
from dataset.cache.store import LatentNames, Stores, may_be_mixed, npz_names
from dataset.caching.given import use_moments
from dataset.caching.planning import Planning, Recipe, SourcePlan, plan_all
from dataset.caching.prefetch import SIZE_CHANGES, Failure, map_ahead, read_ahead, workers_of
from dataset.caching.sound import HearingFamily, SoundWork
from dataset.caching.text_plans import list_caption_files, plan_texts
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, CheckPageOptions
from dataset.sources.clock import find_other_lengths
from dataset.sources.colours import find_colours, find_reordered
from dataset.sources.companions import find_moving_references, refuse_companions
from dataset.sources.decoding import check_resolution, decode_source
from dataset.sources.folders import log_lone_controls
from dataset.sources.frames import find_far_rates, find_wrong_rates, media_table
from dataset.sources.media_source import NO_REFERENCE, Fault
from dataset.sources.references import find_equal_references, lack_references, reference_buckets
from dataset.sources.sound import list_unheard
from modules.bars import Bar
from modules.console import count_of, count_words
from modules.contract.data import LatentSpec, MediaTable, SoundSpec
from modules.contract.family import Caches, Described, TextEncoder, hears_sound, sound_of
from modules.control_codes import columns_of, escape_control_codes, fold
from modules.errors import CacheError, DatasetError, MediaError, OptionError
from modules.media.buckets import Size
from modules.paths import is_address

MEDIA, LATENTS, TEXTS = "media", "latents", "texts"  # the parts to check
NO_ITEM = "tables have no item to train on"
EDITS_NOTHING = "model that takes reference pictures gets none"
TOKENS_ELSEWHERE = findings.Counters(
    (), ("Tokens are counted by --check --html of the text caching script.",)
)


def check_script(family: Caches, config: DatasetConfig, options: CachingOptions, of_texts: bool) -> int:
    """Run --check of a script that caches latents, or texts; returns the exit code."""
    if options.repair_captions is not None:
        _print_lines(findings.repair_captions(config, options.repair_captions))
    parts: tuple[str, ...] = (MEDIA, LATENTS)
    if of_texts:  # the page shows the media too
        parts = (TEXTS,) if options.page.html is None else (MEDIA, TEXTS)
    workers = workers_of(options)
    result = check_caching(family, config, workers, options.skip_existing, options.verify, parts)
    result = result if of_texts else replace(result, counters=TOKENS_ELSEWHERE)
    return tell_check(result, family, config, options.page, workers)


def tell_check(
    result: findings.CheckResult,
    family: Described,
    config: DatasetConfig,
    page: CheckPageOptions,
    workers: int,
) -> int:
    """Print the findings, and write the page if it is asked for; returns the exit code."""
    _print_lines(result.lines)
    if page.html is not None:
        fps = family.defaults.fps
        hears = hears_sound(family)
        write_check_page(page.html, config, result, family.latent, fps, page.html_items, workers, hears)
    return result.exit_code


def _print_lines(lines: Sequence[str]) -> None:
    sys.stdout.write(fold(escape_control_codes("\n".join(lines)), columns_of(sys.stdout)) + "\n")


def check_caching(
    family: Caches,
    config: DatasetConfig,
    workers: int,
    skip_existing: bool,
    verify: bool = False,
    parts: Sequence[str] = (MEDIA, LATENTS),
    validation: tuple[float, int] = (0.0, 0),
) -> findings.CheckResult:
    """Report what caching would do. Nothing is encoded or written, and no encoder is loaded.

    verify: read all cache files again. parts: MEDIA checks the sources; those whose records are missing or
    outdated are decoded. LATENTS checks their caches; it needs a family made with the options of latent
    caching. TEXTS checks caches of captions, and captions longer than an encoder reads; without the encoders'
    files only the captions. validation: share and seed for tables that do not give their own.
    """
    media, latents, texts = (part in parts for part in (MEDIA, LATENTS, TEXTS))
    counters = findings.load_counters(family.text_encoders) if texts else findings.NO_COUNTERS
    identity, encoders, files = _identify(family, latents, texts)

    def sections(table: MediaTable, frames: int) -> int | None:
        # whether images are taken alone is an option of latent caching
        return None if table.kind == "image" and not latents else family.sections_of(table, frames)

    stores, tables = Stores(npz_names(family), skip_existing=skip_existing, verify=verify), []
    given = family.latent, family.defaults.fps, sections, stores
    recipe = Recipe(family.cache_tag, identity, *given, has_rates=family.can.rate, sound=sound_of(family))
    for table in config.datasets:
        found = findings.find_table(config, table)
        may_say = (latents or texts) and may_be_mixed(table)
        forms = other_form(table, family.cache_tag) if may_say else ()
        found.faults += [Fault("folders of caches are in the other form", line) for line in forms]
        if media and found.sources:
            _check_media(found, family, recipe, workers, latents)
        if texts:
            captions = list_caption_files(found.sources, family.cache_tag)
            planned = plan_texts(captions, encoders, stores)
            missing = Counter(name for file in planned for name in file.missing)
            for encoder, _ in encoders:
                valid, to_do = len(captions) - missing[encoder.name], missing[encoder.name]
                needs = count_words(to_do, "captions need encoding")
                found.caches.append(f"caches of {encoder.name}: {valid} are valid, {needs}")
        if texts or (found.sources and identity):
            kind = "shards or folders are not whole; caching mends them"
            found.remarks += [Fault(kind, line) for line in list_shard_faults(table)]
        findings.check_captions(found, counters)
        items = f", {count_of(found.num_items, 'item')}" if media else ""
        found.title = f"{table.name}: {count_of(len(found.sources), table.holds)}{items}"
        tables.append(found)
    sources = [source for found in tables for source in found.sources]
    log_lone_controls(sources)
    if lack_references(config.datasets, sources):
        tables[0].remarks.append(Fault(EDITS_NOTHING, NO_REFERENCE))
    findings.hold_back(tables, *validation)
    findings.balance(tables)
    counted = count_of(findings.count_batches(tables), "batch")
    batches = f"{counted} an epoch, as many steps without accumulation"
    held = sum(found.held.total() for found in tables)
    kept = f"it, without {count_of(held, 'item')} for validation" if held else "all of it"
    tail = (f"Training on {kept}: {batches}",) if media else ()
    head = ("Files recognised:", *findings.indent([*files, *counters.missing]))
    return findings.CheckResult(head, tuple(tables), tail, counters)


Encoders = list[tuple[TextEncoder, dict[str, str]]]  # each encoder with its identity


def _identify(
    family: Caches, latents: bool, texts: bool
) -> tuple[Mapping[str, str], Encoders, Sequence[str]]:
    """Return the media encoders' identity (empty if not needed), the text encoders, and lines about both."""
    identity: Mapping[str, str] = {}
    encoders: Encoders = []
    files: list[str] = []
    try:
        if latents:
            identity = dict(family.media_identity)
            files += describe_identity(identity)
    except OptionError as error:
        files.append(f"caches are not compared: {error}")
    if texts:
        with contextlib.suppress(OptionError):  # an encoder is missing: `Counters` says which
            encoders = [(encoder, dict(encoder.identity)) for encoder in family.text_encoders()]
        files += [line for _, one in encoders for line in describe_identity(one)]
    return identity, encoders, files


def _check_media(
    found: findings.TableFindings, family: Caches, recipe: Recipe, workers: int, with_latents: bool
) -> None:
    """Compare the sources of a table with the model, their caches, and each other."""
    table = found.table
    try:
        check_resolution(table, recipe.latent.pixel_step)
        if with_latents:
            has_control = any(one.control for one in found.sources)
            family.check_table(media_table(table, has_control, any(one.references for one in found.sources)))
            refuse_companions(table, found.sources)
            found.sources = use_moments(family, found.sources)
        plans = _check_sources(found, recipe, workers)
        if recipe.encoder and hears_sound(family) and is_heard(table):
            device = torch.device("cpu")
            sound = SoundWork(cast(HearingFamily, family), [table], recipe.stores, device)
            told, faults, remarks = check_sound(table, plans, sound, recipe.fps, workers)
            found.caches += told
            found.faults += faults
            found.remarks += remarks
    except DatasetError as error:
        found.unusable(error)
    found.faults += find_wrong_rates(found.sources)
    found.remarks += [] if recipe.has_rates else find_far_rates(found.sources, recipe.fps)
    found.remarks += find_other_lengths(found.sources, recipe.fps)
    found.remarks += find_equal_references(found.sources)
    found.remarks += find_reordered(found.sources)
    found.remarks += find_moving_references(found.sources)
    found.remarks += find_colours(found.sources, recipe.latent.masks_latents)


def check_training(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    commands: CachingCommands = NO_COMMANDS,
    accumulation: int = 1,
    processes: int = 1,
    files: Iterable[str] = (),
    text_keys: frozenset[str] = frozenset(),
    counters: findings.Counters = findings.NO_COUNTERS,
    sound: SoundSpec | None = None,
    validation: tuple[float, int] = (0.0, 0),
) -> findings.CheckResult:
    """Report the caches that a training run would see; every cache file is read and verified.

    accumulation, processes: their product is the number of batches per optimizer step. files: lines about the
    checkpoints that the caller recognised. text_keys: keys of a complete text cache. sound: spec of a family
    that learns sound.
    """
    cached = find_items(config, cache_tag, latent, text_keys, sound=sound)
    encoders = SameEncoders(commands)
    head, tables = ("Files recognised:", *findings.indent([*files, *counters.missing])), []
    for table in config.datasets:
        found = findings.TableFindings(table)
        items = [item for item in cached.items if item.table.index == table.index]
        for some in group_items(items).values():
            references = (side * latent.stride[1] for side in some[0].references)
            found.add_items(([one.source_stem for one in some]), (*some[0].bucket, *references))
        _check_caches(found, items, cached, latent, encoders)
        _compare_sources(config, found, items, counters, sound is not None)
        is_held_back = ", for validation" if table.validation else ""
        found.title = f"{table.name}: {len(items)} cached items{is_held_back}"
        tables.append(found)
    if cached.items and learn_no_references(cached.items, stores_for(cached.items[0], latent)):
        tables[0].remarks.append(Fault(EDITS_NOTHING, NO_REFERENCE))
    trained, held = split_validation(cached.items, *validation)
    findings.hold_back(tables, *validation)
    order, batches = BatchOrder(trained, seed=0), accumulation * processes
    steps = count_of(-(-order.num_batches // batches), "step")
    steps += f" of {batches} batches" if batches > 1 else ""
    repeated = count_of(order.num_items, "item")
    tail = [f"An epoch: {repeated} with repeats, {count_of(order.num_batches, 'batch')}, {steps}"]
    tail += [f"For validation: {count_of(len(held), 'item')}"] if held else []
    if any(found.faults for found in tables):
        tail += ["Caches are made by:", *findings.indent([commands.latents, commands.text])]
    return findings.CheckResult(head, tuple(tables), tuple(tail), counters)


def _check_sources(found: findings.TableFindings, recipe: Recipe, workers: int) -> list[SourcePlan]:
    """Compare sources with their caches, decoding those without recorded facts. Returns their plans."""
    table = found.table
    existing = {table.index: LatentNames(recipe.stores.of(table), recipe.tag, table.kind)}
    looked, unreadable = plan_all(found.sources, existing, recipe, workers)

    def decoded(plan: SourcePlan) -> SourcePlan:
        media = decode_source(plan.source, recipe.fps, recipe.latent.pixel_step, recipe.latent.frame_step)
        planning = Planning(plan.source, existing[table.index].of(plan.source.stem), recipe)
        compared = planning.compare(media.size, media.spans, len(media.frames), media.reason)
        changes = () if media.clip is None else media.clip.size_changes
        return replace(compared, size_changes=changes)

    plans = [plan for plan in looked if plan.missing is not None]
    unknown = [plan for plan in looked if plan.missing is None]
    bar = Bar(len(unknown), "Decoding", "source")
    for _, result in read_ahead(unknown, lambda plan: plan.source, decoded, workers, bar, decodes=True):
        if isinstance(result, Failure):
            unreadable.append(result)
        else:
            plans.append(result)

    def measure_references(plan: SourcePlan) -> tuple[Size, ...] | Failure:  # only headers are read
        try:
            return reference_buckets(plan.source, (plan.items[0][0], plan.items[0][1])) if plan.items else ()
        except MediaError as error:
            return Failure.of(plan.source, error)

    sizes_of: Iterable[tuple[Size, ...] | Failure] = itertools.repeat(())
    if table.references is not None:
        bar = Bar(len(plans), "Reading headers", "source", shown=False)
        sizes_of = map_ahead(plans, measure_references, workers, bar)
    for sizes, plan in zip(sizes_of, plans, strict=False):
        if isinstance(sizes, Failure):
            found.faults.append(Fault("cannot be read", str(sizes), sizes.stem))
            continue
        # items of a batch must be equal
        sides = tuple(itertools.chain(*sizes)) if table.batch_size > 1 else ()
        for item in plan.items:
            found.add_items([plan.source.stem], (*item, *sides))
    found.faults += [Fault("cannot be read", str(one), one.stem) for one in unreadable]
    for kind, lines in (
        ("give no item", [(plan.source, plan.reason) for plan in plans]),
        ("give no item of some lengths", [(plan.source, plan.short) for plan in plans]),
        (SIZE_CHANGES, [(plan.source, "; ".join(plan.size_changes) or None) for plan in plans]),
    ):
        told = [(one, line) for one, line in lines if line is not None]
        found.remarks += [Fault(kind, f"{one.path}: {line}", one.stem) for one, line in told]
    if plans and not found.buckets:
        text = f"{table.name}: not one of its {count_of(len(plans), table.kind)} gives an item"
        found.faults.append(Fault(NO_ITEM, text))
    masked = sum(source.mask is not None for source in found.sources)
    if masked:
        found.caches.append(f"{masked} of {len(found.sources)} have a mask; the others are learned whole")
    if recipe.encoder:
        kept = sum(len(plan.kept) for plan in plans)
        to_encode = sum(len(plan.missing or ()) for plan in plans)
        found.caches.append(
            f"caches: {kept} files are valid, {count_words(to_encode, 'items need encoding')}"
        )
    return plans


def _check_caches(
    found: findings.TableFindings,
    items: Sequence[TrainingItem],
    cached: FoundItems,
    latent: LatentSpec,
    encoders: SameEncoders,
) -> None:
    """Read every cached item of a table; add a fault for each that cannot be trained on."""
    folder = found.table.cache_directory
    for kind, paths in (
        ("text caches are missing", (*cached.missing_text, *cached.missing_empty)),
        ("text caches are unfinished", cached.unfinished_text),
        ('caches of sound are missing, and audio = "required"', cached.missing_sound),
    ):
        found.faults += [Fault(kind, str(path)) for path in paths if path.parent == folder]
    found.faults += [
        Fault("caches may be incomplete", line) for table, line in cached.unsound if table is found.table
    ]
    if not items:
        found.faults.append(Fault(NO_ITEM, f"{found.table.name}: look in {folder}"))
        return
    stores = stores_for(items[0], latent)
    drops = [EMPTY] if items[0].table.drops_captions else []
    # each caption, and the empty prompt once, or for each item if an encoder sees its references
    pairs = ((item, number) for item in items for number in range(item.captions))
    dropped = items if items[0].table.texts_see_references else items[:1]
    for item, number in itertools.chain(pairs, ((item, number) for item in dropped for number in drops)):
        try:
            batch = read_batch([item], latent, encoders.commands, captions=[number], stores=stores)
        except CacheError as error:
            found.faults.append(Fault("cannot be used", str(error).splitlines()[0], item.source_stem))
        else:
            said = encoders.difference(batch.made_by)
            found.caches += [] if said is None else said.splitlines()


def _compare_sources(
    config: DatasetConfig,
    found: findings.TableFindings,
    items: Sequence[TrainingItem],
    counters: findings.Counters,
    hears: bool,
) -> None:
    """Add remarks about sources without a cache, a caption or cached sound, if the sources are there at
    all: training does not need them.
    """
    if any(map(is_address, found.table.tars or ())):  # listing them would download them
        found.caches.append("its sources are not checked: they are in tars at addresses")
        return
    sources = findings.find_table(config, found.table)
    if not sources.sources:
        found.caches += [f"its sources are not checked: {fault.text}" for fault in sources.faults[:1]]
        return
    found.sources = sources.sources
    found.remarks += find_reordered(found.sources)
    findings.check_captions(sources, counters)
    stems, kind = (
        {item.source_stem for item in items},
        "have no cache: too short, unreadable, or not cached yet",
    )
    found.caches += sources.caches
    found.remarks += [*sources.faults, *sources.remarks]
    found.remarks += [Fault(kind, str(one.path), one.stem) for one in found.sources if one.stem not in stems]
    if hears and is_heard(found.table):
        silent = {item.source_stem for item in items if not item.has_sound}
        kind = "have sound that is not cached: learned silent until latents are cached again"
        unheard = list_unheard(found.sources, silent)
        found.remarks += [Fault(kind, str(path), path.stem) for path in unheard]
