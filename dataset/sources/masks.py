"""Masks of the loss: white areas of a picture or clip are learned, black ones are not.

A mask comes from a file (`mask_directory`, `mask_path`) or from transparency (`alpha_mask`).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset.config import DatasetTable
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Size
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, Frame, image_suffixes, read_image

Mask = NDArray[np.uint8]  # F H W
Place = Callable[[Frame], Frame]  # resizes and crops a picture

SAME_SHAPE = 0.02  # by how much the sides' ratio of a mask may differ from its clip's


def find_masks(table: DatasetTable, media: Iterable[Path], entries: Iterable[Path]) -> Mapping[Path, Path]:
    """Return the mask of each file of a table among the entries of its mask_directory; those without one are
    learned whole.

    A mask has the name of its image or clip but for the suffix; a clip's may also be an image, or a folder
    of images. Raises DatasetError if a name is not unique, or if there is no mask at all.
    """
    there = _masks_by_stem(table.kind, entries)
    found = {path: there[path.stem] for path in media if path.stem in there}
    doubled = next((masks for masks in found.values() if len(masks) > 1), None)
    if doubled is not None:
        raise DatasetError(
            f"{table.name}: {doubled[0]} and {doubled[1].name} are masks of the same {table.kind}. Keep one."
        )
    if not found:
        example = "cat.png for cat.jpg" if table.kind == "image" else "cat.png or cat.mp4 for cat.mp4"
        raise DatasetError(
            f"{table.name}: {table.mask_directory} has no mask for any {table.kind}. A mask has the name of "
            f"its {table.kind} but for the suffix: {example}."
        )
    return {path: masks[0] for path, masks in found.items()}


def has_mask(table: DatasetTable, stem: str) -> bool:
    """Return whether the mask_directory has a mask of that name now; False if it is missing.

    For training, which asks for each item whether a mask was added after caching; the folder is listed once.
    """
    return table.mask_directory is not None and stem in _stems_in(table.mask_directory, table.kind)


@functools.lru_cache(maxsize=64)
def _stems_in(folder: Path, kind: str) -> frozenset[str]:
    return frozenset(_masks_by_stem(kind, sorted(folder.iterdir()) if folder.is_dir() else []))


def _masks_by_stem(kind: str, entries: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the masks for images or clips among the entries of a folder, by their names without suffix."""
    suffixes = image_suffixes() | {".gif"}
    if kind == "video":
        suffixes |= VIDEO_SUFFIXES | ANIMATION_SUFFIXES
    there: dict[str, list[Path]] = {}
    for path in entries:
        is_folder = kind == "video" and path.is_dir()
        if is_folder or (path.suffix.lower() in suffixes and path.is_file()):
            there.setdefault(path.name if is_folder else path.stem, []).append(path)
    return there


def read_still(path: Path, place: Place, size: Size, num_frames: int) -> Mask:
    """Read an image as the mask of `num_frames` frames. size: of the item; its shape has to be the same.

    place: resizes and crops it like its picture.
    """
    mask = _grey(path, read_image(path), place, size)
    return np.broadcast_to(mask, (num_frames, *mask.shape))


def read_moving(path: Path, frames: Iterator[Frame], place: Place, size: Size, num_frames: int) -> Mask:
    """Turn the frames of a mask clip into masks; a longer one is cut, a shorter one repeats its last."""
    masks = [_grey(path, frame, place, size) for frame in itertools.islice(frames, num_frames)]
    masks += [masks[-1]] * (num_frames - len(masks))
    return np.stack(masks)


def stack_alphas(alphas: Sequence[NDArray[np.uint8] | None]) -> Mask | None:
    """Return the transparency of all frames; None if nothing is transparent."""
    first = next((alpha for alpha in alphas if alpha is not None), None)
    if first is None or all(alpha is None or alpha.min() == 255 for alpha in alphas):
        return None
    return np.stack([np.full_like(first, 255) if alpha is None else alpha for alpha in alphas])


def shrink_mask(mask: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Average a mask F H W, 0..255, over the pixels of each latent: float16, 0..1, F H W of the latents.

    stride: of the family's LatentSpec. In time, the first frame is a latent frame of its own, and after it
    each group of `stride[0]` frames is one.
    """
    _, down, across = stride
    weights = mask.float().unsqueeze(1) / 255
    weights = torch.nn.functional.avg_pool2d(weights, (down, across)).squeeze(1)
    groups = (len(weights) - 1) // stride[0]
    rest = weights[1 : 1 + groups * stride[0]]
    return torch.cat([weights[:1], rest.unflatten(0, (groups, stride[0])).mean(1)]).half()


def _grey(path: Path, frame: Frame, place: Place, size: Size) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    if abs(width * size[1] / (height * size[0]) - 1) > SAME_SHAPE:
        raise MediaError(
            f"{path} has {width}x{height} pixels, what it masks has {size[0]}x{size[1]}: they need the same "
            "shape, or the mask would cover other places"
        )
    return place(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.uint8))
