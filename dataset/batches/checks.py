"""Check that cached entries fit their table, model and sources of now, and were made by equal encoders."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dataset.batches.items import NO_COMMANDS, CachingCommands, TrainingItem, group_items
from dataset.cache.files import FLIPPED, tensor_key
from dataset.cache.records import (
    CacheChecks,
    LatentRecord,
    TextRecord,
    difference,
    options_difference,
    stamp_of,
)
from dataset.cache.store import Stores
from dataset.config_keys import REFERENCES, SECTIONS, TEXTS
from dataset.sources.captions import captions_in, read_caption
from dataset.sources.frames import bucket_of
from dataset.sources.media_source import CLIP_REFERENCES, CONTROL_MASK
from dataset.table import FROM_ALPHA, FROM_FILE, defaults_of
from modules.console import count_of
from modules.contract import data
from modules.errors import CacheError

logger = logging.getLogger(__name__)


def check_channels(
    items: Iterable[TrainingItem],
    latent: data.LatentSpec,
    commands: CachingCommands,
    stores: Stores | None = None,
) -> None:
    """Raise CacheError, with the caching command, if latents were encoded with the VAE of another model.

    Looks at the header of one file of each table and size: caches of two models in one folder mostly differ
    in their sizes. Warns of caches without a frame rate. stores: of the run. Items that are encoded while
    training are skipped.
    """
    stores = stores or Stores()
    unsaid: list[Path] = []  # of other programs
    for *_, item in group_items(items).values():
        if item.kind.sizes is not None:
            continue
        header = stores.of(item.table).read(item.latent_path.name, is_whole=False)
        shapes = [header.shapes[name] for name in header.shapes if tensor_key(name) == "latents"]
        channels = next((shape[0] for shape in shapes if shape), latent.channels)
        if channels != latent.channels:
            raise CacheError(
                f"{item.latent_path}: {other_space(channels, latent)}.\n"
                f"  Make them again with: {commands.latents}\n"
                "  To keep caches for both models, give each a cache_directory of its own."
            )
        if latent.unsaid_fps is not None and data.FPS not in header.keys:
            unsaid.append(item.latent_path)
    if unsaid:
        logger.warning(
            "%s, and maybe others, was made by another program and does not say how many frames make a "
            "second: %g are taken. If it was cached at another rate (target_fps), cache it here: %s",
            unsaid[0],
            latent.unsaid_fps,
            commands.latents,
        )


def other_space(channels: int, latent: data.LatentSpec) -> str:
    return (
        f"its latents have {channels} channels, this model's have {latent.channels}: they were encoded with "
        "the VAE of another model"
    )


def text_faults(
    item: TrainingItem, number: int, records: Mapping[str, TextRecord], is_shared: bool, checks: CacheChecks
) -> Iterator[str]:
    """Yield how the table or the caption file has changed since a caption was encoded.

    is_shared: another program may have made the cache, which keeps no record.
    """
    table, usual = item.table, {**defaults_of(TEXTS), "captions": 1}
    now = {**usual, **table.changed(TEXTS), "captions": item.captions}
    # a file of ours without records was made with the usual keys, or by hand
    for made_with in [one.settings for one in records.values()] or ([] if is_shared else [{}]):
        changed = difference({**usual, **made_with}, now)
        if changed is not None:
            yield f"{changed} in {table.name}"
    if table.references is not None and table.references.seen_by_text:
        there = min(_references_now(item) or 0, table.references.most)
        seen = min((len(one.references) for one in records.values()), default=there)
        if seen < there:
            yield f"its caption was encoded with {seen} of its {count_of(there, 'reference picture')}"
    if table.directory is None:
        return
    for record in records.values():
        folders = [table.control_directory] * len(record.references)
        file = checks.changed_file(folders, record.references)
        if file is not None:
            yield f"{file} has changed since its encoder saw it"
        if record.file is None:
            continue
        path = table.directory / record.file.name
        text = read_caption(path)
        is_same = text is None or captions_in(text, table)[number : number + 1] == (record.caption,)
        if not is_same and stamp_of(path)[1] <= checks.started_ns:
            yield f"made from the caption {record.caption!r}, which now is {text!r}"


def latent_faults(
    item: TrainingItem,
    tensors: Mapping[str, Tensor],
    record: LatentRecord | None,
    latent: data.LatentSpec,
    checks: CacheChecks,
    is_shared: bool,
) -> Iterator[str]:
    """Yield why cached latents are not what the table and the model ask for.

    record: None if it has none. is_shared: another program may have made them.
    """
    table, found = item.table, list(tensors["latents"].shape)
    if found[0] != latent.channels:
        yield other_space(found[0], latent)
    if record is not None:
        made_from = record.options.get("mask")
    else:  # other programs make no mask but from transparency
        theirs = is_shared and data.LOSS_MASK in tensors
        made_from = FROM_ALPHA if theirs else None
    if table.alpha_mask:
        wanted: set[str | None] = {FROM_ALPHA}
    elif table.mask_directory is not None:
        there = _companions_now(item)
        wanted = {FROM_FILE} if there is not None and there[2] else {FROM_FILE, None}
    else:
        wanted = {FROM_FILE, None} if table.directory is None else {None}
    if made_from not in wanted:
        has = "no mask" if wanted == {None} else "a mask for it"
        has = "alpha_mask = true" if table.alpha_mask else has
        yield f"the mask of its loss is from {made_from or 'nowhere'}, {table.name} has {has}"
    if table.augmentation.flip and "latents" + FLIPPED not in tensors:
        yield "it has no mirrored latents, which flip_aug needs"
    if table.references is not None or table.clip_references is not None:
        yield from _reference_faults(item, tensors)
    if record is not None:
        yield from _option_faults(item, tensors, record, latent)
        if record.parts != item.parts:
            yield f"{record.parts} files of its clip belong together, {item.parts} are there"
        references = record.options.get(CLIP_REFERENCES, [0])[0]
        others = [table.mask_directory] * (record.options.get("mask") == FROM_FILE)
        others += [table.control_mask_directory] * (CONTROL_MASK in record.options)
        others += [table.reference_directory] * references
        controls = len(record.files) - 1 - len(others)
        folders = [table.directory, *[table.control_directory] * controls, *others]
        yield from _source_faults(item, folders, record, checks)
    width, height, frames = (*item.bucket, 1)[:3]
    expected = list(latent.shape(frames, height, width)[1:])
    if data.PLACES in tensors:
        expected[1] = len(tensors[data.PLACES])
    if found != expected:
        yield (
            f"its latents have the shape {as_shape(found)}, {table.name} asks for {as_shape(expected)} "
            f"({frames} frames of {width}x{height})"
        )
    mask = tensors.get(data.LOSS_MASK)
    if mask is not None and list(mask.shape) != expected[1:]:
        yield f"the mask of its loss is {as_shape(mask.shape)}, its latents are {as_shape(expected[1:])}"


def _option_faults(
    item: TrainingItem, tensors: Iterable[str], record: LatentRecord, latent: data.LatentSpec
) -> Iterator[str]:
    """Yield which keys of the table have other values than those that latents were made with."""
    table, options = item.table, record.options
    bucket = bucket_of(table, tuple(options["size"]), latent.pixel_step, item.latent_path)
    if tuple(options["bucket"]) != bucket:
        yield f"made for {as_shape(options['bucket'])} pixels, {table.name} asks for {as_shape(bucket)}"
    of_sections, usual = defaults_of(SECTIONS), defaults_of(REFERENCES)
    sections = {key: value for key, value in options.items() if key in of_sections}
    changed = [options_difference(sections, table.changed(SECTIONS), latent)]
    if any(key.startswith(data.CONTROL) for key in tensors):
        then = usual | {key: value for key, value in options.items() if key in usual}
        changed.append(difference(then, usual | table.changed(REFERENCES)))
    yield from (f"{keys} in {table.name}" for keys in changed if keys is not None)
    rules = table.clip_references
    if rules is not None and CLIP_REFERENCES in options:
        made, shown = options[CLIP_REFERENCES][1:], "size factor {}, time factor {} and {} frames (0: all)"
        if made != [*rules.factors]:
            here = shown.format(*rules.factors)
            yield f"its references were made with {shown.format(*made)}, this run has {here}"


def sound_faults(
    item: TrainingItem,
    tensors: Mapping[str, Tensor],
    record: LatentRecord | None,
    latent: data.LatentSpec,
    checks: CacheChecks,
    is_shared: bool,
) -> Iterator[str]:
    """Yield why cached latents of sound are not what the table and the model ask for."""
    table, found = item.table, tuple(tensors[data.SOUND].shape)
    if item.sound and found != item.sound:
        yield f"its latents have the shape {found}, a clip of its frames and rate has {item.sound}"
    if record is None:
        return
    is_given = len(record.files) > 1
    if table.directory is not None and is_given != (table.audio_directory is not None):
        made = "a file of audio_directory" if is_given else "the track of its clip"
        yield f"it was made from {made}, which {table.name} does not use now"
    yield from _source_faults(item, [table.directory, table.audio_directory], record, checks)


def _source_faults(
    item: TrainingItem, folders: Sequence[Path | None], record: LatentRecord, checks: CacheChecks
) -> Iterator[str]:
    """Yield how the sources of an item differ from its record. folders: of each file in the record."""
    table, rate = item.table, record.options.get("source_fps")
    if table.kind == "video" and rate != table.source_fps:
        yield f"made for source_fps = {rate}, {table.name} has {table.source_fps}"
    if table.directory is not None and (table.index, item.key) not in checks.known:
        file = checks.changed_file(folders[: len(record.files)], record.files)
        if file is not None:
            yield f"{file} has changed since it was encoded"


def _reference_faults(item: TrainingItem, tensors: Iterable[str]) -> Iterator[str]:
    """Yield why latents of reference pictures are not what a table asks for. Deleted picture files are no
    fault; pictures that a list no longer names are.
    """
    table, rules = item.table, item.table.references
    if table.clip_references is not None and table.directory is not None:
        cached = sum(key.startswith(data.REFERENCE_LATENTS) and not key.endswith(FLIPPED) for key in tensors)
        if cached or table.reference_directory is not None:
            beside = _companions_now(item)
            now = 0 if table.reference_directory is None else cached if beside is None else beside[1]
            if now != cached:
                yield f"it was made with {count_of(cached, 'reference')}, now {table.name} has {now} for it"
    if rules is None:
        return
    cached = sum(key.startswith(data.CONTROL) and not key.endswith(FLIPPED) for key in tensors)
    made_with = f"it was made with {count_of(cached, 'reference picture')}"
    there = _references_now(item)
    if table.directory is None:
        if there is not None and min(there, rules.most) != cached:
            yield f"{made_with}, now {table.source} names {there}"
    elif cached and table.control_directory is None:
        yield f"it was made with reference pictures, {table.name} has no control_directory"
    elif there is not None and cached < min(there, rules.most):
        yield f"{made_with}, now its image has {min(there, rules.most)}"


def _references_now(item: TrainingItem) -> int | None:
    """Return how many reference pictures an item has, even if the model takes fewer; None: not known."""
    if item.table.directory is not None and item.table.control_directory is None:
        return None
    there = _companions_now(item)
    return None if there is None else there[0]


def _companions_now(item: TrainingItem) -> tuple[int, int, bool] | None:
    """Return an item's entry in `companions_now`; None without one, or if listing could download files."""
    table = item.table
    if not (table.directory or table.jsonl_file or table.table_file):
        return None
    from dataset.sources.listing import companions_now

    return companions_now(table).get(item.source_stem)


def as_shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


# --- encoders
# ------------------------------------------------------------------------------------------------------------

# of a network's file: `modules.checkpoints.opening.fingerprint`
_FINGERPRINT = re.compile(r"([0-9a-f]{8})[0-9a-f]{24}")
SHORTENED = r"\1..."
# key of `Family.media_identity` for the conditions stored with the latents, in which tables may differ
_BESIDE_LATENTS = frozenset({"image", "sections"})


@dataclass
class SameEncoders:
    """Compare the encoders of cached batches, and warn once for each part (latents, each encoder's texts).

    Never an error: two files with different fingerprints may hold one network, and the small difference of
    another dtype does no harm. Files of other programs do not record their encoders.
    """

    commands: CachingCommands = NO_COMMANDS
    _first: dict[str, data.MadeBy] = field(default_factory=dict)  # by part
    _told: set[str] = field(default_factory=set)  # parts

    def warn(self, made_by: Iterable[data.MadeBy]) -> None:
        said = self.difference(made_by)
        if said is not None:
            logger.warning(said)

    def difference(self, made_by: Iterable[data.MadeBy]) -> str | None:
        """Return the text of the warning; None if there is nothing new."""
        files, parts, has_other_networks = list[str](), set[bool](), False
        for made in made_by:
            first = self._first.setdefault(made.part, made)
            keys = made.encoder.keys() | first.encoder.keys()
            if made.part == data.LATENTS_MADE:  # without image conditions a file has no image encoder
                keys = (made.encoder.keys() & first.encoder.keys()) - _BESIDE_LATENTS
            keys = {key for key in keys if first.encoder.get(key) != made.encoder.get(key)}
            if made.part in self._told or not keys:
                continue
            self._told.add(made.part)
            parts.add(first.part in (data.LATENTS_MADE, data.SOUND_MADE))
            for one in (first, made):
                texts = {key: one.encoder.get(key, "none") for key in sorted(keys)}
                has_other_networks |= any(map(_FINGERPRINT.fullmatch, texts.values()))
                said = [f"{key} {_FINGERPRINT.sub(SHORTENED, text)}" for key, text in texts.items()]
                files.append(f"{one.path}: {', '.join(said)}")
        if not files:
            return None
        again = ([self.commands.latents] if True in parts else []) + (
            [self.commands.text] if False in parts else []
        )
        consequence = (
            "Unless the encoders' files hold the same network, the model learns a mixture that fits neither."
            if has_other_networks
            else "Their values differ slightly."
        )
        remedy = f"{consequence} To make all caches alike, cache again with:"
        return "\n  ".join(["Not all caches were made by the same encoders:", *files, remedy, *again])


def describe_identity(identity: Mapping[str, str]) -> list[str]:
    return [
        f"{key.replace('_', ' ')}: " + _FINGERPRINT.sub("fingerprint \\1...", value)
        for key, value in identity.items()
    ]
