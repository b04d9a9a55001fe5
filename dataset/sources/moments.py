"""Precomputed moments of clips, and the VAE that made them.

A moments file, as CogVideoX's tools write it, is one tensor 2C F H/8 W/8: C means, then C logarithms of
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
from modules.option_values import format_shape
from modules.text_files import parse_json, read_text
from protocols.data import LatentSpec

PREPARED = "reelsmith_prepared.json"
VERSION = 1


def full_span(clip: ClipInfo, lengths: ClipLengths) -> Span:
    """Return the span of a clip with precomputed moments: all frames, cut to a length the family accepts."""
    return (0, lengths.fit(clip.kept_frames))


def read_tensor(path: Path) -> Tensor:
    """Read the tensor of a .pt file, memory-mapped. Code in the file is rejected, not executed.

    Raises:
        MediaError: If the file is missing or damaged, or contains anything other than a tensor.
    """
    if not path.exists():
        raise MediaError(f"{path} does not exist")
    try:
        content = load_pickled(path)
    except CheckpointError as error:
        raise MediaError(str(error)) from error
    if not isinstance(content, Tensor):
        raise MediaError(f"{path} contains {type(content).__name__}, not a tensor")
    return content


def read_moments(path: Path, latent: LatentSpec) -> Tensor:
    """Read VAE moments 2C F h w, memory-mapped, for a model with the latent space `latent`.

    A batch dimension of 1, which some tools write, is removed.

    Raises:
        MediaError: If the file cannot be read, or if its tensor cannot contain this model's moments.
    """
    moments = read_tensor(path)
    if moments.ndim == 5 and len(moments) == 1:
        moments = moments[0]
    shape = format_shape(moments.shape)
    if moments.ndim != 4 or not moments.numel() or not moments.is_floating_point():
        raise MediaError(
            f"{path} contains {shape or 'a number'} of {moments.dtype}, not moments of a VAE (channels x "
            "frames x height x width)"
        )
    if moments.shape[0] != 2 * latent.channels:
        raise MediaError(
            f"{path} has {moments.shape[0]} channels: {explain_channels(moments.shape[0], latent)}"
        )
    return moments


def explain_channels(channels: int, latent: LatentSpec) -> str:
    """Return how many channels the moments need; `channels` is how many the file has."""
    guess = " These look like latents, not like moments." if channels == latent.channels else ""
    return (
        f"this model's VAE has {2 * latent.channels}: a mean and a log variance for each of "
        f"{latent.channels}.{guess} Compute them with this model's VAE (prepare_dataset.py), or omit "
        "load_tensors"
    )


def measure(moments: Tensor, latent: LatentSpec, path: Path) -> ClipInfo:
    """Return the size and frame count of the clip that VAE moments (mean and log variance, 2C F h w) encode.

    If the number of latent frames is even, each stands for `stride[0]` frames; if it is odd, the first stands
    for one frame.

    Raises:
        MediaError: If the model does not support the size.
    """
    frame_stride, height_stride, width_stride = latent.stride
    latent_frames = moments.shape[1]
    height = moments.shape[2] * height_stride
    width = moments.shape[3] * width_stride
    if height % latent.pixel_step or width % latent.pixel_step:
        raise MediaError(
            f"{path} is of a clip of {width}x{height} pixels, but this model needs sides that are multiples "
            f"of {latent.pixel_step}"
        )
    if latent_frames % 2 == 0:
        num_frames = latent_frames * frame_stride
    else:
        num_frames = (latent_frames - 1) * frame_stride + 1
    return ClipInfo((width, height), num_frames)


def measure_source(source: MediaSource, latent: LatentSpec) -> ClipInfo:
    """Return the size and frame count of a clip with precomputed moments, from its tensor's shape.

    Raises:
        MediaError: If the file cannot be read, or if its tensor cannot contain moments of this model's VAE.
    """
    assert source.precomputed is not None
    path = source.precomputed.moments
    return measure(read_moments(path, latent), latent, path)


@dataclass(frozen=True)
class PreparedFolder:
    """Settings, as JSON values, with which prepare_dataset.py computed a folder's tensors."""

    architecture: str | None  # `Family.name` of the model whose VAE made the moments; None: there are none
    vae: Mapping[str, str]  # identity of that VAE
    settings: Mapping[str, Any]  # settings on which items depend in addition to their sources


def write_prepared(folder: Path, prepared: PreparedFolder) -> None:
    """Write the metadata file of a folder with prepared tensors.

    Raises:
        OutputError: If the file cannot be written.
    """
    content = {"version": VERSION, **asdict(prepared)}
    write_text(folder / PREPARED, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def read_prepared(folder: Path) -> PreparedFolder | None:
    """Return which VAE and settings a folder's precomputed latents were made with; None if not recorded.

    Folders of other trainers have no such record.

    Raises:
        DatasetError: If the file cannot be read.
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
            "the data into another folder, or remove this file if another program made the data."
        ) from error
