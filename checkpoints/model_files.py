"""Find and check model files and folders set by options; read latent files written by generation."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from checkpoints.containers import load_pickled
from checkpoints.finite import is_finite
from checkpoints.opening import open_checkpoint
from modules.command import quote_command
from modules.control_codes import shorten
from modules.errors import CheckpointError, DownloadError, OptionError
from modules.option_values import to_path
from modules.paths import explain_missing
from protocols.data import AUDIO_LATENTS

Found = TypeVar("Found")


def require_file(path: Path | None, option: str, why: str, default: Path | None = None) -> Path:
    """Return the path of a required model file, after checking that it exists.

    Args:
        path: Value of the option.
        option: The option, which both errors name.
        why: Why the file is needed, for the message.
        default: Default of the option, so that the error can say that the path was not typed.

    Raises:
        OptionError: If no path is given.
        CheckpointError: If the file or folder does not exist.
    """
    if path is None:
        command = quote_command(["python", "tools/download.py", "--list"])
        raise OptionError(f"{option} is missing: {why}. {command} shows where to get it")
    if not path.exists():
        named = f"{option} is not given, and its default" if path == default else option
        # `owner/name`: the owner is not a folder here, and the name has no file extension
        has_extension = re.search(r"\.[a-z]\w*$", path.name) is not None
        has_one_slash = re.fullmatch(r"[\w-]+/[\w.-]+", path.as_posix()) is not None
        looks_like_repository = has_one_slash and not path.parent.exists() and not has_extension
        hint = explain_missing(path)
        if not hint and looks_like_repository:
            hint = " Repositories of the hub are not downloaded here."
        raise CheckpointError(
            f"{named} {path}: no such file or folder.{hint} Pass the path of the model",
            path,
        )
    return path


def inside(path: Path, folder: str) -> Path:
    """Return the subfolder `folder` of `path` if it exists, otherwise `path`."""
    return path / folder if (path / folder).is_dir() else path


def read_once(path: Path, read: Callable[..., Found], *arguments: Any) -> Found:
    """Call `read` with the opened file and `arguments`, and cache the result until the file changes.

    Args:
        path: The file to open.
        read: Module-level function such as `read_vae`, which takes a `Checkpoint` and `arguments`.
        *arguments: Other arguments of `read`; they must be hashable.

    Raises:
        CheckpointError: If the file contains a different kind of network.
    """
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    result: Found = _read_once(path, path.absolute(), stamp, read=read, arguments=arguments)
    return result


@lru_cache(maxsize=16)  # called for every prompt of a long list and for every batch
def _read_once(
    path: Path,
    absolute_path: Path,
    stamp: tuple[int, int],
    *,
    read: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    """Read the file at `path`, which error messages name, and cache the result."""
    # `absolute_path` and `stamp` only identify the file and its version in the cache.
    with open_checkpoint(path) as checkpoint:
        return read(checkpoint, *arguments)


def find_model_folder(option: str, name: str, patterns: Sequence[str]) -> Path:
    """Return the folder `name`; if it does not exist, download the repository `owner/name`.

    `patterns` are the names of the files to download, with wildcards.

    Raises:
        CheckpointError: If `name` is neither a folder nor a repository name.
        DownloadError: If the repository cannot be downloaded.
    """
    folder = to_path(option, name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise CheckpointError(
            f"{option} {name}: there is no such folder. Pass the folder of a model, or the name of a "
            "repository, such as owner/name."
        )
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # no network, no such name, no rights: many classes, one remedy
        reason = shorten(str(error) or type(error).__name__, 300)
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and the cache does not contain it"
        raise DownloadError(
            f"{option} {name}: there is no such folder, and it cannot be downloaded from the hub: {reason}. "
            "Pass the folder of a model."
        ) from None


@dataclass(frozen=True)
class SavedLatents:
    """Video and audio latents read from a file, with its metadata."""

    latents: Tensor  # B C F H W
    metadata: Mapping[str, str]
    audio: Tensor | None = None  # B C T M; None for clips without audio


def load_latents(path: Path, option: str = "--latent_path", only_shape: bool = False) -> SavedLatents:
    """Read a latent file: safetensors, or a pickled tensor.

    `option` is the option that sets the path, for messages. With `only_shape`, only the header is read: the
    latents are on the meta device, and the audio is None.

    Raises:
        CheckpointError: If the file is damaged or has no latents.
    """
    if path.suffix == ".safetensors":
        with open_checkpoint(path) as file:
            latents = None
            info = file.tensors.get("latent")
            if info is not None:
                latents = torch.empty(info.shape, device="meta") if only_shape else file.read("latent")
            audio = None
            if AUDIO_LATENTS in file.tensors and not only_shape:
                audio = file.read(AUDIO_LATENTS)[None].float()
            metadata = file.metadata
    else:
        content = load_pickled(path)  # memory-mapped: nothing is read yet
        latents = content.get("latent") if isinstance(content, dict) else content
        if only_shape and isinstance(latents, Tensor):
            latents = latents.to("meta")
        metadata = {}
        audio = None
    if not isinstance(latents, Tensor):
        raise CheckpointError(
            f"{option} {path} has no tensor `latent`. Pass a file written with --output_type latent",
            path,
        )
    if latents.ndim == 4:
        latents = latents[None]  # add the batch axis
    _check_latent_shapes(path, option, latents, audio)
    tensors = [latents] if audio is None else [latents, audio]
    if not only_shape and not all(map(is_finite, tensors)):
        raise CheckpointError(
            f"{option} {path}: its latents contain NaN or infinite values, so nothing can be decoded. "
            "Generate them again",
            path,
        )
    return SavedLatents(latents.float(), metadata, audio)


def _check_latent_shapes(path: Path, option: str, latents: Tensor, audio: Tensor | None) -> None:
    """Raise CheckpointError unless video latents are 1 x C x F x H x W and audio latents 1 x C x T x M."""
    is_empty = latents.numel() == 0 and audio is None  # a file of audio alone has no video latents
    if latents.ndim != 5 or len(latents) != 1 or is_empty:
        raise CheckpointError(
            f"{option} {path}: `latent` has the shape {tuple(latents.shape)}; C F H W of one video is needed",
            path,
        )
    if audio is not None and (audio.ndim != 4 or not audio.numel()):
        raise CheckpointError(
            f"{option} {path}: `{AUDIO_LATENTS}` has the shape {tuple(audio[0].shape)}; C T M of one clip "
            "is needed",
            path,
        )
