"""Caches in npz files next to the images, in the layout of sd-scripts.

Latents of an image are in `STEM_WWWWxHHHH_TAG.npz` (W, H: size of the image). For each resolution, the file
has the arrays `latents`, `latents_flipped`, `alpha_mask`, `original_size` and `crop_ltrb` with the suffix
`_{h}x{w}` in latent pixels; without `NpzFormat.has_resolutions`, it has one resolution and no suffix. Files
of older programs are called `STEM.npz` and are read if there is no other (`NpzFormat.reads_untagged_files`).
Texts are in `STEM_TAG_te.npz`. Other programs read and write these files, too: their files are used if they
fit, and never removed as stale. Reelsmith's files have one more array for each resolution, the record of its
sources, which other programs ignore.
"""

import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from dataset import cache_files
from dataset.forms.npz_files import (
    OURS,
    Array,
    NpzArray,
    as_array,
    describe_tensors,
    format_array,
    list_arrays,
    open_record,
    read_arrays,
    read_members,
    write_members,
)
from dataset.sources.frames import find_bucket, shrink_mask
from dataset.table import DatasetTable
from modules.atomic_write import explain_errors
from modules.devices import dtype_name
from modules.errors import CacheError
from modules.file_locks import only_one
from modules.media.buckets import Size, inner_box
from protocols.data import FOREIGN_SIZES, LOSS_MASK, LatentSpec
from protocols.rules import NpzFormat

logger = logging.getLogger(__name__)

T = TypeVar("T")

NPZ = ".npz"
LOCK = ".reelsmith-npz.lock"  # held while a resolution is added to a file of the folder
ALPHA, MIRRORED = "alpha_mask", "latents" + cache_files.FLIPPED  # names of arrays
_KNOWN = ("latents", MIRRORED)  # keys of tensors that other programs read
# file name endings that reveal the content; files with other names may be `STEM.npz`
_STATED_CONTENT = re.compile(r"_(\d{4,5}x\d{4,5}_\w+|te_outputs|\w+_te)$")


@dataclass(frozen=True)
class NpzStore:
    """Cache store that keeps a table's entries in npz files.

    Messages outside this class refer to an entry as a single cache file; those of this class name the npz
    file.
    """

    table: DatasetTable
    tag: str  # cache_tag of the family
    latent: LatentSpec
    text_keys: frozenset[str]  # keys of a complete text cache
    folder: Path
    # paths without suffix, by stem, of images that a list names and that may be in several folders
    image_paths: Mapping[str, Path] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set, compare=False, repr=False)  # files that were warned about
    holds_only_caches: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True

    def names(self) -> Collection[str]:
        """Return the names of all entries in the npz files of the table's folders."""
        stems = {path: stem for stem, path in self.image_paths.items()}
        names = []
        for folder in {self.folder, *(path.parent for path in stems)}:
            if not folder.is_dir():
                continue
            for file in os.listdir(folder):
                name = self._find_entry_name(file, folder, stems)
                if name is None:
                    name = self._find_untagged_entry(file, folder, stems)
                if name is not None:
                    names.append(name)
        return [*dict.fromkeys(names)]  # an entry may be in a file of each kind

    def __contains__(self, name: str) -> bool:
        return self._find_entry_file(name).is_file()

    def read(self, name: str, is_full: bool = True) -> cache_files.Entry:
        """Read an entry, always with its tensors: opening an npz file takes most of the time anyway."""
        return self._read_text(name) if self._is_text(name) else self._read_latents(name)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a text to its file, or add latents of one resolution to the image's file."""
        if self._is_text(name):
            # the outputs of text encoders, and the constant arrays that other trainers expect
            tensor_names = {cache_files.tensor_key(tensor_name): tensor_name for tensor_name in tensors}
            arrays: dict[str, Array] = {}
            for key, tensor_name in tensor_names.items():
                arrays[key] = as_array(tensors[tensor_name], keep_half=True)
            members = {key: format_array(array) for key, array in arrays.items()}
            members[OURS] = format_array(describe_tensors(tensors, tensor_names, metadata, members))
            for key, array in self._make_constants(arrays).items():
                if key not in members:
                    members[key] = format_array(array)
            write_members(self._path(name), members)
        else:
            self._write_latents(name, tensors, metadata)

    def remove(self, name: str) -> None:
        """Remove a text's file, or one resolution from a latents file; an empty file is deleted."""
        path = self._path(name)
        if self._is_text(name):
            path.unlink(missing_ok=True)
            return
        suffix = self._suffix(name)
        with explain_errors(path), only_one(path.with_name(LOCK)):
            members = read_members(path) if path.is_file() else {}
            other_sizes = {array: data for array, data in members.items() if not array.endswith(suffix)}
            if other_sizes:
                write_members(path, other_sizes)
            else:
                path.unlink(missing_ok=True)

    def close(self, is_last: bool = False) -> None:
        """Do nothing: each file is flushed when it is written, and a later write removes unfinished ones."""

    @property
    def format(self) -> NpzFormat:
        """Layout of the npz files that this model family uses."""
        assert self.latent.npz is not None  # checked by `open_store` in dataset/forms/npz.py
        return self.latent.npz

    # --- names ---

    def _is_text(self, name: str) -> bool:
        """Return whether a file name belongs to a text cache."""
        return cache_files.is_text_name(name.removesuffix(cache_files.PART), self.tag)

    def _path(self, name: str) -> Path:
        """Return the path of the npz file that contains an entry."""
        finished_name = name.removesuffix(cache_files.PART)
        unfinished_suffix = name[len(finished_name) :]  # PART or ""
        npz_stem = _replace_ending(finished_name.removesuffix(cache_files.SUFFIX), self._endings())
        npz_name = f"{npz_stem}{NPZ}{unfinished_suffix}"
        source_stem = self._source_stem(name)
        image_path = self.image_paths.get(source_stem)
        if image_path is None:
            return self.folder / npz_name
        # the stem of an image in a list may differ from its file name
        return image_path.with_name(image_path.name + npz_name.removeprefix(source_stem))

    def _find_entry_file(self, name: str) -> Path:
        """Return the file of an entry: the one with its name, otherwise the `STEM.npz` of an older trainer.

        The names of older trainers contain no model tag, so a warning is logged once.
        """
        path = self._path(name)
        stem = self._source_stem(name)
        is_latents = bool(stem) and not self._is_text(name)
        if path.is_file() or not is_latents or not self.format.reads_untagged_files:
            return path
        image_path = self.image_paths.get(stem, self.folder / stem)
        untagged = image_path.with_name(image_path.name + NPZ)
        if not untagged.is_file():
            return path
        if not self._warned:  # one warning for all such files
            self._warned.add(untagged.name)
            logger.warning(
                "%s: latents of an older program, whose name does not contain the model. Remove such files "
                "if they are not of %s.",
                untagged,
                self.tag,
            )
        return untagged

    def _find_untagged_entry(self, file: str, folder: Path, stems: Mapping[Path, str]) -> str | None:
        """Return the name of the cache entry in an older trainer's `STEM.npz`; None for other files."""
        # The name of such a file lacks the image size, which is in the file.
        file_stem = file.removesuffix(NPZ)
        reveals_content = _STATED_CONTENT.search(file_stem) is not None  # by its ending
        if not self.format.reads_untagged_files or not file.endswith(NPZ) or reveals_content:
            return None
        source_stem = stems.get(folder / file_stem) if self.image_paths else file_stem
        if source_stem is None:
            return None
        try:
            arrays = read_arrays(folder / file, lambda array: array == "original_size")
            width, height = map(int, arrays["original_size"].tensor.tolist())
        except (CacheError, KeyError, TypeError, ValueError):
            return None
        return cache_files.LatentName(source_stem, (width, height)).file_name(self.tag)

    def _source_stem(self, name: str) -> str:
        """Return the stem of the media file that a cache name belongs to; "" for the empty prompt."""
        finished = name.removesuffix(cache_files.PART)
        latents = cache_files.parse_latent_name(finished, self.tag, "image")
        if latents is not None:
            return latents.stem
        further = cache_files.parse_more_text_name(finished, self.tag)
        if further is not None:
            stem, _ = further
            return stem
        return cache_files.parse_text_name(finished, self.tag) or ""

    def _find_entry_name(self, file: str, folder: Path, stems: Mapping[Path, str]) -> str | None:
        """Return the name of the cache entry in an npz file."""
        # None if the file is not of this family or table.
        # 1. Replace the ending of the file's name, which other programs know, with that of a cache entry.
        # 2. Replace the stem of the image's file with the stem of the item, which may differ in a list.
        # `stems` are the stems of items in a list, by path of the image without suffix.
        finished_file = file.removesuffix(cache_files.PART)
        if not finished_file.endswith(NPZ):
            return None
        unfinished_suffix = file[len(finished_file) :]  # PART or ""
        file_to_entry = [(file_ending, entry_ending) for entry_ending, file_ending in self._endings()]
        name = _replace_ending(finished_file.removesuffix(NPZ), file_to_entry) + cache_files.SUFFIX
        if not self._is_text(name) and cache_files.parse_latent_name(name, self.tag, "image") is None:
            return None
        file_stem = self._source_stem(name)
        if folder / file_stem in stems:
            name = stems[folder / file_stem] + name.removeprefix(file_stem)
        elif folder != self.folder or file_stem in self.image_paths:  # the image is no longer in the list
            return None
        return name + unfinished_suffix

    def _endings(self) -> tuple[tuple[str, str], ...]:
        """Return pairs of name endings: of a cache entry (without suffix), and of its npz file."""
        return (f"_{self.tag}_te", self.format.text_suffix), (f"_{self.tag}", self.format.latent_suffix)

    # --- latents ---

    def _sizes(self, name: str) -> tuple[Size, Size]:
        """Return two sizes of an image: its own, from its cache file's name, and its bucket."""
        parsed = cache_files.parse_latent_name(name, self.tag, "image")
        if parsed is None:
            raise CacheError(f"{self.folder / name}: its name is not that of an image's latents")
        step = self.latent.pixel_step
        return parsed.size, find_bucket(self.table, parsed.size, step, self._path(name))

    def _grid(self, name: str) -> tuple[int, int]:
        """Return the height and width of an entry's latents, computed from the image size in its name."""
        _, (width, height) = self._sizes(name)
        *_, latent_height, latent_width = self.latent.shape(1, height, width)
        return latent_height, latent_width

    def _suffix(self, name: str) -> str:
        """Return the suffix of array names for a file's resolution (`_64x48`); "" if the format has none."""
        if not self.format.has_resolutions:
            return ""
        height, width = self._grid(name)
        return f"_{height}x{width}"

    def _read_latents(self, name: str) -> cache_files.Entry:
        """Read an item's latents from an npz file, which may also contain latents of other resolutions."""
        path, suffix = self._find_entry_file(name), self._suffix(name)
        members = read_arrays(path, lambda array_name: array_name.endswith(suffix))
        arrays = {array_name.removesuffix(suffix): array for array_name, array in members.items()}
        if "latents" not in arrays:
            cached = [array_name for array_name in list_arrays(path) if array_name.startswith("latents_")]
            sizes = ", ".join(sorted(array_name.removeprefix("latents") for array_name in cached))
            raise CacheError(f"{path}: it has no latents{suffix}, but those of {sizes or 'nothing'}")
        entry = open_record(path, arrays, self._reshape_latents)
        if entry is not None:
            return entry
        return self._read_foreign_latents(path, arrays, self._grid(name))

    def _reshape_latents(self, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of an npz file in the shape that this program's metadata in the file states."""
        # masks for other programs have the size of the image, but training needs the size of the latents
        if key == LOSS_MASK and tensor.numel() != math.prod(shape):
            # shrink_mask takes frames with values 0..255
            return shrink_mask(tensor[None] * 255, self.latent.stride)
        return tensor.reshape(shape)

    def _read_foreign_latents(
        self, path: Path, arrays: Mapping[str, NpzArray], grid: tuple[int, int]
    ) -> cache_files.Entry:
        """Return latents that another trainer wrote; raise CacheError if they do not match the table."""
        # `arrays` belong to one resolution, by name without suffix; `grid` is the latents' height and width.
        needed_by = {}  # array -> key of the table that needs it; the caller has checked that latents exist
        if self.table.buckets.augmentation.flip:
            needed_by[MIRRORED] = "flip_aug"
        if self.table.source.alpha_mask:
            needed_by[ALPHA] = "alpha_mask"
        height, width = grid
        for key, table_key in needed_by.items():
            if key not in arrays:
                raise CacheError(f"{path}: it has no {key} of {height}x{width}, which {table_key} needs")
        tensors = {"latents": self._to_video_latents(path, "latents", arrays["latents"].tensor, grid)}
        if MIRRORED in needed_by:
            tensors[MIRRORED] = self._to_video_latents(path, MIRRORED, arrays[MIRRORED].tensor, grid)
        if ALPHA in needed_by:
            tensors[LOSS_MASK] = self._read_foreign_mask(path, arrays[ALPHA].tensor, grid)
        if self.latent.has_size_conditions:
            tensors[FOREIGN_SIZES] = _read_sizes(path, arrays)
        tensors_by_name = {cache_files.tensor_name(key, tensor): tensor for key, tensor in tensors.items()}
        return cache_files.Entry.of(path, {}, tensors_by_name)

    def _to_video_latents(self, path: Path, key: str, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return an array of image latents (C H W, or C 1 H W of older trainers) as C 1 H W."""
        # `key` is the name of the array and `grid` the expected height and width.
        if tensor.ndim == 4 and tensor.shape[1] == 1:
            tensor = tensor[:, 0]
        shape = (self.latent.channels, *grid)
        if tensor.shape != shape or not tensor.is_floating_point():
            raise CacheError(
                f"{path}: its {key} are {dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}, but this "
                f"model's are floating-point numbers of shape {shape}"
            )
        return tensor[:, None]

    def _read_foreign_mask(self, path: Path, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convert a mask from another trainer's cache to 1 H W in latent pixels."""
        # `mask` is H W, in latent pixels or in pixels. `grid` is the height and width of the latents.
        _, height_stride, width_stride = self.latent.stride
        height, width = grid
        if mask.shape == grid:
            return mask[None].half()
        if mask.shape == (height * height_stride, width * width_stride):
            return shrink_mask(mask.float()[None] * 255, self.latent.stride)  # takes values 0..255
        raise CacheError(f"{path}: its alpha_mask has the shape {tuple(mask.shape)}, its latents have {grid}")

    def _write_latents(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write the latents of one bucket to an npz file; arrays of other buckets in it do not change."""
        arrays: dict[str, Array] = {}
        tensor_names: dict[str, str] = {}  # name of the tensor in each array
        for tensor_name, tensor in tensors.items():
            array_name, array = self._latent_array(cache_files.tensor_key(tensor_name), tensor)
            arrays[array_name] = array
            tensor_names[array_name] = tensor_name
        self._add_foreign_arrays(name, arrays)
        members = {array_name: format_array(array) for array_name, array in arrays.items()}
        members[OURS] = format_array(describe_tensors(tensors, tensor_names, metadata, members))
        path, suffix = self._path(name), self._suffix(name)
        with explain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with explain_errors(path), only_one(path.with_name(LOCK)):
            all_members = self._read_other_sizes(path, suffix)
            all_members |= {array_name + suffix: data for array_name, data in members.items()}
            write_members(path, all_members)

    def _add_foreign_arrays(self, name: str, arrays: dict[str, Array]) -> None:
        """Add the arrays that only other trainers need: image size, crop box and an opaque mask."""
        size, bucket = self._sizes(name)
        if self.table.source.alpha_mask and ALPHA not in arrays:  # opaque
            width, height = bucket
            arrays[ALPHA] = np.ones((height, width), np.float32)
        arrays["original_size"] = np.array(size)
        arrays["crop_ltrb"] = np.array(inner_box(size, bucket))

    def _latent_array(self, key: str, tensor: Tensor) -> tuple[str, Array]:
        """Return the name and the array under which an npz file stores a tensor of latents."""
        if key in _KNOWN and tensor.shape[1] == 1:
            return key, as_array(tensor, keep_half=False)[:, 0]  # C H W
        if key == LOSS_MASK and self.table.source.alpha_mask:  # other programs read it in pixels
            _, height_stride, width_stride = self.latent.stride
            mask = tensor[0].repeat_interleave(height_stride, 0).repeat_interleave(width_stride, 1)
            return ALPHA, as_array(mask, keep_half=False)
        return f"{OURS}_{key}", as_array(tensor, keep_half=False)  # a name that other programs ignore

    def _read_other_sizes(self, path: Path, suffix: str) -> dict[str, bytes]:
        """Return the members of an npz file that belong to other resolutions; {} if the file is damaged."""
        # `suffix` is the suffix of the members of this resolution.
        if not path.is_file():
            return {}
        try:
            members = read_members(path)
        except CacheError as error:
            logger.warning("%s. It is made again; cache other sizes that it contained again.", error)
            return {}
        return {array: data for array, data in members.items() if not array.endswith(suffix)}

    # --- texts ---

    def _read_text(self, name: str) -> cache_files.Entry:
        """Read cached text encoder outputs from an npz file, or from an unfinished one (`.part`)."""
        # They are described by this program's record, which unfinished files always have, or by the keys of
        # the format.
        path = self._path(name)
        npz_format = self.format
        keys = self.text_keys
        array_names = {OURS, *keys, *npz_format.constants}
        arrays = read_arrays(path, array_names.__contains__)
        is_part = name.endswith(cache_files.PART)
        if not is_part:
            self._check_constants(path, arrays)
        entry = open_record(path, arrays, lambda _, tensor, shape: tensor.reshape(shape))
        if entry is not None:
            return entry
        missing_keys = sorted(keys - arrays.keys())
        if missing_keys or is_part:
            raise CacheError(f"{path}: it has no {', '.join(missing_keys) or 'record'}")
        tensors_by_name = {}
        for key in sorted(keys):
            tensor = arrays[key].tensor
            tensors_by_name[cache_files.tensor_name(key, tensor, key in npz_format.variable_length)] = tensor
        return cache_files.Entry.of(path, {}, tensors_by_name)

    def _check_constants(self, path: Path, arrays: Mapping[str, NpzArray]) -> None:
        """Raise CacheError if text encoder outputs were made with other settings than this run's."""
        for name, expected in self.format.constants.items():
            array = arrays.get(name)
            stored = None
            if array is not None and array.tensor.numel() == 1:
                stored = array.tensor.item()
            if stored != expected:
                shown = "nothing" if stored is None else stored
                raise CacheError(f"{path}: it was made with {name} {shown}, this training has {expected}")

    def _make_constants(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return constant arrays that other trainers expect besides encoder outputs, such as zeros."""
        added: dict[str, Array] = {name: np.array(value) for name, value in self.format.constants.items()}
        for setting, table_field in self.format.table_settings.items():
            added[setting] = np.array(self.table.value_of(table_field), np.float32)
        for name, (output, num_columns) in self.format.zeros.items():
            if output in arrays:  # zeros with as many rows as this output
                added[name] = np.zeros((len(arrays[output]), num_columns), np.float32)
            elif not output:
                added[name] = np.zeros(num_columns, np.float32)
        return added


def _read_sizes(path: Path, arrays: Mapping[str, NpzArray]) -> Tensor:
    """Return an image's size and crop box (`FOREIGN_SIZES`), as another trainer stored them."""
    numbers: list[float] = []
    for name, count in (("original_size", 2), ("crop_ltrb", 4)):
        if name not in arrays or arrays[name].tensor.numel() != count:
            raise CacheError(f"{path}: it has no {name} with {count} numbers, which the model needs")
        numbers += arrays[name].tensor.double().flatten().tolist()
    if not all(map(math.isfinite, numbers)):
        raise CacheError(f"{path}: its original_size or crop_ltrb is NaN or infinite")
    return torch.tensor(numbers, dtype=torch.float32)


def _replace_ending(stem: str, replacements: Sequence[tuple[str, str]]) -> str:
    """Replace the first of the listed endings that a stem has; a stem with none of them does not change."""
    # `replacements` are pairs of an ending and its replacement.
    for ending, replacement in replacements:
        if stem.endswith(ending):
            return stem.removesuffix(ending) + replacement
    return stem
