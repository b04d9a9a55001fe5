"""`--check`: report totals and all errors of a configuration before a long run."""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch

from data_tools.report.audio import check_audio, is_heard
from data_tools.report.findings import (
    NO_COUNTERS,
    CheckResult,
    Counters,
    TableFindings,
    balance,
    check_captions,
    count_batches,
    find_table,
    hold_back,
    indent,
    load_counters,
    repair_captions,
)
from data_tools.report.layers import find_unusable_layers
from data_tools.report.masks import check_masks, find_lone_masks
from data_tools.report.page import write_check_page
from dataset.batches.checks import SameEncoders, describe_identity
from dataset.batches.finding import FoundItems, find_items, learn_no_references
from dataset.batches.items import NO_COMMANDS, CachingCommands, TrainingItem, group_items
from dataset.batches.order import BatchOrder, split_validation
from dataset.batches.reading import read_batch, stores_for
from dataset.cache.form import list_format_errors, list_shard_errors
from dataset.cache.store import LatentNames, Stores, may_be_mixed, npz_names
from dataset.cache_files import EMPTY
from dataset.caching.audio import AudioWork, HearingFamily
from dataset.caching.planning import LatentCacheSettings, SourcePlan, SourcePlanner, plan_all
from dataset.caching.precomputed import use_moments
from dataset.caching.prefetch import SIZE_CHANGES, Failure, map_ahead, read_ahead, workers_of
from dataset.caching.text_plans import caption_fitter, list_caption_files, plan_texts
from dataset.config import DatasetConfig, DatasetTable
from dataset.forms.composing import source_format_of
from dataset.options import CachingOptions, CheckPageOptions
from dataset.sources.audio import list_silent
from dataset.sources.colors import find_reordered
from dataset.sources.companions import reject_companions
from dataset.sources.decoding import check_resolution, decode_source
from dataset.sources.folders import log_lone_controls
from dataset.sources.frames import find_wrong_rates, media_table
from dataset.sources.left_out import TableFolders
from dataset.sources.media_source import NO_REFERENCE, Fault
from dataset.sources.references import lack_references, reference_buckets
from dataset.sources.remarks import find_media_warnings
from modules.bars import Bar
from modules.console import format_count, pluralize
from modules.control_codes import escape_control_codes, terminal_width, wrap_text
from modules.errors import CacheError, DatasetError, MediaError, OptionError
from modules.integers import ceil_div
from modules.media.buckets import Size
from modules.media.reading import image_size
from protocols.data import AudioSpec, LatentSpec, MediaTable
from protocols.family import Caches, Described, TextEncoder, audio_of, fits_captions, trains_audio

MEDIA, LATENTS, TEXTS = "media", "latents", "texts"  # the parts to check
NO_ITEM = "tables have no item to train on"
EDITS_NOTHING = "model that takes reference pictures gets none"
TOKENS_ELSEWHERE = Counters((), ("Tokens are counted by --check --html of the text caching script.",))
WRONG_OBJECTS = "faults in captions as JSON objects"
RECOGNIZED = "Files recognized:"
UNREADABLE = "cannot be read"


def check_script(family: Caches, config: DatasetConfig, options: CachingOptions, of_texts: bool) -> int:
    """Run --check of a caching script for latents or text embeddings; return its exit code."""
    if options.repair_captions is not None:
        _print_lines(repair_captions(config, options.repair_captions))
    parts: tuple[str, ...] = (MEDIA, LATENTS)
    if of_texts:  # the HTML page needs the media, too
        parts = (TEXTS,) if options.page.html is None else (MEDIA, TEXTS)
    workers = workers_of(options)
    result = check_caching(
        family,
        config,
        workers=workers,
        skip_existing=options.skip_existing,
        verify=options.verify,
        parts=parts,
    )
    if not of_texts:
        # tokens are counted when texts are checked
        result = replace(result, counters=TOKENS_ELSEWHERE)
    return print_check(result, family, config, page=options.page, workers=workers)


def print_check(
    result: CheckResult,
    family: Described,
    config: DatasetConfig,
    page: CheckPageOptions,
    workers: int,
) -> int:
    """Print the findings of a check, write its HTML page with --html, and return the exit code."""
    _print_lines(result.lines)
    if page.html is not None:
        write_check_page(
            page.html,
            config,
            result,
            latent=family.latent,
            fps=family.defaults.fps,
            maximum=page.html_items,
            workers=workers,
            hears=trains_audio(family),
        )
    return result.exit_code


def _print_lines(lines: Sequence[str]) -> None:
    """Print lines, folded to the width of the terminal, with control codes made visible."""
    text = escape_control_codes("\n".join(lines))
    sys.stdout.write(wrap_text(text, terminal_width(sys.stdout)) + "\n")


# --- caching
# ------------------------------------------------------------------------------------------------------------


class _Scope(NamedTuple):
    """Whether a check reads media, cached latents and cached text embeddings."""

    media: bool
    latents: bool
    texts: bool


Encoders = list[tuple[TextEncoder, dict[str, str]]]  # each encoder with its identity


@dataclass(frozen=True)
class _Identified:
    """Identities of the encoders, with which caches are compared, and lines about their files."""

    media: Mapping[str, str]  # identity of the media encoders; empty if not needed
    texts: Encoders
    lines: Sequence[str]


def check_caching(
    family: Caches,
    config: DatasetConfig,
    workers: int,
    skip_existing: bool,
    verify: bool = False,
    parts: Sequence[str] = (MEDIA, LATENTS),
    validation: tuple[float, int] = (0.0, 0),
    counters: Counters | None = None,
) -> CheckResult:
    """Report what caching would do, without loading encoders and without writing anything.

    Args:
        family: Family that would cache.
        config: The dataset.
        workers: Number of threads.
        skip_existing: Whether caching would skip existing files.
        verify: Whether to read the tensors of all cache files.
        parts: What to check. MEDIA checks the sources; sources with missing or outdated records are decoded.
            LATENTS checks caches of latents and needs a family made with the options of latent caching.
            TEXTS checks caches of captions, and captions that are too long for an encoder; without the
            encoders' files it checks only the captions.
        validation: Validation fraction and seed for tables that do not state their own.
        counters: Token counters of the text encoders if a training encodes captions itself; None loads them
            for TEXTS.
    """
    scope = _Scope(media=MEDIA in parts, latents=LATENTS in parts, texts=TEXTS in parts)  # what to check
    if counters is None:
        counters = load_counters(family.text_encoders) if scope.texts else NO_COUNTERS
    identified = _identify(family, scope)  # the encoders' files, which caches were made with
    stores = Stores(npz_names(family), skip_existing=skip_existing, verify=verify)
    cache_settings = _make_cache_settings(family, identified.media, stores, scope)
    folders = TableFolders(config)

    def check_table(table: DatasetTable) -> TableFindings:
        """Check a table of the dataset: its sources, caches and captions, those that `scope` names."""
        findings = find_table(config, table, folders)
        _check_form(findings, family, scope)
        if scope.media and findings.sources:
            _check_media(findings, family, cache_settings, workers, with_latents=scope.latents)
        if scope.texts:
            # an encoder that has captions to encode must be usable
            unencoded = _check_text_caches(findings, family, identified.texts, stores)
            findings.faults += counters.find_unreachable(unencoded)
        # cache files are listed where caches are compared: of texts, or of latents of known encoders
        if scope.texts or (findings.sources and identified.media):
            kind = "shards or folders are incomplete; caching repairs them"
            findings.remarks += [Fault(kind, line) for line in list_shard_errors(table)]
        check_captions(findings, counters, are_cached=scope.texts)
        _check_objects(findings, family)
        findings.title = f"{table.name}: {format_count(len(findings.sources), table.holds)}"
        if scope.media:
            findings.title += f", {format_count(findings.num_items, 'item')}"
        return findings

    tables = [check_table(table) for table in config.datasets]
    sources = [source for findings in tables for source in findings.sources]
    # files of no source can only be told once the sources of all tables are known
    log_lone_controls(sources)
    if scope.media:
        find_lone_masks(tables)
    if lack_references(config.datasets, sources):  # a warning of the whole dataset, shown once
        tables[0].remarks.append(Fault(EDITS_NOTHING, NO_REFERENCE))
    hold_back(tables, *validation)
    balance(tables)
    return CheckResult(
        head=(RECOGNIZED, *indent([*identified.lines, *counters.missing])),
        tables=tuple(tables),
        tail=(_describe_training(tables),) if scope.media else (),
        counters=counters,
    )


def _make_cache_settings(
    family: Caches, identity: Mapping[str, str], stores: Stores, scope: _Scope
) -> LatentCacheSettings:
    """Return the settings with which caching would encode latents, to compare existing caches with them.

    `identity` names the encoders and their files.
    """

    def sections(table: MediaTable, frames: int) -> int | None:
        """Return the number of sections into which a family divides an item; None if it is unknown."""
        # only the options of latent caching say how an image is divided into sections
        if table.kind == "image" and not scope.latents:
            return None
        return family.sections_of(table, frames)

    return LatentCacheSettings(
        tag=family.cache_tag,
        encoder_identity=identity,
        latent=family.latent,
        fps=family.defaults.fps,
        count_sections=sections,
        stores=stores,
        stores_frame_rate=family.abilities.takes_fps,
        audio=audio_of(family),
    )


def _describe_training(tables: Sequence[TableFindings]) -> str:
    """Return a line with the number of items and batches in an epoch."""
    batches = format_count(count_batches(tables), "batch")
    num_held_back = sum(findings.held_back.total() for findings in tables)
    items = "all of it"
    if num_held_back:
        items = f"it, without {format_count(num_held_back, 'item')} for validation"
    return f"Training on {items}: {batches} an epoch, as many steps without accumulation"


def _identify(family: Caches, scope: _Scope) -> _Identified:
    """Return what identifies the family's encoders, such as their files, to compare caches with them."""
    media: Mapping[str, str] = {}
    texts: Encoders = []
    lines: list[str] = []
    try:
        if scope.latents:
            media = dict(family.media_identity)
            lines += describe_identity(media)
    except OptionError as error:
        # without the encoder's files its identity is unknown
        lines.append(f"caches are not compared: {error}")
    if scope.texts:
        with contextlib.suppress(OptionError):  # an encoder is missing: `Counters` reports it
            texts = [(encoder, dict(encoder.identity)) for encoder in family.text_encoders()]
        for _, identity in texts:
            lines += describe_identity(identity)
    return _Identified(media, texts, lines)


def _check_form(findings: TableFindings, family: Caches, scope: _Scope) -> None:
    """Add faults for cache folders in another format than the table's cache_format."""
    if (scope.latents or scope.texts) and may_be_mixed(findings.table):
        lines = list_format_errors(findings.table, family.cache_tag)
        findings.faults += [Fault("folders of caches are in the other form", line) for line in lines]


def _check_text_caches(
    findings: TableFindings, family: Caches, encoders: Encoders, stores: Stores
) -> Iterable[str]:
    """Report valid and missing caches per text encoder; return the encoders that have captions to encode."""
    captions = list_caption_files(findings.sources, family.cache_tag, fit=caption_fitter(family))
    plans = plan_texts(captions, encoders, stores)
    missing = Counter(name for plan in plans for name in plan.encoders_to_run)
    for encoder, _ in encoders:
        num_missing = missing[encoder.name]
        num_valid = len(captions) - num_missing
        needs = pluralize(num_missing, "captions need encoding")
        findings.caches.append(f"caches of {encoder.name}: {num_valid} are valid, {needs}")
    return missing


def _check_objects(findings: TableFindings, family: Caches) -> None:
    """Add a fault for each caption that has to be a JSON object and is not valid."""
    if not fits_captions(family):
        return
    for source in findings.sources:
        captions = [] if source.caption is None else [source.caption, *source.more_captions]
        for caption in filter(family.has_coordinates, captions):
            with contextlib.suppress(MediaError, OSError):  # the check of media reports errors
                place = source.caption_path or source.path
                for line in family.find_caption_errors(caption, image_size(source.path)):
                    findings.faults.append(Fault(WRONG_OBJECTS, f"{place}: {line}", source.stem))


def _check_media(
    findings: TableFindings,
    family: Caches,
    cache_settings: LatentCacheSettings,
    workers: int,
    with_latents: bool,
) -> None:
    """Check the media of a table against the model and their latent caches."""
    try:
        check_resolution(findings.table, cache_settings.latent.pixel_step)
        if with_latents:
            _check_family(findings, family)
        plans = _check_sources(findings, cache_settings, workers)
        # some families cache audio in files of its own; otherwise the caches of latents contain it
        has_audio_caches = trains_audio(family) and not cache_settings.stores_audio
        if cache_settings.encoder_identity and has_audio_caches and is_heard(findings.table):
            _check_table_audio(
                findings, cast(HearingFamily, family), plans, cache_settings=cache_settings, workers=workers
            )
    except DatasetError as error:
        findings.unusable(error)
    findings.faults += find_wrong_rates(findings.sources)
    findings.remarks += find_media_warnings(
        findings.sources, cache_settings.latent, cache_settings.fps, cache_settings.stores_frame_rate
    )


def _check_family(findings: TableFindings, family: Caches) -> None:
    """Run the family's own check of a table's media.

    Raises:
        DatasetError: If the family cannot cache them.
    """
    table, sources = findings.table, findings.sources
    has_control = any(source.control for source in sources)
    has_references = any(source.references for source in sources)
    shown = tuple(source.row_references for source in sources) if table.shows_media else ()
    family.check_table(media_table(table, has_control, has_references, table.has_guides, shown))
    reject_companions(table, sources)
    findings.sources = use_moments(family, sources)


def _check_table_audio(
    findings: TableFindings,
    family: HearingFamily,
    plans: Sequence[SourcePlan],
    cache_settings: LatentCacheSettings,
    workers: int,
) -> None:
    """Check the audio of a table's clips, and add the results to `findings`.

    `plans` say how the latents of the clips are cached.
    """
    table = findings.table
    work = AudioWork(family, [table], cache_settings.stores, torch.device("cpu"))
    audio = check_audio(table, plans, work, workers)
    findings.caches += audio.lines
    findings.faults += audio.faults
    findings.remarks += audio.remarks


def _check_sources(
    findings: TableFindings, cache_settings: LatentCacheSettings, workers: int
) -> list[SourcePlan]:
    """Check the media files of a table, and return their caching plans."""
    table = findings.table
    plans, unreadable = _plan_sources(findings, cache_settings, workers)
    unreadable += find_unusable_layers(plans, workers)
    _count_items(findings, plans, workers)
    findings.faults += [Fault(UNREADABLE, str(failure), failure.stem) for failure in unreadable]
    _add_plan_warnings(findings, plans)
    if plans and not findings.buckets:
        text = f"{table.name}: not one of its {format_count(len(plans), table.kind)} gives an item"
        findings.faults.append(Fault(NO_ITEM, text))
    num_masked = sum(source.mask is not None for source in findings.sources)
    if num_masked:
        counts = f"{num_masked} of {len(findings.sources)}"
        findings.caches.append(f"{counts} have a mask; the others are learned whole")
        check_masks(findings, plans, cache_settings.latent, workers)
    if cache_settings.encoder_identity:  # empty: latents are not checked
        findings.caches.append(_count_caches(plans))
    return plans


def _count_caches(plans: Sequence[SourcePlan]) -> str:
    """Return a line with the numbers of valid and of missing latent caches."""
    num_valid = sum(len(plan.valid_files) for plan in plans)
    num_missing = sum(len(plan.missing_spans or ()) for plan in plans)
    needs = pluralize(num_missing, "items need encoding")
    return f"caches: {num_valid} files are valid, {needs}"


def _plan_sources(
    findings: TableFindings, cache_settings: LatentCacheSettings, workers: int
) -> tuple[list[SourcePlan], list[Failure]]:
    """Plan the caches of all sources; those without recorded sizes are decoded and come last."""
    table = findings.table
    existing = LatentNames(
        cache_settings.stores.latent_store(table), cache_settings.tag, table.kind
    )  # names of cached latents
    planned, unreadable = plan_all(findings.sources, {table.index: existing}, cache_settings, workers)

    def plan_decoded(plan: SourcePlan) -> SourcePlan:
        """Decode a source, and complete its caching plan."""
        source = plan.source
        media = decode_source(
            source, cache_settings.fps, cache_settings.latent.pixel_step, cache_settings.latent.lengths
        )
        planner = SourcePlanner(source, existing.of(source.stem), cache_settings)
        compared = planner.compare(media.size, media.spans, len(media.frames), media.reason)
        changes = () if media.clip is None else media.clip.size_changes
        return replace(compared, size_changes=changes)

    # `missing` is None if the items of a source are not known without decoding it
    plans = [plan for plan in planned if plan.missing_spans is not None]
    unknown = [plan for plan in planned if plan.missing_spans is None]
    decoded = read_ahead(
        unknown,
        source_of=lambda plan: plan.source,
        work=plan_decoded,
        workers=workers,
        bar=Bar(len(unknown), "Decoding", "source"),
        decodes=True,
    )
    for _, result in decoded:
        if isinstance(result, Failure):
            unreadable.append(result)
        else:
            plans.append(result)
    return plans, unreadable


def _count_items(findings: TableFindings, plans: Sequence[SourcePlan], workers: int) -> None:
    """Count the items that each source will give; if its references cannot be read, add a fault instead."""
    table = findings.table
    # sizes of the references of each source; without references an endless row of ()
    sizes_of: Iterable[tuple[Size, ...] | Failure] = itertools.repeat(())
    if table.references is not None:
        bar = Bar(len(plans), "Reading headers", "source", shown=False)
        sizes_of = map_ahead(plans, _measure_references, workers, bar)
    for sizes, plan in zip(sizes_of, plans, strict=False):  # not strict: `sizes_of` may be endless
        if isinstance(sizes, Failure):
            findings.faults.append(Fault(UNREADABLE, str(sizes), sizes.stem))
            continue
        # items of a batch must have references of equal sizes
        sides = tuple(itertools.chain(*sizes)) if table.batch_size > 1 else ()
        for item in plan.item_sizes:
            findings.add_items([plan.source.stem], (*item, *sides))


def _measure_references(plan: SourcePlan) -> tuple[Size, ...] | Failure:
    """Return the size of each reference image of a source, from the headers."""
    if not plan.item_sizes:
        return ()
    width, height = plan.item_sizes[0][:2]
    try:
        return reference_buckets(plan.source, (width, height))
    except MediaError as error:
        return Failure.of(plan.source, error)


def _add_plan_warnings(findings: TableFindings, plans: Sequence[SourcePlan]) -> None:
    """Add a warning for each media file that yields too few items or whose frames change size."""
    remarks: list[tuple[str, Callable[[SourcePlan], str | None]]] = [
        ("give no item", lambda plan: plan.why_no_items),
        ("give no item of some lengths", lambda plan: plan.too_short_for),
        (SIZE_CHANGES, lambda plan: "; ".join(plan.size_changes) or None),
    ]
    for kind, describe in remarks:
        for plan in plans:
            line = describe(plan)
            if line is not None:
                source = plan.source
                findings.remarks.append(Fault(kind, f"{source.path}: {line}", source.stem))


# --- training
# ------------------------------------------------------------------------------------------------------------


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
    audio: AudioSpec | None = None,
    validation: tuple[float, int] = (0.0, 0),
) -> CheckResult:
    """Report the caches that a training run would use; every cache file is read and verified.

    The product of `accumulation` and `processes` is the number of batches per optimizer step. `files` are
    report lines about the checkpoints. `text_keys` are the keys of a complete text cache. `audio` is the
    audio specification of a family that is trained with sound. `validation` holds the fraction of items for
    validation and its seed, for tables that do not state their own.
    """
    cached = find_items(config, cache_tag, latent, text_keys, audio=audio)
    encoders = SameEncoders(commands)  # compares the encoders that made the caches
    head = (RECOGNIZED, *indent([*files, *counters.missing]))
    tables = []
    folders = TableFolders(config)
    for table in config.datasets:
        findings = TableFindings(table)
        items = [item for item in cached.items if item.table.index == table.index]
        _count_cached_items(findings, items, latent)
        _check_caches(findings, items, cached, latent=latent, encoders=encoders)
        _compare_sources(config, findings, items, folders=folders, counters=counters, hears=audio is not None)
        is_held_back = ", for validation" if table.validation else ""
        findings.title = f"{table.name}: {len(items)} cached items{is_held_back}"
        tables.append(findings)
    if cached.items:
        # all items share the model, and therefore the cache layout
        stores = stores_for(cached.items[0], latent)
        if learn_no_references(cached.items, stores):
            tables[0].remarks.append(Fault(EDITS_NOTHING, NO_REFERENCE))
    trained, held_back = split_validation(cached.items, *validation)
    # the same items are subtracted from the bucket counts of the report
    hold_back(tables, *validation)
    tail = [_describe_epoch(trained, batches_per_step=accumulation * processes)]
    if held_back:
        tail.append(f"For validation: {format_count(len(held_back), 'item')}")
    if any(findings.faults for findings in tables):
        tail += ["Caches are made by:", *indent([commands.latents, commands.text])]
    return CheckResult(head, tuple(tables), tuple(tail), counters)


def _count_cached_items(findings: TableFindings, items: Sequence[TrainingItem], latent: LatentSpec) -> None:
    """Count the cached items of a table by the sizes of their images and references."""
    for group in group_items(items).values():
        first = group[0]
        reference_sides = [side * latent.stride[1] for side in first.reference_latent_sizes]
        stems = [item.source_stem for item in group]
        findings.add_items(stems, (*first.bucket, *reference_sides))


def _describe_epoch(items: Sequence[TrainingItem], batches_per_step: int) -> str:
    """Return a line with the number of items, batches and steps in an epoch."""
    order = BatchOrder(items, seed=0)
    num_steps = ceil_div(order.num_batches, batches_per_step)
    steps = format_count(num_steps, "step")
    if batches_per_step > 1:
        steps += f" of {batches_per_step} batches"
    repeated = format_count(order.num_items, "item")
    return f"An epoch: {repeated} with repeats, {format_count(order.num_batches, 'batch')}, {steps}"


def _check_caches(
    findings: TableFindings,
    items: Sequence[TrainingItem],
    cached: FoundItems,
    latent: LatentSpec,
    encoders: SameEncoders,
) -> None:
    """Read every cached item of a table; add a fault for each item that cannot be used."""
    _add_missing_caches(findings, cached)
    if not items:
        text = f"{findings.table.name}: look in {findings.table.cache_directory}"
        findings.faults.append(Fault(NO_ITEM, text))
        return
    stores = stores_for(items[0], latent)
    for item, caption_index in _list_captions(items):
        try:
            batch = read_batch([item], latent, encoders.commands, captions=[caption_index], stores=stores)
        except CacheError as error:
            # the first line names the error; the lines below it say how to correct it
            text = str(error).splitlines()[0]
            findings.faults.append(Fault("cannot be used", text, item.source_stem))
        else:
            difference = encoders.difference(batch.made_by)
            if difference is not None:
                findings.caches += difference.splitlines()


def _add_missing_caches(findings: TableFindings, cached: FoundItems) -> None:
    """Add a fault for each missing or incomplete cache of a table."""
    folder = findings.table.cache_directory
    missing = {
        "text caches are missing": (*cached.missing_text, *cached.missing_empty_prompts),
        "text caches are unfinished": cached.unfinished_text,
        'caches of sound are missing, and audio = "required"': cached.missing_audio,
    }
    for kind, paths in missing.items():
        findings.faults += [Fault(kind, str(path)) for path in paths if path.parent == folder]
    for table, line in cached.incomplete_tables:
        if table is findings.table:
            findings.faults.append(Fault("caches may be incomplete", line))


def _list_captions(items: Sequence[TrainingItem]) -> Iterator[tuple[TrainingItem, int]]:
    """Yield (item, caption index or EMPTY) for every caption that a training run reads."""
    for item in items:
        for number in range(item.num_captions):
            yield item, number
    table = items[0].table
    if table.caches_empty_prompt:
        # the empty prompt once, or for each item if an encoder sees its references
        for item in items if table.texts_see_references else items[:1]:
            yield item, EMPTY


def _compare_sources(
    config: DatasetConfig,
    findings: TableFindings,
    items: Sequence[TrainingItem],
    folders: TableFolders,
    counters: Counters,
    hears: bool,
) -> None:
    """Add warnings about media files of a table that have no cache, caption or cached audio.

    Missing media files cause no warning, because training only reads their caches. `hears` says whether the
    model is trained with audio.
    """
    source_format = source_format_of(findings.table)
    if source_format.list_addresses(findings.table):  # listing such sources would download files
        name = source_format.name
        findings.caches.append(f"its sources are not checked: they are in {name} at addresses")
        return
    listed = find_table(config, findings.table, folders)
    if not listed.sources:
        findings.caches += [f"its sources are not checked: {error.text}" for error in listed.faults[:1]]
        return
    findings.sources = listed.sources
    findings.remarks += find_reordered(findings.sources)
    check_captions(listed, counters)
    findings.caches += listed.caches
    findings.remarks += [*listed.faults, *listed.remarks]
    stems = {item.source_stem for item in items}
    kind = "have no cache: too short, unreadable, or not cached yet"
    for source in findings.sources:
        if source.stem not in stems:
            findings.remarks.append(Fault(kind, str(source.path), source.stem))
    if hears and is_heard(findings.table):
        silent = {item.source_stem for item in items if not item.has_cached_audio}
        kind = "have sound that is not cached: only their pictures are learned until latents are cached again"
        unheard = list_silent(findings.sources, silent)
        findings.remarks += [Fault(kind, str(path), path.stem) for path in unheard]
