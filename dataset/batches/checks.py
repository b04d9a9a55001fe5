"""Check that caches match the current table, model and media, and were made by the same encoders."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dataset.batches.items import NO_COMMANDS, CachingCommands, TrainingItem, group_items
from dataset.cache.records import (
    FROM_OPTION,
    HAS_REFERENCE,
    CacheChecks,
    LatentRecord,
    TextRecord,
    difference,
    options_difference,
    size_and_mtime,
    source_folders,
)
from dataset.cache.store import Stores
from dataset.cache_files import FLIPPED, tensor_key
from dataset.config import DatasetTable
from dataset.config_keys import IGNORE, REFERENCES, SECTIONS, TEXTS, Stale
from dataset.forms.composing import get_source_format
from dataset.sources.captions import captions_in, read_caption
from dataset.sources.frames import find_bucket
from dataset.sources.media_source import AUDIO_FILE, CLIP_REFERENCES
from dataset.table import CLIP, FITTED, FROM_ALPHA, FROM_FILE, FURTHER_TEXT, MEDIA, get_cache_key_defaults
from modules.console import format_count
from modules.errors import CacheError
from modules.option_values import format_shape
from protocols import data

if TYPE_CHECKING:  # loaded only if sources are compared
    from dataset.listing import CompanionCounts

logger = logging.getLogger(__name__)


def check_channels(
    items: Iterable[TrainingItem],
    latent: data.LatentSpec,
    commands: CachingCommands,
    stores: Stores | None = None,
) -> None:
    """Raise CacheError, with the caching command, if latents were encoded with another model's VAE.

    Only one header is read for each table and size, because caches of two models in one folder usually differ
    in size. Logs a warning for caches without a frame rate. Skips items that are encoded during training.
    `stores` are the stores of the run.
    """
    stores = stores or Stores()
    without_fps: list[Path] = []  # caches of other programs
    for group in group_items(items).values():  # by table and size
        item = group[-1]
        if item.cache_info.on_the_fly_buckets is not None:  # encoded during training: there is no cache
            continue
        header = stores.latent_store(item.table).read(item.latent_path.name, is_full=False)
        shapes = [header.shapes[name] for name in header.shapes if tensor_key(name) == "latents"]
        channels = next((shape[0] for shape in shapes if shape), latent.channels)
        if channels != latent.channels:
            raise CacheError(
                f"{item.latent_path}: {explain_wrong_channels(channels, latent)}.\n"
                f"  Cache them again with: {commands.latents}\n"
                "  To keep caches for both models, give each its own cache_directory."
            )
        if latent.default_fps is not None and data.FPS not in header.keys:
            without_fps.append(item.latent_path)
    if without_fps:
        logger.warning(
            "%s, and perhaps others, was made by another program and does not record its frame rate: %g "
            "frames per second are assumed. If it was cached at a different rate (target_fps), cache it "
            "here: %s",
            without_fps[0],
            latent.default_fps,
            commands.latents,
        )


def explain_wrong_channels(channels: int, latent: data.LatentSpec) -> str:
    """Return an error text: cached latents do not have as many channels as the model's latents."""
    return (
        f"its latents have {channels} channels, this model's have {latent.channels}: they were encoded with "
        "the VAE of another model"
    )


def text_errors(
    item: TrainingItem, number: int, records: Mapping[str, TextRecord], is_shared: bool, checks: CacheChecks
) -> Iterator[str]:
    """Yield messages about what has changed in the table or the files since a caption was encoded.

    Args:
        item: Training item with the caption.
        number: Index of the caption among the item's captions.
        records: How each text encoder's outputs were made, by encoder name.
        is_shared: Whether another trainer may have made the cache, which then has no record.
        checks: Checks of this run, by which each file is compared only once.
    """
    recorded = [record.settings for record in records.values()]
    if not recorded and not is_shared:
        recorded = [{}]  # a file without a record was made with default keys (early versions), or by hand
    saw_references = any(record.references for record in records.values())
    for recorded_settings in recorded:
        yield from _find_text_setting_changes(item, recorded_settings, saw_references)
    yield from _find_seen_reference_errors(item, records)
    if (
        item.table.source.directory is not None
    ):  # files that a list or a table of files names are not compared
        for record in records.values():
            # the images or clips that the encoder saw, and the file with the caption at index `number`
            folders = [item.table.references.control_directory] * len(record.references)
            if CLIP in record.settings:
                folders[0] = item.table.source.directory  # the first reference is the clip or image itself
            file = checks.changed_file(folders, record.references)
            if file is not None:
                yield f"{file} has changed since its encoder saw it"
            if record.file is not None:
                yield from _find_caption_change(
                    item.table, item.table.source.directory / record.file.name, number, record, checks
                )


def _find_text_setting_changes(
    item: TrainingItem, recorded: Mapping[str, Any], saw_references: bool
) -> Iterator[str]:
    """Yield a line if a table key that changes text embeddings differs from a cache's record (`recorded`)."""
    # These are keys about the caption, about reference images if a text encoder saw any (`saw_references`),
    # and about other media that it saw.
    table = item.table
    defaults = {**get_cache_key_defaults(TEXTS), "captions": 1}
    current = {**defaults, **table.non_default_values(TEXTS), "captions": item.num_captions}
    if saw_references:
        # of files that had to be downloaded or unpacked, no bucket was known
        bucket = () if recorded.get("bucket") == [] else item.bucket[:2]
        current |= table.visible_reference_settings(bucket)
    current |= _current_visible_media_settings(item, recorded)
    if FITTED in recorded:  # the caption is compared with its file
        current |= table.fitted_caption_settings()
    change_text = difference({**defaults, **recorded}, current)
    if change_text is not None:
        yield f"{change_text} in {table.name}"


def _find_caption_change(
    table: DatasetTable, path: Path, number: int, record: TextRecord, checks: CacheChecks
) -> Iterator[str]:
    """Yield a line if the caption at index `number` in a file is no longer the encoded one."""
    # An encoded caption with converted positions differs from the file, whose content is compared instead.
    if FITTED in record.settings and record.file is not None:
        if checks.changed_file([path.parent], (record.file,)) is not None:
            yield f"{path} has changed since its caption was encoded"
        return
    text = read_caption(path)
    # a slice, because the file may have fewer captions than when it was cached
    if text is None or captions_in(text, table)[number : number + 1] == (record.caption,):
        return
    if size_and_mtime(path)[1] <= checks.started_ns:  # an edit during the run is not an error
        yield f"made from the caption {record.caption!r}, which now is {text!r}"


def _current_visible_media_settings(item: TrainingItem, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table's current settings for media that text encoders see, to compare with `recorded`."""
    # If the table's media cannot be listed, the settings of an item's own media are taken from `recorded`, so
    # that no difference is reported for them.
    companions = _current_companions(item) if MEDIA in recorded else None
    sees_clip = CLIP in recorded
    if companions is not None:
        further_text = companions.further_text
        return item.table.visible_media_settings(
            sees_clip, companions.reference_media, further_text=further_text
        )
    settings = item.table.visible_media_settings(sees_clip, reference_media=None)
    return settings | {key: recorded[key] for key in (MEDIA, FURTHER_TEXT.key) if key in recorded}


def _find_seen_reference_errors(item: TrainingItem, records: Mapping[str, TextRecord]) -> Iterator[str]:
    """Yield an error if captions were encoded together with fewer reference images than the item has."""
    rules = item.table.references.rules
    if rules is None or not rules.seen_by_text:
        return
    num_references = min(_count_references(item) or 0, rules.max_references)
    # without records, nothing says how many images were seen: no error
    num_seen = min((len(record.references) for record in records.values()), default=num_references)
    if num_seen < num_references:
        images = format_count(num_references, "reference image")
        yield f"its caption was encoded with {num_seen} of its {images}"


def latent_errors(
    item: TrainingItem,
    tensors: Mapping[str, Tensor],
    record: LatentRecord | None,
    latent: data.LatentSpec,
    checks: CacheChecks,
    is_shared: bool,
) -> Iterator[str]:
    """Yield the reasons why cached latents do not match the table and the model.

    Args:
        item: Training item of the latents.
        tensors: Tensors of the cache.
        record: How the cache was made: sizes, table keys and media files; None if it does not say.
        latent: Shape of the model's latents.
        checks: Checks of this run, by which each media file is compared only once.
        is_shared: Whether another trainer may have made the cache.
    """
    table = item.table
    channels = tensors["latents"].shape[0]
    if channels != latent.channels:
        yield explain_wrong_channels(channels, latent)
    # the loss mask must come from where the table says: alpha, a file, or none
    if record is not None:
        mask_origin = record.options.get("mask")
    else:  # other programs make masks only from transparency
        mask_origin = FROM_ALPHA if is_shared and data.LOSS_MASK in tensors else None
    allowed_origins = _list_allowed_mask_origins(item)
    if mask_origin not in allowed_origins:
        expected = "no mask" if allowed_origins == {None} else "a mask for it"
        if item.table.source.alpha_mask:
            expected = "alpha_mask = true"
        yield f"its loss mask is from {mask_origin or 'nowhere'}, but {item.table.name} has {expected}"
    if table.buckets.augmentation.flip and "latents" + FLIPPED not in tensors:
        yield "it has no mirrored latents, which flip_aug needs"
    if table.references.rules is not None or table.references.clip_rules is not None:
        yield from _find_reference_errors(item, tensors)
    if record is not None:
        bucket = find_bucket(table, tuple(record.options["size"]), latent.pixel_step, item.latent_path)
        made_for = record.options["bucket"]
        if tuple(made_for) != bucket:
            yield f"made for {format_shape(made_for)} pixels, but {table.name} needs {format_shape(bucket)}"
        yield from _find_changed_keys(table, tensors, record.options, latent)
        if record.parts != item.num_latent_files:
            yield f"its clip was cached in {record.parts} files, but {item.num_latent_files} of them exist"
        yield from _find_source_changes(item, source_folders(table, record), record, checks)
    yield from _find_shape_errors(item, tensors, latent)


def _list_allowed_mask_origins(item: TrainingItem) -> set[str | None]:
    """Return where an item's cached loss mask may come from: FROM_ALPHA, FROM_FILE, or None for no mask."""
    table = item.table
    if table.source.alpha_mask:
        return {FROM_ALPHA}
    if table.source.mask_directory is not None:
        companions = _current_companions(item)
        has_mask = companions is not None and companions.has_mask
        # without a mask file now, a cached mask is not an error: only the file may have been deleted
        return {FROM_FILE} if has_mask else {FROM_FILE, None}
    if table.source.directory is None:  # a list, whose rows may name masks
        return {FROM_FILE, None}
    return {None}


def _find_shape_errors(
    item: TrainingItem, tensors: Mapping[str, Tensor], latent: data.LatentSpec
) -> Iterator[str]:
    """Yield an error if latents or their loss mask do not have the shape that the table requires."""
    shape = list(tensors["latents"].shape)
    width, height = item.bucket[:2]
    frames = item.bucket[2] if len(item.bucket) == 3 else 1
    expected = list(latent.shape(frames, height, width)[1:])
    if data.FRAME_INDICES in tensors:
        expected[1] = len(tensors[data.FRAME_INDICES])  # a single image with its control images as frames
    if shape != expected:
        yield (
            f"its latents have the shape {format_shape(shape)}, but {item.table.name} needs "
            f"{format_shape(expected)} ({frames} frames of {width}x{height})"
        )
    # tensors that belong to latents, such as references, have the same size
    rejected = tensors.get(data.REJECTED_LATENTS)
    if rejected is not None and list(rejected.shape) != shape:
        yield (
            f"the latents of its worse one are {format_shape(rejected.shape)}, but its own are "
            f"{format_shape(shape)}"
        )
    mask = tensors.get(data.LOSS_MASK)
    if mask is not None and list(mask.shape) != expected[1:]:
        yield (
            f"its loss mask is {format_shape(mask.shape)}, but its latents are {format_shape(expected[1:])}"
        )


def _find_changed_keys(
    table: DatasetTable, tensors: Iterable[str], options: Mapping[str, Any], latent: data.LatentSpec
) -> Iterator[str]:
    """Yield the table keys about sections, references and audio in latents that have changed since caching.

    SECTIONS and REFERENCES are groups of table keys. The record (`options`) has those that differed from
    their defaults.
    """
    if AUDIO_FILE in options and (options.get("audio") == IGNORE) != (table.source.audio == IGNORE):
        made = "without" if table.source.audio != IGNORE else "with"
        yield f'it was made {made} the audio of its clip, but {table.name} has audio = "{table.source.audio}"'
    recorded_sections = _select_recorded_keys(options, SECTIONS)
    change_text = options_difference(recorded_sections, table.non_default_values(SECTIONS), latent)
    if change_text is not None:
        yield f"{change_text} in {table.name}"
    if any(key.startswith(data.CONTROL) for key in tensors):
        defaults = get_cache_key_defaults(REFERENCES)
        recorded = _select_recorded_keys(options, REFERENCES)
        change_text = difference(defaults | recorded, defaults | table.non_default_values(REFERENCES))
        if change_text is not None:
            yield f"{change_text} in {table.name}"
    if table.references.clip_rules is not None and CLIP_REFERENCES in options:
        # the number of references, followed by size factor, time factor and frame limit: see
        # `ReferenceRules.factors`
        factors_now = table.references.clip_rules.factors
        _, *factors = options[CLIP_REFERENCES]
        if factors != [*factors_now]:
            yield (
                f"its references were made with {_describe_factors(factors)}, this run has "
                f"{_describe_factors(factors_now)}"
            )


def _describe_factors(factors: Sequence[int]) -> str:
    """Return the downscaling factors of reference clips as text."""
    return "size factor {}, time factor {} and {} frames (0: all)".format(*factors)


def _select_recorded_keys(options: Mapping[str, Any], stale: Stale) -> dict[str, Any]:
    """Return the recorded options that belong to a group of table keys (`stale`), such as REFERENCES."""
    keys = get_cache_key_defaults(stale)
    return {key: option for key, option in options.items() if key in keys}


def audio_errors(
    item: TrainingItem,
    tensors: Mapping[str, Tensor],
    record: LatentRecord | None,
    latent: data.LatentSpec,
    checks: CacheChecks,
    is_shared: bool,
) -> Iterator[str]:
    """Yield the reasons why cached audio latents do not match the table and the model.

    If the cache has no record (`record` is None), only the shape is compared. `latent` and `is_shared` are
    not used; callers pass the same arguments as for latents.
    """
    shape = tuple(tensors[data.AUDIO_LATENTS].shape)
    if item.audio_latent_shape and shape != item.audio_latent_shape:
        yield (
            f"its latents have the shape {shape}, but a clip of its frames and rate has "
            f"{item.audio_latent_shape}"
        )
    if record is not None:
        # a reference file that was only deleted is not an error
        has_reference = HAS_REFERENCE in record.options
        table = item.table
        if has_reference and table.references.reference_audio_directory is None:
            yield f"it was made with a reference, but {table.name} has no reference_audio_directory"
        elif not has_reference and table.references.reference_audio_directory is not None:
            companions = _current_companions(item)
            if companions is not None and companions.has_reference_audio:
                yield f"it was made without a reference, but {table.name} now has one for it"
        yield from _find_audio_source_changes(item, record, checks)


def _find_audio_source_changes(
    item: TrainingItem, record: LatentRecord, checks: CacheChecks
) -> Iterator[str]:
    """Yield an error if audio latents were made from other files, or if one of their files has changed."""
    # A record lists the clip, then a separate audio file and the reference audio, if there are any.
    table = item.table
    has_reference = HAS_REFERENCE in record.options
    num_files = len(record.files) - has_reference
    is_from_file = num_files > 1  # the clip and a separate audio file
    differs = is_from_file != (table.source.audio_directory is not None) and FROM_OPTION not in record.options
    if table.source.directory is not None and differs:
        source = "a file of audio_directory" if is_from_file else "the track of its clip"
        yield f"it was made from {source}, which {table.name} does not use now"
    folders = [table.source.directory, table.source.audio_directory][:num_files]
    if has_reference:
        folders.append(table.references.reference_audio_directory)
    yield from _find_source_changes(item, folders, record, checks)


def _find_source_changes(
    item: TrainingItem, folders: Sequence[Path | None], record: LatentRecord, checks: CacheChecks
) -> Iterator[str]:
    """Yield the differences between an item's media files and its record."""
    # `folders` contains the folder of each file in the record.
    table = item.table
    rate = record.options.get("source_fps")
    if table.kind == "video" and rate != table.buckets.source_fps:
        yield f"made for source_fps = {rate}, but {table.name} has {table.buckets.source_fps}"
    fps = record.options.get("fps")  # target_fps, or the rate of the family
    target_fps = table.buckets.target_fps
    if target_fps is not None and fps not in (None, target_fps):
        yield f"made for {fps:g} frames per second, but {table.name} has target_fps = {target_fps:g}"
    if table.source.directory is not None and (table.index, item.key) not in checks.checked:
        # records of early versions list no files: then there is nothing to compare
        file = checks.changed_file(folders[: len(record.files)], record.files)
        if file is not None:
            yield f"{file} has changed since it was encoded"


def _find_reference_errors(item: TrainingItem, tensors: Iterable[str]) -> Iterator[str]:
    """Yield errors about cached reference images that no longer match the table or the list."""
    table = item.table
    if table.references.clip_rules is not None and table.source.directory is not None:
        yield from _find_clip_reference_errors(item, tensors)
    if table.references.rules is not None:
        num_cached = _count_unmirrored(tensors, data.CONTROL)
        yield from _find_control_errors(item, table.references.rules.max_references, num_cached)


def _find_control_errors(item: TrainingItem, max_references: int, num_cached: int) -> Iterator[str]:
    """Yield an error if an item's number of cached reference images (`num_cached`) is no longer right."""
    # Images of a folder that were only deleted are not an error; images that a list no longer names are one.
    table = item.table
    made_with = f"it was made with {format_count(num_cached, 'reference image')}"
    num_now = _count_references(item)  # None: unknown
    num_expected = None if num_now is None else min(num_now, max_references)
    if (
        table.source.directory is None
    ):  # a list: its rows name the references, so the numbers have to be equal
        if num_expected is not None and num_expected != num_cached:
            yield f"{made_with}, but {table.source.path} now names {num_now}"
    elif num_cached and table.references.control_directory is None:
        yield f"it was made with reference images, but {table.name} has no control_directory"
    elif num_expected is not None and num_cached < num_expected:  # more: files were only deleted
        yield f"{made_with}, but now its image has {num_expected}"


def _find_clip_reference_errors(item: TrainingItem, tensors: Iterable[str]) -> Iterator[str]:
    """Yield an error if a clip has more or fewer reference images in its folder than in its cache file."""
    # Unlike control images, reference images that were only deleted are an error, too.
    table = item.table
    num_cached = _count_unmirrored(tensors, data.REFERENCE_LATENTS)
    num_now = 0
    if table.references.reference_directory is not None:
        companions = _current_companions(item)
        # if the number is unknown, it counts as unchanged
        num_now = num_cached if companions is None else companions.num_references
    if num_now != num_cached:
        made_with = format_count(num_cached, "reference")
        yield f"it was made with {made_with}, but {table.name} now has {num_now} for it"


def _count_unmirrored(tensors: Iterable[str], start: str) -> int:
    """Return the number of tensors whose names begin with `start`, without mirrored ones."""
    return sum(key.startswith(start) and not key.endswith(FLIPPED) for key in tensors)


def _count_references(item: TrainingItem) -> int | None:
    """Return the number of an item's reference images on disk, without a limit; None if unknown."""
    if item.table.source.directory is not None and item.table.references.control_directory is None:
        return None
    companions = _current_companions(item)
    return None if companions is None else companions.num_controls


def _current_companions(item: TrainingItem) -> "CompanionCounts | None":
    """Return how many companion files (masks, references ...) an item has on disk now."""
    # Returns None if the item is not listed, or if listing its table could download files.
    table = item.table
    if not get_source_format(table).is_listed_in_training:
        return None
    from dataset.listing import companions_now  # only if sources are compared

    return companions_now(table).get(item.source_stem)


# --- encoders
# ------------------------------------------------------------------------------------------------------------

# result of `checkpoints.opening.fingerprint`
_FINGERPRINT = re.compile(r"([0-9a-f]{8})[0-9a-f]{24}")
SHORTENED = r"\1..."
# keys of `Family.media_identity` for conditions cached with the latents, which only some tables have
_OPTIONAL_CONDITIONS = frozenset({"image", "sections"})


@dataclass
class SameEncoders:
    """Checks that all batches' caches were made with the same encoders as the first batch's.

    There is one warning for the latents and one for each text encoder. A difference is never an error: files
    with different fingerprints may contain the same network, and a different dtype makes only a small
    difference. Files of other programs do not record their encoders.
    """

    commands: CachingCommands = NO_COMMANDS
    _first: dict[str, data.CacheOrigin] = field(default_factory=dict)  # origin of the first cache, by part
    _warned: set[str] = field(default_factory=set)  # parts with a warning

    def warn(self, origins: Iterable[data.CacheOrigin]) -> None:
        """Log a warning if the batch's encoders differ from earlier batches' encoders."""
        warning = self.difference(origins)
        if warning is not None:
            logger.warning(warning)

    def difference(self, origins: Iterable[data.CacheOrigin]) -> str | None:
        """Return a warning if a batch's encoders differ from the first batch's; None if nothing is new.

        `origins` say who made the batch's caches, one for each part such as latents. Each part is reported
        only once.
        """
        differences: list[_EncoderDifference] = []
        for origin in origins:
            first = self._first.setdefault(origin.part, origin)
            if origin.encoder == first.encoder or origin.part in self._warned:
                continue
            # the keys by which the identities of the two caches' encoders differ
            compared = first.encoder.keys() | origin.encoder.keys()
            if origin.part == data.LATENTS_PART:
                # only the keys of both: not all tables have image conditions
                compared = (first.encoder.keys() & origin.encoder.keys()) - _OPTIONAL_CONDITIONS
            keys = [key for key in sorted(compared) if first.encoder.get(key) != origin.encoder.get(key)]
            if keys:
                self._warned.add(origin.part)
                differences.append(_EncoderDifference(first, origin, keys))
        return _describe_differences(differences, self.commands) if differences else None


class _EncoderDifference(NamedTuple):
    """Two caches of the same part, such as latents, that were made by different encoders."""

    first: data.CacheOrigin
    other: data.CacheOrigin
    keys: list[str]  # what differs, such as the dtype

    @property
    def is_text(self) -> bool:
        """Whether text encoders differ."""
        return self.first.part not in (data.LATENTS_PART, data.AUDIO_PART)

    def identities(self) -> list[dict[str, str]]:
        """Return the different values of the first cache, then of the other cache, by key."""
        return [
            {key: cache.encoder.get(key, "none") for key in self.keys} for cache in (self.first, self.other)
        ]

    def describe(self) -> list[str]:
        """Return a line for each of the two caches, with its different values."""
        lines = []
        for cache, identity in zip((self.first, self.other), self.identities(), strict=True):
            values = [f"{key} {shorten_fingerprint(value)}" for key, value in identity.items()]
            lines.append(f"{cache.path}: {', '.join(values)}")
        return lines

    def may_be_other_network(self) -> bool:
        """Return whether a fingerprint differs: only network files have one, a dtype has none."""
        values = [value for identity in self.identities() for value in identity.values()]
        return any(map(_FINGERPRINT.fullmatch, values))


def _describe_differences(differences: Sequence[_EncoderDifference], commands: CachingCommands) -> str:
    """Return a warning: the caches that differ, what that means, and the commands that cache them again."""
    lines = [line for difference in differences for line in difference.describe()]
    if any(difference.may_be_other_network() for difference in differences):
        consequence = (
            "Unless the encoders' files contain the same network, the model learns a mixture that fits "
            "neither."
        )
    else:
        consequence = "Their values differ slightly."
    remedy = f"{consequence} To make all caches alike, cache again with:"
    repairs = [commands.get(is_text) for is_text in sorted({one.is_text for one in differences})]
    return "\n  ".join(["Not all caches were made by the same encoders:", *lines, remedy, *repairs])


def shorten_fingerprint(text: str) -> str:
    """Shorten each fingerprint in a text to eight characters."""
    return _FINGERPRINT.sub(SHORTENED, text)


def describe_identity(identity: Mapping[str, str]) -> list[str]:
    """Return a line for each entry of an encoder's identity, with shortened fingerprints."""
    return [
        f"{key.replace('_', ' ')}: " + _FINGERPRINT.sub("fingerprint \\1...", value)
        for key, value in identity.items()
    ]
