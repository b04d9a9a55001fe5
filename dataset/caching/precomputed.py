"""Use tensors that other programs have computed (load_tensors): moments of clips, embeddings of captions.

This module is imported only if a table has such tensors.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.containers import load_pickled
from dataset.cache.records import difference
from dataset.caching.text_plans import CaptionFile
from dataset.config import DatasetTable
from dataset.sources import moments as moments_files
from dataset.sources.decoding import NO_FRAMES, DecodedMedia
from dataset.sources.media_source import Fault, MediaSource, raise_if_fatal
from modules.devices import dtype_name
from modules.errors import CheckpointError, DatasetError, MediaError
from modules.text_files import parse_json, read_text
from protocols.data import Conditions, LatentSpec
from protocols.family import Caches, TextEncoder

logger = logging.getLogger(__name__)


def reject_moments(family: Caches, table: DatasetTable) -> None:
    """Raise DatasetError if a table has load_tensors and the family cannot use precomputed VAE moments."""
    if family.moments.rejection is not None:
        raise DatasetError(f"{table.name}: load_tensors cannot be used: {family.moments.rejection}.")


def use_moments(family: Caches, sources: Sequence[MediaSource]) -> list[MediaSource]:
    """Check precomputed VAE moments, and omit first-frame moments if the family does not use them.

    Unreadable files are reported later, by caching.

    Raises:
        DatasetError: If the family cannot use moments, if another model's VAE made them, or if moments of
            first frames are required but missing.
    """
    with_tensors = [source for source in sources if source.precomputed is not None]
    if not with_tensors:
        return list(sources)
    reject_moments(family, with_tensors[0].table)
    first_source_by_folder: dict[Path, MediaSource] = {}
    for source in reversed(with_tensors):  # so that the first source of each folder stays
        assert source.precomputed is not None
        first_source_by_folder[source.precomputed.folder] = source
    for folder, source in first_source_by_folder.items():
        _check_vae(family, folder, source)
    if family.moments.with_image:
        # the VAE moments of each clip's first frame must exist
        kind = "moments of first frames are missing, which this model's image-to-video caches contain"
        errors = []
        for source in with_tensors:
            image = None if source.precomputed is None else source.precomputed.image
            if image is not None and not image.exists():
                errors.append(Fault(kind, str(image), source.stem))
        raise_if_fatal(errors)
        return list(sources)
    without_first_frames = []
    for source in sources:
        if source.precomputed is not None:
            source = dataclasses.replace(source, precomputed=source.precomputed.without_image())
        without_first_frames.append(source)
    return without_first_frames


def decode_moments(source: MediaSource, latent: LatentSpec) -> DecodedMedia:
    """Return an item with its precomputed VAE moments instead of frames.

    Raises:
        MediaError: If the moments cannot be used.
    """
    paths = [path for path, _ in source.latent_inputs]
    # copied, because a memory-mapped file can change, and cannot be replaced on Windows
    moments = tuple(moments_files.read_moments(path, latent).clone() for path in paths)
    clip = moments_files.measure(moments[0], latent, paths[0])
    if len(moments) > 1:  # the second tensor has the moments of the first frame, as a clip of one frame
        channels, _, height, width = moments[0].shape
        if moments[1].shape != (channels, 1, height, width):
            raise MediaError(f"{paths[1]} is not of a single frame of the size of {paths[0]}")
    return DecodedMedia(
        source=source,
        size=clip.size,
        bucket=clip.size,
        frames=NO_FRAMES,
        spans=(moments_files.full_span(clip, latent.lengths),),
        moments=moments,
        clip=clip,
    )


def _check_vae(family: Caches, folder: Path, source: MediaSource) -> None:
    """Raise DatasetError if the VAE moments in a folder were computed with another model's VAE."""
    # The number of channels of one file is compared, then the folder's record.
    assert source.precomputed is not None
    path = source.precomputed.moments
    try:
        shape = moments_files.read_tensor(path).shape[-4:]  # C F H W, without a batch dimension
    except MediaError:
        return  # reported with the other files
    channels = shape[0] if shape else 0
    if channels != 2 * family.latent.channels:  # moments are a mean and a log variance for each channel
        raise DatasetError(
            f"{source.table.name}: {path} has {channels} channels, but "
            f"{moments_files.explain_channels(channels, family.latent)}."
        )
    # If there is no record, or only the VAE's file differs, a warning is logged.
    prepared = moments_files.read_prepared(folder)
    if prepared is None or prepared.architecture is None:
        logger.warning(
            "%s: nothing in %s says which VAE made %s. They are assumed to be moments of the VAE of %s; "
            "from those of another VAE, the model would learn noise.",
            source.table.name,
            folder,
            path.parent.name,
            family.name,
        )
    elif prepared.architecture != family.name:
        raise DatasetError(
            f"{source.table.name}: {path.parent} was made by the VAE of {prepared.architecture} "
            f"({folder / moments_files.PREPARED}), but this is {family.name}. Prepare the data with this "
            "model, or omit load_tensors."
        )
    # the same VAE may be stored in different files, so this is only a warning
    elif prepared.vae.get("vae") != family.media_identity.get("vae"):
        logger.warning(
            "%s: %s was made with a different file of the VAE of %s than --vae. That is correct only if both "
            "have the same weights, for example in another format or precision.",
            source.table.name,
            path.parent,
            family.name,
        )


def embeds_note(path: Path) -> Path:
    """Return the path of the JSON file that describes stored embeddings: NAME.json next to NAME.pt."""
    return path.with_suffix(".json")


def describe_embeds(
    caption: str,
    architecture: str,
    identities: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return the content of NAME.json, which describes the embeddings in NAME.pt.

    Args:
        caption: Caption of the embeddings.
        architecture: Name of the family.
        identities: Identity of each text encoder, by encoder name.
        tensors: The stored tensors, by key.
    """
    return {
        "caption": caption,
        "architecture": architecture,
        "encoders": {name: dict(identity) for name, identity in identities.items()},
        "tensors": {key: _describe_tensor(tensor) for key, tensor in tensors.items()},
    }


def submit_embeds(
    files: Sequence[CaptionFile],
    encoder: TextEncoder,
    identity: Mapping[str, str],
    submit: Callable[[CaptionFile, Conditions], None],
) -> list[CaptionFile]:
    """Write an encoder's precomputed outputs with `submit`; return the captions that must be encoded."""
    to_encode = []
    errors: list[str] = []  # why outputs that exist cannot be used
    for file in files:
        precomputed = None
        try:
            precomputed = read_embeds(file, encoder, identity)
        except _UnfitEmbeds as reason:
            errors.append(f"{file.embeds}: {reason}")
        if precomputed is None:
            to_encode.append(file)
        else:
            submit(file, precomputed)
    if len(to_encode) < len(files) or errors:
        logger.info("%s: %d captions have embeddings already", encoder.name, len(files) - len(to_encode))
    if errors:
        logger.warning(
            "%d captions are encoded here, because their embeddings cannot be used by %s. The first: %s",
            len(errors),
            encoder.name,
            errors[0],
        )
    return to_encode


class _UnfitEmbeds(Exception):
    """Raised if precomputed embeddings do not belong to the caption or the encoder."""


def read_embeds(file: CaptionFile, encoder: TextEncoder, identity: Mapping[str, str]) -> Conditions | None:
    """Return an encoder's precomputed outputs for a caption; None if there are none.

    Raises:
        _UnfitEmbeds: If the outputs have changed, or belong to another encoder or caption.
    """
    if file.embeds is None:
        return None
    json_path = embeds_note(file.embeds)
    declared = _read_declared_shapes(json_path, file, encoder, identity)
    try:
        tensors = load_pickled(file.embeds)
    except CheckpointError as error:
        raise _UnfitEmbeds(str(error)) from error
    if isinstance(tensors, Tensor) and len(encoder.keys) == 1:
        tensors = dict.fromkeys(encoder.keys, tensors)  # a file with a single tensor does not name it
    if not isinstance(tensors, dict):
        raise _UnfitEmbeds(f"it contains {type(tensors).__name__}, not tensors by name")
    conditions: dict[str, Tensor | list[Tensor]] = {}
    for key in encoder.keys:
        tensor = tensors.get(key)
        if not isinstance(tensor, Tensor) or _describe_tensor(tensor) != declared[key]:
            raise _UnfitEmbeds(f"its {key} does not match {json_path.name}")
        copied = tensor.clone()  # because a memory-mapped file can change
        conditions[key] = [copied] if key in encoder.variable_length else copied
    return conditions


def _read_declared_shapes(
    note: Path, file: CaptionFile, encoder: TextEncoder, identity: Mapping[str, str]
) -> dict[str, Any]:
    """Return shape and dtype of the encoder's tensors, by key, from the JSON file next to the embeddings."""
    if not note.exists():
        raise _UnfitEmbeds(f"nothing next to it says which encoder made it ({note.name} is missing)")
    try:
        content = parse_json(read_text(note))
        changed = difference(content["encoders"].get(encoder.name, {}), identity)
        if changed is not None:
            raise _UnfitEmbeds(f"it was made by another encoder: {changed}")
        if content["caption"] != file.caption:
            raise _UnfitEmbeds(f"its caption was {content['caption']!r}, but now is {file.caption!r}")
        return {key: content["tensors"][key] for key in encoder.keys}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _UnfitEmbeds(f"{note.name} cannot be read ({type(error).__name__}: {error})") from error


def _describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor's shape and dtype as JSON values for a record."""
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
