"""Cache files: names of files and tensors, reading and writing, and the protocol of a store of cache files.

Names and tensors are as in musubi-tuner, so that files can be exchanged. The metadata also records the
origin of a file (see records.py).
"""

import os
import re
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from checkpoints.writing import stream_tensors
from modules.devices import dtype_name
from modules.errors import CacheError
from modules.option_values import format_shape
from modules.text_files import read_tensor_header
from protocols.data import AUDIO_LATENTS, LatentSpec
from protocols.loading import TensorInfo

FORMAT_VERSION = "1.0.1"  # as in caches of musubi-tuner
SUFFIX = ".safetensors"
PART = ".part"  # suffix of a text cache that some of the text encoders have not written yet
VARIABLE = "varlen_"  # prefix of the name of a tensor with variable length

FLIPPED = "_flipped"  # suffix of the keys of mirrored latents
AUDIO_LENGTH = "audio_lengths"  # number of frames T of audio latents, which other programs read
EMPTY = -1  # index of the empty prompt, in place of the index of a caption

Grid = tuple[int, int, int]  # F, H, W of latents


class NpzNames(NamedTuple):
    """Facts about a model family that determine the names of npz cache files and of their arrays."""

    tag: str  # cache_tag of the family
    latent: LatentSpec
    text_keys: frozenset[str]  # keys of a complete text cache


_DTYPE = r"(?:bfloat16|float(?:16|32|64|8_e4m3fn|8_e5m2)|u?int(?:8|16|32|64)|bool)"
_TENSOR_NAME = re.compile(rf"(?:{VARIABLE})?\w+(?:_mask|_{_DTYPE})", re.ASCII)
_AUDIO_NAME = re.compile(rf"{AUDIO_LATENTS}_\d+x\d+x\d+_{_DTYPE}", re.ASCII)
_LATENT_NAME = re.compile(rf"(latents(?:_\w+?)?)_(?:(\d+)x)?(\d+)x(\d+)_{_DTYPE}", re.ASCII)
# latents or audio latents of any family; texts: first or further captions, the empty prompt; unfinished texts
_CACHE_NAME = re.compile(
    r"(.+_[0-9]+x[0-9]+_[a-z0-9]+(_audio)?|.+_[a-z0-9]+_te(\.caption[0-9]+)?|(.+_)?[a-z0-9]+_te\.empty)"
    r"\.safetensors(\.part)?",
    re.DOTALL,
)
_MORE_TEXT = re.compile(r"(.+)_([a-z0-9]+)_te\.caption([2-9]|[1-9][0-9]{1,5})\.safetensors", re.DOTALL)
_BAD_CHARACTER = re.compile(r"[/\\:\x00]" if os.name == "nt" else r"[/\x00]")
_FIRST_BYTES = 16 * 1024  # bytes of a first read, enough for the header of nearly every entry
_SPAN = re.compile(r"(\d+)-(\d+)(?:-(\d+))?")
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class LatentName:
    """The parts of a latent cache file's name."""

    stem: str
    size: tuple[int, int]  # width, height: of the original for images, after bucketing for videos
    span: tuple[int, int] | None = None  # videos: index of the first frame, number of frames
    section: int | None = None  # FramePack videos: index of the section

    def file_name(self, tag: str) -> str:
        """Return the file name of these latents, such as `clip_00000-017_0112x0080_wan.safetensors`.

        Args:
            tag: The family's cache_tag.
        """
        parts = [self.stem]
        if self.span is not None:
            first_frame, num_frames = self.span
            section = "" if self.section is None else f"-{self.section:04d}"
            parts.append(f"{first_frame:05d}-{num_frames:03d}{section}")
        width, height = self.size
        parts += [f"{width:04d}x{height:04d}", tag]
        return "_".join(parts) + SUFFIX


def audio_tag(tag: str) -> str:
    """Return the tag in file names of audio latents: `clip_..._ltx2_audio` next to `clip_..._ltx2`."""
    return f"{tag}_audio"


def audio_file_name(latent_file: str, tag: str) -> str:
    """Return the name of the audio cache file that belongs to a clip's latent cache file."""
    return latent_file.removesuffix(f"{tag}{SUFFIX}") + audio_tag(tag) + SUFFIX


def parse_latent_name(file_name: str, tag: str, kind: str) -> LatentName | None:
    """Parse the file name of a family's latent cache of this kind ("image" or "video").

    Returns None for other names.
    """
    family_ending = f"_{tag}{SUFFIX}"
    if not file_name.endswith(family_ending) or file_name.startswith("."):
        return None
    tokens = file_name.removesuffix(family_ending).split("_")  # stem, for videos span, size
    size = _SIZE.fullmatch(tokens.pop())
    if size is None:
        return None
    width, height = int(size[1]), int(size[2])
    if kind == "image":
        return LatentName("_".join(tokens), (width, height)) if tokens else None
    if len(tokens) < 2:
        return None
    span = _SPAN.fullmatch(tokens.pop())
    if span is None:
        return None
    first_frame, num_frames = int(span[1]), int(span[2])
    section = None if span[3] is None else int(span[3])
    return LatentName("_".join(tokens), (width, height), (first_frame, num_frames), section)


def latent_names(names: Iterable[str], tag: str, kind: str) -> Iterator[tuple[str, str, LatentName]]:
    """Yield a family's latent caches among these file names, in order: file name, stem, and parsed ending.

    Folders may have a million names with few different endings (size, span and tag). For speed, each ending
    is parsed once, to a `LatentName` with a meaningless stem, which all names with this ending share.
    """
    family_ending = f"_{tag}{SUFFIX}"
    num_parts = 1 if kind == "image" else 2  # between stem and tag: 0112x0080, or 00000-017 and 0112x0080
    parsed_endings: dict[str, LatentName | None] = {}
    # of the previous name, because most names have the same ending as that
    ending: str | None = None
    parsed: LatentName | None = None
    for name in names:
        if not name.endswith(family_ending) or name[0] == ".":
            continue
        if ending is None or not name.endswith(ending):
            stem, *parts = name.removesuffix(family_ending).rsplit("_", num_parts)
            if len(parts) < num_parts:
                continue
            ending = name[len(stem) :]
            if ending not in parsed_endings:
                parsed_endings[ending] = parse_latent_name(f"x{ending}", tag, kind)  # x: any stem
            parsed = parsed_endings[ending]
        if parsed is not None:
            yield name, name[: -len(ending)], parsed


def text_file_name(stem: str, tag: str, number: int = 0) -> str:
    """Return the name of a text cache, such as `clip_wan_te.safetensors`, for all items of a media file.

    `number` is the index of the caption. Additional captions are in `clip_wan_te.caption2.safetensors` and so
    on; other programs ignore these names. EMPTY stands for the empty prompt, encoded with the file's
    reference images: `clip_wan_te.empty.safetensors`.
    """
    if number == EMPTY:
        return f"{stem}_{empty_text_name(tag)}"
    caption = f".caption{number + 1}" if number else ""
    return f"{stem}_{tag}_te{caption}{SUFFIX}"


def empty_text_name(tag: str) -> str:
    """Return the name of the empty prompt's cache, which all items of a folder share."""
    return f"{tag}_te.empty{SUFFIX}"


def parse_more_text_name(file_name: str, tag: str) -> tuple[str, int] | None:
    """Return stem and index (at least 1) from the file name of a further caption; None for other names."""
    match = _MORE_TEXT.fullmatch(file_name)
    if match is None or match[2] != tag or file_name.startswith("."):
        return None
    return match[1], int(match[3]) - 1


def is_text_name(file_name: str, tag: str) -> bool:
    """Return whether a file name belongs to any text cache of the family."""
    if "_te." not in file_name:  # fast path: half of a million names are latents
        return False
    return (
        parse_text_name(file_name, tag) is not None
        or parse_more_text_name(file_name, tag) is not None
        or is_empty_text_name(file_name, tag)
    )


def is_empty_text_name(file_name: str, tag: str) -> bool:
    """Return whether a file name belongs to an empty prompt's cache, for a folder or a single item."""
    name = empty_text_name(tag)
    return file_name == name or (file_name.endswith(f"_{name}") and not file_name.startswith("."))


def parse_text_name(file_name: str, tag: str) -> str | None:
    """Return the stem in the name of a first caption's text cache; None for other names."""
    ending = f"_{tag}_te{SUFFIX}"
    if not file_name.endswith(ending) or file_name.startswith("."):
        return None
    return file_name.removesuffix(ending)


def is_cache_name(name: str) -> bool:
    """Return whether a file name belongs to a cache of any model family."""
    return not name.startswith(".") and _CACHE_NAME.fullmatch(name) is not None


def is_safe_name(name: str) -> bool:
    """Return whether a file name is valid on all operating systems."""
    return name not in {"", ".", ".."} and _BAD_CHARACTER.search(name) is None


def tensor_name(
    key: str, tensor: Tensor, variable: bool = False, grid: Grid | None = None, has_frames: bool = True
) -> str:
    """Return the name that a tensor has in a cache file: its key, sizes and dtype.

    Args:
        key: Name of the tensor in batches.
        tensor: The tensor, without batch dimension.
        variable: Whether the tensor's length varies between items.
        grid: F, H, W for the name of latents; None for the last dimensions of the tensor.
        has_frames: Whether the name of latents includes F.
    """
    if variable:
        return f"{VARIABLE}{key}_{dtype_name(tensor.dtype)}"
    if key.endswith("_mask"):
        return key
    if key == AUDIO_LATENTS:  # C T M is written T x M x C
        channels, length, width = tensor.shape
        return f"{key}_{length}x{width}x{channels}_{dtype_name(tensor.dtype)}"
    if key == "latents" or key.startswith("latents_"):
        frames_height_width = grid or tuple(tensor.shape[-3:])
        sizes = frames_height_width if has_frames else frames_height_width[1:]
        return f"{key}_{format_shape(sizes)}_{dtype_name(tensor.dtype)}"
    return f"{key}_{dtype_name(tensor.dtype)}"


def tensor_key(name: str) -> str:
    """Return the key in batches for a tensor name in a cache file; the inverse of `tensor_name`.

    `latents_image_5x8x8_bfloat16` -> `latents_image`, `varlen_t5_bfloat16` -> `t5`; masks are unchanged.
    """
    latents = _LATENT_NAME.fullmatch(name)
    if latents is not None:
        return latents[1]
    if _AUDIO_NAME.fullmatch(name):
        return AUDIO_LATENTS
    name = name.removeprefix(VARIABLE)
    return name if name.endswith("_mask") else re.sub(f"_{_DTYPE}$", "", name)


def grid_in_name(name: str) -> Grid | None:
    """Return F, H, W from the name of a latents tensor; None for other names. F is 1 if the name lacks it."""
    latents = _LATENT_NAME.fullmatch(name)
    if latents is None:
        return None
    return int(latents[2] or 1), int(latents[3]), int(latents[4])


@dataclass(frozen=True)
class Entry:
    """The contents of a cache file, or only its header."""

    place: Path | str  # path of the file; a str for speed, which `path` converts
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]  # shapes of tensors, by name in the file
    # tensors by name in the file; {} if only the header was read
    named: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(place: Path | str, metadata: Mapping[str, str], named: Mapping[str, Tensor]) -> "Entry":
        """Create an entry from tensors by their names in the file; `place` is its path, for messages."""
        return Entry(place, metadata, {name: tuple(tensor.shape) for name, tensor in named.items()}, named)

    @property
    def path(self) -> Path:
        """Path of the file, created on access because there may be millions of entries."""
        return Path(self.place)

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the tensors in batches."""
        return frozenset(map(tensor_key, self.shapes))

    @property
    def grids(self) -> frozenset[Grid]:
        """The latent sizes F, H, W at the end of the tensor names."""
        return frozenset(grid for grid in map(grid_in_name, self.shapes) if grid is not None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their key in batches; latents get a frame axis if the file lacks it."""
        tensors = {}
        for name, tensor in self.named.items():
            key = tensor_key(name)
            # latents of images are C H W in some caches; audio latents, C 2 T, have no frames
            is_flat = tensor.ndim == 3 and not key.endswith("_audio") and grid_in_name(name) is not None
            tensors[key] = tensor.unsqueeze(1) if is_flat else tensor
        return tensors

    @property
    def variable(self) -> frozenset[str]:
        """Keys of the tensors whose length differs between items."""
        return frozenset(tensor_key(name) for name in self.named if name.startswith(VARIABLE))


class CacheStore(Protocol):
    """The entries (cache files) of one folder, whether stored singly, in shards or as npz files.

    An entry exists completely or not at all. Several threads may use a store at the same time, and other
    processes may write other entries of the same folder.
    """

    @property
    def folder(self) -> Path:
        """The cache folder, which need not exist."""

    @property
    def holds_only_caches(self) -> bool:
        """Whether the folder contains only caches, so that a damaged entry may be removed."""

    @property
    def is_shared(self) -> bool:
        """Whether other trainers may have cache files in the folder; valid ones are used, none is removed."""

    def names(self) -> Collection[str]:
        """Return the names of all entries, and of any other files in the folder."""

    def __contains__(self, name: str) -> bool:
        """Return whether an entry of this name exists, valid or damaged."""

    def read(self, name: str, is_full: bool = True) -> Entry:
        """Read a cache file into CPU memory, or only its header if `is_full` is False.

        Raises:
            CacheError: If the file is missing or damaged.
        """

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a cache file, replacing one of the same name; `tensors` are keyed by their names in the file.

        Equal contents give equal bytes. Raises OutputError if the file cannot be written.
        """

    def remove(self, name: str) -> None:
        """Remove a cache file if it exists."""

    def close(self, is_last: bool = False) -> None:
        """Flush all written entries; called when a writer is done, which may write again later.

        Args:
            is_last: Whether all writers of a run have finished, so that this process may tidy the store.

        Raises:
            OutputError: If there is not enough disk space; no entry is lost then.
        """


def read_entry(path: Path | str, is_full: bool = True) -> Entry:
    """Read a cache file to the CPU; only metadata and tensor names if `is_full` is False.

    Raises:
        CacheError: If the file is missing or damaged.
    """
    non_blocking = getattr(os, "O_NONBLOCK", 0)  # else opening a named pipe would wait for its writer
    try:
        # `open` is faster than Path.open
        with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | non_blocking)) as file:  # noqa: PTH123
            info = os.fstat(file.fileno())
            if stat.S_ISREG(info.st_mode):
                if is_full:
                    return unpack(path, file.read())
                return unpack_header(path, info.st_size, file.read)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass  # reported below, like a path that is not a regular file
    except OSError as error:
        raise _damage_error(path, error) from error
    raise CacheError(f"{path}: no such cache file")


def unpack(path: Path | str, data: bytes) -> Entry:
    """Parse the bytes of a cache file; its tensors are sorted by name.

    `path` is for messages only.

    Raises:
        CacheError: If the bytes are not a safetensors file.
    """
    try:
        tensors = load(data)
        metadata = read_tensor_header(lambda _: data, len(data)).metadata  # parses the first bytes of `data`
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damage_error(path, error) from error
    sorted_tensors = {name: tensors[name] for name in sorted(tensors)}
    return Entry.of(path, metadata, sorted_tensors)


def unpack_header(path: Path | str, size: int, read: Callable[[int], bytes]) -> Entry:
    """Parse the header of a cache file of `size` bytes; the result has metadata and shapes, but no tensors.

    `read` returns the next N bytes of the file.

    Raises:
        CacheError: If the bytes are not a safetensors file.
    """
    try:
        metadata, content, start = read_tensor_header(read, size, _FIRST_BYTES)
        shapes = {name: tuple(map(int, content[name]["shape"])) for name in sorted(content)}
        end = max((info["data_offsets"][1] for info in content.values()), default=0)
        if end != size - start:
            raise ValueError(f"its tensors have {end} bytes, but the file has {size - start}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damage_error(path, error) from error
    return Entry(path, metadata, shapes)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a cache file atomically; `tensors` are keyed by their names in the file.

    Equal contents give equal bytes; the safetensors library would write metadata in varying order.
    """
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, infos, tensors.__getitem__, dict(sorted(metadata.items())))


def checksum(name: str, tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's name, shape and bytes, as eight hexadecimal digits."""
    start = zlib.crc32(f"{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data.data, start):08x}"


def is_latent_cache(entry: Entry, architecture: str, audio: bool = False) -> bool:
    """Return whether a file's tensor names show that it is a latent cache of the family, not a LoRA.

    Args:
        entry: Cache file or its header.
        architecture: The family's name.
        audio: Whether to check for an audio cache instead.
    """
    # latents have their size F x H x W in the name, audio latents do not
    has_latents = AUDIO_LATENTS in entry.keys if audio else bool(entry.grids)
    matches_family = entry.metadata.get("architecture", architecture) == architecture
    return has_latents and matches_family and _all_cache_names(entry)


def is_text_cache(entry: Entry, architecture: str) -> bool:
    """Return whether a file's tensor names show that it is a text cache of the family."""
    return not entry.grids and _all_cache_names(entry) and entry.metadata.get("architecture") == architecture


def _all_cache_names(entry: Entry) -> bool:
    """Return whether all tensor names in a file have the form of cache tensor names."""
    return bool(entry.shapes) and all(map(_TENSOR_NAME.fullmatch, entry.shapes))


def _damage_error(path: Path | str, error: Exception) -> CacheError:
    """Return the exception that reports a damaged cache file."""
    return CacheError(f"{path}: damaged, cannot be read as safetensors ({error})")
