"""Read, verify and stack cached items when they are needed."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from dataset.cache.files import EMPTY, FLIPPED, NpzNames, tensor_key
from dataset.cache.records import (
    CLOCK,
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
from dataset.sources.frames import bucket_of, has_mask, spans
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
    LatentSpec,
    MadeBy,
)
from modules.errors import CacheError

logger = logging.getLogger(__name__)


def check_channels(
    items: Iterable[TrainingItem],
    latent: LatentSpec,
    commands: CachingCommands,
    stores: Stores | None = None,
) -> None:
    """Raise CacheError, with the caching command, if latents were encoded with the VAE of another model.

    Looks at the header of one file of each table and size: caches of two models in one folder mostly differ
    in their sizes. Warns of those that do not say their frame rate. stores: of the run. Items that are
    encoded while training have no caches.
    """
    stores = stores or Stores()
    unsaid: list[Path] = []  # of other programs
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
        if latent.unsaid_fps is not None and FPS not in header.keys:
            unsaid.append(item.latent_path)
    if unsaid:
        logger.warning(
            "%s, and maybe others, was made by another program and does not say how many frames make a "
            "second: %g are taken. If it was cached at another rate (target_fps), cache it here: %s",
            unsaid[0],
            latent.unsaid_fps,
            commands.latents,
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
    stores = stores or stores_for(items[0], latent)
    reader = _Reader(stores, latent, commands, checks or CacheChecks(), live)
    numbers, sides = captions or [0] * len(items), flips or [False] * len(items)
    media = [
        reader.read_media(item, place, side)
        for place, (item, side) in enumerate(zip(items, sides, strict=True))
    ]
    texts = [reader.read_text(item, number) for item, number in zip(items, numbers, strict=True)]
    has_sound = [SOUND in one.tensors for one in media]
    for one in media:
        if any(has_sound):  # of the others it is not learned
            like = media[has_sound.index(True)].tensors[SOUND]
            one.tensors.setdefault(SOUND, torch.zeros_like(like))
    if any(LOSS_MASK in one.tensors for one in media):  # one without a mask gets ones, which change nothing
        for one in media:
            ones = torch.ones(one.tensors["latents"].shape[1:], dtype=torch.float16)
            one.tensors.setdefault(LOSS_MASK, ones)
    tensors = {**_stack(media, commands.latents), **_stack(texts, commands.text)}
    if any(has_sound):
        tensors[HAS_SOUND] = torch.tensor(has_sound)
    if isinstance(rates := tensors.get(FPS), Tensor):
        tensors[FPS] = (1000 * rates.double()).round().long()
    read, full = [part for pair in zip(media, texts, strict=True) for part in pair], dict[str, Any]()
    if undropped and tuple(undropped) != tuple(numbers):
        whole_texts = [reader.read_text(*pair) for pair in zip(items, undropped, strict=True)]
        full, read = _stack(whole_texts, commands.text), [*read, *whole_texts]
    weights = tuple(item.table.prior_loss_weight for item in items)
    preserved = tuple(item.table.preserves_output for item in items)
    return Batch(
        tensors,
        tuple(one.caption for one in texts),
        tuple(item.key for item in items),
        tuple(made for one in read for made in one.made_by),
        () if set(weights) == {1.0} else weights,
        preserved if any(preserved) else (),
        full,
    )


def _count_windows(item: TrainingItem, record: LatentRecord, frame_step: int) -> int:
    """Return how many items the clip of an item gives; 0 if its cache does not say."""
    table, clip = item.table, record.clip
    if clip is None or not (clip.complete or table.frame_extraction == "head") or record.parts > 1:
        return 0
    return len(spans(table, clip.kept_frames, frame_step))


@dataclass
class _Part:
    """The tensors of an item that come from its media, or from a caption."""

    path: Path
    tensors: dict[str, Tensor]
    variable: frozenset[str] = frozenset()
    caption: str = ""
    made_by: tuple[MadeBy, ...] = ()


@dataclass(frozen=True)
class _Reader:
    """Read the parts of the items of a batch; the arguments are those of `read_batch`."""

    stores: Stores
    latent: LatentSpec
    commands: CachingCommands
    checks: CacheChecks
    live: LiveParts

    def read_media(self, item: TrainingItem, place: int, flip: bool) -> _Part:
        """Read latents, and sound if there is any. place: in the batch. flip: the mirrored side."""
        path, encoded = item.latent_path, self.live.encoded.get(place)
        if encoded is not None:
            part = _Part(path, dict(encoded))
        else:
            part = self._read_entry(item, path, LATENTS_MADE, "latents", self._latent_faults)
            if item.has_sound:
                sound = self._read_entry(item, item.sound_path, SOUND_MADE, SOUND, self._sound_faults)
                part.tensors[SOUND] = sound.tensors[SOUND]
                part.made_by += sound.made_by
            if self.latent.unsaid_fps is not None and FPS not in part.tensors:
                part.tensors[FPS] = torch.tensor(self.latent.unsaid_fps)
        self.checks.add(item.table.index, item.key)
        sides = {key.removesuffix(FLIPPED): one for key, one in part.tensors.items() if key.endswith(FLIPPED)}
        part.tensors = {key: one for key, one in part.tensors.items() if not key.endswith(FLIPPED)}
        if flip:
            if LOSS_MASK in part.tensors:
                sides[LOSS_MASK] = part.tensors[LOSS_MASK].flip(-1)
            part.tensors |= sides
        return part

    def read_text(self, item: TrainingItem, number: int) -> _Part:
        """Read a caption of an item, of which live texts have no tensors."""
        path, table, store = item.caption_path(number), item.table, self.stores.of_texts(item.table)
        live = self.live.tables.get(table.index)
        caption = "" if live is None else live.caption(item.source_stem, number)
        if not item.kind.has_text:
            return _Part(path, {}, caption=caption)
        with _remedy(self.commands.text, store, path.name):
            entry = store.read(path.name)
            tensors = entry.tensors
            absent = sorted(item.kind.text_keys - tensors.keys())
            if absent:
                maker = entry.header.metadata.get("architecture", "")
                raise CacheError(
                    f"{path}: the text cache is incomplete, it has no {', '.join(absent)}"
                    + (f" (made for {maker})" if maker else "")
                )
            records = text_records(entry.header)
            for record in records.values():
                verify_tensors(entry, record.crc32)
            if number != EMPTY and not self.checks.knows(table.index, path.name):
                fault = next(self._text_faults(item, number, records, store.is_shared(path.name)), None)
                if fault is not None:
                    raise CacheError(f"{entry.header.path}: {fault}")
        self.checks.add(table.index, path.name)
        made_by = tuple(MadeBy(path, name, record.encoder) for name, record in records.items())
        # a cache of another program does not say its caption
        stored = next((record.caption for record in records.values()), None)
        cached = entry.header.metadata.get("caption1", "") if stored is None else stored
        return _Part(path, tensors, entry.variable, caption or cached, made_by)

    def _text_faults(
        self, item: TrainingItem, number: int, records: Mapping[str, TextRecord], is_shared: bool
    ) -> Iterator[str]:
        """Yield how the table or the caption file has changed since a caption was encoded.

        is_shared: another program may have made the cache, which keeps no record.
        """
        table, usual = item.table, {**CAPTION_DEFAULTS, "captions": 1}
        now = {**usual, **table.caption_settings, "captions": item.captions}
        # a file of ours without records was made with the usual keys, or by hand
        for made_with in [one.settings for one in records.values()] or ([] if is_shared else [{}]):
            changed = difference({**usual, **made_with}, now)
            if changed is not None:
                yield f"{changed} in {table.name}"
        if table.directory is None:
            return
        for record in records.values():
            folders = [table.control_directory] * len(record.references)
            file = self.checks.changed_file(folders, record.references)
            if file is not None:
                yield f"{file} has changed since its encoder saw it"
            if record.file is None:
                continue
            caption_path = table.directory / record.file.name
            text_now = self.checks.changed_caption(caption_path, record.caption, table, number)
            if text_now is not None:
                yield f"made from the caption {record.caption!r}, which now is {text_now!r}"

    def _read_entry(
        self,
        item: TrainingItem,
        path: Path,
        part: str,
        key: str,
        faults: Callable[[TrainingItem, Mapping[str, Tensor], LatentRecord | None], Iterator[str]],
    ) -> _Part:
        """Read a cache of media. part: for `MadeBy`. key: what it must have. faults: yields why its tensors
        are not what the table asks for.
        """
        store = self.stores.of(item.table)
        with _remedy(self.commands.latents, store, path.name):
            entry = store.read(path.name)
            tensors, record = entry.tensors, latent_record(entry.header)
            if key not in tensors:
                raise CacheError(
                    f"{path}: it has no {key}, so it is not a cache; move it out of the cache folder"
                )
            fault = next(faults(item, tensors, record), None)
            if fault is not None:
                raise CacheError(f"{path}: {fault}")
            if record is not None:
                verify_tensors(entry, record.crc32)
        own_clocks = (
            record is not None
            and item.table.kind == "video"
            and CLOCK not in record.options
            and any(name.startswith((CONTROL, LOSS_MASK)) for name in tensors)
        )
        windows = 0 if record is None else _count_windows(item, record, self.latent.frame_step)
        made_by = () if record is None else (MadeBy(path, part, record.encoder, own_clocks, windows),)
        return _Part(path, tensors, entry.variable, made_by=made_by)

    def _latent_faults(
        self, item: TrainingItem, tensors: Mapping[str, Tensor], record: LatentRecord | None
    ) -> Iterator[str]:
        table, latent, found = item.table, self.latent, list(tensors["latents"].shape)
        if found[0] != latent.channels:
            yield other_space(found[0], latent)
        if record is not None:
            made_from = record.options.get("mask")
        else:  # other programs make no mask but from transparency
            theirs = self.stores.of(table).is_shared(item.latent_path.name) and LOSS_MASK in tensors
            made_from = FROM_ALPHA if theirs else None
        if table.alpha_mask:
            wanted: set[str | None] = {FROM_ALPHA}
        elif table.mask_directory is not None:
            wanted = {FROM_FILE} if has_mask(table, item.source_stem) else {FROM_FILE, None}
        else:
            wanted = {FROM_FILE, None} if table.directory is None else {None}
        if made_from not in wanted:
            has = "no mask" if wanted == {None} else "a mask for it"
            has = "alpha_mask = true" if table.alpha_mask else has
            yield f"the mask of its loss is from {made_from or 'nowhere'}, {table.name} has {has}"
        if table.augmentation.flip and "latents" + FLIPPED not in tensors:
            yield "it has no mirrored latents, which flip_aug needs"
        yield from _reference_faults(item, tensors)
        if record is not None:
            options = record.options
            bucket = bucket_of(table, tuple(options["size"]), latent.pixel_step, item.latent_path)
            if tuple(options["bucket"]) != bucket:
                yield f"made for {_sides(options['bucket'])} pixels, {table.name} asks for {_sides(bucket)}"
            control = {key: value for key, value in options.items() if key in CONTROL_DEFAULTS}
            sections = {key: value for key, value in options.items() if key in SECTION_DEFAULTS}
            changed = [options_difference(sections, table.section_keys, latent)]
            if any(key.startswith(CONTROL) for key in tensors):
                now = {**CONTROL_DEFAULTS, **table.control_keys}
                changed.append(difference({**CONTROL_DEFAULTS, **control}, now))
            yield from (f"{keys} in {table.name}" for keys in changed if keys is not None)
            if record.parts != item.parts:
                yield f"{record.parts} files of its clip belong together, {item.parts} are there"
            folders = [table.directory, *[table.control_directory] * (len(record.files) - 1)]
            if options.get("mask") == FROM_FILE:
                folders[-1] = table.mask_directory
            yield from self._source_faults(item, folders, record)
        width, height, frames = (*item.bucket, 1)[:3]
        expected = list(latent.shape(frames, height, width)[1:])
        if found != expected:
            yield (
                f"its latents have the shape {_sides(found)}, {table.name} asks for {_sides(expected)} "
                f"({frames} frames of {width}x{height})"
            )
        mask = tensors.get(LOSS_MASK)
        if mask is not None and list(mask.shape) != expected[1:]:
            yield f"the mask of its loss is {_sides(mask.shape)}, its latents are {_sides(expected[1:])}"

    def _sound_faults(
        self, item: TrainingItem, tensors: Mapping[str, Tensor], record: LatentRecord | None
    ) -> Iterator[str]:
        table, found = item.table, tuple(tensors[SOUND].shape)
        if item.sound and found != item.sound:
            yield f"its latents have the shape {found}, a clip of its frames and rate has {item.sound}"
        if record is None:
            return
        is_given = len(record.files) > 1
        if table.directory is not None and is_given != (table.audio_directory is not None):
            made = "a file of audio_directory" if is_given else "the track of its clip"
            yield f"it was made from {made}, which {table.name} does not use now"
        yield from self._source_faults(item, [table.directory, table.audio_directory], record)

    def _source_faults(
        self, item: TrainingItem, folders: Sequence[Path | None], record: LatentRecord
    ) -> Iterator[str]:
        """Yield how the sources of a record differ; lists need not be there. folders: of each file."""
        table, rate = item.table, record.options.get("source_fps")
        if table.kind == "video" and rate != table.source_fps:
            yield f"made for source_fps = {rate}, {table.name} has {table.source_fps}"
        if table.directory is not None and not self.checks.knows(table.index, item.key):
            file = self.checks.changed_file(folders[: len(record.files)], record.files)
            if file is not None:
                yield f"{file} has changed since it was encoded"


def stores_for(item: TrainingItem, latent: LatentSpec) -> Stores:
    """Return the stores of a run whose tables say where their caches are."""
    return Stores(NpzNames(item.kind.tag, latent, item.kind.text_keys))


def _reference_faults(item: TrainingItem, tensors: Iterable[str]) -> Iterator[str]:
    """Yield why latents of reference pictures are not what a table asks for. Pictures that are gone are no
    fault, but those that a list no longer names.
    """
    table, rules = item.table, item.table.references
    if rules is None:
        return
    cached = sum(key.startswith(CONTROL) and not key.endswith(FLIPPED) for key in tensors)
    made_with = f"it was made with {count_of(cached, 'reference picture')}"
    if table.directory is None:
        from dataset.sources.tables import count_named_references

        named = count_named_references(table, item.source_stem)
        if named is not None and min(named, rules.most) != cached:
            yield f"{made_with}, now {table.source} names {named}"
    elif cached and table.control_directory is None:
        yield f"it was made with reference pictures, {table.name} has no control_directory"
    elif cached < rules.most:
        from dataset.sources.folders import count_references

        there = min(count_references(table, item.source_stem), rules.most)
        if cached < there:
            yield f"{made_with}, now its image has {there}"


def _stack(parts: Sequence[_Part], command: str) -> dict[str, Tensor | list[Tensor]]:
    """Return the tensors of equal parts of all items. Raises CacheError with the command that makes them."""
    first, stacked = parts[0], dict[str, Tensor | list[Tensor]]()
    for part in parts:
        if part.tensors.keys() != first.tensors.keys():
            odd = ", ".join(sorted(part.tensors.keys() ^ first.tensors.keys()))
            raise CacheError(
                f"{part.path} and {first.path} do not have the same tensors: {odd}.\n"
                f"  Make them again with the same options: {command}"
            )
    for name, like in first.tensors.items():
        tensors = [part.tensors[name] for part in parts]
        if name in first.variable:
            stacked[name] = tensors
            continue
        for part, tensor in zip(parts, tensors, strict=True):
            if tensor.shape != like.shape:
                raise CacheError(
                    f"{part.path}: {name} has the shape {_sides(tensor.shape)}, in {first.path} it has "
                    f"{_sides(like.shape)}.\n  Make both again with the same options: {command}"
                )
        stacked[name] = torch.stack(tensors)
    return stacked


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
