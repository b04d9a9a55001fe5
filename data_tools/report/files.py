"""List each file of a dataset for programs: how it is fitted, its caption, and whether its caches are valid.

No model is read: caches are compared with the encoders named in their own records. Whether another VAE is
chosen now is not known here; --check of the caching scripts compares that.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

from data_tools.report.findings import TableFindings
from data_tools.report.looks import Look
from data_tools.report.numbers import Numbers
from dataset.cache.files import latent_names, tensor_key, text_file_name
from dataset.cache.records import LatentRecord, TextRecord, latent_record, text_records
from dataset.cache.store import CacheStore, LatentNames, Stores
from dataset.caching.planning import Recipe, plan_all
from dataset.caching.text_plans import CaptionFile, list_caption_files, plan_texts, why_outdated
from dataset.sources.captions import read_caption
from dataset.sources.media_source import MediaSource, Remote, TarMember
from modules.contract.data import LatentSpec
from modules.contract.family import TextEncoder
from modules.errors import CacheError, DatasetError
from modules.paths import hide_secrets

VALID, STALE, MISSING, UNKNOWN = "valid", "stale", "missing", "unknown"
MEDIA, TEXT = "media", "text"
FIRST = 64  # how many caches are searched for a record
_TAG = re.compile(r"_(?:\d+x\d+_([a-z0-9]+)|([a-z0-9]+)_te(?:\.caption\d+)?)\.safetensors$")
State = tuple[str, str]  # (one of the words above, reason)
States = dict[str, dict[str, State]]  # by the tag of a model, then MEDIA and TEXT


def list_files(
    tables: Sequence[TableFindings], fps: float, latent: LatentSpec, workers: int
) -> list[Numbers]:
    """Return all files as JSON values, table by table. tables: measured."""
    files = []
    for found in tables:
        states = _compare_caches(found, fps, latent, workers)
        faults, remarks = (found.told(name, with_kind=True) for name in ("faults", "remarks"))
        looks = found.looks or [Look()] * len(found.sources)
        for source, look in zip(found.sources, looks, strict=True):
            fit, text = look.fit, None
            used = [] if source.caption is None else [source.caption, *source.more_captions]
            if source.caption_path is not None:
                with contextlib.suppress(DatasetError):  # reported as a fault
                    text = read_caption(source.caption_path)
            files.append(
                {
                    "table": found.table.index + 1,
                    "stem": source.stem,
                    "kind": found.table.kind,
                    "parts": _list_parts(source),
                    "controls": len(source.control),
                    "has_mask": source.mask is not None,
                    "caption_file": None if source.caption_path is None else str(source.caption_path),
                    "caption_list": None if source.caption_path is not None else str(source.table.source),
                    "text": text,  # of the file
                    "captions": [] if used == [text] else used,  # captions as training uses them
                    "size": look.size,
                    "frames": look.frames,
                    "fps": look.fps and round(look.fps, 3),
                    "fit": fit and {"resized": fit.resized, "crop": fit.crop, "bucket": fit.bucket},
                    "cut_percent": round(look.cut_percent, 2),
                    "lengths": look.lengths,  # frames of an item, how many such items
                    "problem": look.problem,
                    "dropped": look.problem or look.none,
                    "short": look.short,
                    "faults": faults.get(source.stem, []),
                    "remarks": remarks.get(source.stem, []),
                    "caches": states.get(source.stem, {}),
                }
            )
    return files


def _list_parts(source: MediaSource) -> list[Numbers]:
    """Return the files of a source (media, control media, mask): paths, and the archive or address."""
    parts = []
    for path, origin in zip(
        (path for path, _ in source.parts) if source.tensors is None else (source.path,),
        source.origins or (None,) * (3 + len(source.control) + len(source.references)),
        strict=False,
    ):
        part: Numbers = {"path": str(path)}
        if isinstance(origin, TarMember):
            part |= {"in": str(origin.tar), "offset": origin.offset, "bytes": origin.size_bytes}
        elif isinstance(origin, Remote):
            part |= {"in": hide_secrets(origin.address)}
        elif origin is not None:
            part |= {"in": str(origin.file)}
        parts.append(part)
    return parts


def _compare_caches(found: TableFindings, fps: float, latent: LatentSpec, workers: int) -> dict[str, States]:
    """Return the states of a table's caches by stem and model, for all models that have caches."""
    states: dict[str, States] = {source.stem: {} for source in found.sources}
    try:
        stores = Stores(skip_existing=True)
        store = stores.of(found.table)
        names = store.names()
    except (DatasetError, CacheError) as error:
        return {stem: {"": dict.fromkeys((MEDIA, TEXT), (UNKNOWN, str(error)))} for stem in states}
    tags = {match[1] or match[2] for name in names if (match := _TAG.search(name))}
    for tag in sorted(tags):
        media = _compare_media(found, tag, names, stores, fps, latent, workers)
        texts = _compare_texts(found.sources, tag, store, stores, workers)
        for stem, of_stem in states.items():
            of_stem[tag] = {MEDIA: media.get(stem, (MISSING, "")), TEXT: texts.get(stem, (MISSING, ""))}
    return states


def _compare_media(
    found: TableFindings,
    tag: str,
    names: Iterable[str],
    stores: Stores,
    fps: float,
    latent: LatentSpec,
    workers: int,
) -> dict[str, State]:
    table, store = found.table, stores.of(found.table)
    listed = list(latent_names(names, tag, table.kind))
    if not listed:
        return {}
    record: LatentRecord | None = None
    for name, *_ in listed[:FIRST]:
        with contextlib.suppress(CacheError):
            record = latent_record(store.read(name, is_whole=False))
        if record is not None:
            break
    # the number of sections into which a model cuts a length shows in the files of its items
    of_items = Counter(
        (stem, name.span) for _, stem, name in listed if name.span is not None and name.section is not None
    )
    sections = {span[1]: count for (_, span), count in of_items.items() if span is not None}

    recipe = Recipe(
        tag,
        {} if record is None else record.encoder,
        replace(latent, in_sections=bool(sections)),
        float((record and record.options.get("fps")) or fps),
        lambda _, frames: sections.get(frames),
        stores,
        has_rates=bool(record and record.options.get("frame_rate")),
    )
    existing = LatentNames(store, tag, table.kind)
    plans, failures = plan_all(found.sources, {table.index: existing}, recipe, workers, show_progress=False)
    states = {one.stem: (UNKNOWN, one.reason) for one in failures}
    for plan in plans:
        has_files = bool(existing.of(plan.source.stem))
        state, why = VALID, plan.reason or ""
        if plan.outdated is not None:
            state, why = STALE, plan.outdated
        elif plan.missing is None or (plan.missing and not plan.kept):
            state, why = MISSING, ""
            if has_files:
                state, why = STALE, "not of this file, or of other settings"
        elif plan.missing:
            state, why = MISSING, f"{len(plan.missing)} of {len(plan.items)} items"
        elif plan.foreign:
            why = "made by another program: nothing tells what from"
        states[plan.source.stem] = state, why
    return states


def _with_references(file: CaptionFile, source: MediaSource | None) -> CaptionFile:
    """Return a text with the pictures that its encoder saw with it, which only the records of caches tell."""
    if source is None or not source.control:
        return file
    return replace(file, source=source, references=source.parts[1 : 1 + len(source.control)])


def _compare_texts(
    sources: Sequence[MediaSource], tag: str, store: CacheStore, stores: Stores, workers: int
) -> dict[str, State]:
    files = list_caption_files(sources, tag)
    recorded: Mapping[str, TextRecord] = {}
    for file in files[:FIRST]:
        with contextlib.suppress(CacheError):
            recorded = text_records(store.read(file.file_name, is_whole=False))
        if recorded:
            break
    if any(record.references for record in recorded.values()):
        by_stem = {source.stem: source for source in sources}
        files = [_with_references(file, by_stem.get(file.name)) for file in files]
    encoders = [
        (SimpleNamespace(name=name, keys=frozenset(map(tensor_key, one.crc32))), one.encoder)
        for name, one in recorded.items()
    ]
    given = cast("Sequence[tuple[TextEncoder, Mapping[str, str]]]", encoders)
    plans = plan_texts(files, given, stores, workers)
    of_names: dict[str, State] = {}
    for plan in plans:
        name = plan.file_name
        if name not in store:
            state, why = MISSING, ""
        elif not recorded:
            state, why = UNKNOWN, "made by another program: nothing tells of which caption"
        elif not plan.missing:
            state, why = VALID, "made by another program, of the same caption" if plan.is_foreign else ""
        else:
            state, encoder = STALE, plan.missing[0]
            try:
                record = text_records(store.read(name, is_whole=False)).get(encoder)
            except CacheError as error:
                why = str(error)
            else:
                why = f"it has no record of {encoder}"
                if record is not None:
                    why = why_outdated(record, recorded[encoder].encoder, plan) or "damaged"
        of_names[name] = state, why
    states: dict[str, State] = {}
    for source in sources:
        for number in range(1 + len(source.more_captions)):
            if states.get(source.stem, (VALID,))[0] == VALID:  # the first that is not valid decides
                states[source.stem] = of_names.get(text_file_name(source.stem, tag, number), (VALID, ""))
    return states
