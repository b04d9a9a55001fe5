"""List each file of a dataset for programs: how it is fitted, its caption, and whether its caches are valid.

No model is read: caches are compared with the encoders named in their own records. Whether another VAE is
selected now is unknown here; --check of the caching scripts compares that.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

from data_tools.report.findings import TableFindings, group_by_stem
from data_tools.report.looks import Inspection
from data_tools.report.numbers import JsonObject
from dataset.cache.records import LatentRecord, TextRecord, latent_record, text_records
from dataset.cache.store import LatentNames, Stores
from dataset.cache_files import CacheStore, LatentName, latent_names, tensor_key, text_file_name
from dataset.caching.planning import LatentCacheSettings, SourcePlan, plan_all
from dataset.caching.text_plans import CaptionFile, VisibleMedia, list_caption_files, plan_texts, why_outdated
from dataset.config_keys import AUTO
from dataset.listing import find_sources
from dataset.sources.captions import read_caption
from dataset.sources.media_source import MediaSource, Remote
from dataset.table import CLIP, FITTED, DatasetTable
from dataset.table import MEDIA as SEEN_MEDIA
from modules.console import quiet
from modules.errors import CacheError, DatasetError
from modules.paths import hide_secrets
from protocols.data import LatentSpec
from protocols.family import TextEncoder
from protocols.rules import ReferenceRules

VALID, STALE, MISSING, UNKNOWN = "valid", "stale", "missing", "unknown"
MEDIA, TEXT = "media", "text"
MAX_SEARCHED_CACHES = 64  # maximum number of caches searched for a record
MAX_REFERENCES = 1000  # without --references: how many images the model takes is unknown
_TAG_PATTERN = re.compile(r"_(?:\d+x\d+_([a-z0-9]+)|([a-z0-9]+)_te(?:\.caption\d+)?)\.safetensors$")
State = tuple[str, str]  # (one of the words above, reason)
States = dict[str, dict[str, State]]  # by the tag of a model, then MEDIA and TEXT


def list_files(
    tables: Sequence[TableFindings], fps: float, latent: LatentSpec, workers: int
) -> list[JsonObject]:
    """Return findings and cache states of all media files as JSON values, table by table."""
    described_files = []
    for findings in tables:
        states = _compare_caches(findings, fps, latent, workers)
        errors = group_by_stem(findings.errors, with_kind=True)
        warnings = group_by_stem(findings.warnings, with_kind=True)
        # without decoding there are no inspections
        inspections = findings.inspections or [Inspection()] * len(findings.sources)
        for source, inspection in zip(findings.sources, inspections, strict=True):
            file_findings = {
                "faults": errors.get(source.stem, []),
                "remarks": warnings.get(source.stem, []),
                "caches": states.get(source.stem, {}),
            }
            described_files.append(
                {**_describe_source(source), **_describe_inspection(inspection), **file_findings}
            )
    return described_files


def _describe_source(source: MediaSource) -> JsonObject:
    """Return the paths and captions of a media file as JSON values."""
    captions = [] if source.caption is None else [source.caption, *source.more_captions]
    text = None
    if source.caption_path is not None:
        with contextlib.suppress(DatasetError):  # reported as an error
            text = read_caption(source.caption_path)
    return {
        "table": source.table.index + 1,
        "stem": source.stem,
        "kind": source.table.kind,
        "parts": _list_parts(source),
        "controls": len(source.control),
        "has_mask": source.mask is not None,
        "caption_file": None if source.caption_path is None else str(source.caption_path),
        "caption_list": None if source.caption_path is not None else str(source.table.source.path),
        "text": text,  # of the file
        # empty if training uses the text unchanged
        "captions": [] if captions == [text] else captions,  # captions as training uses them
    }


def _describe_inspection(inspection: Inspection) -> JsonObject:
    """Return the measurements of a media file as JSON values."""
    fit = inspection.fit
    return {
        "size": inspection.size,
        "frames": inspection.frames,
        "fps": inspection.fps and round(inspection.fps, 3),
        "fit": fit and {"resized": fit.resized, "crop": fit.crop, "bucket": fit.bucket},
        "cut_percent": round(inspection.cut_percent, 2),
        "lengths": inspection.items_by_length,  # frames of an item, how many such items
        "problem": inspection.read_error,
        "dropped": inspection.read_error or inspection.no_item_reason,
        "short": inspection.too_short_for,
    }


def _list_parts(source: MediaSource) -> list[JsonObject]:
    """Return the files of a media source (media, control media, mask), with their archive or URL."""
    paths = [source.path] if source.precomputed is not None else [path for path, _ in source.latent_inputs]
    remote_or_packed = source.remote_or_packed or (None,) * len(paths)
    parts = []
    for path, origin in zip(paths, remote_or_packed, strict=False):
        part: JsonObject = {"path": str(path)}
        if isinstance(origin, Remote):
            part |= {"in": hide_secrets(origin.address)}
        elif origin is not None:
            part |= origin.describe()
        parts.append(part)
    return parts


def _compare_caches(
    findings: TableFindings, fps: float, latent: LatentSpec, workers: int
) -> dict[str, States]:
    """Return the states of a table's caches by stem and model, for all models that have caches."""
    states: dict[str, States] = {source.stem: {} for source in findings.sources}
    try:
        stores = Stores(skip_existing=True)
        store = stores.latent_store(findings.table)
        names = store.names()
    except (DatasetError, CacheError) as error:
        # the caches cannot be listed, so one entry with no model name contains the error
        unknown = (UNKNOWN, str(error))
        no_model = ""
        return {stem: {no_model: {MEDIA: unknown, TEXT: unknown}} for stem in states}
    # a tag is the name of a model in its cache files
    for tag in _find_model_tags(names):
        media = _compare_media(findings, tag, names, stores=stores, fps=fps, latent=latent, workers=workers)
        texts = _compare_texts(findings, tag, store, stores=stores, latent=latent, workers=workers)
        for stem, states_of_stem in states.items():
            states_of_stem[tag] = {
                MEDIA: media.get(stem, (MISSING, "")),
                TEXT: texts.get(stem, (MISSING, "")),
            }
    return states


def _find_model_tags(names: Iterable[str]) -> list[str]:
    """Return the sorted model names (tags) that occur in the names of cache files."""
    tags = set()
    for name in names:
        match = _TAG_PATTERN.search(name)
        if match is not None:
            tags.add(match[1] or match[2])
    return sorted(tags)


def _count_sections(caches: Iterable[tuple[str, str, LatentName]]) -> dict[int, int]:
    """Map the number of frames of an item to the number of its sections, each cached in one file."""
    num_files: Counter[tuple[str, tuple[int, int]]] = Counter()  # by item: stem and span
    for _, stem, name in caches:
        if name.span is not None and name.section is not None:
            num_files[stem, name.span] += 1
    sections: dict[int, int] = {}
    for (_, span), count in num_files.items():
        _, length = span
        sections[length] = count
    return sections


def _compare_media(
    findings: TableFindings,
    tag: str,
    names: Iterable[str],
    stores: Stores,
    fps: float,
    latent: LatentSpec,
    workers: int,
) -> dict[str, State]:
    """Return the state of a model's latent caches, by the stem of the media file."""
    # No model is loaded: the options and the encoder of the first caches stand for the model's, and caches
    # that differ from them count as outdated.
    table = findings.table
    caches = list(latent_names(names, tag, table.kind))
    if not caches:
        return {}
    store = stores.latent_store(table)
    record = _first_record(store, [name for name, *_ in caches[:MAX_SEARCHED_CACHES]])
    num_sections = _count_sections(caches)
    # other programs' caches have no record; then defaults stand for their options
    options = {} if record is None else record.options
    cache_settings = LatentCacheSettings(
        tag=tag,
        encoder_identity={} if record is None else record.encoder,
        latent=replace(latent, in_sections=bool(num_sections)),
        fps=float(options.get("fps") or fps),
        count_sections=lambda _, frames: num_sections.get(frames),
        stores=stores,
        stores_frame_rate=bool(options.get("frame_rate")),
    )
    return _plan_media_states(findings, LatentNames(store, tag, table.kind), cache_settings, workers)


def _plan_media_states(
    findings: TableFindings, cached_names: LatentNames, cache_settings: LatentCacheSettings, workers: int
) -> dict[str, State]:
    """Return the state of each source's latent caches if caching ran with these settings, by stem."""
    plans, failures = plan_all(
        findings.sources,
        {findings.table.index: cached_names},
        cache_settings,
        workers=workers,
        show_progress=False,
    )
    states = {failure.stem: (UNKNOWN, failure.reason) for failure in failures}
    for plan in plans:
        has_files = bool(cached_names.of(plan.source.stem))
        states[plan.source.stem] = _find_media_state(plan, has_files)
    return states


def _first_record(store: CacheStore, names: Sequence[str]) -> LatentRecord | None:
    """Return the first readable record in the headers of cached latents; None if there is none."""
    for name in names:
        with contextlib.suppress(CacheError):
            record = latent_record(store.read(name, is_full=False))
            if record is not None:
                return record
    return None


def _find_media_state(plan: SourcePlan, has_files: bool) -> State:
    """Return whether a media file's latent caches are valid, missing or outdated, with the reason."""
    # `plan.missing_spans` lists the items without a valid cache (None: the items are not known), and
    # `plan.valid_files` the valid caches. `has_files` says that the source has cache files, valid or not.
    if plan.outdated_reason is not None:
        return STALE, plan.outdated_reason
    # either the items are not known, so no cache counts as valid, or every known item lacks a valid cache
    has_no_valid = plan.missing_spans is None or (plan.missing_spans and not plan.valid_files)
    if has_no_valid:
        return (STALE, "made from another file, or with other settings") if has_files else (MISSING, "")
    if plan.missing_spans:
        return MISSING, f"{len(plan.missing_spans)} of {len(plan.item_sizes)} items"
    if plan.num_without_record:  # valid files that have no record
        return VALID, "made by another program, without a record of its source"
    return VALID, plan.why_no_items or ""


def _with_recorded_text(file: CaptionFile, store: CacheStore) -> CaptionFile:
    """Return a caption file; if caching converted positions in its JSON caption, with the cached text."""
    if not (file.caption or "").lstrip().startswith("{"):
        return file
    records: Mapping[str, TextRecord] = next(_read_text_records(store, [file.file_name]), {})
    record = next(iter(records.values()), None)
    if record is None or not record.settings.get(FITTED):
        return file
    settings = {**file.settings, **file.table.fitted_caption_settings()}
    return replace(file, caption=record.caption, settings=settings)


def _compare_texts(
    findings: TableFindings,
    tag: str,
    store: CacheStore,
    stores: Stores,
    latent: LatentSpec,
    workers: int,
) -> dict[str, State]:
    """Return the state of a model's text caches, by the stem of their media file."""
    # Which media the text encoders see is unknown without the model: the records of the first caches say it.
    names = [text_file_name(source.stem, tag, 0) for source in findings.sources[:MAX_SEARCHED_CACHES]]
    samples = list(_read_text_records(store, names))
    records = samples[0] if samples else {}
    settings = [record.settings for record in records.values()]
    visible_media = VisibleMedia(
        frames=any(CLIP in recorded for recorded in settings),
        reference_media=any(SEEN_MEDIA in recorded for recorded in settings),
    )
    table = _add_seen_media(findings.table, samples, latent.pixel_step)
    sources = findings.sources
    states: dict[str, State] = {}
    if table != findings.table:
        # an item is left out of the new list if its row has unusable references
        states = {source.stem: (UNKNOWN, "its references cannot be listed") for source in sources}
        with quiet():  # all other warnings about the table were logged before
            sources = find_sources(table, faults=[])
    files = [_with_recorded_text(file, store) for file in list_caption_files(sources, tag, visible_media)]
    # stand-ins for the text encoders named in the records, each with its recorded identity
    encoders = []
    for name, record in records.items():
        keys = frozenset(map(tensor_key, record.crc32))
        encoders.append((SimpleNamespace(name=name, keys=keys), record.encoder))
    plans = plan_texts(
        files, cast("Sequence[tuple[TextEncoder, Mapping[str, str]]]", encoders), stores, workers
    )
    state_by_file = {plan.file_name: _find_text_state(plan, store, records) for plan in plans}
    return states | {source.stem: _join_text_states(source, tag, state_by_file) for source in sources}


def _add_seen_media(
    table: DatasetTable, samples: Sequence[Mapping[str, TextRecord]], pixel_step: int
) -> DatasetTable:
    """Return a table with the fields that a family sets if its text encoders see media."""
    # `samples` has the records of several text caches, by encoder, because items may have no references.
    records = [record for by_encoder in samples for record in by_encoder.values()]
    clips = [record.settings[CLIP] for record in records if CLIP in record.settings]
    if any(SEEN_MEDIA in record.settings for record in records):
        table = table.with_values(reads_row_references=True)
    if table.buckets.source_fps is None and any(clip.get("source_fps") == AUTO for clip in clips):
        table = table.with_values(source_fps=AUTO)  # families with audio use the timestamps in each file
    # a clip or image that is itself seen is among the references of its record
    if (
        not clips
        and not table.references.reads_row_references
        and any(record.references for record in records)
    ):
        rules = replace(
            table.references.rules or ReferenceRules(MAX_REFERENCES, pixel_step),
            seen_by_text=True,
            text_sees_vae_input=any("bucket" in record.settings for record in records),
        )
        table = table.with_values(rules=rules)
    return table


def _join_text_states(source: MediaSource, tag: str, state_by_file: Mapping[str, State]) -> State:
    """Return the state of the first caption's cache that is not valid; if none is, that of the last."""
    state: State = (VALID, "")
    num_captions = 1 + len(source.more_captions)
    for caption_index in range(num_captions):
        file_name = text_file_name(source.stem, tag, caption_index)
        # a caption without a plan, such as an empty one, needs no cache
        state = state_by_file.get(file_name, (VALID, ""))
        if state[0] != VALID:
            break
    return state


def _read_text_records(store: CacheStore, names: Iterable[str]) -> Iterator[Mapping[str, TextRecord]]:
    """Yield the text encoders' records, by encoder, of each readable text cache that has any."""
    for name in names:
        with contextlib.suppress(CacheError):
            records = text_records(store.read(name, is_full=False))
            if records:
                yield records


def _find_text_state(plan: CaptionFile, store: CacheStore, sample_records: Mapping[str, TextRecord]) -> State:
    """Return whether the cached embeddings of a caption are valid, missing or outdated, with the reason."""
    if plan.file_name not in store:
        return MISSING, ""
    if not sample_records:
        return UNKNOWN, "made by another program, without a record of its caption"
    if not plan.encoders_to_run:
        return VALID, "made by another program from the same caption" if plan.lacks_record else ""
    # the first encoder whose embeddings have to be computed again
    encoder = plan.encoders_to_run[0]
    try:
        record = text_records(store.read(plan.file_name, is_full=False)).get(encoder)
    except CacheError as error:
        return STALE, str(error)
    if record is None:
        return STALE, f"it has no record of {encoder}"
    num_seen, num_now = len(record.references), len(plan.references)
    # named before the settings that only captions with references have
    if plan.table.references.are_seen_by_texts and num_seen != num_now:
        return STALE, f"it was made with {num_seen} reference images, but now there are {num_now}"
    # if its record fits, the tensors themselves must be unusable
    return STALE, why_outdated(record, sample_records[encoder].encoder, plan) or "damaged"
