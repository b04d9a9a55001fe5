"""Moments of clips that were computed before, and which VAE they are of.

A file of moments, as CogVideoX's tools write them, is one tensor 2C F H/8 W/8: C means, then C logarithms of
variances, before any normalization.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.containers import load_pickled
from dataset.sources.frames import Span
from dataset.sources.media_source import ClipInfo, MediaSource
from modules.atomic_write import write_text
from modules.errors import CheckpointError, DatasetError, MediaError
from modules.media.lengths import ClipLengths
from modules.option_values import as_shape
from modules.text_files import parse_json, read_text
from protocols.data import LatentSpec

PREPARED = "reelsmith_prepared.json"
VERSION = 1


def full_span(clip: ClipInfo, lengths: ClipLengths) -> Span:
    """Return the span of the only item in moments: all frames that fit a length of the family."""
    return (0, lengths.fit(clip.kept_frames))


def read_tensor(path: Path) -> Tensor:
    """Read the tensor of a .pt file, mapped. Code in it is refused, not run.

    Raises:
        MediaError: If the file is missing, damaged, or holds anything else.
    """
    if not path.exists():
        raise MediaError(f"{path} does not exist")
    try:
        content = load_pickled(path)
    except CheckpointError as error:
        raise MediaError(str(error)) from error
    if not isinstance(content, Tensor):
        raise MediaError(f"{path} holds {type(content).__name__}, not a tensor")
    return content


def read_moments(path: Path, latent: LatentSpec) -> Tensor:
    """Read moments 2C F h w, mapped.

    `latent` is that of the model that they are for.

    A leading axis of size 1, which some tools leave, is removed.

    Raises:
        MediaError: If the file cannot be read, or if its tensor cannot be moments of the model.
    """
    moments = read_tensor(path)
    if moments.ndim == 5 and len(moments) == 1:
        moments = moments[0]
    shape = as_shape(moments.shape)
    if moments.ndim != 4 or not moments.numel() or not moments.is_floating_point():
        raise MediaError(
            f"{path} holds {shape or 'a number'} of {moments.dtype}, not moments of a VAE (channels x frames "
            "x height x width)"
        )
    if moments.shape[0] != 2 * latent.channels:
        raise MediaError(
            f"{path} has {moments.shape[0]} channels: {explain_channels(moments.shape[0], latent)}"
        )
    return moments


def explain_channels(channels: int, latent: LatentSpec) -> str:
    """Describe the channels that the model needs.

    `channels` is those of the file.
    """
    plain = " These look like latents, not like moments." if channels == latent.channels else ""
    return (
        f"this model's VAE has {2 * latent.channels}, a mean and a variance for each of {latent.channels}."
        f"{plain} Compute them with this model's VAE (prepare_dataset.py), or leave out load_tensors"
    )


def measure(moments: Tensor, latent: LatentSpec, path: Path) -> ClipInfo:
    """Return size and number of frames of the clip from which moments 2C F h w were encoded.

    If the number of latent frames is even, each stands for four frames; if it is odd, the first stands for
    one.

    Raises:
        MediaError: If the model does not take the size.
    """
    frame_stride, height_stride, width_stride = latent.stride
    latent_frames = moments.shape[1]
    height = moments.shape[2] * height_stride
    width = moments.shape[3] * width_stride
    if height % latent.pixel_step or width % latent.pixel_step:
        raise MediaError(
            f"{path} is of a clip of {width}x{height}; the model takes sides that are multiples of "
            f"{latent.pixel_step}"
        )
    num_frames = (
        latent_frames * frame_stride if latent_frames % 2 == 0 else (latent_frames - 1) * frame_stride + 1
    )
    return ClipInfo((width, height), num_frames)


def measure_source(source: MediaSource, latent: LatentSpec) -> ClipInfo:
    """Return the clip of a source with tensors, from the header of its file.

    Raises:
        MediaError: If the file cannot be read, or if its tensor cannot be moments of the model.
    """
    assert source.tensors is not None
    path = source.tensors.moments
    return measure(read_moments(path, latent), latent, path)


@dataclass(frozen=True)
class PreparedFolder:
    """Facts that all items of a prepared folder share. Values are those of JSON."""

    architecture: str | None  # `Family.name` of the model whose VAE made the moments; None: there are none
    vae: Mapping[str, str]  # identity of that VAE
    settings: Mapping[str, Any]  # what items depend on besides their sources


def write_prepared(folder: Path, prepared: PreparedFolder) -> None:
    """Write the file of a folder.

    Raises:
        OutputError: If that fails.
    """
    content = {"version": VERSION, **asdict(prepared)}
    write_text(folder / PREPARED, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def read_prepared(folder: Path) -> PreparedFolder | None:
    """Read the file of a folder; None if there is none: another program made it.

    Raises:
        DatasetError: If it cannot be read.
    """
    path = folder / PREPARED
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path))
        return PreparedFolder(content["architecture"], dict(content["vae"]), dict(content["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({type(error).__name__}: {error}). prepare_dataset.py writes it; prepare "
            "the data into another folder, or remove this file if the data are of another program."
        ) from error
