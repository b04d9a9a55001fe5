"""`--check`: report totals and all errors of a configuration before a long run."""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import torch

from data_tools.report.audio import check_audio, uses_audio
from data_tools.report.diagnosis.captions import find_caption_findings
from data_tools.report.diagnosis.contract import MeasuredDataset, list_captions
from data_tools.report.diagnosis.trigger_words import find_trigger_findings
from data_tools.report.findings import (
    NO_TOKEN_COUNTERS,
    CheckResult,
    TableFindings,
    TokenCounters,
    balance_regularization,
    check_captions,
    count_batches,
    count_validation_items,
    find_table,
    indent,
    load_token_counters,
    repair_captions,
)
from data_tools.report.layers import find_unusable_layers
from data_tools.report.masks import check_masks, find_lone_masks
from data_tools.report.page import write_check_page
from dataset.batches.checks import SameEncoders, describe_identity
from dataset.batches.finding import FoundItems, find_items, lack_edit_references
from dataset.batches.items import NO_COMMANDS, CachingCommands, TrainingItem, group_items
from dataset.batches.order import BatchOrder, split_validation
from dataset.batches.reading import read_batch, stores_for
from dataset.cache.form import list_format_errors, list_shard_errors
from dataset.cache.store import LatentNames, Stores, may_have_both_formats, npz_names
from dataset.cache_files import EMPTY
from dataset.caching.audio import AudioCachingFamily, AudioWork
from dataset.caching.planning import LatentCacheSettings, SourcePlan, SourcePlanner, plan_all
from dataset.caching.precomputed import use_moments
from dataset.caching.prefetch import SIZE_CHANGES, Failure, count_workers, map_ahead, read_ahead
from dataset.caching.text_plans import find_visible_media, list_caption_files, plan_texts
from dataset.config import DatasetConfig, DatasetTable
from dataset.forms.composing import get_source_format
from dataset.options import CachingOptions, CheckPageOptions
from dataset.sources.audio import list_silent
from dataset.sources.colors import find_reordered
from dataset.sources.companions import reject_companions
from dataset.sources.decoding import check_resolution, decode_source
from dataset.sources.folders import log_lone_controls
from dataset.sources.frames import find_wrong_rates, media_table
from dataset.sources.left_out import TableFolders
from dataset.sources.media_source import NO_REFERENCE, Fault, MediaSource
from dataset.sources.references import lack_references, reference_buckets
from dataset.sources.remarks import find_media_warnings
from modules.bars import Bar
from modules.console import format_count, pluralize
from modules.control_codes import escape_control_codes, terminal_width, wrap_text
from modules.errors import CacheError, DatasetError, MediaError, OptionError
from modules.integers import ceil_div
from modules.media.buckets import Size
from modules.media.reading import image_size
from modules.text_files import looks_like_object
from protocols.data import AudioSpec, LatentSpec, MediaTable
from protocols.families import caption_formats
from protocols.family import (
    Caches,
    Described,
    FitsCaptions,
    TextEncoder,
    fits_captions,
    get_audio_spec,
    trains_audio,
)

MEDIA, LATENTS, TEXTS = "media", "latents", "texts"  # the parts to check
NO_ITEM = "tables have no item to train on"
GETS_NO_REFERENCES = "model that uses reference images gets none"
TOKENS_ELSEWHERE = TokenCounters((), ("Tokens are counted by --check --html of the text caching script.",))
WRONG_JSON_CAPTIONS = "faults in captions as JSON objects"
PLAIN_CAPTIONS = "captions are sentences instead of JSON objects"
RECOGNIZED = "Files recognized:"
UNREADABLE = "cannot be read"


def check_script(family: Caches, config: DatasetConfig, options: CachingOptions, for_texts: bool) -> int:
    """Run --check of a caching script for latents or text embeddings; return its exit code."""
    if options.repair_captions is not None:
        _print_lines(repair_captions(config, options.repair_captions))
    writes_page = options.page.html is not None
    parts: tuple[str, ...] = (MEDIA, LATENTS)
    if for_texts:
        parts = (MEDIA, TEXTS) if writes_page else (TEXTS,)  # the page shows the media too
    workers = count_workers(options)
    result = check_caching(
        family,
        config,
        workers=workers,
        skip_existing=options.skip_existing,
        verify=options.verify,
        parts=parts,
    )
    if not for_texts:
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
            with_audio=trains_audio(family),
        )
    return result.exit_code


def _print_lines(lines: Sequence[str]) -> None:
    """Print lines, folded to the width of the terminal, with control codes made visible."""
    text = escape_control_codes("\n".join(lines))
    sys.stdout.write(wrap_text(text, terminal_width(sys.stdout)) + "\n")


# --- caching
# ------------------------------------------------------------------------------------------------------------


class _Scope(NamedTuple):
    """Which media and caches a check reads."""

    media: bool
    latents: bool
    texts: bool


IdentifiedEncoders = list[tuple[TextEncoder, dict[str, str]]]  # each encoder with its identity


def check_caching(
    family: Caches,
    config: DatasetConfig,
    workers: int,
    skip_existing: bool,
    verify: bool = False,
    parts: Sequence[str] = (MEDIA, LATENTS),
    validation: tuple[float, int] = (0.0, 0),
    counters: TokenCounters | None = None,
) -> CheckResult:
    """Report what caching would do, without loading encoders and without writing anything.

    1. Read what identifies the encoders, and load tokenizers for counting tokens.
    2. Check the media, caches and captions of each table.
    3. Check what concerns all tables: unused control media and masks, references, validation, balance.

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
        validation: Validation fraction and seed for tables that do not set their own.
        counters: Token counters of the text encoders if a training run encodes captions itself; None loads
            them for TEXTS.
    """
    scope = _Scope(media=MEDIA in parts, latents=LATENTS in parts, texts=TEXTS in parts)
    if counters is None:
        counters = load_token_counters(family.text_encoders) if scope.texts else NO_TOKEN_COUNTERS
    media_identity, text_encoders, encoder_lines = _read_encoder_identities(family, scope)
    stores = Stores(npz_names(family), skip_existing=skip_existing, verify=verify)
    checker = _CachingChecker(
        family=family,
        scope=scope,
        text_encoders=text_encoders,
        cache_settings=_make_cache_settings(family, media_identity, stores, scope),
        counters=counters,
        workers=workers,
    )
    folders = TableFolders(config)
    tables = [checker.check(find_table(config, table, folders)) for table in config.datasets]
    sources = [source for findings in tables for source in findings.sources]
    # unused control media and masks are known only after the sources of all tables are listed
    log_lone_controls(sources)
    if scope.media:
        find_lone_masks(tables)
    if lack_references(config.datasets, sources):  # a warning of the whole dataset, shown once
        tables[0].warnings.append(Fault(GETS_NO_REFERENCES, NO_REFERENCE))
    count_validation_items(tables, *validation)
    balance_regularization(tables)
    tail = [_describe_training_epoch(tables)] if scope.media else []
    if counters.by_encoder:
        captions = list_captions(tables, dict(counters.by_encoder))
        dataset = MeasuredDataset(config.path, tables, (), captions, dict(counters.by_encoder))
        for finding in (*find_trigger_findings(dataset), *find_caption_findings(dataset)):
            tail += finding.lines
    return CheckResult(
        head=(RECOGNIZED, *indent([*encoder_lines, *counters.missing_lines])),
        tables=tuple(tables),
        tail=tuple(tail),
        counters=counters,
    )


@dataclass(frozen=True)
class _CachingChecker:
    """Checks dataset tables and their caches against a model family; all tables share its settings."""

    family: Caches
    scope: _Scope
    text_encoders: IdentifiedEncoders
    cache_settings: LatentCacheSettings
    counters: TokenCounters
    workers: int

    def check(self, findings: TableFindings) -> TableFindings:
        """Check a table's media, caches and captions within the checker's scope; add to its findings."""
        table = findings.table
        if (self.scope.latents or self.scope.texts) and may_have_both_formats(findings.table):
            lines = list_format_errors(findings.table, self.family.cache_tag)
            findings.errors += [Fault("folders of caches are in the other form", line) for line in lines]
        if self.scope.media and findings.sources:
            self._check_media(findings)
        if self.scope.texts:
            self._check_text_caches(findings)
        compares_latents = bool(findings.sources and self.cache_settings.encoder_identity)
        if self.scope.texts or compares_latents:
            # only if caches are checked: other checks do not depend on the cache folder
            kind = "shards or folders are incomplete; caching repairs them"
            findings.warnings += [Fault(kind, line) for line in list_shard_errors(table)]
        check_captions(findings, self.counters, are_cached=self.scope.texts)
        family = self.family
        if fits_captions(family):
            findings.errors += _find_json_caption_errors(findings.sources, family)
            findings.warnings += _find_plain_captions(findings, self.family.name)
        findings.title = f"{table.name}: {format_count(len(findings.sources), table.media_kind)}"
        if self.scope.media:
            findings.title += f", {format_count(findings.num_items, 'item')}"
        return findings

    def _check_media(self, findings: TableFindings) -> None:
        """Check the media of a table against the family and their latent caches."""
        settings, table, sources = self.cache_settings, findings.table, findings.sources
        try:
            check_resolution(table, settings.latent.pixel_step)
            if self.scope.latents:  # the family has rules of its own
                has_control = any(source.control for source in sources)
                has_references = any(source.references for source in sources)
                rows = (
                    tuple(source.row_references for source in sources)
                    if table.references.reads_row_references
                    else ()
                )
                facts = media_table(
                    table, has_control, has_references, table.references.has_guides, tuple(rows)
                )
                self.family.check_table(facts)
                reject_companions(table, sources)
                findings.sources = use_moments(self.family, sources)
            plans = _check_sources(findings, settings, self.workers)
            # otherwise the latent caches contain the audio too
            has_separate_audio_caches = trains_audio(self.family) and not settings.stores_audio
            compares_caches = bool(settings.encoder_identity)  # empty: latents are not checked
            if compares_caches and has_separate_audio_caches and uses_audio(table):
                family = cast(AudioCachingFamily, self.family)
                work = AudioWork(family, [table], settings.stores, torch.device("cpu"))
                audio = check_audio(table, plans, work, self.workers)
                findings.info_lines += audio.lines
                findings.errors += audio.errors
                findings.warnings += audio.warnings
        except DatasetError as error:
            findings.add_table_error(error)
        findings.errors += find_wrong_rates(findings.sources)
        findings.warnings += find_media_warnings(
            findings.sources, settings.latent, settings.fps, settings.stores_frame_rate
        )

    def _check_text_caches(self, findings: TableFindings) -> None:
        """Report valid and missing text caches by encoder; add an error if a needed tokenizer is missing."""
        visible_media = find_visible_media([encoder for encoder, _ in self.text_encoders])
        captions = list_caption_files(findings.sources, self.family.cache_tag, visible_media, self.family)
        plans = plan_texts(captions, self.text_encoders, self.cache_settings.stores)
        num_missing = Counter(name for plan in plans for name in plan.encoders_to_run)
        for encoder, _ in self.text_encoders:
            num_valid = len(captions) - num_missing[encoder.name]
            missing = pluralize(num_missing[encoder.name], "captions need encoding")
            findings.info_lines.append(f"caches of {encoder.name}: {num_valid} are valid, {missing}")
        findings.errors += self.counters.find_offline_errors(num_missing)


def _make_cache_settings(
    family: Caches, identity: Mapping[str, str], stores: Stores, scope: _Scope
) -> LatentCacheSettings:
    """Return the settings that caching would encode latents with, for comparison with existing caches."""
    # `identity` names the encoders and their files.

    def count_sections(table: MediaTable, frames: int) -> int | None:
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
        count_sections=count_sections,
        stores=stores,
        stores_frame_rate=family.abilities.takes_fps,
        audio=get_audio_spec(family),
    )


def _describe_training_epoch(tables: Sequence[TableFindings]) -> str:
    """Return a line with the number of items and batches in an epoch."""
    batches = format_count(count_batches(tables), "batch")
    num_held_back = sum(findings.validation_counts.total() for findings in tables)
    items = "all of it"
    if num_held_back:
        items = f"it, without {format_count(num_held_back, 'item')} for validation"
    return f"Training on {items}: {batches} an epoch, as many steps without accumulation"


def _read_encoder_identities(
    family: Caches, scope: _Scope
) -> tuple[Mapping[str, str], IdentifiedEncoders, list[str]]:
    """Return the identity of the media encoders, the text encoders with theirs, and lines about both.

    Caches are compared with these identities; that of the media encoders is empty if it is not needed.
    """
    media_identity: Mapping[str, str] = {}
    text_encoders: IdentifiedEncoders = []
    lines: list[str] = []
    try:
        if scope.latents:
            media_identity = dict(family.media_identity)
            lines += describe_identity(media_identity)
    except OptionError as error:
        # without the encoder's files its identity is unknown
        lines.append(f"caches are not compared: {error}")
    if scope.texts:
        with contextlib.suppress(OptionError):  # an encoder is missing: `TokenCounters` reports it
            text_encoders = [(encoder, dict(encoder.identity)) for encoder in family.text_encoders()]
        for _, identity in text_encoders:
            lines += describe_identity(identity)
    return media_identity, text_encoders, lines


def _find_json_caption_errors(sources: Sequence[MediaSource], family: FitsCaptions) -> Iterator[Fault]:
    """Yield an error for each caption that has to be a JSON object and is not valid."""
    for source in sources:
        captions = [] if source.caption is None else [source.caption, *source.more_captions]
        for caption in filter(family.has_coordinates, captions):
            with contextlib.suppress(MediaError, OSError):  # the check of media reports errors
                path = source.caption_path or source.path
                for line in family.find_caption_errors(caption, image_size(source.path)):
                    yield Fault(WRONG_JSON_CAPTIONS, f"{path}: {line}", source.stem)


def _find_plain_captions(findings: TableFindings, family_name: str) -> list[Fault]:
    """Return a warning if captions are sentences, and the model was trained with JSON objects."""
    format = caption_formats().get(family_name)
    captions = [source.caption for source in findings.sources if source.caption]
    num_plain = sum(not looks_like_object(caption) for caption in captions)
    if format is None or not num_plain:
        return []
    total = format_count(len(captions), "caption")
    text = (
        f"{findings.table.name}: {num_plain} of {total} are plain sentences, and {format.title} was trained "
        f"with JSON objects. tools/caption_dataset.py --caption_format {family_name} writes them"
    )
    return [Fault(PLAIN_CAPTIONS, text)]


def _check_sources(
    findings: TableFindings, cache_settings: LatentCacheSettings, workers: int
) -> list[SourcePlan]:
    """Check the media files of a table, and return their caching plans."""
    table = findings.table
    plans, unreadable = _plan_sources(findings, cache_settings, workers)
    unreadable += find_unusable_layers(plans, workers)
    _count_items(findings, plans, workers)
    findings.errors += [Fault(UNREADABLE, str(failure), failure.stem) for failure in unreadable]
    # media files that yield too few items, or whose frames change size
    reasons: dict[str, list[str | None]] = {
        "give no item": [plan.why_no_items for plan in plans],
        "give no item of some lengths": [plan.too_short_for for plan in plans],
        SIZE_CHANGES: ["; ".join(plan.size_changes) or None for plan in plans],
    }
    for kind, reasons_of_kind in reasons.items():
        for plan, reason in zip(plans, reasons_of_kind, strict=True):
            if reason is not None:
                source = plan.source
                findings.warnings.append(Fault(kind, f"{source.path}: {reason}", source.stem))
    if plans and not findings.num_items_by_bucket:
        text = f"{table.name}: none of its {format_count(len(plans), table.kind)} yields an item"
        findings.errors.append(Fault(NO_ITEM, text))
    num_masked = sum(source.mask is not None for source in findings.sources)
    if num_masked:
        counts = f"{num_masked} of {len(findings.sources)}"
        findings.info_lines.append(f"{counts} have a mask; the others are used completely")
        check_masks(findings, plans, cache_settings.latent, workers)
    if cache_settings.encoder_identity:  # empty: latents are not checked
        findings.info_lines.append(_count_caches(plans))
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
    """Plan the caches of all sources; those with unknown items are decoded and come last in the result."""
    table = findings.table
    store = cache_settings.stores.latent_store(table)
    cached_names = LatentNames(store, cache_settings.tag, table.kind)
    planned, unreadable = plan_all(findings.sources, {table.index: cached_names}, cache_settings, workers)
    # `missing_spans` lists the items to cache; None if they are not known without decoding the source
    plans = [plan for plan in planned if plan.missing_spans is not None]
    unknown = [plan for plan in planned if plan.missing_spans is None]
    decoded = read_ahead(
        unknown,
        get_source=lambda plan: plan.source,
        work=partial(_plan_decoded, cached_names=cached_names, cache_settings=cache_settings),
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


def _plan_decoded(
    plan: SourcePlan, cached_names: LatentNames, cache_settings: LatentCacheSettings
) -> SourcePlan:
    """Decode a media file whose items its header does not reveal; return its complete caching plan."""
    source = plan.source
    latent = cache_settings.latent
    media = decode_source(source, cache_settings.fps, latent.pixel_step, latent.lengths)
    planner = SourcePlanner(source, cached_names.of(source.stem), cache_settings)
    complete_plan = planner.compare(media.size, media.spans, len(media.frames), media.reason)
    size_changes = () if media.clip is None else media.clip.size_changes
    return replace(complete_plan, size_changes=size_changes)


def _count_items(findings: TableFindings, plans: Sequence[SourcePlan], workers: int) -> None:
    """Count the items that each source will give; if its references cannot be read, add an error instead."""
    table = findings.table
    if table.references.rules is None:
        for plan in plans:
            for item_size in plan.item_sizes:
                findings.add_items([plan.source.stem], item_size)
        return
    bar = Bar(len(plans), "Reading headers", "source", shown=False)
    measured = map_ahead(plans, _measure_references, workers, bar)
    for plan, reference_sizes in zip(plans, measured, strict=True):
        if isinstance(reference_sizes, Failure):
            findings.errors.append(Fault(UNREADABLE, str(reference_sizes), reference_sizes.stem))
            continue
        # references of one batch must have the same sizes
        sides = tuple(itertools.chain(*reference_sizes)) if table.learning.batch_size > 1 else ()
        for item_size in plan.item_sizes:
            findings.add_items([plan.source.stem], (*item_size, *sides))


def _measure_references(plan: SourcePlan) -> tuple[Size, ...] | Failure:
    """Return the size of each reference image of a media file from its header; a Failure if unreadable."""
    if not plan.item_sizes:
        return ()
    width, height = plan.item_sizes[0][:2]
    try:
        return reference_buckets(plan.source, (width, height))
    except MediaError as error:
        return Failure.of(plan.source, error)


# --- training
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainingChecker:
    """Checks the caches of dataset tables that a training run would use; all tables share its settings."""

    config: DatasetConfig
    found_items: FoundItems  # of all tables
    latent: LatentSpec
    same_encoders: SameEncoders  # compares the encoders that made the caches
    folders: TableFolders  # of all tables
    counters: TokenCounters
    with_audio: bool  # whether the model is trained with audio

    def check(self, table: DatasetTable) -> TableFindings:
        """Return what was found: cached and missing items, unusable caches, and uncached media files."""
        findings = TableFindings(table)
        items = [item for item in self.found_items.items if item.table.index == table.index]
        for group in group_items(items).values():
            first = group[0]
            reference_sides = [side * self.latent.stride[1] for side in first.reference_latent_sizes]
            stems = [item.source_stem for item in group]
            findings.add_items(stems, (*first.bucket, *reference_sides))
        _add_missing_caches(findings, self.found_items)
        _check_cached_items(findings, items, self.latent, self.same_encoders)
        self._compare_sources(findings, items)
        purpose = ", for validation" if table.learning.validation else ""
        findings.title = f"{table.name}: {len(items)} cached items{purpose}"
        return findings

    def _compare_sources(self, findings: TableFindings, items: Sequence[TrainingItem]) -> None:
        """Add warnings about media files of a table that have no cache, caption or cached audio."""
        # Missing media files cause no warning, because training only reads their caches.
        source_format = get_source_format(findings.table)
        if source_format.list_addresses(findings.table):  # listing such sources would download files
            name = source_format.name
            findings.info_lines.append(f"its sources are not checked: they are in {name} at addresses")
            return
        source_findings = find_table(self.config, findings.table, self.folders)
        if not source_findings.sources:
            for error in source_findings.errors[:1]:
                findings.info_lines.append(f"its sources are not checked: {error.text}")
            return
        findings.sources = source_findings.sources
        findings.warnings += find_reordered(findings.sources)
        check_captions(source_findings, self.counters)
        findings.info_lines += source_findings.info_lines
        # training only reads caches, so errors of sources are warnings
        findings.warnings += [*source_findings.errors, *source_findings.warnings]
        cached_stems = {item.source_stem for item in items}
        kind = "have no cache: too short, unreadable, or not cached yet"
        for source in findings.sources:
            if source.stem not in cached_stems:
                findings.warnings.append(Fault(kind, str(source.path), source.stem))
        if self.with_audio and uses_audio(findings.table):
            stems_without_audio = {item.source_stem for item in items if not item.has_cached_audio}
            kind = (
                "have sound that is not cached: only their pictures are learned until latents are cached "
                "again"
            )
            paths = list_silent(findings.sources, stems_without_audio)
            findings.warnings += [Fault(kind, str(path), path.stem) for path in paths]


def check_training(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    commands: CachingCommands = NO_COMMANDS,
    accumulation: int = 1,
    data_parallel_size: int = 1,
    checkpoint_lines: Iterable[str] = (),
    text_keys: frozenset[str] = frozenset(),
    counters: TokenCounters = NO_TOKEN_COUNTERS,
    audio: AudioSpec | None = None,
    validation: tuple[float, int] = (0.0, 0),
) -> CheckResult:
    """Report the caches that a training run would use; every cache file is read and verified.

    Args:
        config: The dataset.
        cache_tag: Name of the model in its cache files.
        latent: Latent format of the model.
        commands: Commands that make the caches, for messages.
        accumulation: Gradient accumulation steps.
        data_parallel_size: Number of training processes, or of groups of processes that share batches.
        checkpoint_lines: Lines about the checkpoints, for the head of the report.
        text_keys: Keys of a complete text cache.
        counters: Token counters of the text encoders.
        audio: Audio specification of a family that is trained with sound.
        validation: Validation fraction and seed for tables that do not set their own.
    """
    found_items = find_items(config, cache_tag, latent, text_keys, audio=audio)
    checker = _TrainingChecker(
        config=config,
        found_items=found_items,
        latent=latent,
        same_encoders=SameEncoders(commands),
        folders=TableFolders(config),
        counters=counters,
        with_audio=audio is not None,
    )
    tables = [checker.check(table) for table in config.datasets]
    if found_items.items:
        # all items share the model, and therefore the cache layout
        stores = stores_for(found_items.items[0], latent)
        if lack_edit_references(found_items.items, stores):
            tables[0].warnings.append(Fault(GETS_NO_REFERENCES, NO_REFERENCE))
    count_validation_items(tables, *validation)
    closing_lines = _describe_items(found_items.items, validation, accumulation * data_parallel_size)
    if any(findings.errors for findings in tables):
        closing_lines += ["Caches are made by:", *indent([commands.latents, commands.text])]
    opening_lines = (RECOGNIZED, *indent([*checkpoint_lines, *counters.missing_lines]))
    return CheckResult(opening_lines, tuple(tables), tuple(closing_lines), counters)


def _describe_items(
    items: Sequence[TrainingItem], validation: tuple[float, int], batches_per_step: int
) -> list[str]:
    """Return lines about the items of an epoch, and those held out for validation (its fraction and seed)."""
    trained, held_out = split_validation(items, *validation)
    order = BatchOrder(trained, seed=0)
    num_steps = ceil_div(order.num_batches, batches_per_step)
    steps = format_count(num_steps, "step")
    if batches_per_step > 1:
        steps += f" of {batches_per_step} batches"
    repeated = format_count(order.num_items, "item")
    lines = [f"An epoch: {repeated} with repeats, {format_count(order.num_batches, 'batch')}, {steps}"]
    if held_out:
        lines.append(f"For validation: {format_count(len(held_out), 'item')}")
    return lines


def _check_cached_items(
    findings: TableFindings, items: Sequence[TrainingItem], latent: LatentSpec, same_encoders: SameEncoders
) -> None:
    """Read every cached item of a table; add an error for each item that cannot be used."""
    if not items:
        text = f"{findings.table.name}: look in {findings.table.cache_directory}"
        findings.errors.append(Fault(NO_ITEM, text))
        return
    stores = stores_for(items[0], latent)
    for item, caption_index in _list_captions(items):
        try:
            commands = same_encoders.commands
            batch = read_batch([item], latent, commands, captions=[caption_index], stores=stores)
        except CacheError as error:
            # the first line names the error; the lines below it say how to fix it
            text = str(error).splitlines()[0]
            findings.errors.append(Fault("cannot be used", text, item.source_stem))
        else:
            difference = same_encoders.difference(batch.cache_origins)
            if difference is not None:
                findings.info_lines += difference.splitlines()


def _add_missing_caches(findings: TableFindings, found_items: FoundItems) -> None:
    """Add an error for each missing or incomplete cache of a table."""
    folder = findings.table.cache_directory
    missing = {
        "text caches are missing": (*found_items.missing_text, *found_items.missing_empty_prompts),
        "text caches are unfinished": found_items.unfinished_text,
        'caches of sound are missing, and audio = "required"': found_items.missing_audio,
    }
    for kind, paths in missing.items():
        findings.errors += [Fault(kind, str(path)) for path in paths if path.parent == folder]
    for table, line in found_items.incomplete_tables:
        if table is findings.table:
            findings.errors.append(Fault("caches may be incomplete", line))


def _list_captions(items: Sequence[TrainingItem]) -> Iterator[tuple[TrainingItem, int]]:
    """Yield (item, caption index or EMPTY) for every caption that a training run reads."""
    for item in items:
        for number in range(item.num_captions):
            yield item, number
    table = items[0].table
    if table.captions.caches_empty_prompt:
        # the empty prompt once, or for each item if an encoder also gets its reference images
        for item in items if table.references.are_seen_by_texts else items[:1]:
            yield item, EMPTY
