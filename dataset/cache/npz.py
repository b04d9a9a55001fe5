"""Caches in npz files beside the pictures, in the layout that image trainers of the known family share.

Latents of a picture: `STEM_WWWWxHHHH_TAG.npz`, W and H of the picture, with the arrays `latents`,
`latents_flipped`, `alpha_mask`, `original_size` and `crop_ltrb` of every resolution, each with the suffix
`_{h}x{w}` in latent pixels. Texts: `STEM_TAG_te.npz`. Other programs read and write these files too: theirs
count if they fit, and nothing is removed as stale. Ours have one more array for each resolution, the record
of its sources, which other programs ignore.
"""

import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from torch import Tensor

from dataset.cache import files as cache_files
from dataset.cache.npz_files import (
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
from dataset.config import DatasetTable
from dataset.sources.frames import bucket_of, shrink_mask
from dataset.sources.listing import find_sources
from modules.atomic_write import explain_errors
from modules.contract.data import LOSS_MASK, LatentSpec
from modules.contract.rules import NpzFormat
from modules.devices import dtype_name
from modules.errors import CacheError, DatasetError
from modules.file_locks import only_one
from modules.media.buckets import Size, inner_box

logger = logging.getLogger(__name__)

T = TypeVar("T")

NPZ = ".npz"
LOCK = ".reelsmith-npz.lock"  # while a file of the folder gets one resolution more
ALPHA, MIRRORED = "alpha_mask", "latents" + cache_files.FLIPPED
_KNOWN = ("latents", MIRRORED)


@dataclass(frozen=True)
class NpzStore:
    """Store entries in the npz files of a table. Messages outside this class name an entry as a single cache
    file; messages of this class name the npz file.
    """

    table: DatasetTable
    tag: str  # of the family
    latent: LatentSpec
    text_keys: frozenset[str]  # of a whole text cache
    folder: Path
    # pictures that a list names, which may be in many folders: stem -> path without suffix
    beside: Mapping[str, Path] = field(default_factory=dict)
    holds_only_caches: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True

    def names(self) -> Collection[str]:
        stems = {path: stem for stem, path in self.beside.items()}
        return [
            name
            for folder in {self.folder, *(path.parent for path in stems)}
            for file in (os.listdir(folder) if folder.is_dir() else ())
            if (name := self._entry_name(file, folder, stems)) is not None
        ]

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str, is_whole: bool = True) -> cache_files.Entry:
        """Read an entry, always whole: most of the time goes into opening the file."""
        return self._read_text(name) if self._is_text(name) else self._read_latents(name)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        if self._is_text(name):
            self._write_text(name, tensors, metadata)
        else:
            self._write_latents(name, tensors, metadata)

    def remove(self, name: str) -> None:
        path = self._path(name)
        if self._is_text(name):
            path.unlink(missing_ok=True)
            return
        end = self._suffix(name)
        with explain_errors(path), only_one(path.with_name(LOCK)):
            members = read_members(path) if path.is_file() else {}
            kept = {array: data for array, data in members.items() if not array.endswith(end)}
            if kept:
                write_members(path, kept)
            else:
                path.unlink(missing_ok=True)

    def close(self, is_last: bool = False) -> None:
        """Do nothing: each file is flushed when it is written, and a later write removes leftovers."""

    @property
    def form(self) -> NpzFormat:
        assert self.latent.npz is not None  # `open_npz`
        return self.latent.npz

    # --- names ---

    def _is_text(self, name: str) -> bool:
        return cache_files.is_text_name(name.removesuffix(cache_files.PART), self.tag)

    def _path(self, name: str) -> Path:
        whole = name.removesuffix(cache_files.PART)
        part, stem = name[len(whole) :], whole.removesuffix(cache_files.SUFFIX)
        stem = _other_end(stem, self._ends())
        file = f"{stem}{NPZ}{part}"
        source = self._source_stem(name)
        place = self.beside.get(source)
        if place is None:
            return self.folder / file
        return place.with_name(place.name + file.removeprefix(source))

    def _source_stem(self, name: str) -> str:
        """Return the stem of an entry's source, from the entry's name; "" for the empty prompt."""
        whole, tag = name.removesuffix(cache_files.PART), self.tag
        if (latents := cache_files.parse_latent_name(whole, tag, "image")) is not None:
            return latents.stem
        further = cache_files.parse_more_text_name(whole, tag)
        return (further[0] if further is not None else cache_files.parse_text_name(whole, tag)) or ""

    def _entry_name(self, file: str, folder: Path, stems: Mapping[Path, str]) -> str | None:
        """Return the name of the entry in a file; None if it belongs to another family.

        stems: of pictures that a list names, by their paths without suffix.
        """
        whole = file.removesuffix(cache_files.PART)
        part, stem = file[len(whole) :], whole.removesuffix(NPZ)
        name = _other_end(stem, [pair[::-1] for pair in self._ends()]) + cache_files.SUFFIX
        is_one = self._is_text(name) or cache_files.parse_latent_name(name, self.tag, "image") is not None
        if not (is_one and whole.endswith(NPZ)):
            return None
        source = self._source_stem(name)
        if folder / source in stems:
            name = stems[folder / source] + name.removeprefix(source)
        elif folder != self.folder or source in self.beside:  # of a picture that left the list
            return None
        return name + part

    def _ends(self) -> tuple[tuple[str, str], ...]:
        return (f"_{self.tag}_te", self.form.texts), (f"_{self.tag}", self.form.latents)

    # --- latents ---

    def _bucket(self, name: str) -> tuple[Size, Size]:
        """Return the size of a picture, and its size in the table's bucket."""
        parsed = cache_files.parse_latent_name(name, self.tag, "image")
        if parsed is None:
            raise CacheError(f"{self.folder / name}: its name is not that of a picture's latents")
        step = self.latent.pixel_step
        return parsed.size, bucket_of(self.table, parsed.size, step, self._path(name))

    def _grid(self, name: str) -> tuple[int, int]:
        width, height = self._bucket(name)[1]
        shape = self.latent.shape(1, height, width)
        return shape[-2], shape[-1]

    def _suffix(self, name: str) -> str:
        height, width = self._grid(name)
        return f"_{height}x{width}"

    def _read_latents(self, name: str) -> cache_files.Entry:
        path, grid, latent, end = self._path(name), self._grid(name), self.latent, self._suffix(name)
        found = read_arrays(path, lambda one: one.endswith(end))
        arrays = {one.removesuffix(end): array for one, array in found.items()}
        if "latents" not in arrays:
            others = sorted(
                one.removeprefix("latents") for one in list_arrays(path) if one.startswith("latents_")
            )
            raise CacheError(f"{path}: it has no latents{end}, but those of {', '.join(others) or 'nothing'}")

        def reshape(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
            if key == LOSS_MASK and tensor.numel() != math.prod(shape):  # in pixels
                return shrink_mask(tensor[None] * 255, latent.stride)
            return tensor.reshape(shape)

        return open_record(path, arrays, reshape) or self._foreign_latents(path, arrays, grid)

    def _foreign_latents(
        self, path: Path, arrays: Mapping[str, NpzArray], grid: tuple[int, int]
    ) -> cache_files.Entry:
        """Return another program's latents, if they fit the table."""
        latent, wanted = self.latent, ["latents"]
        wanted += [MIRRORED] if self.table.augmentation.flip else []
        wanted += [ALPHA] if self.table.alpha_mask else []
        missing = [one for one in wanted if one not in arrays]
        if missing:
            asks = {MIRRORED: "flip_aug", ALPHA: "alpha_mask"}[missing[0]]
            raise CacheError(f"{path}: it has no {missing[0]} of {grid[0]}x{grid[1]}, which {asks} needs")
        tensors = {}
        for key in wanted:
            array = arrays[key].tensor
            if key == ALPHA:
                pixels = grid[0] * latent.stride[1], grid[1] * latent.stride[2]
                if array.shape not in (grid, pixels):
                    shape = tuple(array.shape)
                    raise CacheError(f"{path}: its alpha_mask has the shape {shape}, its latents have {grid}")
                is_small = array.shape == grid
                mask = (
                    array[None].half() if is_small else shrink_mask(array.float()[None] * 255, latent.stride)
                )
                tensors[LOSS_MASK] = mask
                continue
            if array.shape != (latent.channels, *grid) or not array.is_floating_point():
                raise CacheError(
                    f"{path}: its {key} are {dtype_name(array.dtype)} of shape {tuple(array.shape)}, this "
                    f"model's are floating-point numbers of shape {(latent.channels, *grid)}"
                )
            tensors[key] = array[:, None]
        return cache_files.Entry.of(
            path, {}, {cache_files.tensor_name(key, one): one for key, one in tensors.items()}
        )

    def _write_latents(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        (size, bucket), end = self._bucket(name), self._suffix(name)
        arrays: dict[str, Array] = {}
        sources: dict[str, str] = {}  # array -> name of its tensor
        for named, tensor in tensors.items():
            key = cache_files.tensor_key(named)
            array, place = as_array(tensor, keep_half=False), f"{OURS}_{key}"
            if key in _KNOWN and tensor.shape[1] == 1:
                array, place = array[:, 0], key
            elif key == LOSS_MASK and self.table.alpha_mask:  # 1 H W of latents; averages to the same
                _, down, across = self.latent.stride
                mask = tensor[0].repeat_interleave(down, 0).repeat_interleave(across, 1)
                array, place = as_array(mask, keep_half=False), ALPHA
            arrays[place], sources[place] = array, named
        if self.table.alpha_mask and ALPHA not in arrays:  # opaque; other programs ask for it all the same
            width, height = bucket
            arrays[ALPHA] = np.ones((height, width), np.float32)
        arrays["original_size"] = np.array(size)
        arrays["crop_ltrb"] = np.array(inner_box(size, bucket))
        members = {one: format_array(array) for one, array in arrays.items()}
        members[OURS] = format_array(describe_tensors(tensors, sources, metadata, members))
        path = self._path(name)
        with explain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with explain_errors(path), only_one(path.with_name(LOCK)):
            others: dict[str, bytes] = {}  # of other resolutions
            try:
                if path.is_file():
                    others = {one: data for one, data in read_members(path).items() if not one.endswith(end)}
            except CacheError as error:
                logger.warning(
                    "%s. It is made again; what it held of other sizes has to be cached again.", error
                )
            write_members(path, others | {one + end: data for one, data in members.items()})

    # --- texts ---

    def _read_text(self, name: str) -> cache_files.Entry:
        path, form, keys = self._path(name), self.form, self.text_keys
        arrays = read_arrays(path, lambda one: one in keys or one in form.constants or one == OURS)
        is_part = name.endswith(cache_files.PART)
        for constant, expected in {} if is_part else form.constants.items():
            there = arrays.get(constant)
            found = there.tensor.item() if there is not None and there.tensor.numel() == 1 else None
            if found != expected:
                says = "nothing" if found is None else found
                raise CacheError(f"{path}: it was made with {constant} {says}, this training has {expected}")
        entry = open_record(path, arrays, lambda _, tensor, shape: tensor.reshape(shape))
        if entry is not None:
            return entry
        missing = sorted(keys - arrays.keys())
        if missing or is_part:
            raise CacheError(f"{path}: it has no {', '.join(missing) or 'record'}")
        pairs = sorted((key, arrays[key].tensor) for key in keys)
        named = {
            cache_files.tensor_name(key, tensor, key in form.variable_length): tensor for key, tensor in pairs
        }
        return cache_files.Entry.of(path, {}, named)

    def _write_text(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        form, sources = self.form, {cache_files.tensor_key(named): named for named in tensors}
        arrays = {key: as_array(tensors[named], keep_half=True) for key, named in sources.items()}
        members = {key: format_array(array) for key, array in arrays.items()}
        members[OURS] = format_array(describe_tensors(tensors, sources, metadata, members))
        arrays |= {constant: np.array(value) for constant, value in form.constants.items()}
        for zeros, (like, columns) in form.zeros.items():
            if like in arrays:
                arrays[zeros] = np.zeros((len(arrays[like]), columns), np.float32)
            elif not like:
                arrays[zeros] = np.zeros(columns, np.float32)
        more = {one: format_array(array) for one, array in arrays.items() if one not in members}
        write_members(self._path(name), members | more)


def _other_end(stem: str, ends: Sequence[tuple[str, str]]) -> str:
    """Return a name with the second of a pair of ends in place of the first; others as they are."""
    return next((stem.removesuffix(one) + other for one, other in ends if stem.endswith(one)), stem)


def open_npz(table: DatasetTable, names: cache_files.NpzNames | None, folder: Path) -> NpzStore:
    """Return the npz files of a table. folder: of its pictures; those that a list names may be elsewhere.

    Raises DatasetError if the family has no caches in npz files.
    """
    if names is None or names[1].npz is None:
        raise DatasetError(
            f'{table.name}: cache_format = "npz": this model has no caches in npz files. Use "files" or '
            '"shards"'
        )
    sources = [] if table.metadata_file is None else find_sources(table, captions=False, faults=[])
    return NpzStore(table, *names, folder, {source.stem: source.path.with_suffix("") for source in sources})
