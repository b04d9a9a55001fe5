"""Read, verify and stack cached items when they are needed."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.batches.items import (
    NO_COMMANDS,
    NO_LIVE_PARTS,
    CachingCommands,
    LiveParts,
    TrainingItem,
    group_items,
)
from dataset.batches.sound import read_sound
from dataset.cache.files import EMPTY, FLIPPED, Entry, tensor_key
from dataset.cache.npz import NpzNames
from dataset.cache.records import (
    CacheChecks,
    LatentRecord,
    TextRecord,
    difference,
    latent_record,
    options_difference,
    text_records,
    verify_tensors,
)
from dataset.cache.store import CacheStore, Stores
from dataset.sources.decoding import bucket_of
from dataset.sources.folders import count_references
from dataset.sources.frames import has_mask
from dataset.sources.tables import count_named_references
from dataset.table import CAPTION_DEFAULTS, CONTROL_DEFAULTS, FROM_ALPHA, FROM_FILE, SECTION_DEFAULTS
from modules.console import count_of
from modules.contract.data import (
    CONTROL,
    FPS,
    HAS_SOUND,
    LATENTS_MADE,
    LOSS_MASK,
    SOUND,
    SOUND_MADE,
    Batch,
    Conditions,
    LatentSpec,
    MadeBy,
)
from modules.errors import CacheError


def check_channels(
    items: Iterable[TrainingItem],
    latent: LatentSpec,
    commands: CachingCommands,
    stores: Stores | None = None,
) -> None:
    """Raise CacheError, with the caching command, if latents were encoded with the VAE of another model.

    Looks at the header of one file of each table and size: caches of two models in one folder mostly differ
    in their sizes. stores: of the run. Items that are encoded while training have no caches.
    """
    stores = stores or Stores()
    for *_, item in group_items(items).values():
        if not item.kind.has_latents:
            continue
        header = stores.of(item.table).read(item.latent_path.name, is_whole=False).header
        shapes = [header.shapes[name] for name in header.names if tensor_key(name) == "latents"]
        channels = next((shape[0] for shape in shapes if shape), latent.channels)
        if channels != latent.channels:
            raise CacheError(
                f"{item.latent_path}: {other_space(channels, latent)}.\n"
                f"  Make them again with: {commands.latents}\n"
                "  To keep caches for both models, give each a cache_directory of its own."
            )


def other_space(channels: int, latent: LatentSpec) -> str:
    """Return the fault of latents that have another number of channels than the model's."""
    return (
        f"its latents have {channels} channels, this model's have {latent.channels}: they were encoded with "
        "the VAE of another model"
    )


def read_batch(
    items: Sequence[TrainingItem],
    latent: LatentSpec,
    commands: CachingCommands = NO_COMMANDS,
    checks: CacheChecks | None = None,
    captions: Sequence[int] | None = None,
    stores: Stores | None = None,
    flips: Sequence[bool] = (),
    live: LiveParts = NO_LIVE_PARTS,
    undropped: Sequence[int] = (),
) -> Batch:
    """Read and check the files of a batch and stack them: `latents` B C F H W; tensors of varying length stay
    lists.

    Raises CacheError naming the file, the reason and the command that mends it: damaged, made for other
    options, made from a source or a caption that has changed since, or not of the shape that the
    configuration asks for. checks: of the run, which remembers checked files. captions: the number of the
    caption to use of each item, or EMPTY; without it the first. stores: of the run, which keeps them open.
    flips: which items are mirrored; () for none. live: the parts without a cache: texts are left out then,
    and `captions` of the batch are as their files have them. undropped: the numbers before dropout, for a
    teacher, all cached; if `captions` are others, the batch has these texts too.
    """
    checks, stores = checks or CacheChecks(), stores or stores_for(items[0], latent)
    numbers, sides = captions or [0] * len(items), flips or [False] * len(items)
    read = []
    for place, (item, number, flip) in enumerate(zip(items, numbers, sides, strict=True)):
        encoded = live.encoded.get(place)
        one = _read_item(item, stores, latent, commands, checks, number, encoded, live)
        read.append(replace(one, tensors=choose_side(one.tensors, flip)))
    has_sound = [SOUND in one.tensors for one in read]
    if any(has_sound):  # of the others it is not learned
        like = next(one.tensors[SOUND] for one in read if SOUND in one.tensors)
        read = [replace(one, tensors={SOUND: torch.zeros_like(like), **one.tensors}) for one in read]
    if any(LOSS_MASK in one.tensors for one in read):  # one without a mask gets ones, which change nothing
        shapes = [one.tensors["latents"].shape[1:] for one in read]
        whole = [{LOSS_MASK: torch.ones(shape, dtype=torch.float16)} for shape in shapes]
        read = [replace(one, tensors={**mask, **one.tensors}) for one, mask in zip(read, whole, strict=True)]
    first = read[0]
    for item, other in zip(items, read, strict=True):
        if other.tensors.keys() != first.tensors.keys():
            odd = ", ".join(sorted(other.tensors.keys() ^ first.tensors.keys()))
            in_text = other.text != first.text
            paths = (
                (other.text_path, first.text_path) if in_text else (item.latent_path, items[0].latent_path)
            )
            raise CacheError(
                f"{paths[0]} and {paths[1]} do not have the same tensors: {odd}.\n"
                f"  Make them again with the same options: {commands.text if in_text else commands.latents}"
            )
    tensors = {name: _stack(name, items, read, commands) for name in first.tensors}
    if any(has_sound):
        tensors[HAS_SOUND] = torch.tensor(has_sound)
    if isinstance(rates := tensors.get(FPS), Tensor):
        tensors[FPS] = (1000 * rates.double()).round().long()
    made_by = tuple(made for one in read for made in one.made_by)
    weights = tuple(item.table.prior_loss_weight for item in items)
    preserved = tuple(item.table.preserves_output for item in items)
    full: Conditions = {}
    if undropped and tuple(undropped) != tuple(numbers):
        whole_texts = [
            _read_text(item, stores, commands, checks, number, live)
            for item, number in zip(items, undropped, strict=True)
        ]
        full = {name: _stack(name, items, whole_texts, commands) for name in sorted(first.text)}
        made_by += tuple(made for one in whole_texts for made in one.made_by)
    return Batch(
        tensors,
        tuple(one.caption for one in read),
        tuple(item.key for item in items),
        made_by,
        () if set(weights) == {1.0} else weights,
        preserved if any(preserved) else (),
        full,
    )


@dataclass(frozen=True)
class _ReadItem:
    tensors: Mapping[str, Tensor]
    text_path: Path
    text: frozenset[str]  # names of those that come from the text cache
    variable: frozenset[str]
    caption: str
    made_by: tuple[MadeBy, ...]


def _read_item(
    item: TrainingItem,
    stores: Stores,
    latent: LatentSpec,
    commands: CachingCommands,
    checks: CacheChecks,
    number: int,
    encoded: Mapping[str, Tensor] | None,
    live: LiveParts,
) -> _ReadItem:
    """Read an item. encoded: latents in place of its cache."""
    tensors, variable, made_by = dict(encoded or {}), frozenset[str](), list[MadeBy]()
    if encoded is None:
        store = stores.of(item.table)
        with _remedy(commands.latents, store, item.latent_path.name):
            latents, media = _read_latents(item, store, latent, checks)
        tensors, variable = dict(latents.tensors), latents.variable
        made_by += [] if media is None else [MadeBy(item.latent_path, LATENTS_MADE, media.encoder)]
        if item.has_sound:
            with _remedy(commands.latents, store, item.sound_path.name):
                tensors[SOUND], record = read_sound(item, store, checks)
            made_by += [] if record is None else [MadeBy(item.sound_path, SOUND_MADE, record.encoder)]
    if not item.kind.has_text:
        checks.add(item.table.index, item.key)
        caption = live.tables[item.table.index].caption(item.source_stem, number)
        return _ReadItem(tensors, item.text_path, frozenset(), variable, caption, tuple(made_by))
    text = _read_text(item, stores, commands, checks, number, live)
    checks.add(item.table.index, item.key)
    return replace(
        text,
        tensors={**tensors, **text.tensors},
        variable=variable | text.variable,
        made_by=(*made_by, *text.made_by),
    )


def _read_text(
    item: TrainingItem,
    stores: Stores,
    commands: CachingCommands,
    checks: CacheChecks,
    number: int,
    live: LiveParts,
) -> _ReadItem:
    """Read a cached caption of an item, without latents."""
    text_path, store = item.caption_path(number), stores.of_texts(item.table)
    with _remedy(commands.text, store, text_path.name):
        text = store.read(text_path.name)
        absent = sorted(item.kind.text_keys - text.tensors.keys())
        if absent:
            maker = text.header.metadata.get("architecture", "")
            raise CacheError(
                f"{text_path}: the text cache is incomplete, it has no {', '.join(absent)}"
                + (f" (made for {maker})" if maker else "")
            )
        texts = text_records(text.header)
        caption = _check_caption(item, number, text, texts, checks, store.is_shared(text_path.name))
    if item.table.index in live.tables:  # caches of other programs do not say theirs
        caption = live.tables[item.table.index].caption(item.source_stem, number) or caption
    checks.add(item.table.index, text_path.name)
    made_by = tuple(MadeBy(text_path, name, record.encoder) for name, record in texts.items())
    return _ReadItem(text.tensors, text_path, frozenset(text.tensors), text.variable, caption, made_by)


def choose_side(tensors: Mapping[str, Tensor], flip: bool) -> dict[str, Tensor]:
    """Return the tensors of one side of an item. flip: of the mirrored one."""
    sides = {key.removesuffix(FLIPPED): tensor for key, tensor in tensors.items() if key.endswith(FLIPPED)}
    chosen = {key: tensor for key, tensor in tensors.items() if not key.endswith(FLIPPED)}
    if not flip:
        return chosen
    if LOSS_MASK in chosen:
        sides[LOSS_MASK] = chosen[LOSS_MASK].flip(-1)
    return {**chosen, **sides}


def stores_for(item: TrainingItem, latent: LatentSpec) -> Stores:
    return Stores(NpzNames(item.kind.tag, latent, item.kind.text_keys))


def _read_latents(
    item: TrainingItem, store: CacheStore, latent: LatentSpec, checks: CacheChecks
) -> tuple[Entry, LatentRecord | None]:
    """Read the latents of an item. Raises CacheError if they are not what its table asks for."""
    entry = store.read(item.latent_path.name)
    record = latent_record(entry.header)
    # other programs make no mask but from transparency
    theirs = store.is_shared(item.latent_path.name) and LOSS_MASK in entry.tensors
    made_from = (FROM_ALPHA if theirs else None) if record is None else record.options.get("mask")
    fault = next(_latent_faults(item, entry, record, made_from, latent, checks), None)
    if fault is not None:
        raise CacheError(f"{item.latent_path}: {fault}")
    return entry, record


def _latent_faults(
    item: TrainingItem,
    entry: Entry,
    record: LatentRecord | None,
    made_from: str | None,
    latent: LatentSpec,
    checks: CacheChecks,
) -> Iterator[str]:
    """Yield why latents are not what a table asks for. made_from: what their mask is made from.

    Raises CacheError if a checksum is wrong.
    """
    table = item.table
    if "latents" not in entry.tensors:
        yield "it has no latents, so it is not a cache; move it out of the cache folder"
    found = list(entry.tensors["latents"].shape)
    if found[0] != latent.channels:
        yield other_space(found[0], latent)
    if table.alpha_mask:
        wanted: set[str | None] = {FROM_ALPHA}
    elif table.mask_directory is not None:
        wanted = {FROM_FILE} if has_mask(table, item.source_stem) else {FROM_FILE, None}
    else:
        wanted = {FROM_FILE, None} if table.directory is None else {None}
    if made_from not in wanted:
        now = "alpha_mask = true" if table.alpha_mask else "no mask" if wanted == {None} else "a mask for it"
        yield f"the mask of its loss is from {made_from or 'nowhere'}, {table.name} has {now}"
    if table.augmentation.flip and "latents" + FLIPPED not in entry.tensors:
        yield "it has no mirrored latents, which flip_aug needs"
    fault = _reference_fault(item, entry)
    if fault is not None:
        yield fault
    if record is not None:
        verify_tensors(entry, record.crc32)
        width, height = record.options["size"]
        made_for = record.options["bucket"]
        bucket = bucket_of(table, (width, height), latent.pixel_step, item.latent_path)
        if tuple(made_for) != bucket:
            yield f"made for {_sides(made_for)} pixels, {table.name} asks for {_sides(bucket)}"
        if any(key.startswith(CONTROL) for key in entry.tensors):
            made_with = {key: value for key, value in record.options.items() if key in CONTROL_DEFAULTS}
            changed = difference(
                {**CONTROL_DEFAULTS, **made_with}, {**CONTROL_DEFAULTS, **table.control_keys}
            )
            if changed is not None:
                yield f"{changed} in {table.name}"
        rate = record.options.get("source_fps")
        if table.kind == "video" and rate != table.source_fps:
            yield f"made for source_fps = {rate}, {table.name} has {table.source_fps}"
        made_with = {key: value for key, value in record.options.items() if key in SECTION_DEFAULTS}
        changed = options_difference(made_with, table.section_keys, latent)
        if changed is not None:
            yield f"{changed} in {table.name}"
        if record.parts != item.parts:
            yield f"{record.parts} files of its clip belong together, {item.parts} are there"
        if not checks.knows(table.index, item.key):
            file = checks.changed_file(_folders_of(item, record), record.files)
            if file is not None:
                yield f"{file} has changed since it was encoded"
    width, height, frames = (*item.bucket, 1)[:3]
    expected = list(latent.shape(frames, height, width)[1:])
    if found != expected:
        yield (
            f"its latents have the shape {_sides(found)}, {table.name} asks for {_sides(expected)} "
            f"({frames} frames of {width}x{height})"
        )
    mask = entry.tensors.get(LOSS_MASK)
    if mask is not None and list(mask.shape) != expected[1:]:
        yield f"the mask of its loss is {_sides(mask.shape)}, its latents are {_sides(expected[1:])}"


def _reference_fault(item: TrainingItem, entry: Entry) -> str | None:
    """Return why latents of reference pictures are not what a table asks for. Pictures that are gone are no
    fault, but those that a list no longer names.
    """
    table, rules = item.table, item.table.references
    if rules is None:
        return None
    cached = sum(key.startswith(CONTROL) and not key.endswith(FLIPPED) for key in entry.tensors)
    if table.directory is None:
        named = count_named_references(table, item.source_stem)
        if named is None or min(named, rules.most) == cached:
            return None
        return f"it was made with {count_of(cached, 'reference picture')}, now {table.source} names {named}"
    if cached and table.control_directory is None:
        return f"it was made with reference pictures, {table.name} has no control_directory"
    if cached < rules.most:
        there = min(count_references(table, item.source_stem), rules.most)
        if cached < there:
            return f"it was made with {count_of(cached, 'reference picture')}, now its image has {there}"
    return None


def _folders_of(item: TrainingItem, record: LatentRecord) -> list[Path | None]:
    """Return the folder of each file of a record: the source, its control media, its mask."""
    table, count = item.table, len(record.files)
    if table.directory is None:
        return [None] * count
    folders = [table.directory, *[table.control_directory] * (count - 1)][:count]
    if record.options.get("mask") == FROM_FILE:
        folders[-1] = table.mask_directory
    return folders


def _check_caption(
    item: TrainingItem,
    number: int,
    text: Entry,
    records: Mapping[str, TextRecord],
    checks: CacheChecks,
    is_shared: bool,
) -> str:
    """Return the caption of a text file. Raises CacheError if its table or caption file has changed since.

    is_shared: whether another program may have made it, which keeps no record.
    """
    path = text.header.path
    is_known = number == EMPTY or checks.knows(item.table.index, path.name)
    if not is_known and not records and not is_shared:
        _check_settings(item, path, {})
    for record in records.values():
        verify_tensors(text, record.crc32)
        if is_known:
            continue
        _check_settings(item, path, record.settings)
        if record.references and item.table.directory is not None:
            folders = [item.table.control_directory] * len(record.references)
            file = checks.changed_file(folders, record.references)
            if file is not None:
                raise CacheError(f"{path}: {file} has changed since its encoder saw it")
        if record.file is None or item.table.directory is None:
            continue
        caption_path = item.table.directory / record.file.name
        now = checks.changed_caption(caption_path, record.caption, item.table, number)
        if now is not None:
            raise CacheError(f"{path}: made from the caption {record.caption!r}, which now is {now!r}")
    stored = [record.caption for record in records.values()]
    return stored[0] if stored else text.header.metadata.get("caption1", "")


def _check_settings(item: TrainingItem, path: Path, settings: Mapping[str, Any]) -> None:
    """Raise CacheError if a caption was made with other keys of its table, or is one of another number."""
    then = {**CAPTION_DEFAULTS, "captions": 1, **settings}
    changed = difference(then, {**CAPTION_DEFAULTS, **item.table.caption_settings, "captions": item.captions})
    if changed is not None:
        raise CacheError(f"{path}: {changed} in {item.table.name}")


def _stack(
    name: str, items: Sequence[TrainingItem], read: Sequence[_ReadItem], commands: CachingCommands
) -> Tensor | list[Tensor]:
    tensors = [one.tensors[name] for one in read]
    if name in read[0].variable:
        return tensors
    for item, tensor in zip(items, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise CacheError(
                f"{item.latent_path}: {name} has the shape {_sides(tensor.shape)}, in {items[0].latent_path} "
                f"it has {_sides(tensors[0].shape)}.\n  Make both again with the same options: "
                f"{commands.latents}"
            )
    return torch.stack(tensors)


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


@contextlib.contextmanager
def _remedy(command: str, store: CacheStore, name: str) -> Iterator[None]:
    """Add the command that makes the caches again to every CacheError. name: of the entry."""
    try:
        yield
    except CacheError as error:
        if store.is_shared(name):
            raise CacheError(
                f"{error}.\n  A training with --cache_latents_to_disk and "
                "--cache_text_encoder_outputs_to_disk, without --skip_cache_check, makes again what does "
                "not fit; remove a damaged npz file before. With cache_format npz: "
                f"{command}"
            ) from error
        # of thousands of entries the values are read only then
        again = " --verify" if "damaged" in str(error) else ""
        raise CacheError(f"{error}.\n  Make it again with: {command}{again}") from error
